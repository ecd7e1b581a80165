"""Reader of HPDv2's published layout: {train,test}.json and {train,test}.tar.gz.

Facts about the layout: github.com/tgxs002/HPSv2 and the files of ymhao/HPDv2, which differ from its README: the image
list is called image_path or file_path, an annotator's ranks annotation or rank. Both are read.
"""

import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import ijson

from workflow_scripts.configuration import Split
from workflow_scripts.preferences.schema import SchemaError


def annotation_file(split: Split) -> str:
    """Where the annotations of a split stand, relative to the download folder."""
    return f"{split}.json"


def read_preferences(folder: Path, split: Split) -> Iterator[dict[str, Any]]:
    """Canonical rows of the train or the test split, one for each prompt; no image is read.

    Raises:
        SchemaError: a row is not as published, or the split does not exist.
    """
    if split == "validation":
        raise SchemaError("HPDv2 has no validation split; select_subset draws one from the training split")
    path = folder / annotation_file(split)
    return _read_train(path) if split == "train" else _read_test(path)


def _read_train(path: Path) -> Iterator[dict[str, Any]]:
    """One row for each prompt text with all its pairs, in order of first occurrence: train.json has no prompt ids."""
    prompts: dict[str, tuple[list[str], list[tuple[str, str, int]]]] = {}
    with path.open("rb") as file:
        for number, row in enumerate(ijson.items(file, "item")):
            where = f"{path}, row {number}"
            names = image_names(row, where)
            preference = row.get("human_preference")
            if len(names) != 2 or preference not in ([0, 1], [1, 0]):
                raise SchemaError(f"{where}: needs two images and human_preference [0, 1] or [1, 0], got {row}")
            images, pairs = prompts.setdefault(required(row, "prompt", where), ([], []))
            images += [name for name in names if name not in images]
            pairs.append((*names, int(preference[1])))  # type: ignore[arg-type]
    for text, (images, pairs) in prompts.items():
        yield canonical_row(f"train-{text_digest(text)}", text, images, "train.tar.gz") | {
            "pairs": [{"a": a, "b": b, "preferred": preferred} for a, b, preferred in pairs]
        }


def _read_test(path: Path) -> Iterator[dict[str, Any]]:
    """One row for each row of test.json: two rows may have the same prompt text."""
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        where = f"{path}, row {number}"
        text, names = required(row, "prompt", where), image_names(row, where)
        raw = [a.get("annotation", a.get("rank")) for a in required(row, "raw_annotations", where)]
        yield canonical_row(f"test-{number:04d}-{text_digest(text)}", text, names, "test.tar.gz") | {
            "ranks": ranks_from_one(row.get("rank"), where),
            "annotations": [ranks_from_one(ranks, where) for ranks in raw],
        }


def canonical_row(prompt_id: str, prompt: str, image_ids: list[str], archive: str) -> dict[str, Any]:
    """A row of PREFERENCES without judgements."""
    judgements = ("ranks", "ratings", "alignment_ratings", "fidelity_ratings", "pairs", "annotations")
    row = {"prompt_id": prompt_id, "prompt": prompt, "image_ids": image_ids, "archives": [archive] * len(image_ids)}
    return row | dict.fromkeys(judgements)


def required(row: dict[str, Any], key: str, where: str) -> Any:
    """Value of a key.

    Raises:
        SchemaError: the key is missing.
    """
    if key not in row:
        raise SchemaError(f"{where}: key {key} is missing; the keys are {', '.join(row)}")
    return row[key]


def image_names(row: dict[str, Any], where: str) -> list[str]:
    """Base names of a row's images, each name one string object however often it occurs."""
    paths = row["file_path"] if "file_path" in row else required(row, "image_path", where)
    return [sys.intern(PurePosixPath(path).name) for path in paths]


def ranks_from_one(ranks: object, where: str) -> list[int]:
    """Ranks with 1 as the best of published ones that start from 0 or from 1.

    Raises:
        SchemaError: they are not whole numbers, or start from anything else.
    """
    if (
        not isinstance(ranks, list)
        or not ranks
        or any(type(rank) is not int for rank in ranks)
        or min(ranks) not in (0, 1)
    ):
        raise SchemaError(f"{where}: ranks must be whole numbers from 0 or 1, got {ranks}")
    return [rank + 1 - min(ranks) for rank in ranks]


def text_digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a prompt text."""
    return sha256(text.encode()).hexdigest()[:16]

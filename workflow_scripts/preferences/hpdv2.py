"""Reader of HPDv2's published layout: {train,test}.json and {train,test}.tar.gz.

The layout follows github.com/tgxs002/HPSv2 and the files of ymhao/HPDv2, which differ from its README: the list of
images is called image_path or file_path, the ranks by an annotator annotation or rank. Both are read.
"""

import json
import re
import reprlib
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import Split
from workflow_scripts.preferences.schema import SchemaError, image_name, text

LONGEST_ROW = 2**20  # characters; published rows have some hundred to some thousand
READ_AHEAD = 4 * LONGEST_ROW

_SPACE = re.compile(r"[ \t\n\r]*")


def annotation_file(split: Split) -> str:
    """File with the annotations of a split, relative to the download folder."""
    return f"{split}.json"


def read_preferences(folder: Path, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the canonical rows of the train or the test split, one for each prompt; read no image.

    Raises:
        SchemaError: a row is not as published, or the split does not exist.
    """
    if split == "validation":
        raise SchemaError("HPDv2 has no validation split; select_subset draws one from the training split")
    path = folder / annotation_file(split)
    return _read_train(path) if split == "train" else _read_test(path)


def _read_train(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt text with all its pairs, in order of first occurrence: train.json has no ids."""
    prompts: dict[str, tuple[list[str], list[tuple[str, str, int]]]] = {}
    for where, row in json_rows(path):
        names = image_names(row, where)
        preference = row.get("human_preference")
        if len(names) != 2 or names[0] == names[1] or preference not in ([0, 1], [1, 0]):
            raise SchemaError(
                f"{where}: needs two images and human_preference [0, 1] or [1, 0], got {reprlib.repr(row)}"
            )
        images, pairs = prompts.setdefault(text(required(row, "prompt", where), "prompt", where), ([], []))
        images += [name for name in names if name not in images]
        pairs.append((*names, int(preference[1])))  # type: ignore[arg-type]
    for prompt, (images, pairs) in prompts.items():
        yield canonical_row(f"train-{text_digest(prompt)}", prompt, images, "train.tar.gz") | {
            "pairs": [{"a": a, "b": b, "preferred": preferred} for a, b, preferred in pairs]
        }


def _read_test(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each row of test.json: two rows may have the same prompt text."""
    for number, (where, row) in enumerate(json_rows(path)):
        prompt, names = text(required(row, "prompt", where), "prompt", where), image_names(row, where)
        raw = required(row, "raw_annotations", where)
        if not isinstance(raw, list) or not all(isinstance(annotation, dict) for annotation in raw):
            raise SchemaError(f"{where}: raw_annotations must be a list of objects, got {reprlib.repr(raw)}")
        raw = [annotation.get("annotation", annotation.get("rank")) for annotation in raw]
        yield canonical_row(f"test-{number:04d}-{text_digest(prompt)}", prompt, names, "test.tar.gz") | {
            "ranks": ranks_from_one(row.get("rank"), where),
            "annotations": [ranks_from_one(ranks, where) for ranks in raw],
        }


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream a JSON list of objects, each with its place for messages.

    Raises:
        SchemaError: the file is not such a list, is cut off or damaged, or an object is longer than LONGEST_ROW.
    """
    number = -1
    try:
        for number, row in enumerate(_json_objects(path)):
            yield f"{path}, row {number}", row
    except (ValueError, RecursionError) as error:
        raise SchemaError(
            f"{path} is no complete JSON list of objects: {getattr(error, 'msg', error)}, after {number + 1} rows; "
            "delete it and the dataset.json beside it and run snakemake again"
        ) from None


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    # ijson crashes the interpreter at a number of 5,000 digits, and takes all memory at deep nesting.
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        buffer = file.read(READ_AHEAD)
        at = _after_space(buffer, 0)
        if buffer[at : at + 1] != "[":
            raise ValueError("it does not begin with [")
        at = _after_space(buffer, at + 1)
        more = buffer[at : at + 1] != "]"
        while more:
            if len(buffer) - at < LONGEST_ROW:
                buffer, at = buffer[at:] + file.read(READ_AHEAD), 0
            if buffer[at : at + 1] != "{":
                raise ValueError(f"no object but {reprlib.repr(buffer[at : at + 80])}")
            row, at = decoder.raw_decode(buffer, at)
            yield row
            at = _after_space(buffer, at)
            more = buffer[at : at + 1] == ","
            if more:
                at = _after_space(buffer, at + 1)
        if buffer[at : at + 1] != "]" or (buffer[at + 1 :] + file.read()).strip(" \t\n\r"):
            raise ValueError("it does not end with ]")


def _after_space(buffer: str, at: int) -> int:
    match = _SPACE.match(buffer, at)
    assert match is not None  # the pattern also matches the empty text
    return match.end()


def canonical_row(prompt_id: str, prompt: str, image_ids: list[str], archive: str) -> dict[str, Any]:
    """Make a row of PREFERENCES without judgements."""
    judgements = ("ranks", "ratings", "alignment_ratings", "fidelity_ratings", "pairs", "annotations")
    row = {"prompt_id": prompt_id, "prompt": prompt, "image_ids": image_ids, "archives": [archive] * len(image_ids)}
    return row | dict.fromkeys(judgements)


def required(row: dict[str, Any], key: str, where: str) -> Any:
    """Return the value of a key.

    Raises:
        SchemaError: the key is missing.
    """
    if key not in row:
        raise SchemaError(f"{where}: key {key} is missing; the keys are {reprlib.repr(list(row))}")
    return row[key]


def image_names(row: dict[str, Any], where: str) -> list[str]:
    """Return the base names of the images in a row, interned since each occurs in several rows.

    Raises:
        SchemaError: there is no list of paths.
    """
    paths = row["file_path"] if "file_path" in row else required(row, "image_path", where)
    if not isinstance(paths, list):
        raise SchemaError(f"{where}: image_path must be a list, got {reprlib.repr(paths)}")
    return [sys.intern(image_name(path, where)) for path in paths]


def ranks_from_one(ranks: object, where: str) -> list[int]:
    """Convert published ranks, which start from 0 or from 1, to ranks from 1 = best.

    Raises:
        SchemaError: they are not whole numbers, or start from anything else.
    """
    if (
        not isinstance(ranks, list)
        or not ranks
        or any(type(rank) is not int for rank in ranks)
        or min(ranks) not in (0, 1)
    ):
        raise SchemaError(f"{where}: ranks must be whole numbers from 0 or 1, got {reprlib.repr(ranks)}")
    return [rank + 1 - min(ranks) for rank in ranks]


def text_digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a prompt text."""
    return sha256(text.encode()).hexdigest()[:16]

"""The reader of HPDv2's layout."""

import json
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.preferences.hpdv2 import read_preferences
from workflow_scripts.preferences.schema import SchemaError

TRAIN_ROW = {"prompt": "a cat", "image_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [0, 1]}
TEST_ROW = {
    "prompt": "a cat",
    "image_path": ["a.jpg", "b.jpg"],
    "rank": [1, 0],
    "raw_annotations": [{"annotation": [1, 0], "user_hash": "x"}, {"annotation": [0, 1], "user_hash": "y"}],
}


def read(folder: Path, split: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Canonical rows of published ones."""
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return list(read_preferences(folder, split))


def test_train_rows_equal_the_json(hpdv2_folder: Path) -> None:
    """Pairs are grouped by prompt text, each with the preferred image of human_preference."""
    winners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in json.loads((hpdv2_folder / "train.json").read_text()):
        first, second = row["image_path"]
        winners[row["prompt"]].add((second, first) if row["human_preference"][1] else (first, second))
    rows = list(read_preferences(hpdv2_folder, "train"))
    assert len(rows) == 24
    for row in rows:
        assert row["prompt_id"] == "train-" + sha256(row["prompt"].encode()).hexdigest()[:16]
        assert len(row["image_ids"]) == 4 and set(row["archives"]) == {"train.tar.gz"}
        sides = [(pair["a"], pair["b"]) for pair in row["pairs"]]
        ordered = [pair[::-1] if row["pairs"][i]["preferred"] else pair for i, pair in enumerate(sides)]
        assert set(ordered) == winners[row["prompt"]] and len(ordered) == 6


def test_test_rows_equal_the_json(hpdv2_folder: Path) -> None:
    """Ranks start from 1, for the label and for each annotator."""
    published = json.loads((hpdv2_folder / "test.json").read_text())
    rows = list(read_preferences(hpdv2_folder, "test"))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in published]
    for row, given in zip(rows, published, strict=True):
        assert row["image_ids"] == given["image_path"] and row["pairs"] is None
        assert row["ranks"] == [rank + 1 for rank in given["rank"]]
        assert row["annotations"] == [[rank + 1 for rank in one["annotation"]] for one in given["raw_annotations"]]


def test_keys_of_the_readme_are_read_too(tmp_path: Path) -> None:
    """file_path for image_path, rank for annotation, folders before the names, ranks from 1."""
    old = {"file_path" if key == "image_path" else key: value for key, value in TRAIN_ROW.items()}
    assert read(tmp_path, "train", [old]) == read(tmp_path, "train", [TRAIN_ROW])
    renamed = TEST_ROW | {
        "image_path": ["test/a.jpg", "test/b.jpg"],
        "rank": [2, 1],
        "raw_annotations": [{"rank": [2, 1]}, {"rank": [0, 1]}],
    }
    assert read(tmp_path, "test", [renamed]) == read(tmp_path, "test", [TEST_ROW])


def test_scattered_pairs_of_a_prompt_are_one_row(tmp_path: Path) -> None:
    """train.json has no prompt ids: the text is what groups."""
    other = TRAIN_ROW | {"prompt": "a dog"}
    again = TRAIN_ROW | {"image_path": ["00000002.jpg", "00000001.jpg"], "human_preference": [1, 0]}
    rows = read(tmp_path, "train", [TRAIN_ROW, other, again])
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"]
    assert rows[0]["image_ids"] == ["00000000.jpg", "00000001.jpg", "00000002.jpg"]
    assert [pair["preferred"] for pair in rows[0]["pairs"]] == [1, 0]


def test_repeated_test_prompts_stay_apart(tmp_path: Path) -> None:
    """Two rows of the same text have two ids."""
    assert len({row["prompt_id"] for row in read(tmp_path, "test", [TEST_ROW, TEST_ROW])}) == 2


@pytest.mark.parametrize(
    ("split", "row", "message"),
    [
        ("train", TRAIN_ROW | {"human_preference": [1, 1]}, r"train\.json, row 1: needs two images and human_pref"),
        ("train", TRAIN_ROW | {"image_path": ["a", "b", "c"]}, "row 1: needs two images"),
        ("train", {"prompt": "a cat", "human_preference": [0, 1]}, "row 1: key image_path is missing; the keys are"),
        ("test", TEST_ROW | {"rank": [0.5, 1.0]}, r"test\.json, row 1: ranks must be whole numbers"),
        ("test", TEST_ROW | {"rank": [2, 3]}, "row 1: ranks must be whole numbers from 0 or 1"),
        ("test", TEST_ROW | {"raw_annotations": [{"user_hash": "x"}]}, "row 1: ranks must be .* got None"),
        ("test", {"prompt": "a cat", "image_path": ["a"], "rank": [0]}, "row 1: key raw_annotations is missing"),
    ],
)
def test_errors_name_file_and_row(split: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A row that is not as published."""
    with pytest.raises(SchemaError, match=message):
        read(tmp_path, split, [TRAIN_ROW if split == "train" else TEST_ROW, row])


def test_there_is_no_validation_split(tmp_path: Path) -> None:
    """The error says where validation prompts come from."""
    with pytest.raises(SchemaError, match="select_subset draws one"):
        read_preferences(tmp_path, "validation")

"""The reader of ImageRewardDB's layout."""

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workflow_scripts.preferences.imagereward import read_preferences
from workflow_scripts.preferences.schema import SchemaError, write_preferences
from workflow_scripts.preferences.synthetic_layouts import METADATA


def files_in(folder: Path) -> set[str]:
    """Names of the files under a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def by_prompt(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Canonical rows as {prompt_id: {image: judgements}}, whatever their order."""
    return {
        row["prompt_id"]: {
            image: values
            for image, *values in zip(
                row["image_ids"],
                row["archives"],
                row["ranks"],
                row["ratings"],
                row["alignment_ratings"],
                row["fidelity_ratings"],
                strict=True,
            )
        }
        for row in rows
    }


@pytest.fixture
def edited(imagereward_folder: Path, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Return a function that writes test metadata of other rows beside the same archives."""

    def edit(rows: list[dict[str, Any]]) -> Path:
        shutil.copytree(imagereward_folder / "images", tmp_path / "images", dirs_exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, METADATA), tmp_path / "metadata-test.parquet")
        return tmp_path

    return edit


def test_canonical_rows_equal_the_metadata(imagereward_folder: Path) -> None:
    """Every judgement arrives at its image, and a prompt's images keep their archive."""
    expected: dict[str, Any] = defaultdict(dict)
    for row in pq.read_table(imagereward_folder / "metadata-train.parquet").to_pylist():
        folder, _, name = row["image_path"].rpartition("/")
        ratings = [row[f"{kind}_rating"] for kind in ("overall", "image_text_alignment", "fidelity")]
        expected[row["prompt_id"]][name] = [f"{folder}.zip", row["rank"], *ratings]
    rows = list(read_preferences(imagereward_folder, "train", files_in(imagereward_folder)))
    assert by_prompt(rows) == expected
    assert len(rows) == 24


def test_row_order_and_repeated_rows_do_not_matter(
    imagereward_folder: Path, edited: Callable[[list[dict[str, Any]]], Path]
) -> None:
    """Reversed rows, some twice, give the same judgements."""
    rows = pq.read_table(imagereward_folder / "metadata-test.parquet").to_pylist()
    files = files_in(imagereward_folder)
    plain = list(read_preferences(imagereward_folder, "test", files))
    shuffled = list(read_preferences(edited(rows[::-1] + rows[:5]), "test", files))
    assert by_prompt(shuffled) == by_prompt(plain)


@pytest.mark.parametrize("folder", ["images/test/", ""])
def test_archive_is_found_where_the_path_does_not_name_it(
    folder: str, imagereward_folder: Path, edited: Callable[[list[dict[str, Any]]], Path]
) -> None:
    """Flat image paths are looked up in the archives' own lists."""
    rows = pq.read_table(imagereward_folder / "metadata-test.parquet").to_pylist()
    flat = edited([row | {"image_path": folder + Path(row["image_path"]).name} for row in rows])
    files = files_in(imagereward_folder)
    assert by_prompt(list(read_preferences(flat, "test", files))) == by_prompt(
        list(read_preferences(imagereward_folder, "test", files))
    )


def test_images_of_archives_not_downloaded_are_left_out(imagereward_folder: Path) -> None:
    """A prefix of the archives gives the prompts of these."""
    files = {"images/train/train_1.zip"}
    rows = list(read_preferences(imagereward_folder, "train", files))
    assert len(rows) == 10 and {archive for row in rows for archive in row["archives"]} == files


def test_missing_column_is_named(imagereward_folder: Path, tmp_path: Path) -> None:
    """The error names file and column."""
    table = pq.read_table(imagereward_folder / "metadata-test.parquet").drop_columns(["overall_rating"])
    pq.write_table(table, tmp_path / "metadata-test.parquet")
    with pytest.raises(SchemaError, match=r"metadata-test\.parquet: column overall_rating is missing"):
        list(read_preferences(tmp_path, "test", []))


@pytest.mark.parametrize("change", [{"rank": 5}, {"prompt": "another"}])
def test_contradicting_rows_are_refused(
    change: dict[str, Any], imagereward_folder: Path, edited: Callable[[list[dict[str, Any]]], Path]
) -> None:
    """One image with two ranks, or one prompt_id with two texts."""
    rows = pq.read_table(imagereward_folder / "metadata-test.parquet").to_pylist()
    rows[0]["rank"] = 1
    folder = edited([*rows, rows[0] | change])
    with pytest.raises(SchemaError, match=f"prompt_id {rows[0]['prompt_id']} contradict each other"):
        list(read_preferences(folder, "test", files_in(imagereward_folder)))


def test_counts(imagereward_folder: Path, tmp_path: Path) -> None:
    """Strict and tied pairs add up to all pairs."""
    rows = list(read_preferences(imagereward_folder, "test", files_in(imagereward_folder)))
    counts = write_preferences(tmp_path / "preferences.parquet", rows)
    total = sum(len(row["image_ids"]) * (len(row["image_ids"]) - 1) // 2 for row in rows)
    assert counts["strict_pairs"] + counts["tied_pairs"] == total
    assert counts["tied_pairs"] == sum(len(row["ranks"]) - len(set(row["ranks"])) for row in rows)  # two to a slot

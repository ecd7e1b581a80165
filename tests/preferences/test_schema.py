"""The canonical tables refuse what breaks their contract, on write and on read."""

from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.preferences.schema import (
    IMAGES,
    PREFERENCES,
    SUBSET,
    SchemaError,
    image_name,
    read_image_rows,
    read_table,
    write_images,
    write_preferences,
)

ROW: dict[str, Any] = {
    "prompt_id": "p",
    "prompt": "a cat",
    "image_ids": ["x", "y", "z"],
    "archives": ["1", "1", "2"],
    "ranks": [1, 3, 3],
    "ratings": [7, 1, 1],
    "alignment_ratings": None,
    "fidelity_ratings": None,
    "pairs": [{"a": "x", "b": "y", "preferred": 0}],
    "annotations": [[1, 2, 3]],
}


def test_round_trip_and_counts(tmp_path: Path) -> None:
    """What is written is read, from a stream of rows too."""
    path = tmp_path / "preferences.parquet"
    counts = write_preferences(path, (ROW | {"prompt_id": f"{i}"} for i in range(5000)))
    assert counts == {"prompts": 5000, "images": 15000, "given_pairs": 5000, "strict_pairs": 10000, "tied_pairs": 5000}
    table = read_table(path, PREFERENCES)
    assert table.num_rows == 5000 and table.slice(4999).to_pylist() == [ROW | {"prompt_id": "4999"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": []}, "one or more different names"),
        ({"image_ids": ["x", "x", "z"]}, "one or more different names"),
        ({"archives": ["1"]}, "archives has 1 entries for 3 images"),
        ({"ranks": [1, 2]}, "ranks has 2 entries"),
        ({"ranks": [1, None, 2]}, "ranks has an empty entry"),
        ({"ratings": [1, 2, 8]}, r"rating 8 is outside 1\.\.7"),
        ({"pairs": [{"a": "x", "b": "x", "preferred": 0}]}, "two different images"),
        ({"pairs": [{"a": "x", "b": "w", "preferred": 0}]}, "two different images"),
        ({"pairs": [{"a": "x", "b": "y", "preferred": 2}]}, "prefer 0 or 1"),
        ({"annotations": [[1, 2]]}, "an annotator gives 2 ranks for 3 images"),
    ],
)
def test_violations_name_file_and_prompt(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And leave no file behind."""
    with pytest.raises(SchemaError, match=f"preferences.parquet, prompt_id p: .*{message}"):
        write_preferences(tmp_path / "preferences.parquet", [ROW | change])
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_id_twice_is_refused(tmp_path: Path) -> None:
    """Rows are grouped."""
    with pytest.raises(SchemaError, match="prompt_id p: occurs twice"):
        write_preferences(tmp_path / "preferences.parquet", [ROW, ROW])


def test_no_row_is_refused(tmp_path: Path) -> None:
    """An empty table would only fail later."""
    with pytest.raises(SchemaError, match="no prompt to write"):
        write_preferences(tmp_path / "preferences.parquet", [])


def test_other_columns_are_refused_on_read(tmp_path: Path) -> None:
    """The error names the remedy."""
    write_preferences(tmp_path / "preferences.parquet", [ROW])
    with pytest.raises(SchemaError, match="delete the file and run snakemake again"):
        read_table(tmp_path / "preferences.parquet", SUBSET)
    pq.write_table(pa.table({"image_id": ["x"]}), tmp_path / "images.parquet")
    with pytest.raises(SchemaError, match=r"images\.parquet: columns .* run snakemake again"):
        list(read_image_rows([tmp_path / "images.parquet"]))


def test_images_stream_through(tmp_path: Path) -> None:
    """In order, over several files and row groups."""
    rows = [{"image_id": f"{i}", "bytes": bytes([i % 256]), "width": 2, "height": 1} for i in range(600)]
    paths = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    assert write_images(paths[0], iter(rows[:300])) == {row["image_id"] for row in rows[:300]}
    write_images(paths[1], iter(rows[300:]))
    assert list(read_image_rows(paths)) == rows
    assert pq.read_schema(paths[0]) == IMAGES


@settings(deadline=None)
@given(st.text("a./ ", max_size=8) | st.text(max_size=8))
def test_an_image_goes_by_what_pathlib_takes_for_the_name_of_its_path(path: str) -> None:
    name = PurePosixPath(path).name
    if name in ("", ".."):
        with pytest.raises(SchemaError, match="must name a file"):
            image_name(path, "here")
    else:
        assert image_name(path, "here") == name

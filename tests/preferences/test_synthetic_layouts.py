"""The synthetic world has the published layouts, byte for byte the same for the same seed."""

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from workflow_scripts.configuration.model import ConfigurationError, Hpdv2World, ImageRewardWorld
from workflow_scripts.preferences.synthetic_layouts import (
    METADATA,
    hpdv2_scenes,
    imagereward_scenes,
    prompts,
    write_hpdv2,
    write_imagereward,
)
from workflow_scripts.preferences.synthetic_scenes import held_out, prompt_text


def written_files(folder: Path) -> dict[str, bytes]:
    """Content of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_imagereward_bytes_repeat(
    imagereward_folder: Path, imagereward_world: ImageRewardWorld, tmp_path: Path
) -> None:
    """The same world again has the same bytes; another seed has others."""
    files, _ = write_imagereward(tmp_path / "again", imagereward_world)
    again = written_files(tmp_path / "again")
    assert again == written_files(imagereward_folder) and sorted(again) == sorted(files)
    write_imagereward(tmp_path / "other", imagereward_world.model_copy(update={"seed": 1}))
    other = written_files(tmp_path / "other")
    assert other.keys() == again.keys() and not set(other.values()) & set(again.values())


def test_hpdv2_bytes_repeat(hpdv2_folder: Path, hpdv2_world: Hpdv2World, tmp_path: Path) -> None:
    """The same world again has the same bytes; another seed has others."""
    files, _ = write_hpdv2(tmp_path / "again", hpdv2_world)
    again = written_files(tmp_path / "again")
    assert again == written_files(hpdv2_folder) and sorted(again) == sorted(files)
    write_hpdv2(tmp_path / "other", hpdv2_world.model_copy(update={"seed": 1}))
    assert not set(written_files(tmp_path / "other").values()) & set(again.values())


def test_imagereward_layout(imagereward_folder: Path) -> None:
    """Columns, paths, ids and zips are those of the data set card and of ImageRewardDB.py."""
    for split, archives in {"train": 3, "validation": 1, "test": 2}.items():
        table = pq.read_table(imagereward_folder / f"metadata-{split}.parquet")
        assert table.schema == METADATA
        rows = table.to_pylist()
        paths = {row["image_path"] for row in rows}
        assert len(paths) == len(rows)
        for row in rows:
            assert re.fullmatch(rf"images/{split}/{split}_\d/[0-9a-f-]{{36}}\.webp", row["image_path"])
            assert re.fullmatch(r"\d{6}-\d{4}", row["prompt_id"])
            assert 4 <= row["image_amount_in_total"] == sum(r["prompt_id"] == row["prompt_id"] for r in rows) <= 9
        members = set()
        for number in range(1, archives + 1):
            with zipfile.ZipFile(imagereward_folder / f"images/{split}/{split}_{number}.zip") as archive:
                listed = json.loads(archive.read(f"{split}_{number}.json"))
                assert {Path(row["image_path"]).name for row in listed} == set(archive.namelist()) - {
                    f"{split}_{number}.json"
                }
                members |= {row["image_path"] for row in listed}
        assert members == paths
        assert pq.read_table(imagereward_folder / f"truth-{split}.parquet")["image_id"].to_pylist() == [
            Path(row["image_path"]).name for row in rows
        ]


def test_hpdv2_layout(hpdv2_folder: Path) -> None:
    """Keys, pairs, ranks, annotators and tar members are those of the published files."""
    train = json.loads((hpdv2_folder / "train.json").read_text())
    assert len(train) == 24 * 6
    assert train[0].keys() == {"prompt", "image_path", "human_preference"}
    assert train[0]["image_path"] == ["00000000.jpg", "00000001.jpg"]
    assert all(sorted(row["human_preference"]) == [0, 1] for row in train)
    test = json.loads((hpdv2_folder / "test.json").read_text())
    assert [len(row["image_path"]) for row in test] == [9, 9, 9, 10, 9, 9, 9, 10]
    hashes = [[one["user_hash"] for one in row["raw_annotations"]] for row in test]
    assert len(set(hashes[0])) == 10 and all(row == hashes[0] for row in hashes)
    for row in test:
        for ranks in [row["rank"], *(one["annotation"] for one in row["raw_annotations"])]:
            assert sorted(ranks) == list(range(len(row["image_path"])))
    for split, images in {"train": 96, "test": 74}.items():
        with tarfile.open(hpdv2_folder / f"{split}.tar.gz") as archive:
            assert archive.getnames() == [f"{split}/{number:08d}.jpg" for number in range(images)]


def test_images_are_84_pixels_and_webp_is_lossless(imagereward_folder: Path, hpdv2_folder: Path) -> None:
    """One of each format."""
    with zipfile.ZipFile(imagereward_folder / "images/test/test_1.zip") as archive:
        image = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
        assert image.format == "WEBP" and image.size == (84, 84)
    with tarfile.open(hpdv2_folder / "test.tar.gz") as tar:
        content = tar.extractfile("test/00000000.jpg")
        assert content and Image.open(content).format == "JPEG"


def test_a_prompt_does_not_depend_on_how_many_others_exist() -> None:
    """A longer split starts with the shorter one."""
    few, many = (prompts("imagereward", 0, "train", count, 10) for count in (30, 60))
    assert many[:30] == few
    assert imagereward_scenes(0, "train", 5, few[5]) == imagereward_scenes(0, "train", 5, many[5])
    assert hpdv2_scenes(0, "test", 5, few[5]) == hpdv2_scenes(0, "test", 5, many[5])


def test_blemishes_and_splits_of_prompt_texts() -> None:
    """0.6 % repeated texts, a handful of leaks from test to train, and otherwise disjoint splits."""
    train, validation, test = (
        [prompt_text(*prompt) for prompt in prompts("imagereward", 0, split, count, 400)]
        for split, count in (("train", 480), ("validation", 100), ("test", 400))
    )
    assert len(train) - len(set(train)) == 3
    assert len(test) - len(set(test)) == 3
    assert len(set(train) & set(test)) == 3
    assert not set(validation) & (set(train) | set(test))
    assert all(map(held_out, test)) and sum(map(held_out, train)) == 3
    hpdv2 = [prompt_text(*prompt) for prompt in prompts("hpsv2", 0, "train", 480, 400)]
    assert len(set(hpdv2)) == 480 and sum(map(held_out, hpdv2)) == 3


def test_too_many_prompts_are_refused() -> None:
    """The world has only so many texts, and says so."""
    message = (
        r"^datasets\.imagereward\.synthetic\.validation_prompts: the synthetic world has no 700 different prompts for "
        r"imagereward's validation split, only \d+; ask for fewer$"
    )
    with pytest.raises(ConfigurationError, match=message):
        prompts("imagereward", 0, "validation", 700, 4)

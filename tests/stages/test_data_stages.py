"""The data stages, run one after the other on small worlds: from raw layouts to images."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from workflow_scripts.configuration.model import Configuration, Dataset, Split, load
from workflow_scripts.configuration.stages import (
    DownloadDataset,
    ReadAnnotations,
    ReadImages,
    SelectSubset,
    SynthesizeDataset,
)
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.preferences.schema import IMAGES, SUBSET, SchemaError, read_table, write_preferences
from workflow_scripts.running.provenance import sidecar_path, verify

WORLD = {
    "datasets": {
        "imagereward": {
            "synthetic": {
                "train_prompts": 24,
                "validation_prompts": 5,
                "test_prompts": 12,
                "prompts_per_archive": 10,
                "unreadable_images": 2,
            },
            "validation_prompts": 4,
        },
        "hpsv2": {
            "synthetic": {"train_prompts": 24, "test_prompts": 8, "unreadable_images": 2},
            "validation_prompts": 4,
            "test_prompts": 8,
        },
    },
    "rollouts": {"shard_prompts": 5},
}

RunStage = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def configuration() -> Configuration:
    """Return the configuration of the small worlds."""
    return load(WORLD)


@pytest.fixture(scope="module")
def run_stage() -> Iterator[RunStage]:
    """Return a function that runs a stage by its command line, without tracking, and returns its sidecar."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)

        def run(stage: str, config: Any, **files: Path) -> dict[str, Any]:
            command = [word for name, path in files.items() for word in (f"--{name}", str(path))]
            patch.setattr("sys.argv", [stage, *command, "--config", config.canonical()])
            module = importlib.import_module(f"workflow_scripts.stages.{stage}")
            module.main()
            first = next(name for name, field in module.Arguments.model_fields.items() if "output" in field.metadata)
            return verify(files[first])

        yield run


def read_and_select(run_stage: RunStage, c: Configuration, folder: Path, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Run read_annotations and select_subset for every split; return metrics by output."""
    metrics = {}
    record = folder / dataset / "dataset.json"
    own_validation = dataset == "imagereward"
    splits: list[Split] = ["test", "train", "validation"] if own_validation else ["test", "train"]
    for split in splits:
        output = folder / dataset / split / "preferences.parquet"
        sidecar = run_stage(
            "read_annotations", ReadAnnotations.of(c, dataset, split), record=record, preferences=output
        )
        metrics[f"{split} preferences"] = sidecar["metrics"]
    tables = {split: folder / dataset / split / "preferences.parquet" for split in splits}
    selections: list[tuple[Split, dict[str, Path]]] = [
        ("test", {"preferences": tables["test"]}),
        ("train", {"preferences": tables["train"], "test_preferences": tables["test"]}),
        (
            "validation",
            {
                "preferences": tables["validation"],
                "test_preferences": tables["test"],
                "train_preferences": tables["train"],
            }
            if own_validation
            else {"preferences": tables["train"], "test_preferences": tables["test"]},
        ),
    ]
    for split, inputs in selections:
        output = folder / dataset / split / "subset.parquet"
        sidecar = run_stage("select_subset", SelectSubset.of(c, dataset, split), **inputs, subset=output)
        metrics[f"{split} subset"] = sidecar["metrics"]
    return metrics


@pytest.fixture(scope="module")
def imagereward(
    run_stage: RunStage, configuration: Configuration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Return the folder of a small ImageRewardDB with its canonical tables, and the stages' metrics."""
    folder = tmp_path_factory.mktemp("world")
    output = folder / "imagereward" / "dataset.json"
    run_stage("synthesize_dataset", SynthesizeDataset.of(configuration, "imagereward"), record=output)
    return folder, read_and_select(run_stage, configuration, folder, "imagereward")


@pytest.fixture(scope="module")
def hpsv2(
    run_stage: RunStage, configuration: Configuration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Return the folder of a small HPDv2 with its canonical tables, and the stages' metrics."""
    folder = tmp_path_factory.mktemp("world")
    output = folder / "hpsv2" / "dataset.json"
    run_stage("synthesize_dataset", SynthesizeDataset.of(configuration, "hpsv2"), record=output)
    return folder, read_and_select(run_stage, configuration, folder, "hpsv2")


def read_images(run_stage: RunStage, c: Configuration, folder: Path, dataset: Dataset, split: Split, shard: int) -> Any:
    """Run read_images; return image_ids and listing."""
    place = folder / dataset / split
    output, listing = place / f"images-{shard:04d}.parquet", place / f"images-{shard:04d}.json"
    config = ReadImages.of(c, dataset, split, shard)
    run_stage(
        "read_images",
        config,
        record=folder / dataset / "dataset.json",
        subset=place / "subset.parquet",
        images=output,
        listing=listing,
    )
    return read_table(output, IMAGES)["image_id"].to_pylist(), json.loads(listing.read_text())


def test_record_says_synthetic_and_what_was_measured(
    imagereward: tuple[Path, Any], hpsv2: tuple[Path, Any], run_stage: RunStage, configuration: Configuration
) -> None:
    """The record is the same when the same world is written again, and covers every raw file."""
    for folder, dataset in ((imagereward[0], "imagereward"), (hpsv2[0], "hpsv2")):
        path = folder / dataset / "dataset.json"
        text = path.read_text()
        record = json.loads(text)
        assert (record["source"], record["revision"], record["dataset"]) == ("synthetic", "seed 0", dataset)
        assert 0.5 < record["measured"]["ceiling"] < 1
        assert all((path.parent / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
        run_stage("synthesize_dataset", SynthesizeDataset.of(configuration, dataset), record=path)  # type: ignore[arg-type]
        assert path.read_text() == text


def test_imagereward_tables(imagereward: tuple[Path, Any]) -> None:
    """The leaked training prompt is dropped, the repeated text counted, every split in hash order."""
    folder, metrics = imagereward
    assert metrics["train preferences"]["prompts"] == 24
    assert metrics["train preferences"]["duplicate_texts"] == 1
    train = metrics["train subset"]
    assert (train["overlap_texts"], train["dropped"], train["kept"], train["of"]) == (1, 1, 23, 23)
    assert (metrics["validation subset"]["kept"], metrics["validation subset"]["of"]) == (4, 5)
    assert metrics["test subset"]["kept"] == 12
    for split in ("train", "validation", "test"):
        rows = read_table(folder / "imagereward" / split / "subset.parquet", SUBSET).to_pylist()
        order = [hashlib.sha256(f"0:{row['prompt_id']}".encode()).digest() for row in rows]
        assert order == sorted(order) and [row["position"] for row in rows] == list(range(len(rows)))


def test_hpsv2_tables(hpsv2: tuple[Path, Any]) -> None:
    """A quarter of what is left after dropping the leak, and validation prompts that training does not have."""
    folder, metrics = hpsv2
    assert metrics["test preferences"]["strict_pairs"] == 6 * 36 + 2 * 45
    assert metrics["train preferences"]["given_pairs"] == 24 * 6
    train = metrics["train subset"]
    assert (train["overlap_texts"], train["dropped"], train["kept"], train["of"]) == (1, 1, 6, 23)
    kept, drawn = (
        set(read_table(folder / "hpsv2" / split / "subset.parquet", SUBSET)["prompt_id"].to_pylist())
        for split in ("train", "validation")
    )
    assert len(kept) == 6 and len(drawn) == 4 and not kept & drawn


def test_single_pairs_can_be_kept(hpsv2: tuple[Path, Any], run_stage: RunStage, tmp_path: Path) -> None:
    """A tenth of all pairs, with only their images; validation prompts contribute none of them."""
    folder, _ = hpsv2
    data = {"subsample_by": "pair", "train_fraction": 0.1, "validation_prompts": 4}
    c = load({"datasets": {"hpsv2": data}})
    inputs = {split: folder / "hpsv2" / split / "preferences.parquet" for split in ("train", "test")}
    selected = {}
    for split in ("train", "validation"):
        run_stage(
            "select_subset",
            SelectSubset.of(c, "hpsv2", split),  # type: ignore[arg-type]
            preferences=inputs["train"],
            test_preferences=inputs["test"],
            subset=tmp_path / f"{split}.parquet",
        )
        selected[split] = read_table(tmp_path / f"{split}.parquet", SUBSET).to_pylist()
    assert sum(len(row["pairs"]) for row in selected["train"]) == 14  # of 23 * 6
    for row in selected["train"]:
        assert {pair[side] for pair in row["pairs"] for side in ("a", "b")} == set(row["image_ids"])
    assert not {row["prompt_id"] for row in selected["train"]} & {row["prompt_id"] for row in selected["validation"]}
    assert all(len(row["pairs"]) == 6 for row in selected["validation"])


def test_overlap_is_kept_when_asked(imagereward: tuple[Path, Any], run_stage: RunStage, tmp_path: Path) -> None:
    """drop_overlap false reports and drops nothing; true without test preferences is refused."""
    folder, _ = imagereward
    tables = {split: folder / "imagereward" / split / "preferences.parquet" for split in ("train", "test")}
    config = SelectSubset.of(load({"datasets": {"imagereward": {"drop_overlap": False}}}), "imagereward", "train")
    output = tmp_path / "subset.parquet"
    metrics = run_stage(
        "select_subset", config, preferences=tables["train"], test_preferences=tables["test"], subset=output
    )["metrics"]
    assert (metrics["overlap_texts"], metrics["dropped"], metrics["kept"]) == (1, 0, 24)
    with pytest.raises(ValueError, match="drop_overlap needs --test_preferences"):
        strict = config.model_copy(update={"drop_overlap": True})
        run_stage("select_subset", strict, preferences=tables["train"], subset=output)


def test_images_of_a_shard_and_no_others(
    imagereward: tuple[Path, Any], hpsv2: tuple[Path, Any], run_stage: RunStage, configuration: Configuration
) -> None:
    """Shards of five test prompts share nothing and cover everything; bytes are those of the archive."""
    for folder, dataset, last in ((imagereward[0], "imagereward", 2), (hpsv2[0], "hpsv2", 1)):
        rows = pq.read_table(folder / dataset / "test" / "subset.parquet").to_pylist()
        found: list[str] = []
        for shard in range(last + 1):
            ids, listing = read_images(run_stage, configuration, folder, dataset, "test", shard)  # type: ignore[arg-type]
            assert set(ids) == {i for row in rows[5 * shard : 5 * shard + 5] for i in row["image_ids"]}
            assert listing == {"wanted": len(ids), "read": len(ids), "unreadable": {}, "missing": []}
            found += ids
        assert sorted(found) == sorted(image for row in rows for image in row["image_ids"])


def test_unreadable_images_are_listed(
    imagereward: tuple[Path, Any], run_stage: RunStage, configuration: Configuration
) -> None:
    """The two blemished training images are left out and named with the reason; a warning stands in the sidecar."""
    folder, _ = imagereward
    ids, listing = read_images(run_stage, configuration, folder, "imagereward", "train", 0)
    blemished = json.loads((folder / "imagereward/dataset.json").read_text())["splits"]["train"]["unreadable_images"]
    assert set(listing["unreadable"]) == set(blemished) and "empty" in listing["unreadable"].values()
    assert listing["read"] == len(ids) == listing["wanted"] - 2
    sidecar = json.loads(sidecar_path(folder / "imagereward/train/images-0000.parquet").read_text())
    assert "2 images are unreadable and 0 missing" in sidecar["warnings"][0]
    assert set(sidecar["outputs"]) == {"images-0000.parquet", "images-0000.json"}


def test_mostly_missing_images_are_an_error(
    imagereward: tuple[Path, Any], run_stage: RunStage, configuration: Configuration, tmp_path: Path
) -> None:
    """Without a sidecar no later stage takes the output for complete."""
    folder, _ = imagereward
    subset = tmp_path / "subset.parquet"
    rows = pq.read_table(folder / "imagereward/test/subset.parquet").to_pylist()
    renamed = [row | {"image_ids": [f"other-{image}" for image in row["image_ids"]]} for row in rows]
    write_preferences(subset, renamed, SUBSET)
    sidecar = json.loads(sidecar_path(folder / "imagereward/test/subset.parquet").read_text())
    digest = hashlib.sha256(subset.read_bytes()).hexdigest()
    sidecar["outputs"]["subset.parquet"] |= {"sha256": digest, "bytes": subset.stat().st_size}
    sidecar_path(subset).write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=r"only 0 of .* images can be read"):
        run_stage(
            "read_images",
            ReadImages.of(configuration, "imagereward", "test", 0),
            record=folder / "imagereward/dataset.json",
            subset=subset,
            images=tmp_path / "images.parquet",
            listing=tmp_path / "images.json",
        )
    assert not sidecar_path(tmp_path / "images.parquet").exists()


def test_changed_raw_file_is_noticed(run_stage: RunStage, configuration: Configuration, tmp_path: Path) -> None:
    """A raw file that differs from the record is not read."""
    record = tmp_path / "dataset.json"
    run_stage("synthesize_dataset", SynthesizeDataset.of(configuration, "hpsv2"), record=record)
    test = tmp_path / "test.json"
    test.write_text(test.read_text().replace("red", "RED"))
    config = ReadAnnotations.of(configuration, "hpsv2", "test")
    with pytest.raises(ProvenanceError, match=r"test\.json is not what its stage wrote"):
        run_stage("read_annotations", config, record=record, preferences=tmp_path / "preferences.parquet")


def test_hpsv2_has_no_validation_annotations(
    hpsv2: tuple[Path, Any], run_stage: RunStage, configuration: Configuration, tmp_path: Path
) -> None:
    """The error says where validation prompts come from."""
    config = ReadAnnotations.of(configuration, "hpsv2", "validation")
    record = hpsv2[0] / "hpsv2/dataset.json"
    with pytest.raises(SchemaError, match="select_subset draws one"):
        run_stage("read_annotations", config, record=record, preferences=tmp_path / "preferences.parquet")


# ----------------------------------------------------------------------------------------- a folder that is there


@pytest.mark.parametrize(("dataset", "hub"), [("imagereward", {"train_set": "1k"}), ("hpsv2", {})])
def test_published_files_in_a_folder_of_the_user_are_read_as_the_synthetic_world_is(
    dataset: Dataset, hub: dict[str, str], run_stage: RunStage, tmp_path: Path
) -> None:
    """Same tables and images, nothing copied; that the counts are not the published ones is said."""
    sizes = {"train_prompts": 16, "test_prompts": 8, "unreadable_images": 2}
    if dataset == "imagereward":  # as many archives as published
        sizes |= {"validation_prompts": 8, "prompts_per_archive": 4}
    synthetic = load({"datasets": {dataset: {"synthetic": sizes, "validation_prompts": 2}}})
    record = tmp_path / "world" / dataset / "dataset.json"
    run_stage("synthesize_dataset", SynthesizeDataset.of(synthetic, dataset), record=record)
    there = {"source": "hub", "hub": hub | {"path": str(record.parent)}, "validation_prompts": 2}
    own = load({"datasets": {dataset: there}})
    run_stage("download_dataset", DownloadDataset.of(own, dataset), record=tmp_path / "own" / dataset / "dataset.json")
    for name, c in (("world", synthetic), ("own", own)):
        read_and_select(run_stage, c, tmp_path / name, dataset)
        for split in ("train", "validation", "test"):
            read_images(run_stage, c, tmp_path / name, dataset, split, 0)
    tables = sorted(path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*.parquet"))
    assert {path.name for path in tables} == {"preferences.parquet", "subset.parquet", "images-0000.parquet"}
    for path in tables:
        assert (tmp_path / "own" / path).read_bytes() == (tmp_path / "world" / path).read_bytes(), path
    (warning,) = verify(tmp_path / "own" / dataset / "test/preferences.parquet")["warnings"]
    published = {"imagereward": "466; ", "hpsv2": "400; "}[dataset]
    assert warning.startswith(f"{dataset}, test: read 8 prompts, published are {published}")
    assert not verify(tmp_path / "world" / dataset / "test/preferences.parquet")["warnings"]

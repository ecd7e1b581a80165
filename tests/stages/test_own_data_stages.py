"""Own data through every stage from the user's folder to the tables, for both protocols, in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import (
    GenerateRollouts,
    MakeTables,
    MeasureAccuracy,
    PrepareBasePolicy,
    ReadAnnotations,
    ReadImages,
    RecordOwnData,
    ScoreRollouts,
    SelectSubset,
    TrainGrpo,
)
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences.schema import PREFERENCES, SchemaError, read_table
from workflow_scripts.rollouts.record import ROLLOUT

SPLITS = ("train", "validation", "test")


def configuration(folder: Path, annotations: str, protocol: str) -> Any:
    """Return what a user writes, with the shortest training."""
    own = {"title": "shapes", "folder": str(folder), "annotations": annotations, "protocol": protocol}
    training = {"steps": 2, "prompts_per_step": 2, "validate_every": 2, "warmup_steps": 0}
    return load(
        {
            "tracks": ["own"],
            "datasets": {"own": own | {"validation_prompts": 3}},
            "training": {"own": training},
            "rollouts": {"block_size": 1},
            "scoring": {"report_k": [1], "bootstrap": {"resamples": 100}},
        }
    )


def data_stages(run_main: Any, configured: Any, out: Path) -> Path:
    """Run the stages from the folder to images; return the record."""
    record = out / "dataset.json"
    run_main("record_own_data", RecordOwnData.of(configured), record=record)
    for split in SPLITS:
        config = ReadAnnotations.of(configured, "own", split)  # type: ignore[arg-type]
        run_main("read_annotations", config, record=record, preferences=out / split / "preferences.parquet")
    others = {"train": ["test"], "validation": ["test", "train"], "test": []}
    for split in SPLITS:
        leaks = {f"{other}_preferences": out / other / "preferences.parquet" for other in others[split]}
        run_main(
            "select_subset",
            SelectSubset.of(configured, "own", split),  # type: ignore[arg-type]
            preferences=out / split / "preferences.parquet",
            subset=out / split / "subset.parquet",
            **leaks,
        )
        images = {"images": out / split / "images.parquet", "listing": out / split / "images.json"}
        config = ReadImages.of(configured, "own", split, 0)  # type: ignore[arg-type]
        run_main("read_images", config, record=record, subset=out / split / "subset.parquet", **images)
    return record


@pytest.mark.parametrize(("annotations", "protocol"), [("ratings.csv", "pointwise"), ("pairs.jsonl", "pairwise")])
def test_the_example_reaches_the_tables(run_main: Any, tmp_path: Path, annotations: str, protocol: str) -> None:
    folder, out = tmp_path / "data", tmp_path / "results"
    shutil.copytree(ROOT / "examples/own_data", folder)
    (folder / "images/02-0.webp").write_bytes(b"")  # of the test split: left out, not an error
    configured = configuration(folder, annotations, protocol)
    record = data_stages(run_main, configured, out)
    listing = json.loads((out / "test/images.json").read_text())
    assert listing["unreadable"] == {"images%2F02-0.webp": "empty"}
    base = out / "manifest.json"
    run_main("prepare_base_policy", PrepareBasePolicy.of(configured), manifest=base)
    adapter = out / "policy/adapter_model.safetensors"
    config = TrainGrpo.of(configured, "own", 0)
    assert (config.model.protocol, "approximate" in dict(config.training.rewards)) == (
        protocol,
        protocol == "pointwise",
    )
    run_main(
        "train_grpo",
        config,
        base=base,
        train=out / "train/subset.parquet",
        train_images=out / "train/images.parquet",
        validation=out / "validation/subset.parquet",
        validation_images=out / "validation/images.parquet",
        adapter=adapter,
        adapter_config=adapter.with_name("adapter_config.json"),
        record=adapter.with_name("training.json"),
        checkpoints=out / "checkpoints",
    )
    accuracies = []
    for policy in ("zeroshot", "grpo"):
        rollouts, scores, accuracy = (out / policy / name for name in ("r.parquet", "s.parquet", "own.json"))
        trained = {"adapter": adapter} if policy == "grpo" else {}
        run_main(
            "generate_rollouts",
            GenerateRollouts.of(configured, "own", policy, "own", 0, 0, 0),  # type: ignore[arg-type]
            base=base,
            **trained,
            subset=out / "test/subset.parquet",
            images=out / "test/images.parquet",
            rollouts=rollouts,
        )
        config = ScoreRollouts.of(configured, "own", policy, "own", 0)  # type: ignore[arg-type]
        run_main("score_rollouts", config, rollouts=[rollouts], scores=scores)
        run_main(
            "measure_accuracy",
            MeasureAccuracy.of(configured, "own", policy, "own", 0),  # type: ignore[arg-type]
            scores=scores,
            subset=out / "test/subset.parquet",
            record=record,
            accuracy=accuracy,
            prompts=accuracy.with_name("own-prompts.parquet"),
        )
        accuracies.append(accuracy)
    tables = {name: out / f"{name}.csv" for name in ("table1", "table2", "comparisons", "sensitivity")}
    run_main(
        "make_tables",
        MakeTables.of(configured),
        accuracies=accuracies,
        base=base,
        adapters=[adapter],
        **tables,
        markdown=out / "tables.md",
    )
    (row,) = pd.read_csv(tables["table1"]).to_dict("records")
    assert (row["training_data"], row["test_data"], row["data_source"]) == ("shapes", "shapes", "own")
    assert pd.isna(row["mean@1_paper"]) and 0 <= row["mean@1"] <= 100
    # Pairs of the test split that are not of the unreadable image, counted from the table itself.
    test = read_table(out / "test/preferences.parquet", PREFERENCES).to_pylist()
    strict = 0
    for prompt in test:
        named = zip(prompt["image_ids"], prompt["ranks"], strict=True)
        ranks = [rank for name, rank in named if name not in listing["unreadable"]]
        strict += sum(a != b for i, a in enumerate(ranks) for b in ranks[i + 1 :])
    assert row["n_pairs"] == strict > 0
    if protocol == "pairwise":
        assert strict == 6 * 2 - 1  # two pairs of each of six prompts
    # A shard beyond the last prompt is empty and no error.
    config = GenerateRollouts.of(configured, "own", "zeroshot", "own", 0, 0, 0)
    beyond = config.model_copy(update={"start": 1000, "stop": 2000})
    inputs = {"base": base, "subset": out / "test/subset.parquet", "images": out / "test/images.parquet"}
    run_main("generate_rollouts", beyond, **inputs, rollouts=out / "beyond.parquet")
    assert len(read_table(out / "beyond.parquet", ROLLOUT)) == 0


def test_ratings_are_asked_for_where_they_are_trained_on(run_main: Any, tmp_path: Path) -> None:
    configured = configuration(ROOT / "examples/own_data", "pairs.jsonl", "pointwise")
    data_stages(run_main, configured, tmp_path)
    base = tmp_path / "manifest.json"
    run_main("prepare_base_policy", PrepareBasePolicy.of(configured), manifest=base)
    with pytest.raises(SchemaError, match=r"prompt_id \S+ has no ratings to train on; give them, or set datasets\.own"):
        run_main(
            "train_grpo",
            TrainGrpo.of(configured, "own", 0),
            base=base,
            train=tmp_path / "train/subset.parquet",
            train_images=tmp_path / "train/images.parquet",
            validation=tmp_path / "validation/subset.parquet",
            validation_images=tmp_path / "validation/images.parquet",
            adapter=tmp_path / "adapter_model.safetensors",
            adapter_config=tmp_path / "adapter_config.json",
            record=tmp_path / "training.json",
            checkpoints=tmp_path / "checkpoints",
        )

"""The workflow on own data: configs/own.yaml, across to ImageReward and back, and what a changed file reruns."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from checkout import Workflow

OVERLAY: dict[str, Any] = {
    "tracks": ["own", "imagereward"],
    "cross_tests": [{"track": "own", "test": "imagereward"}, {"track": "imagereward", "test": "own"}],
    "datasets": {"own": {"title": "shapes", "folder": "examples/own_data", "test_prompts": 6}},
    "training": {"own": {"steps": 4, "prompts_per_step": 2, "group_size": 4, "validate_every": 2, "warmup_steps": 0}},
}


def rules(workflow: Workflow) -> set[str]:
    """Rules that a dry run announces for own data alone."""
    return {job.rule for job in workflow.planned(overlay=OVERLAY)}


@pytest.mark.slow
def test_own_data_and_imagereward_both_ways_and_what_reruns(tmp_path: Path) -> None:
    workflow = Workflow.checkout(tmp_path / "softpref")
    workflow.snakemake("--cores", "2", overlay=OVERLAY)
    table = pd.read_csv(workflow.results / "table1.csv")
    rows = table[["training_data", "test_data", "against", "data_source"]].apply(tuple, axis=1).tolist()
    assert rows == [
        ("shapes", "shapes", "labels", "own"),
        ("ImageReward", "ImageReward", "labels", "synthetic"),
        ("ImageReward", "ImageReward", "noise-free order", "synthetic"),
        ("shapes", "ImageReward", "labels", "synthetic"),
        ("shapes", "ImageReward", "noise-free order", "synthetic"),
        ("ImageReward", "shapes", "labels", "own"),
    ]
    assert pd.isna(table["mean@1_paper"][0]) and table["n_prompts"][0] == 6
    assert not rules(workflow)

    folder = workflow.folder / "examples/own_data"
    image, ratings = folder / "images/00-0.webp", folder / "ratings.csv"
    for path in (image, ratings):
        os.utime(path)
    assert not rules(workflow)  # touched, not changed
    whole = image.read_bytes()
    image.write_bytes((folder / "images/00-1.webp").read_bytes())
    assert {"record_own_data", "read_images", "train_grpo", "make_tables"} <= rules(workflow)
    image.write_bytes(whole)
    assert not rules(workflow)
    text = ratings.read_text()
    ratings.write_text(text.replace(",7,train", ",6,train", 1))
    assert {"record_own_data", "read_annotations", "train_grpo", "make_tables"} <= rules(workflow)
    ratings.write_text(text)
    assert not rules(workflow)


def test_the_example_configuration_can_be_planned(tmp_path: Path) -> None:
    workflow = Workflow.checkout(tmp_path / "softpref")
    config = workflow.folder / "configs/test.yaml"
    config.write_text((workflow.folder / "configs/own.yaml").read_text())  # the command line names that file
    jobs = workflow.planned()
    assert [job.rule for job in jobs].count("record_own_data") == 1
    assert {output.split("/")[1] for job in jobs for output in job.outputs} == {"own"}

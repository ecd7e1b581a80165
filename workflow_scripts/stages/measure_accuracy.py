"""Measure how well scores order the images of a test set: every protocol, tie rule and missing-answer rule.

python -m workflow_scripts.stages.measure_accuracy --scores results/scores/imagereward/grpo/seed0/imagereward.parquet \
    --subset results/datasets/imagereward/test/subset.parquet \
    --record results/downloads/synthetic/imagereward/dataset.json \
    --accuracy results/accuracy/imagereward/grpo/seed0/imagereward.json \
    --prompts results/accuracy/imagereward/grpo/seed0/imagereward-prompts.parquet --config '{"track": "imagereward", …}'

The per-prompt file holds the credit of every prompt under every rule: whatever is compared or pooled later is computed
from it, paired over the same prompts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from workflow_scripts.configuration.stages import MeasureAccuracy
from workflow_scripts.files.records import check_file
from workflow_scripts.files.writing import replacing, write_json
from workflow_scripts.preferences.schema import SUBSET, read_table
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.accuracies import cells, credits_of, measurements
from workflow_scripts.scoring.judged_prompts import judged_prompts
from workflow_scripts.scoring.protocols import NEUTRAL, OFFICIAL
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Measure how well scores order the images of a test set."""

    scores: Input
    """Scores of one policy on one test set."""
    subset: Input
    """Test prompts with their annotations."""
    record: Input
    """Record of the data set: where it is from and, of the synthetic world, what is known of it."""
    accuracy: Output
    """Accuracies."""
    prompts: Output
    """Credit and counted pairs of every prompt under every rule."""
    config: MeasureAccuracy
    """Configuration of this stage as JSON."""


def true_ranks(record: dict[str, Any], path: Path) -> dict[str, float]:
    """Noise-free rank (1 = best, only the order counts) of each test image; empty for published data."""
    if record["source"] != "synthetic":
        return {}
    truth = path.parent / "truth-test.parquet"
    check_file(truth, record["files"][truth.name], path)
    table = pq.read_table(truth).to_pydict()
    return {image: -round(utility, 9) for image, utility in zip(table["image_id"], table["utility"], strict=True)}


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        table = pd.read_parquet(arguments.scores)
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        truth = true_ranks(record, arguments.record)
        prompts = judged_prompts(read_table(arguments.subset, SUBSET).to_pylist(), table)

        official = OFFICIAL[config.test]
        asked = measurements(prompts, truth, official, config.report_k, config.missing_answer)
        rules, credits = [one.rule for one in asked], credits_of(asked, NEUTRAL[config.protocol])
        measured = cells(rules, credits, **config.bootstrap.model_dump())

        write_json(
            arguments.accuracy,
            {
                "track": config.track,
                "policy": config.policy,
                "test": config.test,
                "seed": config.seed,
                "data_source": record["source"],
                "data_revision": record["revision"],
                "official": official._asdict(),
                "prompts": len(prompts),
                "images": table["image_id"].nunique(),
                "rollouts": int(table["k"].max()) + 1,
                "forced_share": float(table["forced"].mean()),
                "missing_answer_share": float(table["hard"].isna().mean()),
                "second_annotator_agreement": record.get("measured", {}).get("second_annotator_agreement"),
                "cells": measured,
            },
        )
        by_prompt = pd.DataFrame(rules).loc[np.repeat(np.arange(len(rules)), len(prompts))].reset_index(drop=True)
        correct, pairs = (np.concatenate(parts) for parts in zip(*credits, strict=True))
        names = [prompt.prompt_id for prompt in prompts] * len(rules)
        with replacing(arguments.prompts) as temporary:
            by_prompt.assign(prompt_id=names, correct=correct, pairs=pairs).to_parquet(
                temporary, index=False, compression="zstd"
            )
        rule = (*official, config.missing_answer)
        headline = [c for c in measured if (c["tie"], c["average"], c["label_tie"], c["missing"]) == rule]
        run.metrics({f"accuracy/{c['method']}/Mean_at_{c['k']}/{c['against']}": c["estimate"] for c in headline})


if __name__ == "__main__":
    main()

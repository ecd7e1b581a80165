"""Measure how well scores order the images of a test set: every protocol, tie rule and missing-answer rule.

python -m workflow_scripts.stages.measure_accuracy --scores results/scores/imagereward/grpo/seed0/imagereward.parquet \
    --subset results/datasets/imagereward/test/subset.parquet \
    --dataset_record results/downloads/synthetic/imagereward/dataset.json \
    --output results/accuracy/imagereward/grpo/seed0/imagereward.json \
    --prompts results/accuracy/imagereward/grpo/seed0/imagereward-prompts.parquet --config '{"track": "imagereward", …}'

The per-prompt file holds the credit of every prompt under every rule: whatever is compared or pooled later is computed
from it, paired over the same prompts.
"""

import itertools
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
from workflow_scripts.scoring.bootstrap import Credit, accuracy_intervals
from workflow_scripts.scoring.mean_at_k import fill_missing
from workflow_scripts.scoring.protocols import (
    NEUTRAL,
    OFFICIAL,
    Average,
    Outcomes,
    first_listed,
    outcome_credit,
    prompt_outcomes,
)
from workflow_scripts.tracking.stage_run import run_stage

RULES = ["method", "k", "against", "tie", "label_tie", "missing"]


class Arguments(StageArguments):
    """Measure how well scores order the images of a test set."""

    scores: Input
    """Scores of one policy on one test set."""
    subset: Input
    """Test prompts with their annotations."""
    dataset_record: Input
    """Record of the data set: where it is from and, of the synthetic world, what is known of it."""
    output: Output
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


def score_arrays(scores: pd.DataFrame, rows: list[dict[str, Any]], rollouts: int) -> dict[str, list[np.ndarray]]:
    """Soft and hard scores of each prompt, (N, K), in the order of its images; nan where there is none."""
    index = pd.MultiIndex.from_tuples([(row["prompt_id"], image) for row in rows for image in row["image_ids"]])
    place = index.get_indexer(pd.MultiIndex.from_frame(scores[["prompt_id", "image_id"]]))
    known = place >= 0
    found = {}
    for column in ("soft", "hard"):
        values = np.full((len(index), rollouts), np.nan)
        values[place[known], scores["k"][known]] = scores[column][known]
        found[column] = np.split(values, np.cumsum([len(row["image_ids"]) for row in rows])[:-1])
    return found


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        scores = pd.read_parquet(arguments.scores)
        record = json.loads(arguments.dataset_record.read_text(encoding="utf-8"))
        truth = true_ranks(record, arguments.dataset_record)
        judged = set(scores["prompt_id"].unique())
        rows = [row for row in read_table(arguments.subset, SUBSET).to_pylist() if row["prompt_id"] in judged]
        rollouts = int(scores["k"].max()) + 1
        # An image that could not be read was never judged: it leaves the test, it is not an error of the policy.
        readable = set(scores["image_id"].unique())
        for row in rows:
            kept = [i for i, image in enumerate(row["image_ids"]) if image in readable]
            row["image_ids"] = [row["image_ids"][i] for i in kept]
            row["ranks"] = [row["ranks"][i] for i in kept]
            row["annotations"] = [[ranks[i] for i in kept] for ranks in row["annotations"] or []]

        methods = score_arrays(scores, rows, rollouts)
        targets = {"labels": [np.array(row["ranks"], float) for row in rows]}
        if truth:
            targets["noise-free order"] = [np.array([truth[image] for image in row["image_ids"]]) for row in rows]
        official = OFFICIAL[config.test]
        neutral = NEUTRAL[config.protocol]

        grid: list[tuple[str, list[np.ndarray], str, int, str, str, str]] = []
        for (method, values), against, k in itertools.product(methods.items(), targets, config.report_k):
            both = itertools.product(("wrong", "half", "dropped", "right"), ("wrong", "neutral", "dropped"))
            grid += [(method, values, against, k, tie, "dropped", missing) for tie, missing in both]
            if against == "labels" and official.label_tie == "right":
                grid.append((method, values, against, k, official.tie, "right", config.missing_answer))
        listed = [first_listed(len(row["image_ids"])) for row in rows]
        grid += [("first listed", listed, against, 1, "wrong", "dropped", "wrong") for against in targets]
        annotators = [-np.array(row["annotations"], float).T for row in rows if row["annotations"]]
        if annotators:
            grid.append(("single annotator", annotators, "labels", 1, official.tie, official.label_tie, "wrong"))
        if truth:
            noise_free = [-ranks[:, None] for ranks in targets["noise-free order"]]
            # Equal utilities are ordered by chance: half a point is what a scorer without ties can expect.
            grid.append(("noise-free order", noise_free, "labels", 1, "half", official.label_tie, "wrong"))

        rules: list[dict[str, Any]] = []
        credits: list[Credit] = []
        compared: dict[tuple[str, str, int, bool], Outcomes] = {}  # the rules for ties and missing answers share it
        for method, values, against, k, tie, label_tie, missing in grid:
            key = (method, against, k, missing == "neutral")
            if key not in compared:
                complete = not any(np.isnan(one).any() for one in values)
                filled = [fill_missing(one, neutral) for one in values] if missing == "neutral" else values
                compared[key] = prompt_outcomes(filled, targets[against], k)
                if complete:
                    compared[*key[:3], not key[3]] = compared[key]
            rules.append(dict(zip(RULES, (method, k, against, tie, label_tie, missing), strict=True)))
            rule_of_missing = "wrong" if missing == "neutral" else missing
            credits.append(outcome_credit(compared[key], tie, label_tie, rule_of_missing))  # type: ignore[arg-type]
        b = config.bootstrap
        averages: tuple[Average, ...] = ("micro", "macro")
        intervals = [accuracy_intervals(credits, average, b.confidence, b.resamples, b.seed) for average in averages]
        cells = []
        for rule, (_, pairs), *by_average in zip(rules, credits, *intervals, strict=True):
            for average, interval in zip(averages, by_average, strict=True):
                # Null where no pair counts, as when one answer was given throughout and ties are dropped.
                numbers = {name: None if np.isnan(value) else value for name, value in interval._asdict().items()}
                cells.append({**rule, "average": average, **numbers, "pairs": float(pairs.sum())})

        write_json(
            arguments.output,
            {
                "track": config.track,
                "policy": config.policy,
                "test": config.test,
                "seed": config.seed,
                "data_source": record["source"],
                "data_revision": record["revision"],
                "official": official._asdict(),
                "prompts": len(rows),
                "images": len(readable),
                "rollouts": rollouts,
                "forced_share": float(scores["forced"].mean()),
                "missing_answer_share": float(scores["hard"].isna().mean()),
                "second_annotator_agreement": record.get("measured", {}).get("second_annotator_agreement"),
                "cells": cells,
            },
        )
        with replacing(arguments.prompts) as temporary:
            names = [row["prompt_id"] for row in rows]
            by_prompt = pd.DataFrame(rules).loc[np.repeat(np.arange(len(rules)), len(rows))].reset_index(drop=True)
            correct, pairs = (np.concatenate(parts) for parts in zip(*credits, strict=True))
            by_prompt = by_prompt.assign(prompt_id=names * len(rules), correct=correct, pairs=pairs)
            by_prompt.to_parquet(temporary, index=False, compression="zstd")
        headline = [
            cell
            for cell in cells
            if (cell["tie"], cell["average"], cell["label_tie"]) == official
            and cell["missing"] == config.missing_answer
        ]
        run.metrics({f"accuracy/{c['method']}/Mean_at_{c['k']}/{c['against']}": c["estimate"] for c in headline})


if __name__ == "__main__":
    main()

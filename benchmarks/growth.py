"""Measure the growth of time and peak memory: each work at 1, 2, 4 and 8 times the size, each in its own process.

python -m benchmarks.growth --part read_images select_subset

A line through CPU seconds by size gives the cost of starting (its height at 0) and of one unit of size. The distance of
the largest point from the line through the smaller ones shows whether time grows faster than the size.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.data import measure_one, run
from benchmarks.made_up import (
    write_archive,
    write_hpdv2_annotations,
    write_image_subset,
    write_record,
    write_rollouts,
    write_sidecar,
    write_test_set,
)
from benchmarks.measuring import ROUNDS, ProcessCost, replace_rows
from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import GenerateRollouts, ReadAnnotations, ReadImages, SelectSubset
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import model_files

FACTORS = (1, 2, 4, 8)


def read_images(folder: Path, size: int) -> ProcessCost:
    """Read images into the canonical tables."""
    ((archive, names),) = write_archive(folder / "train_1.zip", size).items()
    record = write_record(folder)
    write_image_subset(folder / "subset.parquet", archive, names)
    outputs = {"images": folder / "images.parquet", "listing": folder / "images.json"}
    config = ReadImages(dataset="imagereward", split="train", shard=0, start=0, stop=None)
    return run("read_images", config, record=record, subset=folder / "subset.parquet", **outputs)


def read_more_images(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Read images into the canonical tables."""
    return 100 * factor, "images", read_images(folder, 100 * factor)


def read_annotations(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Read pairs in the published layout."""
    prompts = 6000 * factor
    record = write_hpdv2_annotations(folder / "hpsv2", prompts)
    config = ReadAnnotations.of(load({}), "hpsv2", "train")
    return 6 * prompts, "pairs", run("read_annotations", config, record=record, preferences=folder / "train.parquet")


def select_subset(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Subsample by pair."""
    c = load({"datasets": {"hpsv2": {"train_fraction": 0.25, "subsample_by": "pair"}}})
    size, unit, _ = read_annotations(folder, factor)
    test = folder / "test.parquet"
    run(
        "read_annotations",
        ReadAnnotations.of(c, "hpsv2", "test"),
        record=folder / "hpsv2/dataset.json",
        preferences=test,
    )
    inputs = {"preferences": folder / "train.parquet", "test_preferences": test, "subset": folder / "subset.parquet"}
    return size, unit, run("select_subset", SelectSubset.of(c, "hpsv2", "train"), **inputs)


def generate_rollouts(folder: Path, images: int, rollouts: int) -> ProcessCost:
    """Generate rollouts with the bundled policy in one process."""
    read_images(folder, images)
    settings = {"rollouts": {"block_size": rollouts}, "scoring": {"report_k": [1]}}
    c = load(settings | {"datasets": {"imagereward": {"test_prompts": images}}})
    manifest = folder / "manifest.json"
    bundled = ROOT / c.policy.bundled
    write_json(manifest, {"path": str(bundled), "files": model_files(bundled)})
    write_sidecar(manifest)
    inputs = {"base": manifest, "subset": folder / "subset.parquet", "images": folder / "images.parquet"}
    config = GenerateRollouts.of(c, "imagereward", "zeroshot", "imagereward", 0, 0, 0)
    return run("generate_rollouts", config, **inputs, rollouts=folder / "rollouts.parquet")


def roll_out_more_items(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Generate one rollout of more items."""
    return 200 * factor, "items", generate_rollouts(folder, 200 * factor, 1)


def roll_out_more_rollouts(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Generate more rollouts of the same items."""
    return 6 * factor, "rollouts of 100 items", generate_rollouts(folder, 100, 6 * factor)


def scoring(folder: Path, prompts: int, rollouts: int, report_k: list[int]) -> tuple[int, ProcessCost, ProcessCost]:
    """Return the pairs of a test set and the costs of its scores and accuracies."""
    settings = {"rollouts": {"blocks": rollouts, "block_size": 1}, "scoring": {"report_k": report_k}}
    judged = write_test_set(folder / "subset.parquet", "hpsv2", prompts)
    write_record(folder)
    recorded = folder / "rollouts.parquet"
    write_rollouts(recorded, "hpsv2", judged, rollouts, 0)
    pairs = sum(len(row["image_ids"]) * (len(row["image_ids"]) - 1) // 2 for row in judged)
    return pairs, *measure_one(load(settings), folder, "hpsv2", "grpo", 0, recorded)


def score_more_rollouts(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Score more rollouts of the same items."""
    _, scored, _ = scoring(folder, 400, 20 * factor, [1])
    return 20 * factor, "rollouts of 3,300 items", scored


def score_more_items(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Score more items."""
    _, scored, _ = scoring(folder, 1600 * factor, 5, [1])
    return 1600 * factor, "prompts", scored


def measure_more_pairs(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Measure accuracies and their bootstrap over more pairs, Mean@1 and Mean@3 of 5 rollouts."""
    pairs, _, measured = scoring(folder, 1600 * factor, 5, [1, 3])
    return pairs, "pairs", measured


def measure_more_rollouts(folder: Path, factor: int) -> tuple[int, str, ProcessCost]:
    """Measure Mean@1 of more rollouts. Mean@k averages over C(K, k) choices, which grows as a power of K."""
    _, _, measured = scoring(folder, 400, 20 * factor, [1])
    return 20 * factor, "rollouts of 3,300 items", measured


# To add a work, write a function of a folder and a factor that returns size, unit and cost.
PARTS: dict[str, Callable[[Path, int], tuple[int, str, ProcessCost]]] = {
    "read_images": read_more_images,
    "read_annotations": read_annotations,
    "select_subset": select_subset,
    "roll_out_more_items": roll_out_more_items,
    "roll_out_more_rollouts": roll_out_more_rollouts,
    "score_more_rollouts": score_more_rollouts,
    "score_more_items": score_more_items,
    "measure_more_pairs": measure_more_pairs,
    "measure_more_rollouts": measure_more_rollouts,
}


def growth(work: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one work: for each size the least disturbed run, the one with the fewest CPU seconds."""
    runs: dict[int, list[tuple[int, str, ProcessCost]]] = {factor: [] for factor in FACTORS}
    for _ in range(rounds):  # all sizes in each round, so that a slowing machine does not bend the line
        for factor in FACTORS:
            with tempfile.TemporaryDirectory() as folder:
                runs[factor].append(PARTS[work](Path(folder), factor))
            print(work, *runs[factor][-1], flush=True)
    found = [min(of_size, key=lambda one: one[2].cpu) for of_size in runs.values()]
    sizes = np.array([size for size, _, _ in found], float)
    cpu = np.array([measured.cpu for _, _, measured in found])
    unit_cost, start = np.polyfit(sizes, cpu, 1)
    before_last = np.polyval(np.polyfit(sizes[:-1], cpu[:-1], 1), sizes[-1])
    return [
        {
            "work": work,
            "factor": factor,
            "size": size,
            "unit": unit,
            "wall_seconds": round(measured.wall, 3),
            "cpu_seconds": round(measured.cpu, 3),
            "peak_megabytes": round(measured.peak_megabytes),
            "start_cpu_seconds": round(start, 3),
            "cpu_microseconds_per_unit": round(1e6 * unit_cost, 2),
            "largest_over_line_percent": round(100 * (cpu[-1] / before_last - 1), 1),
        }
        for factor, (size, unit, measured) in zip(FACTORS, found, strict=True)
    ]


def main() -> None:
    """Measure the selected parts, write results/growth.csv and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    rows = []
    for work in arguments.part:
        rows += growth(work, arguments.rounds)
        replace_rows("growth", ["work"], rows)
    print(tabulate([list(row.values()) for row in rows], headers=list(rows[0])))


if __name__ == "__main__":
    main()

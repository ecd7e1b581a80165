"""Measure data stages against their goals: reading images, subsampling at the published size, bootstrap, tables.

python -m benchmarks.data --part images annotations bootstrap tables

All data are generated. Stages run in their own processes, start included, without tracking. Rows without a goal are for
comparison. CPU seconds of one thread decide whether a goal is reached, because other jobs affect them less than wall
time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.made_up import (
    HPDV2_PROMPTS,
    IMAGEREWARD_PROMPTS,
    write_archive,
    write_hpdv2_annotations,
    write_imagereward_annotations,
    write_record,
    write_rollouts,
    write_sidecar,
    write_test_set,
)
from benchmarks.measuring import ROUNDS, ProcessCost, cost, peak_megabytes, process_cost, replace_rows
from workflow_scripts.configuration.model import Configuration, Dataset, load
from workflow_scripts.configuration.stages import (
    MakeTables,
    MeasureAccuracy,
    ReadAnnotations,
    ScoreRollouts,
    SelectSubset,
    StageConfig,
)
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.archives import iter_images
from workflow_scripts.preferences.images import decoded
from workflow_scripts.preferences.schema import write_images
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.scoring.bootstrap import accuracy_intervals
from workflow_scripts.stages.read_images import stream_images

Row = dict[str, Any]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def run(stage: str, config: StageConfig, *words: Any, **files: Path) -> ProcessCost:
    """Measure a stage by its command line, as a rule runs it."""
    command = [
        sys.executable,
        "-m",
        f"workflow_scripts.stages.{stage}",
        *map(str, words),
        "--config",
        config.canonical(),
    ]
    command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command += ["--code_digest", code_digest(stage)]
    return process_cost(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def start(stage: str) -> ProcessCost:
    """Measure the imports of a stage, with compiled modules."""
    command = [sys.executable, "-c", f"import workflow_scripts.stages.{stage}"]
    process_cost(command, cwd=ROOT, env=ENVIRONMENT)
    return process_cost(command, cwd=ROOT, env=ENVIRONMENT)


def row(what: str, size: str, measured: Any, goal: str = "", reached: bool | str = "") -> Row:
    """Return and print a row of the result."""
    peak = round(measured.peak_megabytes) if isinstance(measured, ProcessCost) else ""
    print(what, size, measured, goal, reached, flush=True)
    return {
        "what": what,
        "size": size,
        "wall_seconds": round(measured.wall, 3),
        "cpu_seconds": round(measured.cpu, 3),
        "peak_megabytes": peak,
        "goal": goal,
        "reached": reached if isinstance(reached, str) else {True: "yes", False: "no"}[reached],
    }


# -------------------------------------------------------------------------------------------------------------- images


def bare_loop(path: Path) -> Iterator[bytes]:
    """Read the bytes of every member with the standard library only."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)
    else:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                yield content.read()


def images(folder: Path, number: int = 400) -> list[Row]:
    """Compare the stage with a loop that only reads and with one that also decodes."""
    rows = []
    for name in ("train_1.zip", "train.tar.gz"):
        path = folder / name
        names = set(write_archive(path, number)[name])
        works: dict[str, Callable[[], object]] = {
            "bare loop": lambda path=path: [len(data) for data in bare_loop(path)],
            "bare loop that decodes": lambda path=path: [decoded(data).size for data in bare_loop(path)],
            "read as the stage does, undecoded": lambda path=path, names=names: [
                len(data)
                for _, data in iter_images(path, names)  # type: ignore[arg-type]
            ],
            "raw to canonical": lambda path=path, names=names: write_images(
                folder / "images.parquet", stream_images({path: names}, {})
            ),
        }
        costs: dict[str, list[Any]] = {work: [] for work in works}
        for _ in range(ROUNDS):
            for work, function in works.items():
                costs[work].append(cost(function))

        def ratio(over: str, costs: dict[str, list[Any]] = costs) -> float:
            pairs = zip(costs[over], costs["raw to canonical"], strict=True)
            return statistics.median(a.cpu / b.cpu for a, b in pairs)

        for work in works:
            median = sorted(costs[work], key=lambda one: one.cpu)[ROUNDS // 2]
            size = f"{number} images of {path.suffix[1:]}, {number / median.cpu:.0f} in a CPU second"
            if work == "raw to canonical":
                floor = ratio("bare loop that decodes")
                rows.append(
                    row(work, size, median, f"0.7 x bare loop: {ratio('bare loop'):.3f} x", ratio("bare loop") >= 0.7)
                )
                rows.append(row(work, size, median, f"0.7 x bare loop that decodes: {floor:.2f} x", floor >= 0.7))
            else:
                rows.append(row(work, size, median))
    print(f"peak {peak_megabytes():.0f} MB")
    return rows


# --------------------------------------------------------------------------------------------------------- annotations


def annotations(folder: Path, prompts: int = HPDV2_PROMPTS) -> list[Row]:
    """Measure reading and subsampling at the published size."""
    rows = []
    for dataset, by_units, record in (
        ("hpsv2", ("prompt", "pair"), write_hpdv2_annotations(folder / "hpsv2", prompts)),
        ("imagereward", ("prompt",), write_imagereward_annotations(folder / "imagereward", IMAGEREWARD_PROMPTS)),
    ):
        rows += annotations_of(dataset, by_units, record, 6 * prompts)  # type: ignore[arg-type]
    return rows


def annotations_of(dataset: Dataset, by_units: tuple[str, ...], record: Path, pairs: int) -> list[Row]:
    """Measure reading and selecting for one data set."""
    place = record.parent
    train, test = place / "train.parquet", place / "test.parquet"
    size = f"{pairs:,} pairs" if dataset == "hpsv2" else f"{6 * IMAGEREWARD_PROMPTS:,} images"
    run("read_annotations", ReadAnnotations.of(load({}), dataset, "test"), record=record, preferences=test)
    read = run("read_annotations", ReadAnnotations.of(load({}), dataset, "train"), record=record, preferences=train)
    rows = [row(f"read_annotations {dataset}", size, read, "1 GB", read.peak_megabytes < 1000)]
    for by in by_units:
        c = load({"datasets": {dataset: {"train_fraction": 0.25, "subsample_by": by}}})
        inputs = {"preferences": train, "test_preferences": test, "subset": place / f"subset-{by}.parquet"}
        selected = run("select_subset", SelectSubset.of(c, dataset, "train"), **inputs)
        reached = selected.cpu < 10 and selected.peak_megabytes < 1000
        rows.append(row(f"select_subset {dataset} by {by}", size, selected, "10 s, 1 GB", reached))
        both = ProcessCost(read.wall + selected.wall, read.cpu + selected.cpu, selected.peak_megabytes)
        reached = both.cpu < 10 and max(read.peak_megabytes, selected.peak_megabytes) < 1000
        rows.append(row(f"both {dataset} by {by}", size, both, "10 s, 1 GB", reached))
    return rows


# ----------------------------------------------------------------------------------------------------------- bootstrap


def credits(prompts: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return credit and pairs of prompts with the given total number of pairs."""
    rng = np.random.default_rng(0)
    counted = np.full(prompts, pairs // prompts, dtype=float)
    counted[: pairs % prompts] += 1
    return rng.binomial(counted.astype(int), 0.6) * 1.0, counted


def bootstrap(folder: Path) -> list[Row]:
    """Measure one interval with 10,000 resamples over the pairs of 2,000 prompts."""
    rows = []
    for average in ("micro", "macro"):
        costs = [
            cost(lambda: accuracy_intervals([credits(2000, 15_300)], average, 0.95, 10_000, 0))  # type: ignore[arg-type]  # noqa: B023
            for _ in range(ROUNDS)
        ]
        median = sorted(costs, key=lambda one: one.cpu)[ROUNDS // 2]
        rows.append(row(f"bootstrap, {average}", "10,000 x 15,300 pairs", median, "2 s", median.cpu < 2))
    return rows


# -------------------------------------------------------------------------------------------------------------- tables


def tables(folder: Path, seeds: int = 5, rollouts: int = 10) -> list[Row]:
    """Measure scores, accuracies and tables for several seeds, zero-shot and trained, on both default test sets."""
    c = load({"seeds": list(range(seeds)), "rollouts": {"blocks": rollouts, "block_size": 1}})
    spent: dict[str, list[ProcessCost]] = {"score_rollouts": [], "measure_accuracy": []}
    accuracies, adapters = [], []
    tests: tuple[tuple[Dataset, int], ...] = (("imagereward", 2000), ("hpsv2", 400))
    for dataset, prompts in tests:
        place = folder / dataset
        place.mkdir(parents=True)
        judged = write_test_set(place / "subset.parquet", dataset, prompts)
        write_record(place)
        write_json(place / "training.json", {"warnings": []})
        for policy in ("zeroshot", "grpo"):
            for seed in range(seeds):
                recorded = place / f"{policy}-{seed}-rollouts.parquet"
                write_rollouts(recorded, dataset, judged, rollouts, 2 * seed + (policy == "grpo"))
                scored, measured = measure_one(c, place, dataset, policy, seed, recorded)
                spent["score_rollouts"].append(scored)
                spent["measure_accuracy"].append(measured)
                accuracies.append(place / f"{policy}-{seed}.json")
                if policy == "grpo":
                    adapters.append(place / f"adapter-{seed}.safetensors")
                    adapters[-1].write_bytes(b"")
                    write_sidecar(adapters[-1], config={"track": dataset, "seed": seed})
    base = folder / "manifest.json"
    write_json(base, {"repository": None, "path": "models/made-up"})
    write_sidecar(base)
    written = {name: folder / f"{name}.csv" for name in ("table1", "table2", "comparisons", "sensitivity")}
    words = [*accuracies, *(word for path in adapters for word in ("--adapters", path))]
    spent["make_tables"] = [
        run("make_tables", MakeTables.of(c), *words, base=base, **written, markdown=folder / "tables.md")
    ]
    size = f"{seeds} seeds, 2 data sets, {rollouts} rollouts"
    rows = [row(stage, f"{size}: {len(costs)} jobs", total(costs)) for stage, costs in spent.items()]
    starts = [(start(stage), len(costs)) for stage, costs in spent.items()]
    imports = total([one for one, jobs in starts for _ in range(jobs)])
    rows.append(row("of these, starting and importing", f"{len(accuracies) * 2 + 1} jobs", imports))
    everything = total([one for costs in spent.values() for one in costs])
    rows.append(row("tables, all jobs one after the other", size, everything, "10 s", everything.cpu < 10))
    without = ProcessCost(everything.wall - imports.wall, everything.cpu - imports.cpu, everything.peak_megabytes)
    rows.append(row("tables, without starting and importing", size, without, "10 s", without.cpu < 10))
    return rows


def measure_one(
    c: Configuration, place: Path, dataset: Dataset, policy: Any, seed: int, recorded: Path
) -> tuple[ProcessCost, ProcessCost]:
    """Measure scores and accuracies of one policy."""
    scores, accuracy = place / f"{policy}-{seed}-scores.parquet", place / f"{policy}-{seed}.json"
    config = ScoreRollouts.of(c, dataset, policy, dataset, seed)
    scored = run("score_rollouts", config, "--rollouts", recorded, scores=scores)
    inputs = {"scores": scores, "subset": place / "subset.parquet", "record": place / "dataset.json"}
    outputs = {"accuracy": accuracy, "prompts": place / f"{policy}-{seed}-prompts.parquet"}
    return scored, run("measure_accuracy", MeasureAccuracy.of(c, dataset, policy, dataset, seed), **inputs, **outputs)


def total(costs: list[ProcessCost]) -> ProcessCost:
    """Return the total cost of sequential processes."""
    return ProcessCost(
        sum(one.wall for one in costs), sum(one.cpu for one in costs), max(one.peak_megabytes for one in costs)
    )


PARTS: dict[str, Callable[[Path], list[Row]]] = {
    "images": images,
    "annotations": annotations,
    "bootstrap": bootstrap,
    "tables": tables,
}


def main() -> None:
    """Measure the selected parts, write results/data.csv and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    rows = []
    for part in parser.parse_args().part:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            measured = [{"part": part, **one} for one in PARTS[part](Path(temporary))]
        replace_rows("data", ["part"], measured)
        rows += measured
        print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(tabulate([list(one.values()) for one in rows], headers=list(rows[0])))


if __name__ == "__main__":
    main()

"""Measure overheads: start-up of every stage, MLflow, a dry run with nothing to do, a rerun after one changed key.

python -m benchmarks.startup --results FOLDER [--before CHECKOUT] [--only WHAT]

FOLDER is a checkout with a finished run of configs/test.yaml; it is copied, never written to, and made if missing
(minutes). `--before` names another checkout of this repository: each measurement alternates between both, and the
columns before_* hold its figures. Other code digests would cause a rerun, so such a checkout cannot serve the dry run
and the rerun.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROUNDS, ProcessCost, in_turn, process_cost, write_rows
from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import STAGES, SelectSubset
from workflow_scripts.files.paths import ROOT

OPTIONS = ["--cores", "all", "--configfile", "configs/test.yaml"]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
LOADS_TORCH = """
import runpy, sys
stage = sys.argv[1]
sys.argv = [stage, "--help"]
try:
    runpy.run_module(f"workflow_scripts.stages.{stage}", run_name="__main__", alter_sys=True)
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def environment(code: Path, tracking: str = "") -> dict[str, str]:
    """Return the environment of a job that runs the code of a checkout."""
    return os.environ | {
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": tracking,
    }


def help_of(stage: str) -> Callable[[Path], ProcessCost]:
    """Measure the start-up of a stage."""
    command = [sys.executable, "-m", f"workflow_scripts.stages.{stage}", "--help"]
    return lambda code: process_cost(command, cwd=code, env=environment(code), **QUIET)


def small_job(run: Path, tracking: str) -> Callable[[Path], ProcessCost]:
    """Measure a tiny job: ordering a few test prompts."""
    configuration = load({"datasets": {"imagereward": {"test_prompts": 10}}})
    data = "results/test/datasets/imagereward/test"
    command = [
        *(sys.executable, "-m", "workflow_scripts.stages.select_subset"),
        *("--preferences", f"{data}/preferences.parquet", "--subset", "ordered/subset.parquet"),
        *("--config", SelectSubset.of(configuration, "imagereward", "test").canonical(), "--code_digest", "none"),
    ]
    return lambda code: process_cost(command, cwd=run, env=environment(code, tracking), **QUIET)


def dry_run(run: Path) -> Callable[[Path], ProcessCost]:
    """Measure the dry run of a finished run."""
    command = [*SNAKEMAKE, "-n", "--quiet", *OPTIONS]
    return lambda code: process_cost([*command, "--snakefile", f"{code}/Snakefile"], cwd=run, **QUIET)


def rerun(run: Path) -> Callable[[Path], ProcessCost]:
    """Measure table 1 with another scoring.report_k, alternating between two values."""
    reported = [[1, 3]]

    def work(code: Path) -> ProcessCost:
        reported.append([1, 2] if reported[-1] == [1, 3] else [1, 3])
        changed = ["--config", f"scoring={json.dumps({'report_k': reported[-1]})}"]
        command = [*SNAKEMAKE, "results/test/table1.csv", "--quiet", *OPTIONS, *changed]
        return process_cost([*command, "--snakefile", f"{code}/Snakefile"], cwd=run, **QUIET)

    return work


def measured(work: Callable[[Path], ProcessCost], codes: dict[str, Path], rounds: int) -> dict[str, float]:
    """Return medians of wall and CPU seconds for each checkout, in alternating order after a warm-up round."""
    costs: dict[str, list[ProcessCost]] = {name: [] for name in codes}
    for name in in_turn(codes, rounds + 1):
        costs[name].append(work(codes[name]))
    return {
        f"{name}{kind}_seconds": round(statistics.median(getattr(cost, kind) for cost in costs[name][1:]), 2)
        for name in codes
        for kind in ("wall", "cpu")
    }


def main() -> None:
    """Measure and write benchmarks/results/startup.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="checkout with a finished run of configs/test.yaml")
    parser.add_argument("--before", type=Path, help="checkout of the code to compare with")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="measure only names that contain this text")
    arguments = parser.parse_args()
    codes = ({"before_": arguments.before.resolve()} if arguments.before else {}) | {"": ROOT}
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        ignored = shutil.ignore_patterns(".git", ".venv*", "mlruns", "mlflow.db*", "__pycache__", ".workflow.lock")
        shutil.copytree(arguments.results or ROOT, run, ignore=ignored)
        if not arguments.results:
            subprocess.run([*SNAKEMAKE, "all", *OPTIONS], cwd=run, check=True, **QUIET)
        store = f"sqlite:///{temporary}/mlflow.db"
        works: list[tuple[str, float | str, Callable[[Path], ProcessCost]]] = [
            *((f"start of {stage}", 1.5, help_of(stage)) for stage in STAGES),
            ("small job without MLflow", "", small_job(run, "")),
            ("small job with MLflow", "", small_job(run, store)),
            ("dry run with nothing to do", 2.5, dry_run(run)),
            ("table 1 of another scoring.report_k", 8, rerun(run)),
        ]
        rows = []
        for what, goal, work in works:
            if arguments.only not in what:
                continue
            torch = ""
            if what.startswith("start of "):
                command = [sys.executable, "-c", LOADS_TORCH, what.removeprefix("start of ")]
                loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                torch = loaded.stderr.split()[-1]
            rows.append({"what": what, **measured(work, codes, arguments.rounds), "goal_seconds": goal, "torch": torch})
            print(rows[-1], flush=True)
            write_rows("startup", rows)


if __name__ == "__main__":
    main()

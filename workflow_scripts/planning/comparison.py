"""What was planned beside what a run has recorded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.targets import measured
from workflow_scripts.planning.devices import PlanError
from workflow_scripts.planning.plan import Plan
from workflow_scripts.planning.report import section


def comparison(p: Plan) -> str:
    """Planned and recorded numbers side by side.

    Raises:
        PlanError: the run has not come so far.
    """
    planned = {stage.name: stage for stage in p.stages}
    rows = []
    for name, recorded in recorded_stages(p.configuration):
        stage = planned[name]
        seconds = sum(cost.seconds for cost in stage.costs.values())
        numbers = {
            "items": stage.asked.items,
            "rollouts": stage.rollouts,
            "tokens": stage.prompt_tokens + stage.completion_tokens,
            "completion tokens": stage.completion_tokens,
            "seconds": seconds,
            "CPU seconds": seconds,
        }
        for key, value in recorded.items():
            rows.append([name, key, f"{numbers[key]:,.0f}", f"{value:,.0f}", f"{numbers[key] / value:.2f}"])
    return section("Planned and recorded", ["stage", "what", "planned", "recorded", "ratio"], rows).lstrip()


def recorded_stages(c: Configuration) -> Iterator[tuple[str, dict[str, float]]]:
    """Stages that a run has recorded, by their names in the plan: items, rollouts, seconds of the first seed."""
    seed = c.seeds[0]
    for track in c.tracks if c.trains() else []:
        adapter = Path(c.results) / f"policies/{track}/seed{seed}/adapter_model.safetensors"
        sidecar = _sidecar(adapter)
        history = json.loads(adapter.with_name("training.json").read_text(encoding="utf-8"))["history"]
        yield (
            f"train_grpo {track}",
            {
                "items": sidecar["metrics"]["training_items"],
                "tokens": [entry["num_tokens"] for entry in history if "num_tokens" in entry][-1],
                "seconds": sidecar["seconds"],
                "CPU seconds": _cpu_seconds(c, f"train_grpo/{track}-seed{seed}.tsv"),
            },
        )
    for track, policy, test in dict.fromkeys(case[:3] for case in measured(c)):
        paths = sorted((Path(c.results) / f"rollouts/{track}/{policy}/seed{seed}/{test}").glob("*.parquet"))
        if not paths:
            continue
        sidecars = [_sidecar(path) for path in paths]
        ids = [len(row) for path in paths for row in pq.read_table(path)["completion_ids"].to_pylist()]
        yield (
            f"generate_rollouts {track} {policy} on {test}",
            {
                "items": sum(s["metrics"]["items"] for s in sidecars) / c.rollouts.blocks,
                "rollouts": sum(s["metrics"]["rollouts"] for s in sidecars),
                "completion tokens": sum(ids),
                "seconds": sum(sidecar["seconds"] for sidecar in sidecars),
                "CPU seconds": _cpu_seconds(c, f"generate_rollouts/{track}-{policy}-seed{seed}-{test}-*.tsv"),
            },
        )


def _sidecar(output: Path) -> dict[str, Any]:
    path = output.with_name(output.name + ".provenance.json")
    if not path.is_file():
        raise PlanError(f"{path} is not there: nothing to compare with; run snakemake with this configuration first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _cpu_seconds(c: Configuration, pattern: str) -> float:
    """Time on the CPU of some jobs, from Snakemake's benchmarks: the same whatever else the machine does."""
    paths = (Path(c.results) / "benchmarks").glob(pattern)
    return sum(float(path.read_text().splitlines()[1].split("\t")[-1]) for path in paths)

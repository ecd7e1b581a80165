"""A plan as tables for people and as JSON for programs."""

import json
import shutil
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.devices import GIGABYTE
from workflow_scripts.planning.plan import Plan

MEMORY = ["weights", "adapter", "optimizer", "kv cache", "activations", "pixels", "workspace", "vLLM"]
WORK = ["jobs", "prompts", "items", "rollouts", "tokens/item", "prompt tokens", "completions", "at most", "PFLOP"]


def report(p: Plan) -> str:
    """Report a plan in tables: policy and GPU, disk, work, memory, hours, warnings."""
    m, c = p.model, p.configuration
    source = c.policy.hub.path or c.policy.hub.repository if c.policy.source == "hub" else c.policy.bundled
    lora = (
        f"; LoRA of rank {m.rank} on {len(m.architecture.adapted(m.target_modules))} layers, {m.adapter:,} parameters"
        if c.trains()
        else ""
    )
    assumed = ", ".join(f"{name} {value:g}" for name, value in p.assumed.model_dump().items())
    return "\n".join(
        [
            f"Policy {source}: {m.architecture.parameters:,} parameters in {m.dtype}, attention {m.attention}{lora}.",
            f"GPU {p.gpu.name}: {p.gpu.flops / 1e12:.4g} TFLOP/s, {p.gpu.memory / GIGABYTE:.4g} GB, "
            f"{p.gpu.bandwidth / 1e9:.4g} GB/s.",
            f"Assumed: {assumed}.",
            _disk(p),
            _work(p),
            _memory(p),
            _hours(p),
            "",
            *(f"WARNING: {text}" for text in p.warnings),
        ]
    ).rstrip()


def _disk(p: Plan) -> str:
    rows = [
        [x.name, x.where, f"{x.download / 1e9:.2f}", f"{x.disk / 1e9:.2f}", "" if x.lasting else "while training"]
        for x in p.artifacts
    ]
    rows.append(
        ["sum", "", *(f"{sum(getattr(x, k) for x in p.artifacts) / 1e9:.2f}" for k in ("download", "disk")), ""]
    )
    free = shutil.disk_usage(ROOT).free / 1e9
    return section(f"Downloads and disk, GB ({free:.0f} free here)", ["what", "where", "download", "disk", ""], rows)


def _work(p: Plan) -> str:
    rows = []
    for s in p.stages:
        about = "" if s.asked.counted else "~"
        counts = [f"{about}{s.asked.prompts:,.0f}", f"{about}{s.asked.items:,.0f}", f"{s.rollouts:,.0f}"]
        tokens = [f"{s.asked.mean:,.0f}", *map(rounded, (s.prompt_tokens, s.completion_tokens, s.at_most))]
        rows.append([s.name, s.jobs, *counts, *tokens, f"{sum(x.flops for x in s.costs.values()) / 1e15:.3g}"])
    title = f"Work for one seed of {len(p.configuration.seeds)} (~: expected from published totals, else counted)"
    return section(title, ["stage", *WORK], rows)


def _memory(p: Plan) -> str:
    room = p.gpu.memory * (1 - p.assumed.memory_reserved)
    rows = []
    for stage in p.stages:
        for phase, parts in stage.memory.items():
            sizes = [*(parts.get(part, 0) for part in MEMORY), sum(parts.values())]
            fits = "fits" if sizes[-1] <= room else "DOES NOT FIT"
            rows.append([stage.name, phase, *(f"{size / GIGABYTE:.2f}" for size in sizes), fits])
    title = f"GPU memory at its peak, GB of {room / GIGABYTE:.1f}"
    return section(title, ["stage", "phase", *MEMORY, "sum", ""], rows)


def _hours(p: Plan) -> str:
    seeds, processes = len(p.configuration.seeds), p.configuration.distributed.processes
    rows, sums = [], [0.0, 0.0]
    for stage in p.stages:
        parts = ", ".join(f"{part} {cost.seconds / 3600:.2g}" for part, cost in stage.costs.items())
        hours = [sum(cost.seconds for cost in stage.costs.values()) / 3600, stage.highest.seconds / 3600]
        sums = [total + one for total, one in zip(sums, hours, strict=True)]
        rows.append([stage.name, parts, *(f"{one:.3g}" for one in hours)])
    rows.append([f"sum x {seeds} seeds", "", *(f"{seeds * total:.3g}" for total in sums)])
    title = "GPU-hours"
    if processes > 1:
        title += f" (a training runs on {processes} GPUs at once: it takes 1/{processes} of its GPU-hours)"
    return section(title, ["stage", "of which", "expected", "at most"], rows)


def section(title: str, header: list[str], rows: list[list[Any]]) -> str:
    """Format a table below its title and an empty line."""
    alignment = ("left",) + ("right",) * (len(header) - 1)
    return f"\n{title}\n{tabulate(rows, header, disable_numparse=True, colalign=alignment)}"


def rounded(value: float) -> str:
    """Three digits with a unit: 1,234,567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def as_json(p: Plan) -> str:
    """Format a plan for programs: bytes, FLOPs and seconds."""

    def without_models(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in items if key not in ("config", "inputs")}

    value = asdict(p, dict_factory=without_models)
    value |= {"configuration": p.configuration.model_dump(mode="json"), "assumed": p.assumed.model_dump()}
    value["model"] |= {"parameters": p.model.architecture.parameters, "adapter": p.model.adapter}
    return json.dumps(value, indent=2)

"""What was measured beside the plan, and the hours that follow from it, as Markdown and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from workflow_scripts.planning.devices import GIGABYTE
from workflow_scripts.planning.plan import Plan, completion_length
from workflow_scripts.preflight.check import Checked, stage_of

HEAD = ["track", "phase", "seconds", "planned", "peak GB", "planned", "tokens/s", "planned"]


@dataclass(frozen=True)
class Report:
    """All that is reported."""

    device: str
    plan: Plan
    planned: bool
    """Whether the plan knows this device."""
    tracks: list[Checked]
    notes: list[str]

    @property
    def misfits(self) -> list[str]:
        """What does not fit, with the key to lower."""
        return [text for track in self.tracks for text in track.misfits]


def planned_phase(r: Report, checked: Checked, phase: str) -> tuple[float, float, float] | None:
    """Seconds, bytes and tokens of one run of a phase by the plan; None where it does not plan it.

    The plan's time for images is in the phases that prepare them, as measured.
    """
    stage, c = stage_of(r.plan, checked.track, phase), r.plan.configuration
    name = phase.split()[0]
    if name == "loading" and name in stage.costs:
        return stage.costs[name].seconds * len(c.seeds) / stage.jobs, 0, 0
    repeats = checked.repeats.get(phase)
    if name not in stage.costs or not repeats:
        return None
    if name == "rollouts":
        repeats = stage.asked.items * c.rollouts.blocks / repeats
    tokens = stage.completion_tokens + (stage.prompt_tokens if name in ("reference", "update") else 0)
    if name == "validation":
        t = getattr(c.training, checked.track)
        length = completion_length(c, r.plan.assumed, checked.track, t.max_completion_tokens)
        tokens = repeats * t.prompts_per_step * t.group_size // 2 * t.validation_rollouts * length.mean
    memory = sum(stage.memory.get("update" if name == "reference" else name, {}).values())
    parts = [name, "images"] if name in ("update", "rollouts") else [name]
    seconds = sum(stage.costs[part].seconds for part in parts if part in stage.costs)
    return seconds / repeats, memory, tokens / repeats


def hours(r: Report) -> Iterator[tuple[str, int, float | None, float]]:
    """Yield each stage of one seed: its name, its jobs, its hours by measurement (None: not measured) and by plan."""
    c = r.plan.configuration
    for stage in r.plan.stages:
        kind, track = stage.name.split()[:2]
        checked = next(one for one in r.tracks if one.track == track)
        repeats: dict[str, float | None] = {"loading": stage.jobs // len(c.seeds)}
        if kind == "train_grpo":
            repeats |= {name: checked.repeats.get(name) for name in ("generation", "update", "validation")}
            if stage.costs["reference"].seconds:
                repeats["reference"] = checked.repeats.get("reference")
        else:
            name = f"rollouts {stage.name.split()[2]}"
            if c.rollouts.engine == "vllm":
                repeats = {f"loading {name}": repeats["loading"]}
            items = checked.repeats.get(name)
            repeats[name] = stage.asked.items * c.rollouts.blocks / items if items else None
        known = [checked.phases[n].seconds * k for n, k in repeats.items() if k is not None and n in checked.phases]
        seconds = sum(known) if len(known) == len(repeats) else None
        planned = sum(cost.seconds for cost in stage.costs.values())
        yield stage.name, stage.jobs // len(c.seeds), None if seconds is None else seconds / 3600, planned / 3600


def markdown(r: Report) -> str:
    """Format the report as Markdown: phases, hours, what does not fit, what was assumed."""
    c = r.plan.configuration
    phases = []
    for checked in r.tracks:
        for name, one in checked.phases.items():
            row = [checked.track, name, f"{one.seconds:.3g}", "", f"{one.peak / GIGABYTE:.2f}", ""]
            row += [f"{one.tokens / one.seconds:,.0f}" if one.tokens else "", ""]
            if planned := planned_phase(r, checked, name):
                seconds, memory, tokens = planned
                row[5] = f"{memory / GIGABYTE:.2f}" if memory else ""
                if r.planned:
                    row[3], row[7] = f"{seconds:.3g}", f"{tokens / seconds:,.0f}" if tokens else ""
            phases.append(row)
    found = list(hours(r))
    rows = [
        [name, jobs, "not measured" if got is None else f"{got:.3g}", f"{plan:.3g}" if r.planned else ""]
        for name, jobs, got, plan in found
    ]
    whole = [got for _, _, got, _ in found]
    total = "" if None in whole else f"{len(c.seeds) * sum(got for got in whole if got):.3g}"
    planned_total = f"{len(c.seeds) * sum(plan for *_, plan in found):.3g}" if r.planned else ""
    rows.append([f"sum x {len(c.seeds)} seeds", "", total, planned_total])
    notes = [f"{checked.track}: {checked.completions}." for checked in r.tracks] + r.notes
    return "\n".join(
        [
            f"# Measured on {r.device}",
            "",
            "One run of each phase, at the sizes of the configuration.",
            "",
            tabulate(phases, HEAD, tablefmt="github", disable_numparse=True),
            "",
            "GPU-hours that follow:" if c.policy.device == "cuda" else "Hours that follow:",
            "",
            tabulate(rows, ["stage of one seed", "jobs", "hours", "planned"], tablefmt="github", disable_numparse=True),
            "",
            *(f"- **{text}**" for text in r.misfits),
            *(f"- {text}" for text in notes),
            "",
        ]
    )


def as_json(r: Report) -> dict[str, Any]:
    """Return the report for programs: seconds, bytes and tokens."""
    return {
        "device": r.device,
        "tracks": [
            {
                "track": checked.track,
                "completions": checked.completions,
                "phases": {
                    name: asdict(one)
                    | {"repeats": checked.repeats.get(name)}
                    | {"planned": dict(zip(("seconds", "peak", "tokens"), planned, strict=True)) if planned else None}
                    for name, one in checked.phases.items()
                    for planned in [planned_phase(r, checked, name) if r.planned else None]
                },
            }
            for checked in r.tracks
        ],
        "hours": [
            {"stage": name, "jobs": jobs, "measured": got, "planned": plan if r.planned else None}
            for name, jobs, got, plan in hours(r)
        ],
        "seeds": len(r.plan.configuration.seeds),
        "does_not_fit": r.misfits,
        "notes": r.notes,
    }

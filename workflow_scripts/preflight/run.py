"""The whole check: the plan for this device, and the measurement of every track beside it."""

import itertools
import re
import shutil
from pathlib import Path

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.planning.devices import CPU, FACTS, GIGABYTE, Assumptions, data_sheet, this_cpu
from workflow_scripts.planning.plan import plan
from workflow_scripts.preflight.check import check_track, without_vllm
from workflow_scripts.preflight.machine import existing
from workflow_scripts.preflight.report import Report
from workflow_scripts.preflight.untrained import Source
from workflow_scripts.running.gpus import Gpu


def check(c: Configuration, assumed: Assumptions, gpus: list[Gpu], start: float, folder: Path) -> Report:
    """Measure every track of a configuration.

    Args:
        c: the configuration.
        assumed: of the plan.
        gpus: those that `check_run` found, the first of which is measured; none on a CPU.
        start: seconds that a job takes before it loads its policy.
        folder: for temporary files.

    Raises:
        PlanError: the policy is not known, or data are not here.
    """
    c, notes = without_vllm(c)
    known = CPU if c.policy.device == "cpu" else device_named(gpus[0].name, gpus[0].total) if gpus else None
    device = this_cpu(c.numeric_threads) if known == CPU else data_sheet(known or "h100-80gb")
    planned = plan(c, device, assumed)
    source = Source.of(c, folder)
    notes += disk(c, sum(artifact.disk for artifact in planned.artifacts))
    if known:
        notes += [f"By the plan, for the longest questions: {text}." for text in planned.warnings]
    else:
        notes.append("The plan knows no data of this GPU, so its seconds are left out (planning/facts.yaml).")
    if source.random:
        notes.append(
            f"Random weights; {'the bundled' if source.stands_in else 'its own'} processor. Images are made, not read."
        )
    if c.distributed.processes > 1:
        notes.append("The share of one process was measured, without communication.")
    if c.policy.device == "cpu":
        notes.append("Seconds are CPU seconds over threads; memory is the highest of the process so far.")
    room = (gpus[0].total if gpus else 0) or device.memory
    tracks = [check_track(source, planned, track, room, start) for track in c.tracks]
    return Report(gpus[0].name if gpus else "this CPU", planned, known is not None, tracks, notes)


def device_named(name: str, memory: float) -> str | None:
    """Return the GPU of facts.yaml that a driver means by a name, such as NVIDIA A100-SXM4-80GB; None if none.

    The words of a key stand in the name, alone or joined; a word such as 80gb is the memory, within a tenth.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    words += [a + b for a, b in itertools.pairwise(words)]

    def matches(word: str) -> bool:
        size = re.fullmatch(r"(\d+)gb", word)
        return abs(memory / GIGABYTE / int(size[1]) - 1) < 0.1 if size else word in words

    fitting = [key for key in FACTS["gpus"] if all(map(matches, key.split("-")))]
    return max(fitting, key=lambda key: key.count("-"), default=None)


def disk(c: Configuration, needed: float) -> list[str]:
    """Say where the plan's files do not fit on the disk, those that are there already counted again."""
    there = existing(Path(c.results))
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [
        f"{there} has {free / 1e9:.0f} GB free, and a whole run writes {needed / 1e9:.0f} GB; set `results` and "
        "`downloads` to folders on a larger disk"
    ]

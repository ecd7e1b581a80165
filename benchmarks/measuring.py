"""Contests: several contestants do the same work in turn, in one run on one machine, and their costs are compared."""

import csv
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROUNDS = 5
RESULTS = Path(__file__).parent / "results"


class Cost(NamedTuple):
    """Wall and CPU seconds of one piece of work; CPU seconds are summed over threads."""

    wall: float
    cpu: float


class ProcessCost(NamedTuple):
    """Cost of a process and its waited-for children; peak memory in MB is that of the largest of them."""

    wall: float
    cpu: float
    peak_megabytes: float


def cost(work: Callable[[], object]) -> Cost:
    """Measure a call in this process, after a garbage collection."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


# A process inherits the peak memory of its parent, so a small process forks the measured one.
FORK = """
import json, os, resource, sys, time
wall = time.perf_counter()
child = os.fork()
if not child:
    os.close(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - wall
with open(int(sys.argv[1]), "w") as file:
    json.dump([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)], file)
"""


def process_cost(command: list[str], **options: Any) -> ProcessCost:
    """Measure a command from start to end.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    receiving, sending = os.pipe()
    launcher = [sys.executable, "-S", "-E", "-c", FORK, str(sending), *command]
    with subprocess.Popen(launcher, pass_fds=[sending], **options) as process:
        os.close(sending)
        with os.fdopen(receiving) as told:
            wall, cpu, peak, status = json.load(told)
    if process.returncode or status:
        raise subprocess.CalledProcessError(status, command)
    return ProcessCost(wall, cpu, peak / (1e6 if sys.platform == "darwin" else 1e3))


def in_turn(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Yield each name once per round, in alternating order."""
    order = list(names)
    for _ in range(rounds):
        yield from order
        order.reverse()


def contest(contestants: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Let contestants do the same work, once to warm up, then `rounds` times in alternating order.

    Returns a row for each contestant: medians of wall and CPU seconds, and `speedup` over the first contestant, the
    median over rounds of the ratio within a round. Changes of the load between rounds do not affect it.
    """
    for work in contestants.values():
        work()
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for name in in_turn(contestants, rounds):
        costs[name].append(cost(contestants[name]))
    return summarised(costs)


def summarised(costs: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a contest from the costs of each contestant by round."""
    first = next(iter(costs.values()))
    return [
        {
            "contestant": name,
            "wall_seconds": round(statistics.median(c.wall for c in own), 4),
            "cpu_seconds": round(statistics.median(c.cpu for c in own), 4),
            "speedup_wall": round(statistics.median(a.wall / b.wall for a, b in zip(first, own, strict=True)), 2),
            "speedup_cpu": round(statistics.median(a.cpu / b.cpu for a, b in zip(first, own, strict=True)), 2),
            "rounds": len(own),
        }
        for name, own in costs.items()
    ]


def machine() -> dict[str, str]:
    """Return the properties of this machine that affect results: processor, cores, memory, versions."""
    import numpy
    import pyarrow
    import torch
    import transformers
    import trl

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(psutil.cpu_count(logical=True)),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, trl, numpy, pyarrow)},
    }


def peak_megabytes() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def replace_rows(name: str, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write rows to results/<name>.csv; they replace rows with the same values in `columns`."""
    path = RESULTS / f"{name}.csv"
    measured = {tuple(str(row[column]) for column in columns) for row in rows}
    kept: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[column] for column in columns) not in measured]
    write_rows(name, kept + rows)


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a benchmark to results/<name>.csv."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

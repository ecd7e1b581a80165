"""Jobs behind a report, from their sidecars: settings, time, memory and code."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from workflow_scripts.files.instances import INSTANCE_KEYS, flat
from workflow_scripts.running.provenance import read_sidecar, sidecar_path


def jobs_behind(sidecars: dict[str, Any]) -> list[dict[str, Any]]:
    """Sidecars of all jobs that these jobs depend on, directly or not, where the files still exist."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(sidecars.values())
    while waiting:
        sidecar = waiting.pop()
        if sidecar["stage_key"] not in found:
            found[sidecar["stage_key"]] = sidecar
            waiting += [read_sidecar(Path(name)) for name in sidecar["inputs"] if sidecar_path(Path(name)).is_file()]
    return sorted(found.values(), key=lambda sidecar: sidecar["started"])


def settings(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings by stage, in the order of execution: each key with its value, or with all values where jobs differ."""
    stages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for job in jobs:
        stages[job["stage"]].append(flat(job["config"]))
    found = []
    for name, configs in stages.items():
        keys = list(dict.fromkeys(key for config in configs for key in config))
        rows = []
        for key in keys:
            values = {json.dumps(config[key], ensure_ascii=False): config[key] for config in configs if key in config}
            plain = [value if isinstance(value, str) else text for text, value in values.items()]
            rows.append((key, "\n".join(sorted(plain) if key in INSTANCE_KEYS else plain)))
        found.append({"name": name, "jobs": len(configs), "settings": rows})
    return found


def provenance_table(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Jobs, time, memory and code by stage, with the dates and commits of all jobs."""
    frame = pd.DataFrame(
        [{k: job[k] for k in ("stage", "seconds", "peak_memory_megabytes", "code_digest")} for job in jobs]
    )
    rows = [
        [
            stage,
            str(len(group)),
            f"{group['seconds'].sum():.0f}",
            str(group["peak_memory_megabytes"].max()),
            ", ".join(sorted(set(group["code_digest"]))),
        ]
        for stage, group in frame.groupby("stage", sort=False)
    ]
    commits = sorted({job["git_commit"] or "no checkout" for job in jobs})
    return {
        "lead": f"{len(jobs)} jobs, {frame['seconds'].sum() / 60:.0f} minutes together, started between "
        f"{jobs[0]['started'][:16]} and {jobs[-1]['started'][:16]} UTC. Commit: {', '.join(commits)}. Each result has "
        "its provenance beside it, in a file that ends in .provenance.json.",
        "caption": "Jobs behind this report",
        "columns": ["stage", "jobs", "seconds", "memory, MB", "code digest"],
        "rows": rows,
        "heads": 1,
    }

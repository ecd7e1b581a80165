"""Compare what `check-gpu` extrapolates with what a finished run of the same configuration has recorded.

python -m benchmarks.check_gpu              # results/check_gpu.csv, after `snakemake --cores 1 results/table1.csv`

Both are CPU seconds of each stage of the first seed: those of Snakemake's benchmarks, and the median of several
checks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.measuring import write_rows
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.comparison import recorded_stages

ROUNDS = 3


def extrapolated(configfiles: list[Path]) -> dict[str, float]:
    """Return the seconds of each stage that one check extrapolates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "workflow_scripts", "check-gpu", "--output", f"{folder}/check-gpu"]
        command += [word for path in configfiles for word in ("--configfile", str(path))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "check-gpu.json").read_text(encoding="utf-8"))
    return {stage["stage"]: 3600 * stage["measured"] for stage in report["hours"]}


def main() -> None:
    """Check several times, compare, and write results/check_gpu.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="overlays; results are looked for here")
    arguments = parser.parse_args()
    recorded = {
        name: numbers["CPU seconds"] for name, numbers in recorded_stages(read_configuration(arguments.configfile))
    }
    checks: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        found = extrapolated(arguments.configfile)
        for name, seconds in (found | {"sum": sum(found.values())}).items():
            checks[name].append(seconds)
    recorded["sum"] = sum(recorded.values())
    rows = [
        {
            "stage": name,
            "recorded_cpu_seconds": round(recorded[name], 1),
            "extrapolated_cpu_seconds": round(statistics.median(seconds), 1),
            "ratio": round(statistics.median(seconds) / recorded[name], 2),
            "lowest_ratio": round(min(seconds) / recorded[name], 2),
            "highest_ratio": round(max(seconds) / recorded[name], 2),
            "rounds": len(seconds),
        }
        for name, seconds in checks.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    write_rows("check_gpu", rows)


if __name__ == "__main__":
    main()

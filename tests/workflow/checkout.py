"""A checkout of the repository where the workflow runs for real."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.arithmetic import VARIABLES

NOT_COPIED = (".git", ".venv*", ".*_cache", ".hypothesis", ".snakemake", "__pycache__", "*.egg-info")
MADE = ("results", "mlflow.db*", "mlruns", "mlartifacts")


class PlannedJob(NamedTuple):
    """A job that a dry run announces; `reruns` where any of its outputs is there already."""

    rule: str
    outputs: tuple[str, ...]
    reruns: bool


@dataclass
class Workflow:
    """A checkout with the results, the tracking store and Snakemake's own state in it, all at their default places."""

    folder: Path

    @classmethod
    def checkout(cls, folder: Path) -> "Workflow":
        """Return a new checkout of this repository's files, nothing run in it."""
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED, *MADE))
        return cls(folder)

    def copy(self, folder: Path) -> "Workflow":
        """Return a copy of everything, file times included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workflow(folder)

    @property
    def results(self) -> Path:
        """Folder of the results."""
        return self.folder / "results" / "test"

    @property
    def uri(self) -> str:
        """Tracking store."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def snakemake(
        self, *options: str, config: tuple[str, ...] = (), overlay: dict[str, Any] | None = None, **variables: str
    ) -> str:
        """Run Snakemake in the checkout with configs/test.yaml, an overlay and `--config`; return all it says."""
        command = [sys.executable, "-m", "snakemake", *options, "--configfile", "configs/test.yaml"]
        if overlay:
            (self.folder / ".overlay.yaml").write_text(yaml.safe_dump(overlay))
            command += [".overlay.yaml"]
        command += ["--config", *config] if config else []
        done = subprocess.run(command, cwd=self.folder, env=environment() | variables, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    def planned(self, config: str | None = None, overlay: dict[str, Any] | None = None) -> list[PlannedJob]:
        """Jobs that `snakemake -n` announces."""
        said = self.snakemake("-n", config=(config,) if config else (), overlay=overlay)
        jobs = []
        for block in re.split(r"^rule ", said, flags=re.M)[1:]:
            lines = block.splitlines()
            for line in lines:
                if line.startswith("    output: "):
                    outputs = tuple(line.removeprefix("    output: ").split(", "))
                    jobs.append(
                        PlannedJob(lines[0].rstrip(":"), outputs, any((self.folder / o).exists() for o in outputs))
                    )
        assert jobs or "Nothing to be done" in said, said
        return jobs

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Rule and outputs of each job, by its log file, as Snakemake lists them."""
        found: dict[str, dict[str, Any]] = {}
        lines = self.snakemake("--summary", "--quiet").splitlines()
        header = next(i for i, line in enumerate(lines) if line.startswith("output_file\t"))
        for line in lines[header + 1 :]:
            if line.count("\t") == lines[header].count("\t"):
                row = dict(zip(lines[header].split("\t"), line.split("\t"), strict=True))
                job = found.setdefault(row["log-file(s)"], {"rule": row["rule"], "outputs": []})
                job["outputs"].append(self.folder / row["output_file"])
        return found


def environment() -> dict[str, str]:
    """Environment of a fresh shell: no package and no instruction set of this process's, the configured store."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI", *VARIABLES)}

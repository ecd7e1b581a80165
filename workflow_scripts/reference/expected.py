"""Commit the tables of a finished run as what its configuration is expected to give: writes tests/expected/{name}/.

python -m workflow_scripts.reference.expected test    # of configs/test.yaml; `default`: of config.yaml

`make expected NAME=test` makes the run first, and then the pages that show the tables. Run it where snakemake ran.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import ADAPTER
from workflow_scripts.reporting.expectation import (
    EXPECTED,
    KEYS,
    RUN,
    check_made_with,
    compared_files,
    file_digests,
    processors_of,
    settings_digest,
)
from workflow_scripts.running.command_line import tell_briefly

TRAININGS, VALIDATION = "trainings.csv", "eval_soft_pair_accuracy"


class SeveralProcessorsError(ValueError):
    """Results that several processors made: nobody could make them again on one."""


def configuration_of(name: str) -> Configuration:
    """Configuration that an expectation is named after.

    Raises:
        ConfigurationError: there is no such overlay.
    """
    return read_configuration([] if name == "default" else [ROOT / "configs" / f"{name}.yaml"])


def training_in_short(name: str, results: Path) -> dict[str, Any]:
    """What tells a stable training: its largest KL divergence, gradient norms, and every validation with its error."""
    track, seed = Path(name).parts[1:3]
    history = json.loads((results / name).with_name("training.json").read_text(encoding="utf-8"))["history"]
    gradients = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    row: dict[str, Any] = {"track": track, "seed": seed.removeprefix("seed")}
    row |= {"largest_kl": max(entry["kl"] for entry in history if "kl" in entry)}
    row |= {"median_gradient": median(gradients), "largest_gradient": max(gradients)}
    for entry in history:
        if VALIDATION in entry:
            name = f"validation@{entry['step']}"
            row |= {name: entry[VALIDATION], f"{name}_se": entry[f"{VALIDATION}_se"]}
    return row


def write_expectation(configuration: Configuration, results: Path, folder: Path) -> None:
    """Write the expectation of a configuration from a finished results folder.

    Raises:
        ProvenanceError: a file is missing, is not what its stage wrote, or was made with other settings or code.
        SeveralProcessorsError: the files were made on different processors.
    """
    check_made_with(configuration, results)
    files = compared_files(configuration)
    processor, *others = processors_of(results, files)
    if others:
        raise SeveralProcessorsError(
            f"{results} was made on {processor} and on {others[0]}; delete it and run snakemake on one machine"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for table in KEYS:
        shutil.copyfile(results / f"{table}.csv", folder / f"{table}.csv")
    adapters = [name for name in files if name.endswith(ADAPTER)]
    trainings = pd.DataFrame([training_in_short(name, results) for name in adapters])
    trainings.round(5).to_csv(folder / TRAININGS, index=False)
    settings, digests = settings_digest(configuration), file_digests(results, files)
    write_json(folder / RUN, {"settings": settings, "processor": processor, "files": digests})


if __name__ == "__main__":
    sys.excepthook = tell_briefly
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="default, or an overlay configs/{name}.yaml")
    parser.add_argument("--results", type=Path, help="results folder; by default that of the configuration")
    arguments = parser.parse_args()
    chosen = configuration_of(arguments.name)
    write_expectation(chosen, arguments.results or Path(chosen.results), EXPECTED / arguments.name)

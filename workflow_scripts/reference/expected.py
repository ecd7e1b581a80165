"""Commit the tables of a finished run as what its configuration is expected to give: writes tests/expected/{name}/.

python -m workflow_scripts.reference.expected test    # of configs/test.yaml; `default`: of config.yaml

`make expected NAME=test` makes the run first, and then the pages that show the tables. Run it where snakemake ran.
"""

import argparse
import shutil
import sys
from pathlib import Path

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
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


class SeveralProcessorsError(ValueError):
    """Results that several processors made: nobody could make them again on one."""


def configuration_of(name: str) -> Configuration:
    """Configuration that an expectation is named after.

    Raises:
        ConfigurationError: there is no such overlay.
    """
    return read_configuration([] if name == "default" else [ROOT / "configs" / f"{name}.yaml"])


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

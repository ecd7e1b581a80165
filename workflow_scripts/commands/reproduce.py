"""`reproduce`: say cell by cell whether results have the committed digits."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from workflow_scripts.commands.plan import split_settings
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import parse_changes, read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.reporting import expectation
from workflow_scripts.running.command_line import Command


class Reproduce(Command):
    """Say cell by cell whether finished results are the published tables.

    These are in tests/expected/, in a folder for each configuration. Exits with 1 where a cell differs or nothing can
    be compared; notes are not compared, and adapters, rollouts and scores with other bytes are only named. Run it where
    you run snakemake.

    example: python -m workflow_scripts reproduce --configfile configs/test.yaml
    """

    results: Path | None = None
    """Results folder; by default that of the configuration."""
    configfile: list[Path] = Field([])
    """Overlay that the results were made with; repeat the option for several."""
    config: Annotated[list[str], NoDecode, BeforeValidator(split_settings)] = Field([])
    """Change `key=value` that they were made with, as of snakemake; repeat the option for several."""

    def cli_cmd(self) -> None:
        """Print what differs; exit with 1 where a table does."""
        configuration = read_configuration(self.configfile, parse_changes(self.config))
        results = self.results or Path(configuration.results)
        if not (folder := expectation.expectation_of(configuration)):
            where = expectation.EXPECTED.relative_to(ROOT)
            sys.exit(f"error: {where} has no published table of this configuration, so there is nothing to compare")
        expectation.check_made_with(configuration, results)
        comparison = expectation.compare(results, folder)
        print(report(comparison))
        sys.exit(int(bool(comparison.cells)))


def report(comparison: expectation.Comparison) -> str:
    """Every cell and every file that differs, and whether the digits were verified on the processors used."""
    from tabulate import tabulate

    parts = []
    if comparison.cells:
        parts.append(tabulate(comparison.cells, headers=expectation.Difference._fields, disable_numparse=True))
    if comparison.files:
        parts.append("\n".join(["other bytes:", *(f"  {name}" for name in comparison.files)]))
    for processor in comparison.processors:
        known = expectation.is_verified(processor)
        made_by = "made by {name} ({vendor}, {instructions})".format(**processor)
        parts.append(f"{made_by}, {'on which the digits were verified' if known else 'where digits may differ'}")
    return "\n\n".join([*parts, comparison.summary()])


def one_line(configuration: Configuration) -> str:
    """Say in one line whether the tables of a finished run are the published ones; empty where none are published."""
    results = Path(configuration.results)
    try:
        folder = expectation.expectation_of(configuration)
        if not folder or not (results / "table1.csv").is_file():
            return ""
        expectation.check_made_with(configuration, results)
        comparison = expectation.compare(results, folder)
    except ProvenanceError as error:
        return f"not compared with the published table: {error}"
    words = ["python", "-m", "workflow_scripts", "reproduce", "--results", str(results)]
    if folder.name != "default":
        words += ["--configfile", f"configs/{folder.name}.yaml"]
    differ = comparison.cells or comparison.files
    return comparison.summary() + (f"; all differences: {shlex.join(words)}" if differ else "")

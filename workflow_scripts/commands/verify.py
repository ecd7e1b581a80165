"""`verify`: check every file of a results folder against its sidecar, its inputs and the configuration."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration.model import Configuration, ConfigurationError
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.running.command_line import Command, UsageError
from workflow_scripts.running.mismatches import add_followers, altered_outputs, other_inputs, other_settings
from workflow_scripts.running.provenance import SUFFIX, read_sidecar, sidecar_path, sidecars
from workflow_scripts.running.recorded_files import RECORDS, altered_files


class Verify(Command):
    """Check a whole results folder: is every file what its stage wrote, from the inputs that are there, as configured?

    Prints what does not fit and exits with 1 where there is anything. Run it where you run snakemake: the paths in
    provenance files start there. A results folder of another configuration within the folder, such as
    results/three-seeds in results, is left out.

    example: python -m workflow_scripts verify results/three-seeds --configfile configs/three_seeds.yaml
    """

    folder: CliPositionalArg[Path]
    """Results folder."""
    configfile: list[Path] = Field([])
    """Overlay that the results were made with; repeat the option for several."""
    remove: bool = False
    """Delete the outputs of every job that does not fit, and print the command that makes them anew."""

    def cli_cmd(self) -> None:
        """Print a table of what does not fit; exit with 1 where there is anything."""
        from workflow_scripts.configuration.overlays import read_configuration

        try:
            configuration = read_configuration(self.configfile)
        except ConfigurationError as error:
            raise UsageError(str(error)) from None
        if self.folder.resolve() != Path(configuration.results).resolve():
            other = f"{self.folder} is not the results folder of this configuration, {configuration.results}"
            if self.remove:
                raise UsageError(f"{other}; name its overlays by --configfile, or nothing would fit")
            print(f"note: {other}; --configfile names its overlays\n")
        if not sidecars(self.folder):
            raise UsageError(f"{self.folder} holds no provenance files; is it a results folder?")
        jobs, reasons = misfits(self.folder, configuration)
        if self.remove:
            remove(jobs, reasons)
        self.tell(jobs, reasons)
        sys.exit(int(any(reasons.values())))

    def tell(self, jobs: dict[Path, dict[str, Any]], reasons: dict[Path, list[str]]) -> None:
        """Print counts by stage, every reason, and what to do."""
        from tabulate import tabulate

        wrong = [output for output in jobs if reasons[output]]
        by_stage = Counter(jobs[output]["stage"] for output in wrong)
        checked = Counter(job["stage"] for job in jobs.values())
        counts = [(stage, number, by_stage[stage]) for stage, number in checked.items()]
        print(tabulate(counts, headers=["stage", "jobs checked", "do not fit"]))
        if not wrong:
            return
        rows = [(output.relative_to(self.folder), reason) for output in wrong for reason in reasons[output]]
        print("\n" + tabulate(rows, headers=["file", "why it does not fit"]))
        print(f"\n{len(wrong)} of {len(jobs)} jobs do not fit.", end=" ")
        if self.remove:
            # By name: Snakemake does not miss a file from the middle where what was made from it is there.
            overlays = ["--configfile", *map(str, self.configfile)] if self.configfile else []
            command = ["snakemake", "--cores", "all", *map(str, wrong), *overlays]
            print(f"They are deleted. To make them anew:\n  {shlex.join(command)}\nThen run snakemake as always.")
        else:
            print("Add --remove to delete them.")


def misfits(folder: Path, configuration: Configuration) -> tuple[dict[Path, dict[str, Any]], dict[Path, list[str]]]:
    """Sidecar of every job of a results folder, and why it does not fit (nothing where it does), by first output."""
    jobs, reasons = dict[Path, dict[str, Any]](), dict[Path, list[str]]()
    stale = set[Path]()
    for path in sidecars(folder):
        output = path.with_name(path.name.removesuffix(SUFFIX))
        try:
            jobs[output] = sidecar = read_sidecar(output)
            settings = other_settings(configuration, sidecar)
            recorded = altered_files(output) if output.name in RECORDS and output.is_file() else []
            reasons[output] = altered_outputs(output, sidecar) + recorded + other_inputs(sidecar) + settings
            stale |= {(output.parent / name).resolve() for name in sidecar["outputs"] if settings}
        except ProvenanceError as error:
            jobs[output], reasons[output] = {"stage": "?", "outputs": [output.name], "inputs": {}}, [str(error)]
    add_followers(jobs, reasons, stale)
    return jobs, reasons


def remove(jobs: dict[Path, dict[str, Any]], reasons: dict[Path, list[str]]) -> None:
    """Delete the outputs and the sidecar of every job that does not fit."""
    for output in jobs:
        if reasons[output]:
            for name in jobs[output]["outputs"]:
                (output.parent / name).unlink(missing_ok=True)
            sidecar_path(output).unlink()

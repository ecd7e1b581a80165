"""Check a whole results folder: is every file what its stage wrote, from the inputs that are there, as configured?

python -m workflow_scripts verify results
python -m workflow_scripts verify results/three-seeds --configfile configs/three_seeds.yaml

Prints what does not fit and exits with 1 where there is anything. `--remove` deletes these files and prints the command
that makes them anew. Run it where you run snakemake: the paths in provenance files start there. A results folder of
another configuration within the folder, such as results/three-seeds in results, is left out.
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config
from tabulate import tabulate

from workflow_scripts.configuration.model import Configuration, ConfigurationError, load
from workflow_scripts.configuration.stages import same_instance
from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.instances import flat
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.provenance import SUFFIX, read_sidecar, sidecar_path, sidecars


def altered_outputs(output: Path, sidecar: dict[str, Any]) -> list[str]:
    """Outputs of a job that are missing or, by content, not what its stage wrote."""
    found = []
    for name, record in sidecar["outputs"].items():
        path = output.parent / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != record["bytes"] or file_digest(path) != record["sha256"]:
            found.append(f"{name} is not what its stage wrote")
    return found


def other_inputs(sidecar: dict[str, Any]) -> list[str]:
    """Inputs of a job of which there is another version now; one that is no longer there cannot be compared."""
    found = []
    for name, sha256 in sidecar["inputs"].items():
        path = Path(name)
        if path.is_file() and file_digest(path) != sha256:
            found.append(f"made from another {name}")
    return found


def other_settings(configuration: Configuration, sidecar: dict[str, Any]) -> list[str]:
    """What this configuration and this code ask of a stage that differs from what a sidecar says it ran with."""
    expected = same_instance(configuration, sidecar["stage"], sidecar["config"]).model_dump(mode="json")
    asked, ran = flat(expected), flat(sidecar["config"])
    found = [
        f"made with {key} = {json.dumps(ran.get(key))}, now {json.dumps(asked.get(key))}"
        for key in sorted(asked.keys() | ran.keys())
        if asked.get(key) != ran.get(key)
    ]
    if sidecar["code_digest"] != code_digest(sidecar["stage"], expected.get("engine", "transformers")):
        found.append(f"made by other code of {sidecar['stage']}")
    return found


def add_followers(jobs: dict[Path, dict[str, Any]], reasons: dict[Path, list[str]], stale: set[Path]) -> None:
    """Give a reason to whatever was made from an output with other settings, however many stages later.

    Args:
        jobs: sidecars by first output.
        reasons: why a job does not fit, by first output; added to.
        stale: outputs of jobs with other settings, resolved; added to.
    """
    waiting = set(jobs)
    while followers := {
        output: old for output in waiting if (old := [n for n in jobs[output]["inputs"] if Path(n).resolve() in stale])
    }:
        for output, old in followers.items():
            reasons[output] += [f"made from {name}, which does not fit" for name in old]
            stale |= {(output.parent / name).resolve() for name in jobs[output]["outputs"]}
        waiting -= followers.keys()


def refuse_unrecorded(
    configuration: Configuration, outputs: Iterable[str], is_recorded: Callable[[str], bool]
) -> list[str]:
    """Stop where parts of the tables were made with other settings and Snakemake cannot know.

    Snakemake compares settings with its own record in .snakemake/. Where that is lost, or results were copied here
    without it, it takes any file for up to date. The provenance files know better.

    Args:
        configuration: the one that is asked for.
        outputs: files that the tables are made from; those before them are found in their provenance.
        is_recorded: whether Snakemake has a record of a file.

    Returns:
        Nothing: a rule can call this as one of its input functions.

    Raises:
        ProvenanceError: names every file with what differs, and the remedy.
    """
    waiting, seen, found = list(outputs), set(), []
    while waiting:
        name = waiting.pop()
        if name in seen or not Path(name).is_file() or not Path(f"{name}{SUFFIX}").is_file():
            continue
        seen.add(name)
        sidecar = read_sidecar(Path(name))
        waiting += sidecar["inputs"]
        if not is_recorded(name):
            found += [f"  {name}: {reason}" for reason in other_settings(configuration, sidecar)]
    if found:
        raise ProvenanceError(
            "\n".join(
                [
                    "these results were made with other settings, and Snakemake's own record of them (.snakemake/) is "
                    "not here, so it would take them for up to date:",
                    *sorted(found),
                    "Set the configuration that they were made with, or delete them (python -m "
                    "workflow_scripts.commands.verify --remove, with the same --configfile) and run snakemake again.",
                ]
            )
        )
    return []


def read_configuration(files: list[Path]) -> Configuration:
    """config.yaml of the repository with overlays on it, as Snakemake merges them."""
    merged: dict[str, Any] = {}
    for path in (ROOT / "config.yaml", *files):
        with path.open(encoding="utf-8") as file:  # whose name YAML's errors say
            update_config(merged, yaml.safe_load(file) or {})
    return load(merged)


def main() -> int:
    """Print a table of what does not fit; 1 where there is anything."""
    from workflow_scripts.running.command_line import (
        tell_briefly,  # here, so that no dry run loads what reads command lines
    )

    sys.excepthook = tell_briefly
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results folder")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="overlays that the results are of")
    parser.add_argument("--remove", action="store_true", help="delete the outputs of every job that does not fit")
    arguments = parser.parse_args()
    try:
        configuration = read_configuration(arguments.configfile)
    except (ConfigurationError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    if arguments.folder.resolve() != Path(configuration.results).resolve():
        other = f"{arguments.folder} is not the results folder of this configuration, {configuration.results}"
        if arguments.remove:
            parser.error(f"{other}; name its overlays by --configfile, or nothing would fit")
        print(f"note: {other}; --configfile names its overlays\n")
    found = sidecars(arguments.folder)
    if not found:
        parser.error(f"{arguments.folder} holds no provenance files; is it a results folder?")
    jobs, reasons = dict[Path, dict[str, Any]](), dict[Path, list[str]]()
    stale = set[Path]()
    for path in found:
        output = path.with_name(path.name.removesuffix(SUFFIX))
        try:
            jobs[output] = sidecar = read_sidecar(output)
            settings = other_settings(configuration, sidecar)
            reasons[output] = altered_outputs(output, sidecar) + other_inputs(sidecar) + settings
            stale |= {(output.parent / name).resolve() for name in sidecar["outputs"] if settings}
        except ProvenanceError as error:
            jobs[output], reasons[output] = {"stage": "?", "outputs": [output.name], "inputs": {}}, [str(error)]
    add_followers(jobs, reasons, stale)
    misfits = [output for output in jobs if reasons[output]]
    if arguments.remove:
        for output in misfits:
            for name in jobs[output]["outputs"]:
                (output.parent / name).unlink(missing_ok=True)
            sidecar_path(output).unlink()
    checked = Counter(job["stage"] for job in jobs.values())
    wrong = Counter(jobs[output]["stage"] for output in misfits)
    rows = [(output.relative_to(arguments.folder), reason) for output in misfits for reason in reasons[output]]
    counts = [(stage, number, wrong[stage]) for stage, number in checked.items()]
    print(tabulate(counts, headers=["stage", "jobs checked", "do not fit"]))
    if rows:
        print("\n" + tabulate(rows, headers=["file", "why it does not fit"]))
        print(f"\n{len(misfits)} of {len(found)} jobs do not fit.", end=" ")
        if arguments.remove:
            # By name: Snakemake does not miss a file from the middle where what was made from it is there.
            overlays = ["--configfile", *map(str, arguments.configfile)] if arguments.configfile else []
            command = ["snakemake", "--cores", "all", *map(str, misfits), *overlays]
            print(f"They are deleted. To make them anew:\n  {shlex.join(command)}\nThen run snakemake as always.")
        else:
            print("Add --remove to delete them.")
    return int(bool(rows))


if __name__ == "__main__":
    sys.exit(main())

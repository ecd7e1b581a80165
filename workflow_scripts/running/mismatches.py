"""Results that do not fit: changed files, other inputs, other settings or other code than a sidecar says."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import same_instance
from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.instances import flat
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.provenance import SUFFIX, read_sidecar


def altered_outputs(output: Path, sidecar: dict[str, Any]) -> list[str]:
    """Outputs of a job that are missing or whose content differs from what its stage wrote."""
    found = []
    for name, record in sidecar["outputs"].items():
        path = output.parent / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != record["bytes"] or file_digest(path) != record["sha256"]:
            found.append(f"{name} is not what its stage wrote")
    return found


def other_inputs(sidecar: dict[str, Any]) -> list[str]:
    """Inputs of a job that have another content now; an input that is gone cannot be compared."""
    found = []
    for name, sha256 in sidecar["inputs"].items():
        path = Path(name)
        if path.is_file() and file_digest(path) != sha256:
            found.append(f"made from another {name}")
    return found


def other_settings(configuration: Configuration, sidecar: dict[str, Any]) -> list[str]:
    """Keys and code of a stage that differ between this configuration and the sidecar of a job."""
    expected = same_instance(configuration, sidecar["stage"], sidecar["config"])
    asked, ran = flat(expected.model_dump(mode="json")), flat(sidecar["config"])
    found = [
        f"made with {key} = {json.dumps(ran.get(key))}, now {json.dumps(asked.get(key))}"
        for key in sorted(asked.keys() | ran.keys())
        if asked.get(key) != ran.get(key)
    ]
    if sidecar["code_digest"] != code_digest(sidecar["stage"], expected.code_engine):
        found.append(f"made by other code of {sidecar['stage']}")
    return found


def add_followers(jobs: dict[Path, dict[str, Any]], reasons: dict[Path, list[str]], stale: set[Path]) -> None:
    """Give a reason to every job that used an output with other settings, however many stages later.

    Args:
        jobs: sidecars by first output.
        reasons: why a job does not fit, by first output; extended here.
        stale: outputs of jobs with other settings, resolved; extended here.
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
    """Stop where parts of the tables were made with other settings and Snakemake cannot tell.

    Snakemake compares settings with its own record in .snakemake/. Where that is lost, or results were copied without
    it, Snakemake takes any file for up to date. The provenance files record the settings.

    Args:
        configuration: the one to compare with.
        outputs: inputs of the tables; their provenance leads to the files before them.
        is_recorded: whether Snakemake has a record of a file.

    Returns:
        An empty list, so that a rule can call this as an input function.

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
                    "workflow_scripts verify --remove, with the same --configfile) and run snakemake again.",
                ]
            )
        )
    return []

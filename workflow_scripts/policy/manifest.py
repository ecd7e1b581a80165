"""The manifest of the base policy: its files with their digests, and checks that files and adapters belong to it."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import Policy
from workflow_scripts.files.paths import ROOT, from_here
from workflow_scripts.files.records import file_record, is_as_recorded
from workflow_scripts.running.provenance import sidecar_path

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT names them

# Weights as safetensors only, because loading a pickle runs code; no *.py, because a model's own code is never run.
NEEDED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


class PolicyError(RuntimeError):
    """A policy cannot be used for this task: the message says why and what to change."""


def needed_files(folder: Path) -> list[Path]:
    """Files of a model folder that loading may read, by name."""
    return sorted(path for pattern in NEEDED for path in folder.glob(pattern) if "provenance" not in path.name)


def bundled_files(policy: Policy) -> list[str]:
    """Files of the bundled policy as inputs of a rule: each of them changes what the policy answers. Else none."""
    return from_here(needed_files(ROOT / policy.bundled)) if policy.source == "bundled" else []


def base_files(folder: Path) -> list[Path]:
    """Files of a base policy's folder that loading may read, by name.

    Raises:
        PolicyError: there are no weights as safetensors, or the folder holds an adapter.
    """
    paths = needed_files(folder)
    names = [path.name for path in paths]
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern))
        raise PolicyError(
            f"{folder} holds no *.safetensors{f', only {pickled}, which are not loaded' if pickled else ''}; set "
            "policy.source and policy.bundled or policy.hub to a model folder with weights as safetensors"
        )
    if ADAPTER_CONFIG in names:
        raise PolicyError(f"{folder} holds an adapter, not a base policy; merge it into its base model and save that")
    return paths


def model_records(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Digest, size and modification time of each file of a base policy's folder that loading may read, by name.

    Args:
        folder: of the model.
        known: records that were made already, by name; other files are read.

    Raises:
        PolicyError: as `base_files`.
    """
    return {path.name: (known or {}).get(path.name) or file_record(path) for path in base_files(folder)}


def model_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a base policy's folder that loading may read, by name.

    Raises:
        PolicyError: as `base_files`.
    """
    return {name: record["sha256"] for name, record in model_records(folder).items()}


@cache  # model and processor both ask; weights with another time than the recorded one should be read once
def base_path(manifest: Path) -> Path:
    """Folder of the base model that a manifest names; a relative path starts at the repository.

    A file is read only if it has another size or modification time than the sidecar of the manifest records. The
    manifest itself holds no times, so that it has the same bytes for the same model.

    Raises:
        PolicyError: a file was changed, added or removed after the manifest was written.
    """
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    folder, digests, sidecar = ROOT / recorded["path"], recorded["files"], sidecar_path(manifest)
    records = json.loads(sidecar.read_text(encoding="utf-8")).get("files", {}) if sidecar.is_file() else {}
    found = {path.name: path for path in base_files(folder)}
    differing = sorted(
        name
        for name in found.keys() | digests.keys()
        if name not in found
        or name not in digests
        or not is_as_recorded(found[name], records.get(name, {}) | {"sha256": digests[name]})
    )
    if differing:
        raise PolicyError(
            f"{folder / differing[0]} is not as it was when {manifest} was written; restore it, or delete {manifest} "
            "and run snakemake again to use the folder as it is now, with new trainings and rollouts"
        )
    return folder


def check_trained_on(adapter: Path, trained: Mapping[str, Any], manifest: Path, base: Mapping[str, Any]) -> str:
    """Check that an adapter was trained on a base policy; `trained` and `base` are the sidecars of the two paths.

    Returns:
        SHA-256 of the manifest.

    Raises:
        PolicyError: it was trained on another one.
    """
    sha256 = str(base["outputs"][manifest.name]["sha256"])
    if sha256 not in trained["inputs"].values():
        raise PolicyError(
            f"{adapter} was trained on another base policy than {manifest} (SHA-256 {sha256}); train it again with "
            "snakemake, or set `policy` to the base policy that it was trained on"
        )
    return sha256

"""The manifest of the base policy: which files it is made of, and that they are still those."""

import json
from functools import cache
from pathlib import Path

from workflow_scripts.configuration.model import Policy
from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.paths import ROOT, from_here

# Weights as safetensors only: a pickle runs code when it is loaded. And no *.py: code of a model is never run.
NEEDED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


class PolicyError(RuntimeError):
    """A policy cannot be used for this task: says why and what to change."""


def needed_files(folder: Path) -> list[Path]:
    """Files of a model folder that loading may read, by name."""
    return sorted(path for pattern in NEEDED for path in folder.glob(pattern) if "provenance" not in path.name)


def bundled_files(policy: Policy) -> list[str]:
    """Files of the bundled policy as inputs of a rule: each of them changes what the policy answers. Else none."""
    return from_here(needed_files(ROOT / policy.bundled)) if policy.source == "bundled" else []


def model_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder that loading may read, by name.

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
    if "adapter_config.json" in names:
        raise PolicyError(f"{folder} holds an adapter, not a base policy; merge it into its base model and save that")
    return {path.name: file_digest(path) for path in paths}


@cache  # the weights of a large model are read once for this, not once for model and processor each
def base_path(manifest: Path) -> Path:
    """Folder of the base model that a manifest names (relative ones are relative to the repository).

    Raises:
        PolicyError: a file in it was changed, added or removed since the manifest was written.
    """
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    folder = ROOT / recorded["path"]
    found = model_files(folder)
    differing = sorted(dict(found.items() ^ recorded["files"].items()))
    if differing:
        raise PolicyError(
            f"{folder / differing[0]} is not as it was when {manifest} was written; restore it, or delete {manifest} "
            "and run snakemake again to use the folder as it is now, with new trainings and rollouts"
        )
    return folder

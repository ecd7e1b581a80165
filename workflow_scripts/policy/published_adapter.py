"""A published LoRA adapter on the base policy: its files with their digests, and the check that it fits the base."""

import json
from pathlib import Path
from typing import Any

from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.manifest import ADAPTER, ADAPTER_CONFIG, PolicyError


def adapter_files(folder: Path, bases: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the two files of an adapter, by name.

    Args:
        folder: of the adapter.
        bases: names of the base policy; empty if it is a folder, which no adapter can name.

    Raises:
        PolicyError: a file is missing, or the adapter is no LoRA or was trained on another base policy.
    """
    if missing := [name for name in (ADAPTER_CONFIG, ADAPTER) if not (folder / name).is_file()]:
        raise PolicyError(
            f"{folder} holds no {missing[0]}; set policy.hub.adapter to a LoRA adapter that PEFT has saved"
        )
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if saved.get("peft_type") != "LORA":
        raise PolicyError(
            f"{folder} holds an adapter of type {saved.get('peft_type')}; set policy.hub.adapter to a LoRA"
        )
    trained_on = saved.get("base_model_name_or_path")
    if bases and trained_on not in bases:
        raise PolicyError(
            f"{folder / ADAPTER_CONFIG} says that the adapter was trained on {trained_on}, but policy.hub.repository "
            f"is {bases[0]}; set it to the adapter's base policy. If the two are the same model, correct "
            "base_model_name_or_path in a copy of the adapter and set policy.hub.adapter.path to the copy"
        )
    return {name: file_digest(folder / name) for name in (ADAPTER_CONFIG, ADAPTER)}


def published_adapter(manifest: Path) -> Path | None:
    """Folder of the adapter that the manifest of a base policy names; None if it names none.

    Raises:
        PolicyError: one of its files was changed or removed after the manifest was written.
    """
    recorded: dict[str, Any] | None = json.loads(manifest.read_text(encoding="utf-8")).get("adapter")
    if recorded is None:
        return None
    folder = ROOT / recorded["path"]
    found = adapter_files(folder, ())
    if differing := sorted(name for name, sha256 in recorded["files"].items() if found[name] != sha256):
        raise PolicyError(
            f"{folder / differing[0]} is not as it was when {manifest} was written; restore it, or delete {manifest} "
            "and run snakemake again to use the adapter as it is now, with new rollouts"
        )
    return folder

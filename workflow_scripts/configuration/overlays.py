"""Configuration files: config.yaml with overlays on it."""

from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.files.paths import ROOT


def read_configuration(files: list[Path]) -> Configuration:
    """config.yaml of the repository with overlays on it, as Snakemake merges them."""
    merged: dict[str, Any] = {}
    for path in (ROOT / "config.yaml", *files):
        with path.open(encoding="utf-8") as file:  # whose name YAML's errors say
            update_config(merged, yaml.safe_load(file) or {})
    return load(merged)

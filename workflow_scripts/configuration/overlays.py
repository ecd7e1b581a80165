"""Read config.yaml with overlays and single changes on it, merged as Snakemake merges `--configfile` and `--config`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.configuration.model import Configuration, ConfigurationError, load
from workflow_scripts.files.paths import ROOT


def read_configuration(files: Iterable[Path] = (), changes: Mapping[str, Any] | None = None) -> Configuration:
    """Read config.yaml of the repository, then overlays in order, then changes.

    Args:
        files: overlays, such as configs/paper.yaml.
        changes: nested keys with their values; `parse_changes` reads them from a command line.

    Raises:
        ConfigurationError: a file cannot be read, or a key or a value is wrong.
    """
    merged: dict[str, Any] = {}
    for path in (ROOT / "config.yaml", *files):
        merged = merge(merged, _read(path))
    return load(merge(merged, changes or {}))


def merge(base: Any, overlay: Mapping[str, Any]) -> Any:
    """Return a mapping with the values of an overlay, mappings inside merged likewise; an empty one changes nothing."""
    if not overlay:
        return base
    kept = base if isinstance(base, Mapping) else {}
    inner = {key: merge(kept.get(key, {}), value) for key, value in overlay.items() if isinstance(value, Mapping)}
    return {**kept, **overlay, **inner}


def parse_changes(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` settings, such as those of Snakemake's --config; each value is YAML.

    Raises:
        ConfigurationError: a setting has no value, or none that is YAML.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigurationError(f"--config {setting}: give key=value, such as 'seeds=[0, 1]'")
        try:
            changes = merge(changes, {key: yaml.safe_load(value)})
        except yaml.YAMLError as error:
            raise ConfigurationError(f"--config {setting}: the value is not YAML ({error})") from error
    return changes


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # the name of which YAML's errors state
            found = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--configfile {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"--configfile {path} holds no keys; give a YAML file such as configs/paper.yaml")
    return found

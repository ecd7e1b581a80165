"""The published data sets and models, as published.yaml states them."""

from pathlib import Path
from typing import Any

import yaml

# Prefer libyaml: every process reads this file, and the parser in Python takes ten times as long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PUBLISHED: dict[str, dict[str, Any]] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=_LOADER
)


def download_sizes(dataset: str, hub: Any) -> dict[str, float]:
    """Bytes of a data set's published files that a configuration downloads, by name.

    Args:
        dataset: of the paper.
        hub: its section of the configuration; the chosen training archives of ImageRewardDB are one entry.
    """
    published = PUBLISHED[dataset]
    sizes = {name: float(file["bytes"]) for name, file in published["files"].items()}
    if dataset == "imagereward":
        sizes["images/train"] = float(published["train_sets"][hub.train_set]["bytes"])
    return {name: size for name, size in sizes.items() if "test" in name} if hub.test_only else sizes


def published_files(repository: str) -> dict[str, dict[str, Any]]:
    """Published files of a repository, by name, with their bytes; none where it is not known."""
    return next((entry["files"] for entry in PUBLISHED.values() if entry["repository"] == repository), {})

"""The published data sets and models, as published.yaml states them."""

from pathlib import Path
from typing import Any

import yaml

# By libyaml, where it is there: every process reads this, and the parser in Python takes ten times as long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PUBLISHED: dict[str, dict[str, Any]] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=_LOADER
)


def differences(dataset: str, split: str, counts: dict[str, int]) -> list[str]:
    """What was counted in a split and is not as published, to be said to the user; nothing where that is not known.

    Args:
        dataset: key of PUBLISHED.
        split: its key in `counts` there, such as "test" or "train-8k".
        counts: prompts, images and pairs (ties included) that were read.
    """
    expected = PUBLISHED[dataset]["counts"].get(split, {})
    within = expected.get("within", {})
    return [
        f"{counts[name]:,} {name}, published are {expected[name]:,}"
        for name in counts
        if name in expected and abs(counts[name] - expected[name]) > within[name]
    ]

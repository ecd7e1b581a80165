"""The published data sets and models, as published.yaml states them."""

from pathlib import Path
from typing import Any

import yaml

# Prefer libyaml: every process reads this file, and the parser in Python takes ten times as long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PUBLISHED: dict[str, dict[str, Any]] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=_LOADER
)

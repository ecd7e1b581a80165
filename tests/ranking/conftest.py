"""Judges of the trained policies that several files need."""

from collections.abc import Callable
from pathlib import Path

import pytest

from workflow_scripts.ranking.judge import Judge


@pytest.fixture(scope="session")
def judge_of(policy_folders: Path) -> Callable[..., Judge]:
    """Return a function that loads the judge of a track, once for the same settings."""
    loaded: dict[str, Judge] = {}

    def load(track: str, **settings: object) -> Judge:
        key = f"{track} {settings}"
        if key not in loaded:
            loaded[key] = Judge.load(policy_folders / track / "seed0", **settings)  # type: ignore[arg-type]
        return loaded[key]

    return load

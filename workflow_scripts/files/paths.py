"""Places: the checkout that this package is in, and paths as the workflow writes them."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def from_here(paths: Iterable[Path]) -> list[str]:
    """Paths relative to the working directory where they are in it: a moved repository has the same inputs."""
    here = Path.cwd()
    return [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]

"""Titles of data sets, policies and tables, and how tables write numbers: the same in every file, page and summary."""

from collections.abc import Mapping
from typing import Any

POLICIES = {"zeroshot": "zero-shot", "grpo": "trained"}
METHODS = {"soft": "soft reward", "hard": "sampled answer"}
TABLES = {
    "table1": "Table 1: trained policies with soft reward",
    "table2": "Table 2: sampled answer against soft reward, ImageReward test set",
}
# First columns of the tables, which say what a row is about.
HEADS = {"table1": ["training_data", "test_data", "against"], "table2": ["method", "against"]}

# Columns of table 1, as training records name them.
TRAINED_ON = ["items_available", "items_seen", "epochs"]


def table_titles(trained: bool) -> dict[str, str]:
    """Titles of the tables; where nothing is trained, table 1 has the zero-shot policy."""
    return TABLES if trained else TABLES | {"table1": "Table 1: zero-shot policy with soft reward"}


def track_titles(own: str | None) -> dict[str, str]:
    """Titles of the training sets; `own` is that of the user's data."""
    return {"imagereward": "ImageReward", "hpsv2": "HPSv2", "own": own or "own data"}


def dataset_titles(own: str | None) -> dict[str, str]:
    """Titles of the data sets that policies are tested on; `own` is that of the user's data."""
    return {"imagereward": "ImageReward", "hpsv2": "HPDv2", "own": own or "own data"}


def number(value: Any, digits: int = 1) -> str:
    """A number, or the text of one, with `digits` decimals; empty for None, nan and an empty text."""
    return "" if value is None or value == "" or value != value else f"{float(value):.{digits}f}"


def with_interval(row: Mapping[Any, Any], name: str) -> str:
    """A value of a table's row with its interval, "64.8 [64.0, 65.6]"; without one where the row has none."""
    low, high = (number(row.get(f"{name}_{end}")) for end in ("low", "high"))
    return number(row.get(name)) + (f" [{low}, {high}]" if low and high else "")

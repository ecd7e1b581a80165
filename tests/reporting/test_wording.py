"""Numbers of tables for people, from data frames and from CSV texts alike."""

import subprocess
import sys
from typing import Any

import pytest

from workflow_scripts.files.paths import ROOT
from workflow_scripts.reporting.wording import number, with_interval


@pytest.mark.parametrize(
    ("value", "text"), [(64.84, "64.8"), ("64.84", "64.8"), (9, "9.0"), (None, ""), ("", ""), (float("nan"), "")]
)
def test_a_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_an_interval_stands_where_there_is_one() -> None:
    row = {"mean@1": "64.82", "mean@1_low": "64.04", "mean@1_high": "65.61", "paper": 65.1, "paper_low": float("nan")}
    assert with_interval(row, "mean@1") == "64.8 [64.0, 65.6]"
    assert with_interval(row, "paper") == "65.1" and with_interval(row, "other") == ""


def test_it_loads_no_library() -> None:
    code = "import workflow_scripts.reporting.wording, sys; print({'numpy', 'pandas', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Count the cases behind every promise of docs/reliability.md, and write the counts into its table.

make docs                              # or: python tests/reliability.py

Promise and tests of each row are written by hand; a test is a file below tests/ or file::test, and ::test alone is in
the file before it. The counts are of the tests that pytest collects from these files.
"""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"


class Cases(NamedTuple):
    """Cases of one collected test: written ones, ones that hypothesis generates, either of them in the slow part."""

    written: int
    generated: int
    slow: int


class Collector:
    """Plugin of pytest that keeps the cases of every test, by file::test, and there by the number of the test."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Cases]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            assert isinstance(item, pytest.Function)
            marker = item.get_closest_marker("cases")
            written, generated = (marker.args[0] if marker else 1), 0
            if hasattr(item.obj, "hypothesis"):
                own = getattr(item.obj, "_hypothesis_internal_use_settings", None) or settings.default
                written, generated = 0, own.max_examples
            slow = item.get_closest_marker("slow") is not None
            cases = Cases(0, 0, written + generated) if slow else Cases(written, generated, 0)
            name = f"{item.path.relative_to(ROOT / 'tests').as_posix()}::{item.originalname}"
            self.found.setdefault(name, {})[item.nodeid] = cases


def named(cell: str) -> list[str]:
    """Files and tests that a cell of the table names."""
    names: list[str] = []
    for name in re.findall(r"`([\w/.:]+)`", cell):
        names.append(names[-1].split("::")[0] + name if name.startswith("::") else name)
    return names


def collected(names: list[str]) -> dict[str, dict[str, Cases]]:
    """Cases of all tests of the named files.

    Raises:
        SystemExit: pytest cannot collect them, or a name has no test.
    """
    collector, said = Collector(), io.StringIO()
    files = sorted({str(ROOT / "tests" / name.split("::")[0]) for name in names})
    with contextlib.redirect_stdout(said):
        status = pytest.main(["--collect-only", "-qq", "-o", "addopts=--strict-markers", *files], [collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"pytest cannot collect the tests that {PAGE} names:\n{said.getvalue()}")
    for name in names:
        if not any(test == name or test.startswith(f"{name}::") for test in collector.found):
            raise SystemExit(f"{PAGE} names {name}, which is not a test")
    return collector.found


def counted(text: str) -> str:
    """The page with the counts of the tests that there are now; a row that names no test counts all of the table's."""
    rows = [(line, line.split("|")) for line in text.splitlines() if re.match(r"\| .+\|$", line)]
    rows = [(line, cells) for line, cells in rows[1:] if len(cells) == 7]
    tests = collected([name for _, cells in rows for name in named(cells[2])])
    every = [name for _, cells in rows for name in named(cells[2])]
    for line, (_, promise, cell, *_) in rows:
        cases: dict[str, Cases] = {}
        for name in named(cell) or every:
            for test, found in tests.items():
                if test == name or test.startswith(f"{name}::"):
                    cases |= found
        sums = [sum(numbers) for numbers in zip(*cases.values(), strict=True)]
        shown = " | ".join(f"{number:,}" if number else "" for number in sums)
        text = text.replace(line, f"|{promise}|{cell}| {shown} |")
    return text


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write")
    arguments = parser.parse_args()
    arguments.output.write_text(counted(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

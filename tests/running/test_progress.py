"""Bars of libraries become lines of a log."""

import subprocess
import sys

WORK = """
import sys
from workflow_scripts.running import progress
progress.SECONDS_BETWEEN_LINES = {seconds}
progress.lines_in_logs()
progress.lines_in_logs()  # a second time changes nothing
from tqdm import tqdm
print("begun")
for _ in tqdm(range(50), desc="outer", mininterval=0, miniters=1):
    for _ in tqdm(range(3), desc="inner", mininterval=0, miniters=1, leave=False):
        pass
print("done", file=sys.stderr)
"""


def logged(seconds: float) -> tuple[list[str], str]:
    """Lines on the error stream of a process that is no terminal, and all of its output."""
    code = WORK.format(seconds=seconds)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"\r" not in done.stderr and b"\x1b" not in done.stderr
    return done.stderr.decode().splitlines(), done.stdout.decode()


def test_a_long_time_leaves_the_end_alone() -> None:
    lines, output = logged(1e9)
    assert output == "begun\n" and lines[-1] == "done"
    outer = [line for line in lines if line.startswith("outer")]
    assert outer[-1].startswith("outer: 100%") and "50/50" in outer[-1] and "it/s" in outer[-1]


def test_no_time_leaves_every_step() -> None:
    lines, _ = logged(0)
    assert sum(line.startswith("outer:") for line in lines) >= 50

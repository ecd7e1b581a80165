"""`reproduce` and the closing line of a workflow: whether results have the published digits."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workflow_scripts.commands import summary
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT

Finished = tuple[Configuration, Path]


def run(results: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on results of configs/test.yaml."""
    overlays = ["--configfile", str(ROOT / "configs/test.yaml"), *words]
    command = [sys.executable, "-m", "workflow_scripts", "reproduce", "--results", str(results), *overlays]
    return subprocess.run(command, capture_output=True, text=True)


def change_a_cell(results: Path) -> None:
    """Give table 1 another first accuracy."""
    path = results / "table1.csv"
    path.write_text(re.sub(r"(?<=^ImageReward,ImageReward,labels,0,)[\d.]+", "1.23", path.read_text(), flags=re.M))


def test_equal_tables_end_with_0_whatever_the_bytes_of_other_files(finished: Finished) -> None:
    done = run(finished[1])
    assert done.returncode == 0 and done.stderr == ""
    assert "\n  policies/imagereward/seed0/adapter_model.safetensors\n" in done.stdout
    assert "made by zen3 (AuthenticAMD, avx2), on which the digits were verified" in done.stdout
    assert "equal to the published table (tests/expected/test), although files have other bytes:" in done.stdout


def test_a_cell_that_differs_is_listed_and_ends_with_1(
    finished: Finished, recorded_anew: Callable[[Path], None]
) -> None:
    change_a_cell(finished[1])
    assert "is not what its stage wrote" in run(finished[1]).stderr
    recorded_anew(finished[1] / "table1.csv")
    done = run(finished[1])
    assert done.returncode == 1 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    (listed,) = [line for line in lines if line.startswith("table1 ")]
    assert re.fullmatch(r"table1 ImageReward \| ImageReward \| labels \| 0 mean@1 [\d.]+ 1\.23", listed)
    assert lines[-1].startswith(
        "1 cell differs from the published table (tests/expected/test), the first in table1.csv"
    )


def test_without_an_expectation_one_line_says_so(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("scoring: {report_k: [1, 2]}")
    done = run(finished[1], "--configfile", str(tmp_path / "more.yaml"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: tests/expected has no published table") and done.stderr.count("\n") == 1


def test_results_that_are_not_finished_are_an_error_of_one_line(finished: Finished) -> None:
    (finished[1] / "table1.csv.provenance.json").unlink()
    done = run(finished[1])
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "table1.csv" in done.stderr


def test_the_end_of_a_run_says_it_in_one_line(
    finished: Finished, recorded_anew: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    configuration, results = finished
    summary.tell_success(configuration, 0)
    equal = "Tables: equal to the published table (tests/expected/test), although files have other bytes:"
    assert equal in capsys.readouterr().err
    change_a_cell(results)
    recorded_anew(results / "table1.csv")
    summary.tell_success(configuration, 0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Tables: ")]
    assert line.startswith("Tables: 1 cell differs from the published table (tests/expected/test), the first in table1")
    command = line.split("; all differences: ")[1]
    chosen = shlex.split(command)
    assert chosen[:4] == ["python", "-m", "workflow_scripts", "reproduce"]
    assert chosen[4:] == ["--results", str(results), "--configfile", "configs/test.yaml"]


def test_a_run_without_an_expectation_says_nothing_of_it(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    other = read_configuration([ROOT / "configs/test.yaml"], {"results": str(finished[1]), "seeds": [3]})
    summary.tell_success(other, 0)
    said = capsys.readouterr().err
    assert "Where to look next" in said and "Tables: " not in said


def test_a_run_that_cannot_be_compared_keeps_its_summary(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = next(finished[1].glob("scores/**/*.provenance.json"))
    sidecar.write_text(sidecar.read_text().replace('"code_digest": "', '"code_digest": "other'))
    summary.tell_success(finished[0], 0)
    said = capsys.readouterr().err
    assert "Tables: not compared with the published table: " in said and "other code of score_rollouts" in said
    assert "Where to look next" in said
    sidecar.unlink()
    summary.tell_success(finished[0], 0)
    said = capsys.readouterr().err
    assert "no readable provenance file" in said and "Where to look next" in said

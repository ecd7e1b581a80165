"""The closing words of a workflow: what was made, both tables, what failed and why."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.commands import summary
from workflow_scripts.configuration.model import load
from workflow_scripts.files.paths import ROOT

TABLE1 = """training_data,test_data,against,seed,mean@1,mean@1_low,mean@1_high,mean@1_paper,ceiling
ImageReward,ImageReward,labels,0,64.82,64.04,65.61,64.7,74.4
ImageReward,ImageReward,noise-free order,0,71.9,71.1,72.6,,100.0
"""
TABLE2 = """method,against,seed,mean@1,mean@1_low,mean@1_high,paper
Single human,labels,,64.8,,,65.1
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder with two jobs and both tables, in which one job had something to warn of."""
    folder = tmp_path / "results"
    (folder / "policies").mkdir(parents=True)
    for name, stage, warnings in (
        ("policies/adapter", "train_grpo", ["has collapsed [50 %]"]),
        ("table1.csv", "make_tables", []),
    ):
        record = {"stage": stage, "started": datetime.now(UTC).isoformat(), "seconds": 61.0, "warnings": warnings}
        record |= {"peak_memory_megabytes": 900, "config": {}, "code_digest": "", "outputs": {}}
        (folder / f"{name}.provenance.json").write_text(json.dumps(record))
    (folder / "table1.csv").write_text(TABLE1)
    (folder / "table2.csv").write_text(TABLE2)
    (folder / "tables.md").write_text("# Tables")
    return folder


def said(results: Path, uri: str = "sqlite:///mlflow.db", since: float = 0.0) -> str:
    """What is printed where there is no terminal."""
    stream = io.StringIO()
    summary.summarise(results, None, uri, summary.console(stream), since)
    return stream.getvalue()


def test_everything_that_one_wants_to_know(results: Path) -> None:
    text = said(results)
    assert text.isascii() and "\x1b" not in text
    lines = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()]
    assert "train_grpo 1 61 900" in lines and "make_tables 1 61 900" in lines
    assert "ImageReward ImageReward labels 0 64.7 74.4 64.8 [64.0, 65.6]" in lines
    assert "Single human labels 65.1 64.8" in lines
    assert "warning: has collapsed [50 %]" in lines
    assert f"{results / 'tables.md'}: both tables and all comparisons" in text and "report.html" not in text
    assert "mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db" in text


def test_nothing_is_said_of_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(results, since=time.time() + 60) == ""
    summary.tell_success(load({"results": str(results)}), time.time() + 60)
    assert capsys.readouterr().err == ""


def test_where_the_runs_are(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:password@host:5000")
    configuration = {"results": str(results)}
    summary.tell_success(load(configuration), 0)
    assert "http://host:5000: every job as a run" in capsys.readouterr().err
    summary.tell_success(load(configuration | {"tracking": {"enabled": False}}), 0)
    assert "not tracked" in capsys.readouterr().err


def test_a_summary_that_fails_is_no_failure(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "table1.csv").write_bytes(b"\xff\x00training_data")
    summary.tell_success(load({"results": str(results)}), 0)
    assert "no summary: UnicodeDecodeError" in capsys.readouterr().err
    summary.tell_failure([str(results / "there is no such log")])
    assert "no summary: FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "12:00:01 begun\nerror: results/a is missing; run snakemake again\n",
            "error: results/a is missing; run snakemake again",
        ),
        (
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\n12:00:02 closing\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        ("12:00:01 begun\nKilled\n\n", "Killed"),
        ("", ""),
    ],
)
def test_the_line_that_says_why(log: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    path.write_text(log)
    assert summary.last_error(path) == line


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "workflow_scripts", "summary", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_as_a_command(results: Path, tmp_path: Path) -> None:
    done = run("--results", str(results), "--uri", "sqlite:///elsewhere.db")
    assert done.returncode == 0 and "sqlite:///elsewhere.db" in done.stdout and "make_tables" in done.stdout
    nothing = run("--results", str(tmp_path / "nothing"))
    assert nothing.returncode == 1 and nothing.stderr.count("\n") == 1 and "holds no results" in nothing.stderr
    assert run("--reslts", "x").returncode == 2


def test_a_terminal_gets_lines_and_colours(results: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "workflow_scripts", "summary", "--results", str(results)]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    read: list[bytes] = []

    def reading() -> None:
        try:
            while data := os.read(master, 4096):
                read.append(data)
        except OSError:  # the other end is closed
            pass

    thread = threading.Thread(target=reading)
    thread.start()
    subprocess.run(command, env=environment, stdout=slave, check=True)
    os.close(slave)
    thread.join()
    os.close(master)
    assert b"\x1b[" in b"".join(read) and "─".encode() in b"".join(read)


# -------------------------------------------------------------------------------------------------- by a real workflow

SNAKEFILE = """
import sys, time
sys.path.insert(0, {root!r})
from workflow_scripts.commands import summary
from workflow_scripts.configuration.model import Configuration
STARTED = time.time()
onsuccess: summary.tell_success(Configuration(results="results"), STARTED)
onerror: summary.tell_failure(log)
rule first:
    output: "results/{{name}}.txt"
    log: "results/logs/{{name}}.log"
    shell: "{command} &> {{log}}"
"""


def workflow(folder: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a workflow of one rule whose Snakefile says the closing words as the project's does."""
    (folder / "Snakefile").write_text(SNAKEFILE.format(root=str(ROOT), command=command))
    words = [sys.executable, "-m", "snakemake", "--cores", "1", "results/made.txt", *options]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_a_failed_job_is_named_with_its_reason_and_the_remedy(tmp_path: Path) -> None:
    done = workflow(tmp_path, "(echo 'error: the disk is full'; echo closing; false)")
    assert done.returncode == 1
    told = done.stderr[done.stderr.rindex("failed: first") :].splitlines()
    assert told[1].strip() == "error: the disk is full" and told[2].strip() == "all it said: results/logs/made.log"
    assert told[4].strip() == "snakemake --cores 1 results/made.txt"


def test_what_was_made_is_said_once(tmp_path: Path) -> None:
    record = {"stage": "first", "seconds": 1, "warnings": [], "peak_memory_megabytes": 1}
    (tmp_path / "record.py").write_text(
        "import datetime, json, pathlib; pathlib.Path('results/made.txt').write_text('')\n"
        f"record = {record!r} | {{'started': datetime.datetime.now(datetime.UTC).isoformat()}}\n"
        "pathlib.Path('results/made.txt.provenance.json').write_text(json.dumps(record))"
    )
    command = f"{sys.executable} record.py"
    assert "What was made" not in workflow(tmp_path, command, "-n").stderr
    first = workflow(tmp_path, command)
    assert first.returncode == 0 and "What was made" in first.stderr and "mlflow ui --host 127.0.0.1" in first.stderr
    assert "What was made" not in workflow(tmp_path, command).stderr

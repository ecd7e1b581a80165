"""One process makes a result, and one workflow writes to a results folder, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences.schema import PREFERENCES, write_preferences
from workflow_scripts.running.locks import LockedError
from workflow_scripts.running.provenance import verify

CONFIG = SelectSubset.of(Configuration(), "imagereward", "test")
HOLDING = """
import sys
from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage

arguments = Arguments.parse()
with run_stage(arguments):
    print("holding", flush=True)
    arguments.subset.write_text(sys.stdin.read())
"""
COUNTING = """
import sys
from pathlib import Path
from workflow_scripts.running.locks import Lock, LockedError

counter, path = Path(sys.argv[1]), Path(sys.argv[2])
gained = 0
while gained < 40:
    try:
        with Lock(path, "taken"):
            counter.write_text(str(int(counter.read_text()) + 1))
            gained += 1
    except LockedError:
        pass
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs code of this project."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes
    )


@pytest.fixture
def preferences(tmp_path: Path, with_sidecar: Callable[..., Path]) -> Path:
    """Canonical annotations of three prompts."""
    path = tmp_path / "preferences.parquet"
    row = dict.fromkeys(PREFERENCES.names) | {"image_ids": ["a", "b"], "archives": ["z", "z"], "ranks": [1, 2]}
    write_preferences(path, [row | {"prompt_id": f"p{i}", "prompt": f"prompt {i}"} for i in range(3)])
    return with_sidecar(path)


@pytest.fixture
def holder(tmp_path: Path, preferences: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of making out/subset.parquet; it finishes at the end of its input."""
    output = tmp_path / "out" / "subset.parquet"
    words = ["--preferences", str(preferences), "--subset", str(output), "--config", CONFIG.canonical()]
    process = python(HOLDING, *words)
    assert process.stdout and process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_the_first_finishes(
    holder: subprocess.Popen[str], preferences: Path, run_main: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "subset.parquet"
    with pytest.raises(LockedError) as refusal:
        run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    said = str(refusal.value)
    assert f"{output} is being made by another process; wait for it or end it" in said
    assert f"process {holder.pid} on {os.uname().nodename}" in said
    assert not output.exists()
    holder.communicate("result", timeout=60)
    assert holder.returncode == 0 and output.read_text() == "result"
    verify(output)
    assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.name}.provenance.json"}


def test_a_killed_process_blocks_nobody(
    holder: subprocess.Popen[str], preferences: Path, run_main: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "subset.parquet"
    holder.kill()
    holder.wait()
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.name}.provenance.json"}


def test_another_output_is_free(
    holder: subprocess.Popen[str], preferences: Path, run_main: Any, tmp_path: Path
) -> None:
    run_main("select_subset", CONFIG, preferences=preferences, subset=tmp_path / "out" / "other.parquet")
    assert holder.poll() is None


def test_a_failed_stage_lets_go(preferences: Path, run_main: Any, tmp_path: Path) -> None:
    output = tmp_path / "subset.parquet"
    in_the_way = tmp_path / f".subset.parquet.{os.getpid()}.tmp"
    in_the_way.mkdir()
    with pytest.raises(OSError):
        run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    assert not list(tmp_path.glob(".*.lock"))


def test_four_processes_are_never_in_at_once(tmp_path: Path) -> None:
    """A lock file that vanishes between an opening and a locking must not let two in: no increment is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [python(COUNTING, str(counter), str(tmp_path / "lock")) for _ in range(4)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert counter.read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


# ---------------------------------------------------------------------------------------------------------- workflows

TARGET = "downloads/synthetic/hpsv2/dataset.json"


class Workflows:
    """Snakemake processes on one results folder, each from a working directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.started: list[subprocess.Popen[str]] = []

    def start(self, directory: str, *options: str) -> subprocess.Popen[str]:
        """Start `snakemake` in a working directory, as the leader of a process group."""
        command = [sys.executable, "-m", "snakemake", "--directory", str(self.folder / directory)]
        command += [
            "--configfile",
            str(ROOT / "configs/test.yaml"),
            "--workflow-profile",
            str(ROOT / "profiles/default"),
        ]
        command += ["--config", f"results={self.results}", f"downloads={self.results}/downloads"]
        command += ["tracking={enabled: false}", "--cores", "1", *options]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        self.started.append(process)
        return process

    def run(self, directory: str, *options: str) -> tuple[int, str]:
        """Run `snakemake`; its exit status and all it says."""
        process = self.start(directory, *options)
        said = process.communicate(timeout=300)[0]
        return process.returncode, said

    def holder(self, lock: Path) -> int:
        """Process that holds a lock, as soon as there is one."""
        while not (lock.is_file() and lock.read_text().endswith("\n")):
            assert self.started[-1].poll() is None, self.started[-1].communicate()[0]
            time.sleep(0.02)
        return int(lock.read_text().split()[1])


@pytest.fixture
def workflows(tmp_path: Path) -> Iterator[Workflows]:
    """Workflows; what is left of their processes is killed."""
    found = Workflows(tmp_path)
    yield found
    for process in found.started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


def test_the_second_of_two_workflows_is_refused(workflows: Workflows) -> None:
    target, lock = str(workflows.results / TARGET), workflows.results / ".workflow.lock"
    first = workflows.start("one", target)
    pid = workflows.holder(lock)
    assert pid == first.pid
    os.killpg(first.pid, signal.SIGSTOP)  # so that it cannot finish before the second has tried
    status, said = workflows.run("two", "-n", target)
    assert status == 0, said
    status, said = workflows.run("two", target)
    assert status == 1, said
    assert f"another workflow is writing to {workflows.results}; wait for it or end it" in said
    assert f"process {first.pid} on" in said
    os.killpg(first.pid, signal.SIGCONT)
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 0, said
    verify(workflows.results / TARGET)
    assert not list(workflows.results.rglob("*.lock"))  # hidden ones, too


def test_an_orphan_of_a_killed_workflow_is_not_doubled(workflows: Workflows) -> None:
    output = workflows.results / TARGET
    first = workflows.start("one", str(output))
    stage = workflows.holder(output.with_name(".dataset.json.lock"))
    os.kill(stage, signal.SIGSTOP)
    first.kill()
    first.wait()
    status, said = workflows.run("two", str(output))
    assert status == 1, said
    assert f"{output} is being made by another process; wait for it or end it" in said
    assert f"process {stage} on" in said
    assert not output.exists()
    os.kill(stage, signal.SIGCONT)
    assert first.stdout
    first.stdout.read()  # the orphan has this pipe: it ends when the orphan does
    verify(output)
    assert not list(workflows.results.rglob("*.json.lock"))

"""A store that is away in whatever manner costs no result and no patience, and `log_runs` logs it afterwards."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest

from workflow_scripts.commands.log_runs import NotLoggedError, log_runs, producers, remind
from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences.schema import PREFERENCES, write_preferences
from workflow_scripts.running.locks import Lock
from workflow_scripts.running.provenance import read_sidecar, sidecar_path, verify

CONFIG = SelectSubset.of(Configuration(), "imagereward", "test")
# A stage that reports something, waits for a line of its input, and reports again.
REPORTING = """
import sys
from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage

arguments = Arguments.parse()
with run_stage(arguments) as run:
    run.metrics({"loss": 1.0}, step=1)
    print(run.mlflow_run_id, flush=True)
    sys.stdin.readline()
    for step in range(2, 40):
        run.metrics({"loss": 1 / step}, step=step)
    run.metrics({"count": 3})
    run.warn("something to know")
    arguments.subset.write_text("result")
"""


@pytest.fixture
def preferences(tmp_path: Path, with_sidecar: Callable[..., Path]) -> Path:
    """Canonical annotations of three prompts, made by a job that is not among the results."""
    path = tmp_path / "preferences.parquet"
    row = dict.fromkeys(PREFERENCES.names) | {"image_ids": ["a", "b"], "archives": ["z", "z"], "ranks": [1, 2]}
    write_preferences(path, [row | {"prompt_id": f"p{i}", "prompt": f"prompt {i}"} for i in range(3)])
    return with_sidecar(path, mlflow_run_id="elsewhere")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What the stage makes; its folder is the results folder."""
    return tmp_path / "results" / "subset.parquet"


@pytest.fixture
def stage(preferences: Path, output: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts the stage with a store; `code` in place of its own main."""
    started: list[subprocess.Popen[str]] = []

    def start(uri: str, code: str | None = None, config: SelectSubset = CONFIG) -> subprocess.Popen[str]:
        log = tmp_path / "subset.log"
        words = ["-c", code] if code else ["-m", "workflow_scripts.stages.select_subset"]
        words += ["--preferences", str(preferences), "--subset", str(output), "--config", config.canonical()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
        streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("w") as written:
            command = [sys.executable, *words, "--log_file", str(log)]
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=written, **streams)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def untracked(
    stage: Callable[..., subprocess.Popen[str]], output: Path, tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    """Return a function that runs the stage with a store that fails, and checks that nothing but the run is lost."""

    def run(uri: str) -> dict[str, Any]:
        process = stage(uri)
        process.communicate(timeout=150)
        said = (tmp_path / "subset.log").read_text()
        assert process.returncode == 0, said
        assert "MLflow did not take this run" in said and said.splitlines()[-1].endswith("log-runs RESULTS_FOLDER")
        sidecar = verify(output)
        assert sidecar["mlflow_run_id"] is None and sidecar["metrics"]["kept"] == 3
        return sidecar

    return run


def runs(uri: str, status: str = "FINISHED") -> list[Any]:
    """Runs of a store with a status."""
    client = mlflow.MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"attributes.status = '{status}'")


@pytest.fixture
def logged(
    monkeypatch: pytest.MonkeyPatch, output: Path, tmp_path: Path
) -> Callable[[str], tuple[Any, tuple[int, int, list[str]]]]:
    """Return a function that logs the results folder to a store; the only finished run there, and what was counted."""

    def log(uri: str) -> tuple[Any, tuple[int, int, list[str]]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        counts = log_runs([output.parent])
        (run,) = runs(uri)
        assert run.info.run_id == read_sidecar(output)["mlflow_run_id"]
        verify(output)
        return run, counts

    return log


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite store with all its tables and nothing in them."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def warm(tmp_path: Path, empty_store: Path) -> Callable[[Path], str]:
    """Return a function that makes a store in a folder, its artifacts elsewhere, and gives its address."""

    def make(folder: Path) -> str:
        prepared = tmp_path / "prepared.db"  # this process keeps it open
        shutil.copy(empty_store, prepared)
        client = mlflow.MlflowClient(f"sqlite:///{prepared}")
        client.create_experiment("softpref", artifact_location=(tmp_path / "artifacts").as_uri())
        shutil.copy(prepared, folder / "mlflow.db")
        return f"sqlite:///{folder}/mlflow.db"

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no free byte on a small disk."""
    with (disk / "filling").open("wb", buffering=0) as filling, contextlib.suppress(OSError):
        while filling.write(b"x" * 4096):
            pass


# ------------------------------------------------------------------------------------------------ away from the start


def test_a_server_that_is_down(untracked: Any, logged: Any, warm: Any, tmp_path: Path) -> None:
    untracked("http://127.0.0.1:9")
    run, counts = logged(warm(tmp_path))
    assert counts == (1, 0, []) and run.data.params["seed"] == "0"


@pytest.mark.parametrize("status", [401, 503])
def test_a_server_that_refuses(status: int, untracked: Any, logged: Any, warm: Any, tmp_path: Path) -> None:
    """It wants a login, or says that it is not available."""

    class Refusing(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.send_error(status)

        do_GET = do_POST = refuse  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        untracked(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert str(status) in (tmp_path / "subset.log").read_text()
    assert logged(warm(tmp_path))[1] == (1, 0, [])


def test_a_broken_sqlite_file(untracked: Any, logged: Any, warm: Any, tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    store.write_bytes(b"not a database" * 1000)
    untracked(f"sqlite:///{store}")
    assert store.read_bytes() == b"not a database" * 1000
    with pytest.raises(NotLoggedError, match="not a database"):
        logged(f"sqlite:///{store}")
    store.unlink()
    assert logged(warm(tmp_path))[1] == (1, 0, [])


def test_a_locked_sqlite_store(untracked: Any, logged: Any, warm: Any, tmp_path: Path) -> None:
    uri = warm(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        untracked(uri)
    assert logged(uri)[1] == (1, 0, [])


def test_a_read_only_sqlite_store(untracked: Any, logged: Any, warm: Any, small_disk: Path) -> None:
    uri = warm(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    untracked(uri)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert logged(uri)[1] == (1, 0, [])


def test_a_full_disk_under_the_store(untracked: Any, logged: Any, warm: Any, small_disk: Path) -> None:
    uri = warm(small_disk)
    fill(small_disk)
    untracked(uri)
    (small_disk / "filling").unlink()
    assert logged(uri)[1] == (1, 0, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_never_answers(untracked: Any, logged: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        untracked(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert logged(f"sqlite:///{tmp_path}/later.db")[1] == (1, 0, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_full_disk_under_a_new_store(untracked: Any, small_disk: Path) -> None:
    fill(small_disk)
    untracked(f"sqlite:///{small_disk}/mlflow.db")


# ------------------------------------------------------------------------------------- gone in the middle of the stage


def check_cut_short(
    process: subprocess.Popen[str], output: Path, log: Path, first_id: str, uri: str, logged: Any, steps: int = 1
) -> None:
    """The stage ended well, the run that it had begun is failed, and the one logged afterwards is whole."""
    said = log.read_text()
    assert process.returncode == 0, said
    assert said.count("MLflow did not take") == 1 and said.splitlines()[-1].endswith("log-runs RESULTS_FOLDER")
    sidecar = verify(output)
    assert sidecar["mlflow_run_id"] is None and sidecar["metrics"] == {"count": 3}
    run, counts = logged(uri)
    assert counts == (1, 0, []) and run.info.run_id != first_id
    assert run.data.metrics["count"] == 3 and run.data.tags["warning"] == "something to know"
    (cut,) = runs(uri, "FAILED")
    assert cut.info.run_id == first_id and "killed" in cut.data.tags


def test_a_store_that_breaks_in_the_middle_of_a_stage(
    stage: Any, logged: Any, warm: Any, output: Path, tmp_path: Path
) -> None:
    uri, store = warm(tmp_path), tmp_path / "mlflow.db"
    process = stage(uri, REPORTING)
    first_id = process.stdout.readline().strip()
    shutil.copy(store, tmp_path / "kept.db")
    with store.open("r+b") as file:
        file.write(b"\0" * store.stat().st_size)
    process.communicate("go on\n", timeout=150)
    shutil.copy(tmp_path / "kept.db", store)
    check_cut_short(process, output, tmp_path / "subset.log", first_id, uri, logged)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_store_that_is_locked_in_the_middle_of_a_stage(
    stage: Any, logged: Any, warm: Any, output: Path, tmp_path: Path
) -> None:
    uri = warm(tmp_path)
    process = stage(uri, REPORTING)
    first_id = process.stdout.readline().strip()
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        process.communicate("go on\n", timeout=150)
    check_cut_short(process, output, tmp_path / "subset.log", first_id, uri, logged)


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A tracking server; killed at the end, and waited for."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/stored"]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_is_killed_in_the_middle_of_a_stage(
    stage: Any, logged: Any, output: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with server(tmp_path, port) as uri:
        process = stage(uri, REPORTING)
        first_id = process.stdout.readline().strip()
    process.communicate("go on\n", timeout=150)
    with server(tmp_path, port) as uri:
        check_cut_short(process, output, tmp_path / "subset.log", first_id, uri, logged)


# ------------------------------------------------------------------------------------------------------------ log_runs


def test_logging_twice_logs_once(
    run_main: Any, preferences: Path, logged: Any, warm: Any, tmp_path: Path, output: Path
) -> None:
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    uri = warm(tmp_path)
    run, counts = logged(uri)
    assert counts == (1, 0, [])
    assert run.data.tags["upstream_runs"] == "elsewhere"  # the job that made the input is not in the folder
    before = sidecar_path(output).read_bytes()
    again, counts = logged(uri)
    assert again.info.run_id == run.info.run_id and counts == (0, 1, [])
    assert sidecar_path(output).read_bytes() == before


def command(folder: Path, uri: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m workflow_scripts log-runs`."""
    words = [sys.executable, "-m", "workflow_scripts", "log-runs", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_names_damaged_results_and_logs_the_others(
    run_main: Any, preferences: Path, output: Path, tmp_path: Path
) -> None:
    for seed in range(3):
        config = CONFIG.model_copy(update={"seed": seed})
        run_main("select_subset", config, preferences=preferences, subset=output.with_name(f"{seed}.parquet"))
    damaged, unreadable = output.with_name("0.parquet"), output.with_name("2.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    sidecar_path(unreadable).write_text('{"stage": "select_')
    done = command(tmp_path, "", "results", "--experiment", "mine", "--uri", "sqlite:///mine.db")
    assert done.returncode == 1, done.stderr
    assert "logged select_subset · imagereward · test · seed 1" in done.stdout
    assert "1 logged, 0 were there" in done.stdout
    assert f"{damaged} is not what its stage wrote" in done.stderr and "Traceback" not in done.stderr
    assert f"{unreadable} has no readable provenance file" in done.stderr and "2 not logged:" in done.stderr
    (run,) = runs(f"sqlite:///{tmp_path}/mine.db")
    assert run.data.params["seed"] == "1"
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mine.db").get_experiment(run.info.experiment_id).name == "mine"
    assert not list(output.parent.glob("*.lock")) and not list(output.parent.glob(".*"))


def test_the_command_refuses_what_it_cannot_do(run_main: Any, preferences: Path, output: Path, tmp_path: Path) -> None:
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = command(tmp_path, uri, "resluts")
    assert done.returncode == 1 and done.stderr == "error: resluts is not a folder; name the results folder\n"
    with Lock.of_results(output.parent):
        done = command(tmp_path, uri, "results")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: another workflow is writing to {output.parent}; wait for it")
    done = command(tmp_path, "http://me:planted-secret@127.0.0.1:9", "results")
    assert done.returncode == 1 and "error: no MLflow store to log to" in done.stderr
    assert "Traceback" not in done.stderr and "planted" not in done.stderr
    assert read_sidecar(output)["mlflow_run_id"] is None


def test_the_workflow_says_at_its_end_what_is_not_tracked(
    run_main: Any, preferences: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    results = {"results": str(output.parent), "downloads": f"{output.parent}/downloads"}
    remind(load(results | {"tracking": {"experiment": "my own"}}))
    told = f"1 results are complete but not in MLflow; to log them: python -m workflow_scripts log-runs {output.parent}"
    assert capsys.readouterr().err.endswith(f"{told} --experiment 'my own'\n")
    remind(load(results | {"tracking": {"enabled": False}}))
    assert capsys.readouterr().err == ""
    sidecar = read_sidecar(output) | {"mlflow_run_id": "there"}
    sidecar_path(output).write_text(json.dumps(sidecar))
    remind(load(results))
    assert capsys.readouterr().err == ""


def test_producers_are_found_in_a_moved_folder() -> None:
    def job(name: str, digest: str) -> dict[str, Any]:
        return {"outputs": {name: {"sha256": digest}}, "name": digest}

    jobs = [
        (Path("/new/results/policies/imagereward/seed0/adapter"), job("adapter", "same")),
        (Path("/new/results/policies/imagereward/seed1/adapter"), job("adapter", "same")),
        (Path("/new/results/policies/hpsv2/seed1/adapter"), job("adapter", "other")),
    ]
    inputs = {
        "results/policies/imagereward/seed1/adapter": "same",
        "results/policies/imagereward/seed0/adapter": "same",
        "results/policies/hpsv2/seed0/adapter": "other",
        "results/policies/hpsv2/seed1/adapter": "changed",
    }
    assert producers(inputs, jobs) == [jobs[1][1], jobs[0][1], jobs[2][1], None]

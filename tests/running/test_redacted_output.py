"""No secret of the environment is written anywhere, and nothing listens on a network: real stages, a real workflow."""

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.redaction import HIDDEN
from workflow_scripts.preferences.schema import PREFERENCES, write_preferences
from workflow_scripts.running.provenance import verify

MARK = "planted-secret-"
NOWHERE = "127.0.0.1:9"
PLANTED = {
    "HF_TOKEN": f"{MARK}hub-token",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}tracking-password",
    "MLFLOW_TRACKING_TOKEN": f"{MARK}tracking-token",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}storage-key",
    "HF_ENDPOINT": f"http://me:{MARK}end%40point@{NOWHERE}",
    "HTTPS_PROXY": f"http://me:{MARK}proxy@{NOWHERE}",
    "NO_PROXY": "127.0.0.1",
}
FAILING = """
import logging, os, sys, warnings

early = logging.getLogger("a library")
early.addHandler(logging.StreamHandler())  # has the stream as it was before the stage began

from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage

with run_stage(Arguments.parse()) as run:
    secrets = " ".join(f"{name}={os.environ[name]}" for name in sys.stdin.read().split())
    print("printed", secrets)
    warnings.warn("warned " + secrets)
    early.warning("logged %s", secrets)
    try:
        raise OSError("inner " + secrets)
    except OSError:
        early.exception("with traceback")
    run.warn("reported " + secrets)
    raise ValueError("raised " + secrets)
"""


def leaks(content: bytes) -> bool:
    """Whether planted text is in some bytes, as it is or in base64 at any offset."""
    mark = MARK.encode()
    inside = [base64.b64encode(b"x" * shift + mark)[4 if shift else 0 : -4] for shift in range(3)]
    return any(form in content for form in (mark, *inside))


def leaking_files(folder: Path) -> list[Path]:
    """Files below a folder that hold planted text in their bytes or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if leaks(path.read_bytes()) or MARK in str(path.relative_to(folder))]


def test_leaks_are_found(tmp_path: Path) -> None:
    for shift in range(3):
        (tmp_path / str(shift)).write_bytes(b"<" + base64.b64encode(b"a" * shift + PLANTED["HF_TOKEN"].encode()) + b">")
    (tmp_path / "plain").write_text(PLANTED["HTTPS_PROXY"])
    (tmp_path / "clean").write_text("plant")
    assert {path.name for path in leaking_files(tmp_path)} == {"0", "1", "2", "plain"}


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def words(tmp_path: Path, with_sidecar: Callable[..., Path]) -> list[str]:
    """Command line of select_subset."""
    path = tmp_path / "preferences.parquet"
    row = dict.fromkeys(PREFERENCES.names) | {"image_ids": ["a", "b"], "archives": ["z", "z"], "ranks": [1, 2]}
    write_preferences(path, [row | {"prompt_id": f"p{i}", "prompt": f"prompt {i}"} for i in range(3)])
    config = SelectSubset.of(Configuration(), "imagereward", "test").canonical()
    files = ["--preferences", str(with_sidecar(path)), "--subset", str(tmp_path / "subset.parquet")]
    return [*files, "--config", config, "--log_file", str(tmp_path / "subset.log")]


def run_stage(code: list[str], words: list[str], folder: Path, uri: str) -> subprocess.CompletedProcess[str]:
    """Run a stage with planted secrets, all it says in its log, as its rule does."""
    environment = os.environ | PLANTED | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri, "HOME": str(folder)}
    with (folder / "subset.log").open("w") as log:
        streams: Any = {
            "stdout": log,
            "stderr": log,
            "text": True,
            "input": " ".join([*PLANTED, "MLFLOW_TRACKING_URI"]),
        }
        return subprocess.run([sys.executable, *code, *words], cwd=folder, env=environment, **streams)


def test_whatever_a_stage_says_holds_no_secret(words: list[str], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert run_stage(["-c", FAILING], words, tmp_path, uri).returncode == 1
    said = (tmp_path / "subset.log").read_text()
    for way in ("printed", "warned", "logged", "inner", "reported", "raised"):
        assert f"{way} HF_TOKEN={HIDDEN}" in said, way
    assert f"HTTPS_PROXY=http://{NOWHERE}" in said
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("softpref").experiment_id])
    traceback = Path(client.download_artifacts(run.info.run_id, "traceback.txt")).read_text()
    assert run.info.status == "FAILED" and f"raised HF_TOKEN={HIDDEN}" in traceback
    assert leaking_files(tmp_path) == []


def test_a_store_that_needs_a_login_and_is_away(words: list[str], tmp_path: Path) -> None:
    done = run_stage(["-m", "workflow_scripts.stages.select_subset"], words, tmp_path, f"http://me:{MARK}uri@{NOWHERE}")
    assert done.returncode == 0
    assert "MLflow did not take this run" in (tmp_path / "subset.log").read_text()
    verify(tmp_path / "subset.parquet")
    assert leaking_files(tmp_path) == []


# ------------------------------------------------------------------------------------------------------- the workflow


class Workflow:
    """The small workflow in a folder of its own, with planted secrets and watched sockets."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.listening: set[Any] = set()
        self.seen: set[int] = set()

    def snakemake(self, *options: str, config: tuple[str, ...] = ()) -> tuple[int, str]:
        """Run Snakemake; its exit status and all it says. Who listens meanwhile goes to `listening`."""
        command = [sys.executable, "-m", "snakemake", "--directory", str(self.folder)]
        command += [
            "--configfile",
            str(ROOT / "configs/test.yaml"),
            "--workflow-profile",
            str(ROOT / "profiles/default"),
        ]
        command += ["--config", "results=results", "downloads=results/downloads", *config, "--cores", "1", *options]
        environment = os.environ | PLANTED | {"HF_ENDPOINT": self.endpoint, "HOME": str(self.folder)}
        environment.pop("MLFLOW_TRACKING_URI")
        with (self.folder / "said").open("w+") as said:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
            while process.poll() is None:
                self._watch(psutil.Process(process.pid))
                try:
                    process.wait(0.3)
                except subprocess.TimeoutExpired:
                    continue
            said.seek(0)
            return process.returncode, said.read()

    def _watch(self, parent: psutil.Process) -> None:
        try:
            for process in [parent, *parent.children(recursive=True)]:
                self.seen.add(process.pid)
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.listening.add((tuple(process.cmdline()), connection.laddr))
        except psutil.Error:  # it has just ended
            pass


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    """Address of a Hub that refuses every request."""
    hub = HTTPServer(("127.0.0.1", 0), type("Refusing", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None}))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{hub.server_address[1]}"
    hub.shutdown()


def test_a_workflow_writes_no_secret_and_does_not_listen(tmp_path: Path, refusing_hub: str) -> None:
    """Success, failure, report: everything that lies in the folder afterwards, the store's bytes included."""
    workflow = Workflow(tmp_path, f"http://me:{MARK}end%40point@{refusing_hub}")
    target = "results/downloads/synthetic/hpsv2/dataset.json"
    status, said = workflow.snakemake(target)
    assert status == 0, said
    verify(tmp_path / target)
    status, said = workflow.snakemake(target, "--report", "report.html")
    assert status == 0, said
    status, said = workflow.snakemake("results/downloads/hub/hpsv2/dataset.json")
    assert status == 1 and "download_dataset" in said, said
    assert f"http://{refusing_hub}/api/datasets" in (tmp_path / "results/logs/download_dataset/hpsv2.log").read_text()
    # A password in the configuration is refused before it can be written anywhere.
    status, said = workflow.snakemake(target, config=(f"tracking={{uri: 'http://me:{MARK}config@{NOWHERE}'}}",))
    assert status == 1 and "tracking.uri" in said and "MLFLOW_TRACKING_PASSWORD" in said, said
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("softpref-test").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]
    assert (tmp_path / "report.html").stat().st_size > 1e5 and list(tmp_path.glob(".snakemake/log/*"))
    assert leaking_files(tmp_path) == []
    assert len(workflow.seen) > 6 and workflow.listening == set()

"""Touching, checking out again and moving a repository with a finished run in it."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from checkout import Workflow, environment

from workflow_scripts.files.paths import ROOT

CARRIED = ("results", ".snakemake", "mlflow.db", "mlruns")  # what a checkout does not hold
TABLES = ("table1.csv", "table2.csv", "comparisons.csv", "sensitivity.csv", "tables.md")
CROSS = (  # one row of table1.csv, from the recorded rollouts on
    "rollouts/hpsv2/grpo/seed0/imagereward/0001-0000.parquet",
    "scores/hpsv2/grpo/seed0/imagereward.parquet",
    "accuracy/hpsv2/grpo/seed0/imagereward.json",
)


@pytest.fixture
def gone(workflow: Workflow, tmp_path: Path) -> Iterator[Path]:
    """Return the place of the finished run while nothing is there: a path written anywhere leads nowhere."""
    away = tmp_path / "away"
    workflow.folder.rename(away)
    try:
        yield workflow.folder
    finally:
        if workflow.folder.is_symlink():
            workflow.folder.unlink()
        elif workflow.folder.exists():
            shutil.rmtree(workflow.folder)
        away.rename(workflow.folder)


def attached(workflow: Workflow) -> dict[str, set[str]]:
    """Names of the artifacts that each run shows, by run."""
    client = mlflow.MlflowClient(workflow.uri)
    experiment = client.get_experiment_by_name("softpref-test")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_id: {entry.path for entry in client.list_artifacts(run.info.run_id)} for run in runs}


def documented(language: str, word: str) -> str:
    """The code block of docs/provenance.md that has this word in it."""
    text = (ROOT / "docs" / "provenance.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.S) if word in b]
    return block


def test_touching_everything_reruns_nothing(workflow: Workflow, tmp_path: Path) -> None:
    copy = workflow.copy(tmp_path / "copy")
    rng = random.Random("touch")
    paths = sorted(path for path in copy.folder.rglob("*") if ".snakemake" not in path.parts)
    for path in paths:
        os.utime(path, (rng.randrange(10**9, 2 * 10**9),) * 2)  # inputs older and younger than what is made of them
    assert len(paths) > 300 and copy.planned() == []


def test_checking_out_again_reruns_nothing(workflow: Workflow, tmp_path: Path) -> None:
    origin, clone = Workflow.checkout(tmp_path / "origin"), tmp_path / "clone"
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "All"], ["clone", "-q", ".", str(clone)]):
        subprocess.run(["git", *words], cwd=origin.folder, check=True)
    assert not any((clone / name).exists() for name in CARRIED[1:]) and not (clone / "results/test").exists()
    command = ["cp", "-a", *(str(workflow.folder / name) for name in CARRIED), str(clone)]
    subprocess.run(command, check=True)
    assert Workflow(clone).planned() == []


@pytest.mark.slow
def test_a_moved_repository_goes_on(workflow: Workflow, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    moved = workflow.copy(tmp_path / "other" / "place")
    runs = attached(workflow)
    assert all(runs.values())
    old: Path = request.getfixturevalue("gone")
    assert moved.planned() == []
    assert not any(attached(moved).values())  # MLflow keeps absolute paths

    cure = documented("bash", "UPDATE").replace("/old/place", str(old))
    subprocess.run(cure, shell=True, executable="/bin/bash", cwd=moved.folder, env=with_python(), check=True)
    assert attached(moved) == runs

    wanted = {name: (moved.results / name).read_bytes() for name in (*TABLES, *CROSS)}
    for name in wanted:
        (moved.results / name).unlink()
    said = moved.snakemake("--cores", "2")
    assert {name: (moved.results / name).read_bytes() for name in wanted} == wanted
    assert said.count("rule generate_rollouts:") == 1 and "rule train_grpo:" not in said
    again = attached(moved)
    assert len(again) == len(runs) and all(again.values())  # the new runs replace those of the same stage_key
    assert again.keys() != runs.keys() and not old.exists()


def test_a_link_at_the_old_place_shows_the_artifacts(
    workflow: Workflow, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    moved = workflow.copy(tmp_path / "place")
    runs = attached(workflow)
    old: Path = request.getfixturevalue("gone")
    cure = documented("bash", "ln -s").replace("/old/place", str(old))
    subprocess.run(cure, shell=True, executable="/bin/bash", cwd=moved.folder, check=True)
    assert attached(moved) == runs


def with_python() -> dict[str, str]:
    """Environment in which `python` and `mlflow` are this interpreter's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment() | {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_artifacts_of_a_tracking_server_move_along(workflow: Workflow, tmp_path: Path) -> None:
    """The documented server keeps relative places: what was logged before the move is there after it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = documented("bash", "mlflow server").replace("5000", port)
    target = "results/test/accuracy/imagereward/zeroshot/seed0/imagereward.json"
    here = workflow.copy(tmp_path / "here")
    for name in ("mlflow.db", "mlruns"):
        path = here.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (here.folder / target).unlink()

    def served(folder: Path, act: str) -> str:
        server = subprocess.Popen(f"exec {command}", shell=True, cwd=folder, env=with_python())
        try:
            done = subprocess.run([sys.executable, "-c", act], cwd=folder, env=with_python(), stdout=subprocess.PIPE)
            assert done.returncode == 0
            return done.stdout.decode()
        finally:
            server.terminate()
            server.wait()

    uri = f"http://127.0.0.1:{port}"
    wait = f"""
import subprocess, sys, time, urllib.request
for _ in range(600):
    try:
        urllib.request.urlopen("{uri}/health")
        break
    except OSError:
        time.sleep(0.2)
"""
    run = f"""
import os
command = [sys.executable, "-m", "snakemake", "--cores", "1", "{target}", "--configfile", "configs/test.yaml"]
subprocess.run(command, env=os.environ | {{"MLFLOW_TRACKING_URI": "{uri}"}}, check=True, stderr=subprocess.DEVNULL)
"""
    show = f"""
import mlflow
client = mlflow.MlflowClient("{uri}")
experiment = client.get_experiment_by_name("softpref-test")
for run in client.search_runs([experiment.experiment_id]):
    print(run.info.run_name, *sorted(entry.path for entry in client.list_artifacts(run.info.run_id)))
    client.download_artifacts(run.info.run_id, "")
"""
    before = served(here.folder, wait + run + show)
    assert "measure_accuracy" in before and "imagereward.json.provenance.json" in before
    here.folder.rename(tmp_path / "there")
    assert served(tmp_path / "there", wait + show) == before

"""One stage instance is one MLflow run, whatever happens to the stage or to the store."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences.schema import PREFERENCES, write_preferences
from workflow_scripts.ranking.traces import log_gallery
from workflow_scripts.running.provenance import git_commit, verify
from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage
from workflow_scripts.tracking.store import open_store

CONFIG = SelectSubset.of(Configuration(), "imagereward", "test")
TURNS = 10


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a store that all tests of this file share, each with an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def store(
    uri: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[Any]]]:
    """Return a function that finds the runs of this test, oldest first."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.chdir(tmp_path)  # artifacts of an sqlite store stand in ./mlruns
    handler, handlers = signal.getsignal(signal.SIGTERM), logging.root.handlers[:]

    def runs(status: str | None = None) -> list[Any]:
        client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name(request.node.name)
        found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]) if experiment else []
        return [run for run in found if status in (None, run.info.status)]

    yield runs
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers


@pytest.fixture
def preferences(tmp_path: Path, with_sidecar: Callable[..., Path]) -> Path:
    """Canonical annotations of three prompts, as made by the run "upstream"."""
    path = tmp_path / "preferences.parquet"
    row = dict.fromkeys(PREFERENCES.names) | {"image_ids": ["a", "b"], "archives": ["z", "z"], "ranks": [1, 2]}
    write_preferences(path, [row | {"prompt_id": f"p{i}", "prompt": f"prompt {i}"} for i in range(3)])
    return with_sidecar(path, mlflow_run_id="upstream")


def words(preferences: Path, output: Path, config: SelectSubset = CONFIG) -> list[str]:
    """Command line of select_subset."""
    return ["--preferences", str(preferences), "--subset", str(output), "--config", config.canonical()]


def artifacts(run: Any, folder: str | None = None) -> dict[str, Path]:
    """Local copies of the files attached to a run."""
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = {}
    for entry in client.list_artifacts(run.info.run_id, folder):
        if entry.is_dir:
            found |= artifacts(run, entry.path)
        else:
            found[entry.path] = Path(client.download_artifacts(run.info.run_id, entry.path))
    return found


def test_a_finished_stage_is_one_run_with_all_it_used_and_made(
    store: Any, preferences: Path, run_main: Any, tmp_path: Path
) -> None:
    output, log = tmp_path / "out" / "subset.parquet", tmp_path / "subset.log"
    log.write_text("what was said\n")
    sidecar = run_main("select_subset", CONFIG, preferences=preferences, subset=output, log_file=log)
    (run,) = store()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "select_subset · imagereward · test · seed 0")
    told = {name: str(value) for name, value in CONFIG.model_dump(mode="json").items() if value is not None}
    assert run.data.params == told
    expected = {
        "stage": "select_subset",
        "dataset": "imagereward",
        "split": "test",
        "seed": "0",
        "stage_key": sidecar["stage_key"],
        "git_commit": git_commit() or "",
        "upstream_runs": "upstream",
    }
    assert expected.items() <= run.data.tags.items()
    assert sidecar["metrics"]["kept"] == 3 and sidecar["metrics"].items() <= run.data.metrics.items()
    assert {"seconds", "peak_memory_megabytes"} <= set(run.data.metrics)
    found = artifacts(run)
    assert set(found) == {"subset.parquet", "subset.parquet.provenance.json", "log/subset.log"}
    assert found["subset.parquet"].read_bytes() == output.read_bytes()
    assert json.loads(found["subset.parquet.provenance.json"].read_text()) == sidecar
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "/".join(preferences.parts[-3:])
    assert file_digest(preferences).startswith(given.dataset.digest)
    assert sidecar["mlflow_run_id"] == run.info.run_id and sidecar["upstream_runs"] == ["upstream"]
    assert verify(output) == sidecar


def test_a_rerun_replaces_its_predecessor(store: Any, preferences: Path, run_main: Any, tmp_path: Path) -> None:
    output = tmp_path / "subset.parquet"
    for _ in range(2):
        sidecar = run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    (run,) = store()
    assert run.info.run_id == sidecar["mlflow_run_id"] and run.info.status == "FINISHED"


def test_another_configuration_is_another_run(store: Any, preferences: Path, run_main: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        config = CONFIG.model_copy(update={"seed": seed})
        run_main("select_subset", config, preferences=preferences, subset=tmp_path / f"{seed}.parquet")
    runs = store("FINISHED")
    assert [run.data.params["seed"] for run in runs] == ["0", "1"]
    assert len({run.data.tags["stage_key"] for run in runs}) == 2


def test_a_failed_stage_leaves_a_failed_run_with_its_traceback(
    store: Any, preferences: Path, run_main: Any, tmp_path: Path
) -> None:
    output, log = tmp_path / "out" / "subset.parquet", tmp_path / "subset.log"
    log.write_text("what was said\n")
    in_the_way = output.parent / f".subset.parquet.{os.getpid()}.tmp"
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError):
        run_main("select_subset", CONFIG, preferences=preferences, subset=output, log_file=log)
    (run,) = store()
    assert run.info.status == "FAILED"
    found = artifacts(run)
    assert "Traceback" in found["traceback.txt"].read_text() and str(in_the_way) in found["traceback.txt"].read_text()
    assert found["log/subset.log"].read_text() == "what was said\n"
    # The run that succeeds replaces finished ones only.
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    assert [run.info.status for run in store()] == ["FAILED", "FINISHED"]
    assert len({run.data.tags["stage_key"] for run in store()}) == 1


def test_a_changed_input_stops_the_stage(store: Any, preferences: Path, run_main: Any, tmp_path: Path) -> None:
    preferences.write_bytes(preferences.read_bytes()[::-1])
    with pytest.raises(RuntimeError, match=r"preferences\.parquet is not what its stage wrote"):
        run_main("select_subset", CONFIG, preferences=preferences, subset=tmp_path / "subset.parquet")
    (run,) = store()
    assert run.info.status == "FAILED" and "ProvenanceError" in artifacts(run)["traceback.txt"].read_text()
    assert not (tmp_path / "subset.parquet").exists()


def test_what_the_stage_reports_is_in_the_run_and_in_the_sidecar(store: Any, preferences: Path, tmp_path: Path) -> None:
    output = tmp_path / "subset.parquet"
    with run_stage(Arguments.parse(words(preferences, output))) as run:
        output.write_text("result")
        run.metrics({"share of 5★, in %": 12.5, "count": 3})
        for step in (1, 2):
            run.metrics({"loss": 1 / step, "eval_answer_share/7": 0.5}, step=step)
        run.warn("first")
        run.warn("second")
        run.text("<think>", "traces/1.txt")
    (found,) = store()
    assert found.data.metrics["share of 5__ in _"] == 12.5 and found.data.metrics["count"] == 3
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    curve = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 1.0), (2, 0.5)]
    assert found.data.metrics["validation/answer_share/7"] == 0.5
    assert found.data.tags["warning"] == "first; second"
    assert artifacts(found)["traces/1.txt"].read_text() == "<think>"
    sidecar = verify(output)
    assert sidecar["metrics"] == {"share of 5★, in %": 12.5, "count": 3}
    assert sidecar["warnings"] == ["first", "second"]


def judged(image: str, anchor: bool) -> dict[str, Any]:
    """A row of a gallery of pairs; the anchor's image is of other bytes."""
    row = {
        "prompt_id": "p",
        "prompt": "a <b>cat</b>",
        "dataset": "hpsv2",
        "track": "hpsv2",
        "policy": "grpo",
        "seed": 0,
    }
    row |= {
        "image_id": image,
        "image": image.encode(),
        "anchor": anchor,
        "predicted_rank": 1,
        "score": 0.75,
        "right": False,
    }
    row |= {
        "score_se": None,
        "human_rank": 2.0,
        "human_rating": None,
        "pairs": 3,
        "pairs_right": 1.5,
        "confidence": 0.7,
    }
    thought = {"k": 0, "text": "<think>it has ears</think><answer>1</answer>", "answer_probabilities": [0.25, 0.75]}
    thought |= {"soft": 0.75, "sampled_answer": 1, "forced": False, "second": True}
    return row | {"rollouts": [] if anchor else [thought]}


def test_images_of_a_gallery_are_traces_of_its_run(store: Any, preferences: Path, tmp_path: Path) -> None:
    output = tmp_path / "subset.parquet"
    rows = [judged("dog", True), judged("cat", False), judged("cow", False)]
    for number in (2, 1):  # a rerun replaces its predecessor's, too
        with run_stage(Arguments.parse(words(preferences, output))) as run:
            output.write_text("result")
            log_gallery(run, rows, number)
    (found,) = store()
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = found.info.experiment_id
    (trace,) = client.search_traces(locations=[experiment])
    of_run = f"attributes.run_id = '{found.info.run_id}' and tags.right = 'false' and tags.confidence = 'high'"
    assert len(client.search_traces(locations=[experiment], filter_string=of_run)) == 1
    assert client.search_traces(locations=[experiment], filter_string="tags.right = 'true'") == []
    root, rollout = trace.data.spans
    shown = trace.info.tags["image_id"]
    assert root.inputs["prompt"] == "a <b>cat</b>" and root.outputs["pairs_right"] == "1.5 of 3"
    assert (
        rollout.outputs["thinking"] == "<think>it has ears</think>"
        and rollout.outputs["answer"] == "<answer>1</answer>"
    )
    assert rollout.outputs["answer_probabilities"] == {"0": 0.25, "1": 0.75} and rollout.inputs["shown"] == "second"
    assert {a.name: a.value for a in trace.info.assessments} == {"human_rank": 2.0, "right": False}
    folder = Path(trace.info.tags["mlflow.artifactLocation"].removeprefix("file://")) / "attachments"
    attached = {
        folder / root.inputs[name].removeprefix("mlflow-attachment://").split("?")[0]
        for name in ("image", "compared_with")
    }
    assert {path.read_bytes().decode() for path in attached} == {shown, "dog"} and shown != "dog"


def test_a_large_output_is_attached_by_its_digest(
    store: Any, preferences: Path, run_main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPREF_ARTIFACT_MEGABYTES", "0.001")
    output = tmp_path / "subset.parquet"
    run_main("select_subset", CONFIG, preferences=preferences, subset=output)
    found = artifacts(store()[0])
    assert output.stat().st_size > 1000 and "subset.parquet" not in found
    assert found["subset.parquet.path.txt"].read_text() == f"{output}\nsha256 {file_digest(output)}\n"


def test_runs_and_experiment_say_what_they_are(store: Any, preferences: Path, run_main: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        config = CONFIG.model_copy(update={"seed": seed})
        run_main("select_subset", config, preferences=preferences, subset=tmp_path / f"{seed}.parquet")
        client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment(store()[0].info.experiment_id)
        note = experiment.tags["mlflow.note.content"]
        if seed == 0:
            assert f"#/experiments/{experiment.experiment_id}/traces" in note
            client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "my own words")
    assert note == "my own words"
    told = [run.data.tags["mlflow.note.content"] for run in store()]
    assert "snakemake --cores all --force 1.parquet" in told[1] and "Select prompts of a split" in told[1]


def test_without_an_address_nothing_is_tracked(
    store: Any, preferences: Path, run_main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    sidecar = run_main("select_subset", CONFIG, preferences=preferences, subset=tmp_path / "subset.parquet")
    assert sidecar["mlflow_run_id"] is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store() == []


# ----------------------------------------------------------------------------------------------- processes of their own

WAITING = """
import sys
from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage

with run_stage(Arguments.parse()) as run:
    print(run.mlflow_run_id, flush=True)
    sys.stdin.read()
"""


def start(code: list[str], arguments: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    """Start a stage in a process of its own."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *code, *arguments], cwd=tmp_path, env=environment, **pipes)


def test_killed_processes_leave_no_running_run(store: Any, preferences: Path, run_main: Any, tmp_path: Path) -> None:
    processes = [start(["-c", WAITING], words(preferences, tmp_path / f"{i}.parquet"), tmp_path) for i in range(2)]
    killed, waiting = (process.stdout.readline().strip() for process in processes)  # type: ignore[union-attr]
    processes[0].kill()
    processes[0].wait()
    assert {run.info.run_id for run in store("RUNNING")} == {killed, waiting}
    run_main("select_subset", CONFIG, preferences=preferences, subset=tmp_path / "subset.parquet")
    states = {run.info.run_id: run.info.status for run in store()}
    assert (states[killed], states[waiting]) == ("FAILED", "RUNNING")
    # A cancelled stage closes its run itself.
    processes[1].terminate()
    processes[1].communicate(timeout=60)
    assert processes[1].returncode == 143
    assert {run.info.run_id for run in store("FAILED")} == {killed, waiting}
    assert len(store("FINISHED")) == 1


def open_at_once(number: int, folder: Path, preferences: Path) -> None:
    """Start stages with a store that is not there yet: each has its finished run with all its artifacts."""
    folder.mkdir()
    uri = f"sqlite:///{folder}/cold.db"
    stage = ["-m", "workflow_scripts.stages.select_subset"]
    configs = [CONFIG.model_copy(update={"seed": seed}) for seed in range(number)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        processes = [
            start(stage, words(preferences, folder / f"{i}.parquet", config), folder)
            for i, config in enumerate(configs)
        ]
        said = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * number, said
    client = mlflow.MlflowClient(uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment], "attributes.status = 'FINISHED'")
    assert sorted(int(run.data.params["seed"]) for run in runs) == list(range(number)), said
    assert all(len(client.list_artifacts(run.info.run_id)) == 2 for run in runs)
    assert len(client.search_runs([experiment])) == number


def test_six_processes_may_open_a_cold_store_at_once(store: Any, preferences: Path, tmp_path: Path) -> None:
    open_at_once(6, tmp_path / "six", preferences)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.cases(TURNS)
def test_eight_processes_may_open_a_cold_store_at_once_ten_times(store: Any, preferences: Path, tmp_path: Path) -> None:
    for turn in range(TURNS):
        open_at_once(8, tmp_path / str(turn), preferences)


# Opens a store, and is killed while its tables are made: a new store has some 800 kB in the end.
KILLED_WHILE_OPENING = """
import contextlib, os, sys, threading
from pathlib import Path
from workflow_scripts.tracking.store import open_store

def strike():
    while True:
        for path in Path().glob("*new.db*"):
            with contextlib.suppress(FileNotFoundError):
                if "journal" not in path.name and path.stat().st_size > 50_000:
                    os.kill(os.getpid(), 9)

threading.Thread(target=strike, daemon=True).start()
open_store(sys.argv[1])
"""


def test_a_kill_while_a_new_store_is_made_leaves_none_behind_that_is_broken(store: Any, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_OPENING, uri], cwd=tmp_path, env=environment)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "new.db").exists()
    client, experiment = open_store(uri)
    assert client.get_experiment(experiment).lifecycle_stage == "active" and not client.search_runs([experiment])
    assert {path.name for path in tmp_path.iterdir()} <= {"new.db", "new.db.lock"}


def test_a_store_that_is_away_costs_no_result(
    store: Any, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    output = tmp_path / "subset.parquet"
    process = start(["-m", "workflow_scripts.stages.select_subset"], words(preferences, output), tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "MLflow did not take this run" in said and "127.0.0.1" in said and "the stage goes on" in said
    assert "secret" not in said
    sidecar = verify(output)
    assert sidecar["mlflow_run_id"] is None and sidecar["metrics"]["kept"] == 3

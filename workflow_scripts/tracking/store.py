"""The MLflow store: opened by one process at a time, searched for the runs of a stage instance."""

import contextlib
import gc
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from workflow_scripts.configuration.shown import EXPERIMENT_NOTE
from workflow_scripts.files.writing import replacing
from workflow_scripts.running.command_line import freeze_imports
from workflow_scripts.tracking.pages import NOTE

# How long a stage waits for the processes that open the store before it (a new store takes each of them a minute on a
# busy machine; a dead process is not waited for), and for one that writes to it.
OPENING_SECONDS, WRITING_SECONDS = 900, 10


def open_store(uri: str) -> tuple[Any, str]:
    """Return the MLflow client for a store and the id of the experiment; create them where they are missing.

    Raises:
        Exception: whatever MLflow and its database raise when the store is away, locked, read-only or broken.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # its queue drops what does not fit
    gc.disable()  # MLflow and its store create thousands of classes, which the collector would search again and again
    try:
        import mlflow

        with _first_use(uri):
            mlflow.set_tracking_uri(uri)
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "softpref"))
    finally:
        freeze_imports()
        gc.enable()
    client = mlflow.MlflowClient()
    if NOTE not in experiment.tags:  # a description that somebody has written stays
        client.set_experiment_tag(experiment.experiment_id, NOTE, EXPERIMENT_NOTE.format(id=experiment.experiment_id))
        client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "custom_model_development")
    return client, experiment.experiment_id


def finished_runs(client: Any, experiment_id: str, stage_key: str) -> list[str]:
    """Return the ids of the finished runs of a stage instance."""
    same = f"tags.stage_key = '{stage_key}' and attributes.status = 'FINISHED'"
    return [run.info.run_id for run in client.search_runs([experiment_id], same)]


def delete_others(client: Any, experiment_id: str, stage_key: str, kept: str) -> None:
    """Delete the finished runs of a stage instance that the run `kept` replaces, and their traces."""
    for run_id in finished_runs(client, experiment_id, stage_key):
        if run_id != kept:
            _delete_traces(client, experiment_id, run_id)
            client.delete_run(run_id)


def fail_killed(client: Any, experiment_id: str) -> None:
    """Mark runs as failed whose process on this machine no longer exists."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, rest = run.data.tags.get("process", "").partition(" ")
        pid, _, created = rest.partition(" ")
        if host != os.uname().nodename:
            continue
        try:
            alive = psutil.Process(int(pid)).create_time() == float(created)
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            _delete_traces(client, experiment_id, run.info.run_id)
            client.set_tag(run.info.run_id, "killed", "the process ended without closing its run")
            client.set_terminated(run.info.run_id, "FAILED")


def _delete_traces(client: Any, experiment_id: str, run_id: str) -> None:
    of_run = f"attributes.run_id = '{run_id}'"
    while found := client.search_traces(locations=[experiment_id], filter_string=of_run, include_spans=False):
        client.delete_traces(experiment_id, trace_ids=[trace.info.trace_id for trace in found])


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Serialise the first use of an SQLite store: several processes that create its tables at once break it for good.

    A kill in the middle breaks it, too, so a new store is made beside its place. A store that cannot be written to
    fails here: MLflow would retry for minutes.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=OPENING_SECONDS):
        if not path.exists() or path.stat().st_size == 0:
            from mlflow import MlflowClient

            for left in path.parent.glob(f".{path.name}.*-journal"):
                left.unlink()
            with replacing(path) as new:
                MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(path, timeout=WRITING_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
        yield

"""The MLflow run of one stage instance: opened with its sidecar, fed by the stage, closed with its outputs attached.

A store that is away never costs a result: the stage goes on without it and says so, and `log-runs` logs it afterwards.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.instances import INSTANCE_KEYS, instance_name
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import write_json
from workflow_scripts.running.code_digest import PACKAGE
from workflow_scripts.running.provenance import sidecar_path
from workflow_scripts.tracking.pages import NOTE, chosen_params, curve_name, input_name, run_note
from workflow_scripts.tracking.store import delete_others, fail_killed, open_store

log = logging.getLogger("softpref")


class Run:
    """Handle of a running stage: what the stage reports goes to MLflow where it is reachable, and to the sidecar."""

    def __init__(self, key: str, inputs: dict[str, Any]) -> None:
        """`key` is the stage_key; `inputs` maps each input path to the sidecar of the job that made it, or to None."""
        self.stage_key = key
        self.inputs = inputs
        self.summary: dict[str, float] = {}
        self.warnings: list[str] = []
        self.files_read: dict[str, dict[str, Any]] = {}  # records of files that are no inputs of the rule
        self.mlflow_run_id: str | None = None
        self._client: Any = None  # None: no tracking, or the store has failed
        self._experiment_id = ""

    def send(self, what: str, write: Callable[[Any, str, str], object]) -> None:
        """Call `write(client, experiment_id, run_id)` where there is a store; a failure is only said.

        A store that fails once is not asked again: a stage waits for it once, and a run that lacks something does not
        pass for a complete one. The next process that opens the store marks it as failed.
        """
        if self._client is None or self.mlflow_run_id is None:
            return
        try:
            write(self._client, self._experiment_id, self.mlflow_run_id)
        except Exception as error:
            self._give_up(what, error)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics that are finite numbers.

        Metrics without a step also stand in the sidecar; those with one are training curves, shown in groups.
        """
        values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if step is None:
            self.summary.update(values)

        def write(client: Any, _: str, run_id: str) -> None:
            from mlflow.entities import Metric

            shown = {name if step is None else curve_name(name): value for name, value in values.items()}
            now = time.time_ns() // 1_000_000
            client.log_batch(
                run_id, [Metric(_safe(name), float(value), now, step or 0) for name, value in shown.items()]
            )

        self.send("metrics", write)

    def warn(self, message: str) -> None:
        """Say something that the user must not miss: in the log, in MLflow and in the sidecar."""
        log.warning(message)
        self.warnings.append(redacted(message))
        self.send("a warning", lambda client, _, run_id: client.set_tag(run_id, "warning", "; ".join(self.warnings)))

    def text(self, content: str, name: str) -> None:
        """Attach a text."""
        self.send(name, lambda client, _, run_id: client.log_text(run_id, content, name))

    def describe(self, record: dict[str, Any], output: Path) -> None:
        """Write the description of this run from its sidecar, as far as it is known, and its first output."""

        def write(client: Any, experiment_id: str, run_id: str) -> None:
            client.set_tag(run_id, NOTE, run_note(record, output, self.inputs, experiment_id))

        self.send("its description", write)

    def files(self, paths: list[Path], folder: str | None = None) -> None:
        """Attach files; one above SOFTPREF_ARTIFACT_MEGABYTES by path and digest only (they are in the sidecar)."""
        limit = float(os.environ.get("SOFTPREF_ARTIFACT_MEGABYTES", "20")) * 1e6

        def write(path: Path, client: Any, _: str, run_id: str) -> None:
            if path.stat().st_size <= limit:
                client.log_artifact(run_id, str(path), folder)
            else:
                text = f"{path.resolve()}\nsha256 {file_digest(path)}\n"
                client.log_text(run_id, text, str(Path(folder or "") / f"{path.name}.path.txt"))

        for path in paths:
            self.send(f"the file {path}", partial(write, path))

    def open(self, record: dict[str, Any]) -> None:
        """Start the MLflow run of a sidecar: clean up after killed runs, log parameters, tags and input data sets."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            return
        try:
            self._client, self._experiment_id = open_store(uri)
            fail_killed(self._client, self._experiment_id)
            run = self._client.create_run(
                self._experiment_id, milliseconds(record["started"]), _tags(record), instance_name(record)
            )
        except Exception as error:
            self._give_up("this run", error)
            return
        self.mlflow_run_id = run.info.run_id
        self.send("its parameters and inputs", lambda client, _, run_id: _log_record(client, run_id, record))

    def close(self, status: str, log_file: Path | None, ended: int | None = None) -> None:
        """End the MLflow run (`ended` in ms, None: now); a finished one replaces finished ones of its stage_key."""
        if log_file and log_file.is_file():
            sys.stdout.flush()  # a file takes it in blocks; a trainer prints there
            sys.stderr.flush()
            self.files([log_file], "log")

        def write(client: Any, experiment_id: str, run_id: str) -> None:
            client.set_terminated(run_id, status, ended)
            if status == "FINISHED":
                delete_others(client, experiment_id, self.stage_key, run_id)

        self.send("the end of this run", write)

    def finish(self, record: dict[str, Any], output: Path, log_file: Path | None) -> None:
        """End the run of a result that is there with its sidecar: attach all of it, and mark the run finished.

        The `mlflow_run_id` of the sidecar becomes null where the store did not take everything.
        """
        self.metrics({"seconds": record["seconds"], "peak_memory_megabytes": record["peak_memory_megabytes"]})
        self.describe(record, output)
        self.files([*(output.parent / name for name in record["outputs"]), sidecar_path(output)])
        self.close("FINISHED", log_file, milliseconds(record["started"]) + round(1000 * record["seconds"]))
        if self.mlflow_run_id != record["mlflow_run_id"]:
            write_json(sidecar_path(output), record | {"mlflow_run_id": self.mlflow_run_id})

    def _give_up(self, what: str, error: Exception) -> None:
        problem = redacted(f"{type(error).__name__}: {error}")
        log.warning("MLflow did not take %s (%s); the stage goes on without it", what, problem)
        self._client = self.mlflow_run_id = None


def milliseconds(started: str) -> int:
    """Milliseconds since 1970 of a time in ISO format."""
    return round(datetime.fromisoformat(started).timestamp() * 1000)


def _log_record(client: Any, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(name, value) for name, value in chosen_params(record["config"]).items()]
    client.log_batch(run_id, params=params)
    context = [InputTag("mlflow.data.context", record["stage"])]
    data = [
        DatasetInput(
            Dataset(input_name(path), digest[:16], "local", json.dumps({"uri": str(Path(path).resolve())})), context
        )
        for path, digest in record["inputs"].items()
    ]
    client.log_inputs(run_id, data)


def _tags(record: dict[str, Any]) -> dict[str, str]:
    process = psutil.Process()
    commit = record["git_commit"] or ""
    return {
        "stage": record["stage"],
        "stage_key": record["stage_key"],
        "git_commit": commit,
        "upstream_runs": " ".join(record["upstream_runs"]),
        "process": f"{os.uname().nodename} {process.pid} {process.create_time()}",
        **{key: str(record["config"][key]) for key in INSTANCE_KEYS if key in record["config"]},
        **({"warning": "; ".join(record["warnings"])} if record.get("warnings") else {}),
        # The MLflow pages show these as the source and the user of a run.
        "mlflow.source.name": f"{PACKAGE}.stages.{record['stage']}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("+changes"),
        "mlflow.user": process.username(),
    }


def _safe(name: str) -> str:
    """A metric name that MLflow accepts: its own set of characters only."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)

"""One stage instance is one MLflow run: opened here, fed by the stage, closed with every output as an artifact.

The store being away never costs a result: the stage goes on without it and says so, and `log_runs` logs it afterwards.
"""

import contextlib
import gc
import inspect
import json
import logging
import math
import os
import resource
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from workflow_scripts.files.digests import canonical_json, file_digest
from workflow_scripts.files.instances import INSTANCE_KEYS, instance_name
from workflow_scripts.files.records import ProvenanceError, file_record
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import replacing, write_json
from workflow_scripts.running.code_digest import PACKAGE, code_digest
from workflow_scripts.running.command_line import StageArguments, freeze_imports
from workflow_scripts.running.locks import Lock
from workflow_scripts.running.progress import lines_in_logs
from workflow_scripts.running.provenance import git_commit, sidecar_path, stage_key, verify_chain, versions
from workflow_scripts.running.redacted_output import redact_output
from workflow_scripts.tracking.pages import EXPERIMENT_NOTE, NOTE, chosen_params, curve_name, input_name, run_note

log = logging.getLogger("softpref")

# How long a stage waits for others: those that open the store before it (a new one takes each of them a minute on a
# busy machine; a dead one is not waited for), and one that writes to it.
OPENING_SECONDS, WRITING_SECONDS = 900, 10


class Run:
    """Handle of a running stage: what the stage reports goes to MLflow where that is reachable, and to the sidecar."""

    def __init__(self, key: str, inputs: dict[str, Any]) -> None:
        """`key` is the stage_key; `inputs` the sidecar of the job that made each input path, None: not known."""
        self.stage_key = key
        self.inputs = inputs
        self.summary: dict[str, float] = {}
        self.warnings: list[str] = []
        self.mlflow_run_id: str | None = None
        self._client: Any = None  # None: without tracking, or the store has failed
        self._experiment_id = ""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics that are finite numbers.

        Those without a step also stand in the sidecar; those with one are training curves, and are shown in groups.
        """
        values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if step is None:
            self.summary.update(values)
        with self._sending("metrics") as client:
            if client:
                from mlflow.entities import Metric

                now = time.time_ns() // 1_000_000
                shown = {name if step is None else curve_name(name): value for name, value in values.items()}
                points = [Metric(_safe(name), float(value), now, step or 0) for name, value in shown.items()]
                client.log_batch(self.mlflow_run_id, metrics=points)

    def warn(self, message: str) -> None:
        """Say something that the user must not miss: in the log, in MLflow and in the sidecar."""
        log.warning(message)
        self.warnings.append(redacted(message))
        with self._sending("a warning") as client:
            if client:
                client.set_tag(self.mlflow_run_id, "warning", "; ".join(self.warnings))

    def text(self, content: str, name: str) -> None:
        """Attach a text."""
        with self._sending(name) as client:
            if client:
                client.log_text(self.mlflow_run_id, content, name)

    def traces(self, rollouts: list[dict[str, Any]]) -> None:
        """Attach the text of three rollouts, the first in the order of their file, to be read by people."""
        for rollout in sorted(rollouts, key=lambda row: (row["item_id"], row["k"]))[:3]:
            self.text(rollout["text"], f"traces/{rollout['item_id'].replace('/', '_')}-{rollout['k']}.txt")

    def gallery_traces(self, rows: list[dict[str, Any]], number: int) -> None:
        """Log so many images of a gallery (rows of `reporting.gallery.GALLERY`) as traces of this run."""
        from workflow_scripts.ranking import traces  # other stages need nothing of what it imports

        anchors = {row["prompt_id"]: row for row in rows if row["anchor"]}
        for row in traces.sampled(rows, number):
            with self._sending("a trace") as client:
                if client and self.mlflow_run_id:
                    anchor = anchors.get(row["prompt_id"])
                    traces.log_trace(client, self._experiment_id, self.mlflow_run_id, row, anchor)

    def describe(self, record: dict[str, Any], output: Path) -> None:
        """Write the description of this run: of its sidecar, as far as it is known, and its first output."""
        with self._sending("its description") as client:
            if client:
                note = run_note(record, output, self.inputs, self._experiment_id)
                client.set_tag(self.mlflow_run_id, NOTE, note)

    def files(self, paths: list[Path], folder: str | None = None) -> None:
        """Attach files; one above SOFTPREF_ARTIFACT_MEGABYTES by path and digest only (they are in the sidecar)."""
        limit = float(os.environ.get("SOFTPREF_ARTIFACT_MEGABYTES", "20")) * 1e6
        for path in paths:
            with self._sending(f"the file {path}") as client:
                if client and path.stat().st_size <= limit:
                    client.log_artifact(self.mlflow_run_id, str(path), folder)
                elif client:
                    text = f"{path.resolve()}\nsha256 {file_digest(path)}\n"
                    client.log_text(self.mlflow_run_id, text, str(Path(folder or "") / f"{path.name}.path.txt"))

    def open(self, record: dict[str, Any]) -> None:
        """Start the MLflow run of a sidecar: clean up after killed ones, log parameters, tags and input data sets."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            return
        with self._sending("this run"):
            self._client, self._experiment_id = open_store(uri)
            from mlflow.entities import Dataset, DatasetInput, InputTag, Param

            _fail_killed(self._client, self._experiment_id)
            run = self._client.create_run(
                self._experiment_id, _milliseconds(record["started"]), _tags(record), instance_name(record)
            )
            self.mlflow_run_id = run.info.run_id
            params = [Param(name, value) for name, value in chosen_params(record["config"]).items()]
            self._client.log_batch(self.mlflow_run_id, params=params)
            context = [InputTag("mlflow.data.context", record["stage"])]
            data = [
                DatasetInput(
                    Dataset(input_name(path), digest[:16], "local", json.dumps({"uri": str(Path(path).resolve())})),
                    context,
                )
                for path, digest in record["inputs"].items()
            ]
            self._client.log_inputs(self.mlflow_run_id, data)

    def close(self, status: str, log_file: Path | None, ended: int | None = None) -> None:
        """End the MLflow run (`ended` in ms, None: now); a finished one replaces finished ones of its stage_key."""
        if log_file and log_file.is_file():
            sys.stderr.flush()
            self.files([log_file], "log")
        with self._sending("the end of this run") as client:
            if client:
                client.set_terminated(self.mlflow_run_id, status, ended)
            if client and status == "FINISHED":
                for old in finished_runs(client, self._experiment_id, self.stage_key):
                    if old != self.mlflow_run_id:
                        _delete_traces(client, self._experiment_id, old)
                        client.delete_run(old)

    @contextlib.contextmanager
    def _sending(self, what: str) -> Iterator[Any]:
        """Yield MLflow's client, None where there is none.

        A store that fails once is not asked again: a stage waits for it once, and a run that lacks something is not
        taken for a whole one. The process that left it open marks it failed (`_fail_killed`).
        """
        try:
            yield self._client
        except Exception as error:
            problem = redacted(f"{type(error).__name__}: {error}")
            log.warning("MLflow did not take %s (%s); the stage goes on without it", what, problem)
            self._client = self.mlflow_run_id = None


@contextlib.contextmanager
def run_stage(arguments: StageArguments) -> Iterator[Run]:
    """Run the body of a stage with verified inputs, an open MLflow run, and a sidecar at the end.

    Of several processes (torchrun) the first does so; the others get a run that knows its `stage_key` and records
    nothing. What they write is what the body lets them write.

    Raises:
        LockedError: another process is making the same output.
        ProvenanceError: an input does not match its sidecar.
    """
    redact_output()
    lines_in_logs()
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a cancelled stage closes its run
    if not first:
        run = Run("", {})
        run.inputs = _verified(arguments)
        run.stage_key = _stage_key(arguments, run.inputs)
        yield run
        return
    with Lock.of_output(_outputs(arguments)[0]), _recorded(arguments) as run:
        yield run


@contextlib.contextmanager
def _recorded(arguments: StageArguments) -> Iterator[Run]:
    started = time.time()
    stage, config, code = _identity(arguments)
    run = Run("", {})
    record: dict[str, Any] = {
        "stage": stage,
        "stage_key": "",
        "config": json.loads(canonical_json(config)),  # in the order in which the sidecar keeps it
        "code_digest": code,
        "git_commit": git_commit(),
        "inputs": {},
        "upstream_runs": [],
        "versions": versions(),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
    }
    try:
        run.inputs = _verified(arguments)
    except ProvenanceError:
        run.open(record)
        _fail(run, arguments.log_file)
        raise
    record["inputs"] = _digests(run.inputs)
    record["upstream_runs"] = sorted({s["mlflow_run_id"] for s in run.inputs.values() if s["mlflow_run_id"]})
    run.stage_key = record["stage_key"] = _stage_key(arguments, run.inputs)
    run.open(record)
    run.describe(record, _outputs(arguments)[0])
    try:
        log.info("%s, stage_key %s", instance_name(record), run.stage_key)
        yield run
        outputs = _outputs(arguments)
        folder = outputs[0].parent
        record |= {
            "outputs": {os.path.relpath(path, folder): file_record(path) for path in outputs},
            "metrics": run.summary,
            "warnings": run.warnings,
            "seconds": round(time.time() - started, 2),
            "peak_memory_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            "mlflow_run_id": run.mlflow_run_id,
            "log": os.path.relpath(arguments.log_file, folder) if arguments.log_file else None,
        }
        write_json(sidecar_path(outputs[0]), record)
        log.info("finished in %.1f s, at most %d MB", record["seconds"], record["peak_memory_megabytes"])
    except BaseException:
        _fail(run, arguments.log_file)
        raise
    finish(run, record, outputs[0], arguments.log_file)
    if os.environ.get("MLFLOW_TRACKING_URI") and run.mlflow_run_id is None:
        log.warning(
            "the result is complete but not in MLflow; to log it: python -m workflow_scripts log-runs RESULTS_FOLDER"
        )


def _identity(arguments: StageArguments) -> tuple[str, dict[str, Any], str]:
    """Stage, configuration and code digest of what these arguments run."""
    stage = Path(inspect.getfile(type(arguments))).stem
    config = arguments.config.model_dump(mode="json")  # type: ignore[attr-defined]
    return stage, config, arguments.code_digest or code_digest(stage, config.get("engine", "transformers"))


def _verified(arguments: StageArguments) -> dict[str, Any]:
    """Sidecar of each input path, everything checked against it."""
    seen: dict[Path, Any] = {}
    paths = [path for group in arguments.files("input").values() for path in group]
    return {str(path): verify_chain(path, seen) for path in paths}


def _digests(sidecars: dict[str, Any]) -> dict[str, str]:
    return {path: sidecar["outputs"][Path(path).name]["sha256"] for path, sidecar in sidecars.items()}


def _stage_key(arguments: StageArguments, sidecars: dict[str, Any]) -> str:
    stage, config, code = _identity(arguments)
    digests = _digests(sidecars)
    given = arguments.files("input")
    by_argument = {argument: [digests[str(path)] for path in group] for argument, group in given.items()}
    return stage_key(stage, config, by_argument, code)


def finish(run: Run, record: dict[str, Any], output: Path, log_file: Path | None) -> None:
    """End the MLflow run of a result that is there with its sidecar: attach all of it, and mark the run finished.

    The sidecar's `mlflow_run_id` becomes null where the store did not take everything.
    """
    run.metrics({"seconds": record["seconds"], "peak_memory_megabytes": record["peak_memory_megabytes"]})
    sidecar = sidecar_path(output)
    run.describe(record, output)
    run.files([*(output.parent / name for name in record["outputs"]), sidecar])
    run.close("FINISHED", log_file, _milliseconds(record["started"]) + round(1000 * record["seconds"]))
    if run.mlflow_run_id != record["mlflow_run_id"]:
        write_json(sidecar, record | {"mlflow_run_id": run.mlflow_run_id})


def open_store(uri: str) -> tuple[Any, str]:
    """MLflow's client for a store, and the id of the experiment; made where they are not there yet.

    Raises:
        Exception: whatever MLflow and its database raise when the store is away, locked, read-only or broken.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # its queue drops what does not fit
    gc.disable()  # it would search the thousands of classes that MLflow and its store make again and again
    try:
        import mlflow

        with _first_use(uri):
            mlflow.set_tracking_uri(uri)
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "softpref"))
    finally:
        freeze_imports()
        gc.enable()
    client = mlflow.MlflowClient()
    if NOTE not in experiment.tags:  # what somebody has written there stays
        client.set_experiment_tag(experiment.experiment_id, NOTE, EXPERIMENT_NOTE.format(id=experiment.experiment_id))
        client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "custom_model_development")
    return client, experiment.experiment_id


def finished_runs(client: Any, experiment_id: str, stage_key: str) -> list[str]:
    """Ids of the finished runs of a stage instance."""
    same = f"tags.stage_key = '{stage_key}' and attributes.status = 'FINISHED'"
    return [run.info.run_id for run in client.search_runs([experiment_id], same)]


def _fail(run: Run, log_file: Path | None) -> None:
    """End the MLflow run as failed, with the traceback of the current exception."""
    run.text(redacted(traceback.format_exc()), "traceback.txt")
    run.close("FAILED", log_file)


def _outputs(arguments: StageArguments) -> list[Path]:
    return [path for group in arguments.files("output").values() for path in group]


def _milliseconds(started: str) -> int:
    return round(datetime.fromisoformat(started).timestamp() * 1000)


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
        # What MLflow's pages show as a run's source and user.
        "mlflow.source.name": f"{PACKAGE}.stages.{record['stage']}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("+changes"),
        "mlflow.user": process.username(),
    }


def _fail_killed(client: Any, experiment_id: str) -> None:
    """Mark runs failed whose process on this machine no longer exists."""
    for old in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, rest = old.data.tags.get("process", "").partition(" ")
        pid, _, created = rest.partition(" ")
        if host != os.uname().nodename:
            continue
        try:
            alive = psutil.Process(int(pid)).create_time() == float(created)
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            _delete_traces(client, experiment_id, old.info.run_id)
            client.set_tag(old.info.run_id, "killed", "the process ended without closing its run")
            client.set_terminated(old.info.run_id, "FAILED")


def _delete_traces(client: Any, experiment_id: str, run_id: str) -> None:
    """Delete the traces of a run that another one replaces."""
    of_run = f"attributes.run_id = '{run_id}'"
    while found := client.search_traces(locations=[experiment_id], filter_string=of_run, include_spans=False):
        client.delete_traces(experiment_id, trace_ids=[trace.info.trace_id for trace in found])


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Serialise the first use of an sqlite store: several processes making its tables at once break it for good.

    So does a kill meanwhile: a new store is made beside its place. One that cannot be written to is found out here:
    MLflow would try again for minutes.
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


def _safe(name: str) -> str:
    """A metric name that MLflow accepts: its own set of characters only."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)

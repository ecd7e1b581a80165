"""One stage instance is one MLflow run: opened here, fed by the stage, closed with every output as an artifact.

The store being away never costs a result: each call is guarded, the stage goes on and says so.
"""

import contextlib
import inspect
import logging
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from workflow_scripts import provenance
from workflow_scripts.command_line import StageArguments

log = logging.getLogger("softpref")

# The parts of a stage instance's name, in the order in which they are said.
INSTANCE_KEYS = ("dataset", "track", "policy", "test", "split", "seed", "shard", "block")


class Run:
    """Handle of a running stage: what the stage reports goes to MLflow where that is reachable, and to the sidecar."""

    def __init__(self, key: str, inputs: dict[str, Any]) -> None:
        """`key` is the stage_key; `inputs` the verified sidecar of each input path."""
        self.stage_key = key
        self.inputs = inputs
        self.mlflow_run_id: str | None = None
        self.summary: dict[str, float] = {}
        self.warnings: list[str] = []

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics that are finite numbers; those without a step also stand in the sidecar."""
        values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if step is None:
            self.summary.update(values)
        if self.mlflow_run_id is None:
            return
        with self._guarded("metrics"):
            import mlflow

            mlflow.log_metrics({_safe(k): float(v) for k, v in values.items()}, step=step)

    def warn(self, message: str) -> None:
        """Say something that the user must not miss: in the log, in MLflow and in the sidecar."""
        log.warning(message)
        self.warnings.append(message)
        if self.mlflow_run_id is None:
            return
        with self._guarded("warning"):
            import mlflow

            mlflow.set_tag("warning", "; ".join(self.warnings))

    def text(self, content: str, name: str) -> None:
        """Attach a text."""
        if self.mlflow_run_id is None:
            return
        with self._guarded(name):
            import mlflow

            mlflow.log_text(content, name)

    def files(self, paths: list[Path], folder: str | None = None) -> None:
        """Attach files; one above SOFTPREF_ARTIFACT_MEGABYTES by path and digest only (they are in the sidecar)."""
        limit = float(os.environ.get("SOFTPREF_ARTIFACT_MEGABYTES", "20")) * 1e6
        for path in paths if self.mlflow_run_id else []:
            with self._guarded(f"artifact {path}"):
                import mlflow

                if path.stat().st_size <= limit:
                    mlflow.log_artifact(str(path), folder)
                else:
                    text = f"{path.resolve()}\nsha256 {provenance.file_digest(path)}\n"
                    mlflow.log_text(text, str(Path(folder or "") / f"{path.name}.path.txt"))

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning("MLflow did not take %s (%s); the result is not affected", what, _told(error))


@contextlib.contextmanager
def run_stage(arguments: StageArguments) -> Iterator[Run]:
    """Run the body of a stage with verified inputs, an open MLflow run, and a sidecar at the end.

    Raises:
        ProvenanceError: an input does not match its sidecar.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a cancelled stage closes its run
    started = time.time()
    stage = Path(inspect.getfile(type(arguments))).stem
    config = arguments.config.model_dump(mode="json")  # type: ignore[attr-defined]
    code = arguments.code_digest or provenance.code_digest(stage, config.get("engine", "transformers"))
    instance = {k: config[k] for k in INSTANCE_KEYS if k in config}
    name = " · ".join([stage, *(f"{k} {v}" if isinstance(v, int) else str(v) for k, v in instance.items())])
    run = Run("", {})
    record: dict[str, Any] = {
        "stage": stage,
        "stage_key": "",
        "config": config,
        "code_digest": code,
        "git_commit": provenance.git_commit(),
        "inputs": {},
        "upstream_runs": [],
        "versions": provenance.versions(),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
    }
    given = arguments.files("input")
    try:
        verified: dict[Path, Any] = {}
        run.inputs = {str(path): provenance.verify_chain(path, verified) for group in given.values() for path in group}
    except provenance.ProvenanceError:
        _open(run, name, record)
        _fail(run, arguments.log_file)
        raise
    record["inputs"] = inputs = {p: s["outputs"][Path(p).name]["sha256"] for p, s in run.inputs.items()}
    record["upstream_runs"] = sorted({s["mlflow_run_id"] for s in run.inputs.values() if s["mlflow_run_id"]})
    by_argument = {argument: [inputs[str(path)] for path in group] for argument, group in given.items()}
    run.stage_key = record["stage_key"] = provenance.stage_key(stage, config, by_argument, code)
    _open(run, name, record)
    try:
        log.info("%s, stage_key %s", name, run.stage_key)
        yield run
        outputs = [path for group in arguments.files("output").values() for path in group]
        folder = outputs[0].parent
        record |= {
            "outputs": {os.path.relpath(path, folder): provenance.described(path) for path in outputs},
            "metrics": run.summary,
            "warnings": run.warnings,
            "seconds": round(time.time() - started, 2),
            "peak_memory_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            "mlflow_run_id": run.mlflow_run_id,
        }
        sidecar = provenance.sidecar_path(outputs[0])
        provenance.write_json(sidecar, record)
        log.info("finished in %.1f s, at most %d MB", record["seconds"], record["peak_memory_megabytes"])
    except BaseException:
        _fail(run, arguments.log_file)
        raise
    run.metrics({"seconds": record["seconds"], "peak_memory_megabytes": record["peak_memory_megabytes"]})
    run.files([*outputs, sidecar])
    _close(run, "FINISHED", arguments.log_file)


def _open(run: Run, name: str, record: dict[str, Any]) -> None:
    """Start the MLflow run: clean up after killed ones, log parameters, tags and input data sets."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        os.environ.setdefault(variable, "2" if "RETRIES" in variable else "10")
    try:
        import mlflow
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]

        with _first_use(uri):
            mlflow.set_tracking_uri(uri)
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "softpref"))
        _fail_killed(mlflow.MlflowClient(), experiment.experiment_id)
        process = psutil.Process()
        tags = {
            "stage": record["stage"],
            "stage_key": record["stage_key"],
            "git_commit": record["git_commit"] or "",
            "upstream_runs": " ".join(record["upstream_runs"]),
            "process": f"{os.uname().nodename} {process.pid} {process.create_time()}",
            **{key: str(record["config"][key]) for key in INSTANCE_KEYS if key in record["config"]},
        }
        active = mlflow.start_run(run_name=name, tags=tags)
        run.mlflow_run_id = active.info.run_id
        mlflow.log_params(provenance.flat(record["config"]))
        for path, digest in record["inputs"].items():
            source = LocalArtifactDatasetSource(str(Path(path).resolve()))
            data: Any = MetaDataset(source, name=Path(path).name, digest=digest[:16])  # type: ignore[abstract]
            mlflow.log_input(data, context=record["stage"])
    except Exception as error:
        log.warning("no MLflow run at %s (%s); the stage goes on", uri.split("@")[-1], _told(error))


def _fail(run: Run, log_file: Path | None) -> None:
    """End the MLflow run as failed, with the traceback of the current exception."""
    run.text(traceback.format_exc(), "traceback.txt")
    _close(run, "FAILED", log_file)


def _close(run: Run, status: str, log_file: Path | None) -> None:
    """End the MLflow run; a finished one replaces finished predecessors of the same stage_key."""
    if run.mlflow_run_id is None:
        return
    if log_file and log_file.is_file():
        sys.stderr.flush()
        run.files([log_file], "log")
    with run._guarded("end of run"):
        import mlflow

        mlflow.end_run(status)
        if status == "FINISHED":
            client = mlflow.MlflowClient()
            experiment = client.get_run(run.mlflow_run_id).info.experiment_id
            same = f"tags.stage_key = '{run.stage_key}' and attributes.status = 'FINISHED'"
            for old in client.search_runs([experiment], same):
                if old.info.run_id != run.mlflow_run_id:
                    client.delete_run(old.info.run_id)


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
            client.set_tag(old.info.run_id, "killed", "the process ended without closing its run")
            client.set_terminated(old.info.run_id, "FAILED")


def _first_use(uri: str) -> contextlib.AbstractContextManager[Any]:
    """Serialise the first use of an sqlite store: several processes migrating it at once break it for good."""
    if not uri.startswith("sqlite:///"):
        return contextlib.nullcontext()
    return FileLock(uri.removeprefix("sqlite:///") + ".lock")


def _told(error: Exception) -> str:
    """What an exception says, without the user and password that an address in it may hold."""
    return re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {error}")


def _safe(name: str) -> str:
    """A metric name that MLflow accepts: its own set of characters only."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)

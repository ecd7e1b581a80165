"""What happens around the body of a stage: inputs verified, its MLflow run opened, its sidecar written."""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workflow_scripts.files.digests import canonical_json
from workflow_scripts.files.instances import instance_name
from workflow_scripts.files.records import ProvenanceError, file_record
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import write_json
from workflow_scripts.running.arithmetic import processor
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.command_line import StageArguments
from workflow_scripts.running.locks import Lock
from workflow_scripts.running.progress import lines_in_logs
from workflow_scripts.running.provenance import git_commit, sidecar_path, stage_key, verify_chain, versions
from workflow_scripts.running.redacted_output import redact_output
from workflow_scripts.tracking.run import Run, log


@contextlib.contextmanager
def run_stage(arguments: StageArguments) -> Iterator[Run]:
    """Run the body of a stage with verified inputs, an open MLflow run, and a sidecar at the end.

    Of several processes (torchrun) the first does so; the others get a run that knows its `stage_key` and records
    nothing. What they write is up to the body.

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
        inputs = _verified(arguments)
        yield Run(_stage_key(arguments, inputs), inputs)
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
        "processor": processor(),
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
        if run.files_read:
            record["files"] = run.files_read
        write_json(sidecar_path(outputs[0]), record)
        log.info("finished in %.1f s, at most %d MB", record["seconds"], record["peak_memory_megabytes"])
    except BaseException:
        _fail(run, arguments.log_file)
        raise
    run.finish(record, outputs[0], arguments.log_file)
    if os.environ.get("MLFLOW_TRACKING_URI") and run.mlflow_run_id is None:
        log.warning(
            "the result is complete but not in MLflow; to log it: python -m workflow_scripts log-runs RESULTS_FOLDER"
        )


def _identity(arguments: StageArguments) -> tuple[str, dict[str, Any], str]:
    """Stage, configuration and code digest of what these arguments run."""
    config: Any = arguments.config  # type: ignore[attr-defined]
    code = arguments.code_digest or code_digest(config.stage, config.code_engine)
    return config.stage, config.model_dump(mode="json"), code


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


def _fail(run: Run, log_file: Path | None) -> None:
    """End the MLflow run as failed, with the traceback of the current exception."""
    run.text(redacted(traceback.format_exc()), "traceback.txt")
    run.close("FAILED", log_file)


def _outputs(arguments: StageArguments) -> list[Path]:
    return [path for group in arguments.files("output").values() for path in group]

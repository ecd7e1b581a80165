"""Log results to MLflow afterwards: every stage instance of a results folder that the store does not have.

python -m workflow_scripts log-runs results

For results that were made while the store was away or tracking was off, or to fill another store. Run it in the folder
where snakemake ran. It may be run again: what the store has, by stage_key, is not logged twice. What a run of the stage
would have logged is taken from its provenance file, its outputs and its log; training curves from training.json.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from workflow_scripts.commands.register import ADAPTER, KEYS, register_all
from workflow_scripts.configuration.model import Configuration, ConfigurationError, Tracking, load
from workflow_scripts.files.instances import instance_name
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import write_json
from workflow_scripts.running.command_line import tell_briefly
from workflow_scripts.running.environment import stage_environment
from workflow_scripts.running.locks import Lock, LockedError
from workflow_scripts.running.provenance import SUFFIX, read_sidecar, sidecar_path, sidecars, verify
from workflow_scripts.running.redacted_output import redact_output
from workflow_scripts.tracking.pages import NOTE, run_note
from workflow_scripts.tracking.stage_run import Run, finish, finished_runs, open_store


class NotLoggedError(RuntimeError):
    """The store did not take a run."""


def recorded(folders: list[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """First output and sidecar of every job whose results lie in the folders, upstream jobs first.

    Also what is wrong with each sidecar that cannot be read.
    """
    jobs, unreadable = [], []
    for path in sorted({path.resolve() for folder in folders for path in sidecars(folder)}):
        output = path.with_name(path.name.removesuffix(SUFFIX))
        try:
            jobs.append((output, read_sidecar(output)))
        except ProvenanceError as error:
            unreadable.append(str(error))
    return sorted(jobs, key=lambda job: job[1]["started"]), unreadable


def producers(inputs: dict[str, str], jobs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any] | None]:
    """Sidecar of the job that made each input (path to digest), None where it is not among the jobs.

    Name and digest decide, and among several the longest common end of the path: the folder may have been moved.
    """

    def common_end(one: Path, other: Path) -> int:
        pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    found = []
    for path, digest in inputs.items():
        name = Path(path).name
        same = [(output, job) for output, job in jobs if job["outputs"].get(name, {}).get("sha256") == digest]
        best = max(same, key=lambda pair: common_end(pair[0].with_name(name), Path(path)), default=None)
        found.append(best and best[1])
    return found


def upstream_runs(sidecar: dict[str, Any], jobs: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """MLflow runs of the jobs that made a job's inputs; as recorded for those made elsewhere."""
    made_by = producers(sidecar["inputs"], jobs)
    elsewhere = sidecar["upstream_runs"] if None in made_by else []
    return sorted({*elsewhere, *(job["mlflow_run_id"] for job in made_by if job and job["mlflow_run_id"])})


def log_job(output: Path, sidecar: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Log a result as the run of its stage would have, and write the id of the run into its sidecar.

    `inputs` are the sidecars of the jobs that made each input, None where one is not known.

    Raises:
        NotLoggedError: the store did not take all of it; the log says why.
    """
    import pyarrow.parquet as pq

    run = Run(sidecar["stage_key"], inputs)
    run.open(sidecar)
    sidecar["mlflow_run_id"] = run.mlflow_run_id
    run.metrics(sidecar["metrics"])
    if "training.json" in sidecar["outputs"]:
        for entry in json.loads((output.parent / "training.json").read_text())["history"]:
            run.metrics({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])
    if sidecar["stage"] == "generate_rollouts":
        run.traces(pq.read_table(output, columns=["item_id", "k", "text"]).slice(0, 3).to_pylist())
    if sidecar["stage"] == "make_gallery":
        run.gallery_traces(pq.read_table(output).to_pylist(), sidecar["config"]["traces"])
    if run.mlflow_run_id:
        write_json(sidecar_path(output), sidecar)
        log_file = sidecar.get("log")
        finish(run, sidecar, output, log_file and output.parent / log_file)
    if run.mlflow_run_id is None:
        raise NotLoggedError(f"{instance_name(sidecar)}: the store did not take it; see above, and run this again")


def link_job(client: Any, experiment: str, output: Path, sidecar: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Give a run that the store has, and its sidecar, the links to the runs that were logged afterwards."""
    write_json(sidecar_path(output), sidecar)
    run_id = sidecar["mlflow_run_id"]
    client.set_tag(run_id, NOTE, run_note(sidecar, output, inputs, experiment))
    client.set_tag(run_id, "upstream_runs", " ".join(sidecar["upstream_runs"]))
    client.log_artifact(run_id, str(sidecar_path(output)))


def log_runs(folders: list[Path]) -> tuple[int, int, list[str]]:
    """Log what the store does not have: numbers of jobs logged and of jobs it had, and which results are damaged.

    Raises:
        LockedError: a workflow is running on one of the folders.
        NotLoggedError: the store failed.
    """
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(Lock.of_results(folder))
        try:
            client, experiment = open_store(os.environ["MLFLOW_TRACKING_URI"])
        except Exception as error:
            raise NotLoggedError(redacted(f"no MLflow store to log to ({type(error).__name__}: {error})")) from None
        jobs, damaged = recorded(folders)
        logged = known = 0
        for output, sidecar in jobs:
            try:
                verify(output)
            except ProvenanceError as error:
                damaged.append(str(error))
                continue
            before = sidecar["mlflow_run_id"], sidecar["upstream_runs"]
            there = finished_runs(client, experiment, sidecar["stage_key"])
            sidecar["upstream_runs"] = upstream_runs(sidecar, jobs)
            inputs = dict(zip(sidecar["inputs"], producers(sidecar["inputs"], jobs), strict=True))
            if not there:
                log_job(output, sidecar, inputs)
                print(f"logged {instance_name(sidecar)}", flush=True)
                logged += 1
                continue
            known += 1
            if sidecar["mlflow_run_id"] not in there:
                sidecar["mlflow_run_id"] = there[0]
            if before != (sidecar["mlflow_run_id"], sidecar["upstream_runs"]):
                link_job(client, experiment, output, sidecar, inputs)
    return logged, known, damaged


def remind(configuration: Configuration) -> None:
    """Say at the end of a workflow how many of its results are not in MLflow, and how to log them."""
    results, downloads = Path(configuration.results), Path(configuration.downloads)
    folders = [results] if downloads.is_relative_to(results) else [results, downloads]
    missing = sum(sidecar["mlflow_run_id"] is None for _, sidecar in recorded(folders)[0])
    if configuration.tracking.enabled and missing:
        given = configuration.tracking.model_dump(include=set(KEYS), exclude_defaults=True)
        command = ["python", "-m", "workflow_scripts.commands.log_runs", *map(str, folders)]
        command += [word for key, value in given.items() for word in (f"--{key}", str(value))]
        print(f"{missing} results are complete but not in MLflow; to log them: {shlex.join(command)}", file=sys.stderr)


def main() -> None:
    """Run the command."""
    sys.excepthook = tell_briefly
    redact_output()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts log-runs", description="Log results to MLflow that its store does not have."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="results folder; a downloads folder elsewhere, too")
    for key in KEYS:
        field = Tracking.model_fields[key]
        parser.add_argument(f"--{key}", default=field.default, help=f"{field.description} (default: {field.default})")
    arguments = parser.parse_args()
    try:
        configuration = load({"tracking": {key: getattr(arguments, key) for key in KEYS}})
        for folder in arguments.folders:
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder; name the results folder")
        os.environ.update(stage_environment(configuration))
        logged, there, damaged = log_runs(arguments.folders)
    except (ConfigurationError, NotADirectoryError, LockedError, NotLoggedError) as error:
        sys.exit(f"error: {error}")
    print(f"{logged} logged, {there} were there")
    if damaged:
        sys.exit("\n".join([f"{len(damaged)} not logged:", *damaged]))
    policies = [
        path.parent for folder in arguments.folders for path in sorted(folder.glob(f"policies/*/seed*/{ADAPTER}"))
    ]
    if failed := register_all(policies):
        sys.exit("\n".join(f"not registered: {problem}" for problem in failed))


if __name__ == "__main__":
    main()

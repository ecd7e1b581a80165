"""`register`: put trained policies into the model registry of MLflow. The workflow does so at its end."""

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration.model import Configuration, Tracking, load
from workflow_scripts.configuration.targets import adapter_folders
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import ADAPTER
from workflow_scripts.running.command_line import Command
from workflow_scripts.running.environment import stage_environment
from workflow_scripts.running.provenance import read_sidecar

RECORD = "registered_model.json"


class Store(Command):
    """Options of the commands that write to MLflow: keys of `tracking` in the configuration."""

    uri: str = Tracking.model_fields["uri"].default
    """Tracking store, where MLFLOW_TRACKING_URI does not name one."""
    experiment: str = Tracking.model_fields["experiment"].default
    """Experiment."""
    artifact_megabytes: float = Tracking.model_fields["artifact_megabytes"].default
    """Larger outputs are logged by path and digest instead of a copy."""

    def enter(self) -> None:
        """Set the environment variables of the store."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        options = {name: getattr(self, name) for name in Store.model_fields}
        os.environ.update(stage_environment(load({"tracking": options})))


class Register(Store):
    """Register trained policies as models in MLflow.

    A policy that the store has is not registered twice.

    example: python -m workflow_scripts register results/policies/imagereward/seed0
    """

    folders: CliPositionalArg[list[Path]]
    """Folders of trained adapters."""

    def cli_cmd(self) -> None:
        """Register each folder; exit with 1 where one fails."""
        self.enter()
        if failed := register_all(self.folders):
            sys.exit("\n".join(f"error: not registered: {problem}" for problem in failed))


def register(folder: Path) -> tuple[str, str, bool]:
    """Register the policy of an adapter's folder in the store of MLFLOW_TRACKING_URI.

    Returns and raises what `ranking.registered_policy.register_policy` does.
    """
    from workflow_scripts.ranking.registered_policy import register_policy
    from workflow_scripts.tracking.store import finished_runs, open_store

    client, experiment = open_store(os.environ["MLFLOW_TRACKING_URI"])
    return register_policy(folder, client, partial(finished_runs, client, experiment))


def register_all(folders: list[Path]) -> list[str]:
    """Register policies and write a record beside each; return the failures, one line for each folder."""
    failed = []
    for folder in folders:
        try:
            name, version, new = register(folder)
        except Exception as error:  # whatever the store and its database raise: no result is worth less for it
            failed.append(redacted(f"{folder}: {error}"))
            continue
        run = read_sidecar(folder / ADAPTER)["mlflow_run_id"]
        write_json(folder / RECORD, {"name": name, "version": version, "mlflow_run_id": run})
        print(f"{folder}: {name}, version {version}{'' if new else ', was there'}", flush=True)
    return failed


def register_at_the_end(configuration: Configuration) -> None:
    """Register the policies that a workflow has trained, in a process of its own, since it needs torch.

    A failure is only said: the results are complete.
    """
    if not configuration.tracking.enabled:
        return
    folders = [folder for name in adapter_folders(configuration) if needs_registration(folder := Path(name))]
    if folders:
        words = [word for key in Store.model_fields for word in (f"--{key}", str(getattr(configuration.tracking, key)))]
        subprocess.run([sys.executable, "-m", "workflow_scripts", "register", *words, *map(str, folders)], check=False)


def needs_registration(folder: Path) -> bool:
    """Whether a folder holds a finished training whose run is in MLflow and which has no record of its registration.

    Where the run is not in MLflow, `log-runs` logs it and registers the policy then.
    """
    if not (folder / ADAPTER).is_file() or (run := read_sidecar(folder / ADAPTER)["mlflow_run_id"]) is None:
        return False
    try:
        return bool(json.loads((folder / RECORD).read_text(encoding="utf-8"))["mlflow_run_id"] != run)
    except (OSError, ValueError):
        return True

"""Register trained policies as models in MLflow: to be loaded by mlflow.pyfunc and served by `mlflow models serve`.

python -m workflow_scripts register results/policies/imagereward/seed0

The workflow does this at its end. A policy becomes a version of the model softpref-<track>, tagged with seed and
stage_key and linked to the run that trained it. One that the store has is not registered twice. The base policy is put
into the model unless it is larger than the largest artifact: then the model says where it is, with its digests.
"""

import argparse
import base64
import importlib.metadata
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import Configuration, Tracking, load
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import base_path
from workflow_scripts.running.code_digest import PACKAGE
from workflow_scripts.running.command_line import tell_briefly
from workflow_scripts.running.environment import stage_environment
from workflow_scripts.running.provenance import read_sidecar, sidecar_path, verify
from workflow_scripts.running.redacted_output import redact_output
from workflow_scripts.tracking.stage_run import finished_runs, open_store

ADAPTER = "adapter_model.safetensors"
RECORD = "registered_model.json"
KEYS = ("uri", "experiment", "artifact_megabytes")
# What the judge imports; MLflow installs these where it makes an environment for a model.
NEEDED = (
    *("mlflow", "torch", "torchvision", "transformers", "peft", "safetensors", "jinja2", "pillow", "numpy", "pandas"),
    *("scipy", "pydantic", "pydantic-settings", "pyyaml", "tqdm", "filelock", "psutil"),
)


class RegistrationError(RuntimeError):
    """A policy cannot be registered: says why and what to do."""


def register(folder: Path) -> tuple[str, str, bool]:
    """Register the policy of an adapter's folder in the store of MLFLOW_TRACKING_URI.

    Returns:
        Name and version of the model, and whether it is new.

    Raises:
        RegistrationError: the folder holds no finished training, or its run is not in the store.
        ProvenanceError: a file is not what its stage wrote.
        PolicyError: the base policy is not as it was.
    """
    if not (folder / ADAPTER).is_file():
        raise RegistrationError(f"{folder} holds no {ADAPTER}; name the folder of a finished training")
    sidecar = verify(folder / ADAPTER)
    track, seed = sidecar["config"]["track"], sidecar["config"]["seed"]
    name = f"softpref-{track}"
    client, experiment = open_store(os.environ["MLFLOW_TRACKING_URI"])
    runs = finished_runs(client, experiment, sidecar["stage_key"])
    if not runs:
        raise RegistrationError(
            f"the run that trained {folder} is not in MLflow; log it first by python -m workflow_scripts log-runs with "
            "the results folder"
        )
    run = sidecar["mlflow_run_id"] if sidecar["mlflow_run_id"] in runs else runs[0]
    versions = client.search_model_versions(f"name = '{name}' and tag.stage_key = '{sidecar['stage_key']}'")
    for version in versions:
        if version.run_id == run:
            return name, str(version.version), False
    version = _log_model(folder, sidecar, name, run)
    for old in versions:  # of the same training, whose run was replaced
        client.delete_model_version(name, old.version)
    for key, value in {"stage_key": sidecar["stage_key"], "seed": seed, "track": track}.items():
        client.set_model_version_tag(name, version, key, str(value))
    return name, version, True


def _log_model(folder: Path, sidecar: dict[str, Any], name: str, run: str) -> str:
    """Make the model and its version; returns the version's number."""
    os.environ |= {"MLFLOW_UV_AUTO_DETECT": "false", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    track, seed = sidecar["config"]["track"], sidecar["config"]["seed"]
    manifest = folder.parent.parent / "base" / "manifest.json"
    base = base_path(manifest)
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    limit = float(os.environ.get("SOFTPREF_ARTIFACT_MEGABYTES", "20")) * 1e6
    inside = sum((base / file).stat().st_size for file in files) <= limit
    prompt, images = _example()
    with tempfile.TemporaryDirectory() as temporary:
        policies = Path(temporary) / "policies"
        adapter = policies / track / f"seed{seed}"
        adapter.mkdir(parents=True)
        for file in (*sidecar["outputs"], sidecar_path(folder / ADAPTER).name):
            shutil.copy2(folder / file, adapter / file)
        (policies / "base").mkdir()
        for path in (manifest, sidecar_path(manifest)):
            shutil.copy2(path, policies / "base" / path.name)
        if inside:
            (policies / "base" / "model").mkdir()
            for file in files:
                shutil.copy2(base / file, policies / "base" / "model" / file)
        else:
            (policies / "base" / "path.txt").write_text(str(base.resolve()), encoding="utf-8")
        logged = Model.log(
            artifact_path=None,
            name=name,
            flavor=mlflow.pyfunc,
            run_id=run,
            registered_model_name=name,
            await_registration_for=60,
            python_model=str(ROOT / PACKAGE / "ranking/served_policy.py"),
            artifacts={"policies": str(policies)},
            code_paths=[str(ROOT / PACKAGE)],
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in NEEDED],
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(Array(DataType.string), "images")]),
                outputs=Schema(
                    [
                        ColSpec(Array(DataType.double), "scores"),
                        ColSpec(Array(DataType.long), "ranks"),
                        ColSpec(Array(Array(DataType.string)), "reasoning"),
                    ]
                ),
                params=ParamSchema([ParamSpec("k", DataType.long, 3), ParamSpec("seed", DataType.long, 0)]),
            ),
            input_example=pd.DataFrame({"prompt": [prompt], "images": [images]}),
            metadata={"stage_key": sidecar["stage_key"], "base_files": files},
        )
    return str(logged.registered_model_version)


def _example() -> tuple[str, list[str]]:
    """A prompt and two small pictures in base64."""
    from PIL import Image, ImageDraw

    images = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(image).ellipse((22, 22, 62, 62), fill=colour)
        file = io.BytesIO()
        image.save(file, "PNG")
        images.append(base64.b64encode(file.getvalue()).decode())
    return "one red circle", images


def at_the_end(configuration: Configuration) -> None:
    """Register what a finished workflow has trained; the store being away costs no result.

    What is registered already, by a small record beside each adapter, costs nothing.
    """
    if not configuration.tracking.enabled:
        return
    folders = [
        folder
        for track in configuration.tracks
        for seed in configuration.seeds
        if needs_registration(folder := Path(configuration.results, "policies", track, f"seed{seed}"))
    ]
    if folders:
        words = [word for key in KEYS for word in (f"--{key}", str(getattr(configuration.tracking, key)))]
        command = [sys.executable, "-m", "workflow_scripts.commands.register", *words, *map(str, folders)]
        subprocess.run(command, check=False)


def needs_registration(folder: Path) -> bool:
    """Whether a folder holds a finished training whose run is in MLflow and which has no record of its registration.

    Where the run is not in MLflow, `log_runs` logs it and registers the policy then.
    """
    if not (folder / ADAPTER).is_file() or (run := read_sidecar(folder / ADAPTER)["mlflow_run_id"]) is None:
        return False
    try:
        return bool(json.loads((folder / RECORD).read_text(encoding="utf-8"))["mlflow_run_id"] != run)
    except (OSError, ValueError):
        return True


def register_all(folders: list[Path]) -> list[str]:
    """Register policies and write the record beside each; returns what went wrong, by folder."""
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


def main() -> None:
    """Run the command."""
    redact_output()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.excepthook = tell_briefly
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts register",
        description="Register trained policies as models in MLflow.",
        epilog="example: python -m workflow_scripts register results/policies/imagereward/seed0",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folder of a trained adapter")
    for key in KEYS:
        field = Tracking.model_fields[key]
        parser.add_argument(f"--{key}", default=field.default, help=f"{field.description} (default: {field.default})")
    arguments = parser.parse_args()
    os.environ.update(stage_environment(load({"tracking": {key: getattr(arguments, key) for key in KEYS}})))
    if failed := register_all(arguments.folders):
        sys.exit("\n".join(f"error: not registered: {problem}" for problem in failed))


if __name__ == "__main__":
    main()

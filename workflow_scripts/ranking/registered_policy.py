"""A trained policy as a registered model in MLflow: loaded by mlflow.pyfunc and served by `mlflow models serve`.

A policy becomes a version of the model softpref-<track>, tagged with seed and stage_key and linked to the run that
trained it. The base policy is part of the model unless it is larger than the largest artifact: then the model records
its path and digests.
"""

import base64
import importlib.metadata
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.manifest import ADAPTER, base_path
from workflow_scripts.running.code_digest import PACKAGE
from workflow_scripts.running.provenance import sidecar_path, verify

# The judge imports these; MLflow installs them where it makes an environment for a model.
NEEDED = (
    *("mlflow", "torch", "torchvision", "transformers", "peft", "safetensors", "jinja2", "pillow", "numpy", "pandas"),
    *("scipy", "pydantic", "pydantic-settings", "pyyaml", "tqdm", "filelock", "psutil"),
)


class RegistrationError(RuntimeError):
    """A policy cannot be registered: says why and what to do."""


def register_policy(folder: Path, client: Any, finished: Callable[[str], list[str]]) -> tuple[str, str, bool]:
    """Register the policy of an adapter's folder in an MLflow store.

    Args:
        folder: of the adapter.
        client: MLflow client for the store, to which MLflow itself is set as well.
        finished: ids of the finished runs of a stage_key.

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
    runs = finished(sidecar["stage_key"])
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

"""Trained policies in the folders that the workflow would have made, and judges of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workflow_scripts.configuration.model import Configuration, Track
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.ranking.judge import Judge
from workflow_scripts.running.provenance import sidecar_path


@pytest.fixture(scope="session")
def policy_folders(adapter: Path, base_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base/, imagereward/seed0/ and hpsv2/seed0/ as trainings leave them."""
    policies = tmp_path_factory.mktemp("results") / "policies"
    manifest = policies / "base" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    shutil.copyfile(base_manifest, manifest)
    common = {"inputs": {}, "warnings": [], "metrics": {}, "upstream_runs": [], "mlflow_run_id": None}
    common |= {"git_commit": None, "code_digest": "c", "seconds": 1.0, "peak_memory_megabytes": 1, "versions": {}}
    common |= {"started": "2025-01-01T00:00:00.000+00:00", "log": None}
    outputs = {manifest.name: file_record(manifest)}
    base = common | {"stage": "prepare_base_policy", "stage_key": "base", "config": {}, "outputs": outputs}
    write_json(sidecar_path(manifest), base)
    tracks: list[Track] = ["imagereward", "hpsv2"]
    for track in tracks:
        folder = policies / track / "seed0"
        shutil.copytree(adapter, folder)
        files = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "training.json")]
        write_json(files[2], {"history": []})
        record = common | {"stage": "train_grpo", "stage_key": f"key of {track}"}
        record["config"] = TrainGrpo.of(Configuration(), track, 0).model_dump(mode="json")
        record["inputs"] = {str(manifest): file_record(manifest)["sha256"]}
        record["outputs"] = {path.name: file_record(path) for path in files}
        write_json(sidecar_path(files[0]), record)
    return policies


@pytest.fixture(scope="session")
def judge_of(policy_folders: Path) -> Callable[..., Judge]:
    """Return a function that loads the judge of a track, once for the same settings."""
    loaded: dict[str, Judge] = {}

    def load(track: str, **settings: object) -> Judge:
        key = f"{track} {settings}"
        if key not in loaded:
            loaded[key] = Judge.load(policy_folders / track / "seed0", **settings)  # type: ignore[arg-type]
        return loaded[key]

    return load

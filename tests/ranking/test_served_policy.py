"""The registered model: found by its tags, loaded by mlflow.pyfunc, served over real HTTP with the judge's answers."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from PIL import Image

from workflow_scripts.commands.log_runs import log_runs
from workflow_scripts.commands.register import (
    ADAPTER,
    RECORD,
    needs_registration,
    register,
    register_all,
    register_at_the_end,
)
from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.files.writing import write_json
from workflow_scripts.ranking.judge import Judge
from workflow_scripts.running.environment import stage_environment
from workflow_scripts.running.provenance import read_sidecar

pytestmark = pytest.mark.slow
Scenes = list[tuple[str, dict[str, Image.Image]]]


@pytest.fixture(scope="module")
def results(policy_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a results folder with trained policies, whose runs and models are in a store of their own."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copytree(policy_folders, folder / "results" / "policies")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in stage_environment(Configuration()).items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        failed = register_all([folder / "results/policies/hpsv2/seed0"])
        assert len(failed) == 1 and "is not in MLflow; log it first" in failed[0]
        log_runs([folder / "results"])
        assert register_all([folder / "results/policies" / track / "seed0" for track in ("imagereward", "hpsv2")]) == []
        yield folder / "results"


def encoded(image: Image.Image) -> str:
    """An image file in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def expected(judge: Judge, prompt: str, images: list[Image.Image], **asked: int) -> dict[str, Any]:
    """What the judge says in this process, in the order of the images."""
    ranked = sorted(judge.rank(prompt, images, **asked), key=lambda row: row.index)
    return {
        "scores": [row.score for row in ranked],
        "ranks": [row.rank for row in ranked],
        "reasoning": [[thought.reasoning for thought in row.judgement.thoughts] for row in ranked],
    }


def test_a_version_is_linked_to_its_training(results: Path) -> None:
    client = mlflow.MlflowClient()
    for track in ("imagereward", "hpsv2"):
        folder = results / "policies" / track / "seed0"
        (version,) = client.search_model_versions(f"name = 'softpref-{track}'")
        sidecar = read_sidecar(folder / ADAPTER)
        assert version.run_id == sidecar["mlflow_run_id"]
        assert version.tags == {"stage_key": sidecar["stage_key"], "seed": "0", "track": track}
        assert register(folder) == (f"softpref-{track}", "1", False)
        assert not needs_registration(folder) and json.loads((folder / RECORD).read_text())["version"] == "1"
        info = mlflow.models.get_model_info(f"models:/softpref-{track}/1")
        assert info.signature.inputs.input_names() == ["prompt", "images"]
        assert info.signature.outputs.input_names() == ["scores", "ranks", "reasoning"]


def test_a_run_that_was_logged_again_has_one_version(results: Path, tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    folder = copy / "policies/imagereward/seed0"
    (old,) = client.search_model_versions("name = 'softpref-imagereward'")
    client.delete_run(old.run_id)
    try:
        log_runs([copy])
        assert needs_registration(folder) and register_all([folder]) == []
        (new,) = client.search_model_versions("name = 'softpref-imagereward'")
        assert (
            new.run_id != old.run_id
            and str(new.version) == "2"
            and new.run_id == read_sidecar(folder / ADAPTER)["mlflow_run_id"]
        )
    finally:
        client.restore_run(old.run_id)


def test_the_end_of_a_workflow_registers_what_is_missing(results: Path, capfd: Any) -> None:
    configuration = load({"results": str(results), "tracking": {"uri": os.environ["MLFLOW_TRACKING_URI"]}})
    register_at_the_end(configuration)
    assert capfd.readouterr().out == ""
    (results / "policies/hpsv2/seed0" / RECORD).unlink()
    register_at_the_end(configuration)
    assert "softpref-hpsv2, version 1, was there" in capfd.readouterr().out
    register_at_the_end(
        configuration.model_copy(update={"tracking": configuration.tracking.model_copy(update={"enabled": False})})
    )
    assert capfd.readouterr().out == ""


def test_a_store_that_is_away_costs_nothing(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (results / "policies/hpsv2/seed0" / RECORD).unlink(missing_ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")
    register_at_the_end(load({"results": str(results)}))
    assert "error: not registered:" in capfd.readouterr().err
    assert needs_registration(results / "policies/hpsv2/seed0")


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_loaded_by_pyfunc_it_says_what_the_judge_says(
    results: Path, judge_of: Callable[..., Judge], scenes: Scenes, track: str
) -> None:
    (version,) = mlflow.MlflowClient().search_model_versions(f"name = 'softpref-{track}'")
    model = mlflow.pyfunc.load_model(f"models:/softpref-{track}/{version.version}")
    rows = [(prompt, list(pictures.values())) for prompt, pictures in scenes[:2]]
    asked = pd.DataFrame([(prompt, [encoded(image) for image in images]) for prompt, images in rows])
    answered = model.predict(asked.set_axis(["prompt", "images"], axis=1), params={"k": 2, "seed": 5})
    judge = judge_of(track, k=1)
    assert answered.to_dict("records") == [expected(judge, prompt, images, k=2, seed=5) for prompt, images in rows]


def test_a_large_base_policy_stays_where_it_is(
    results: Path, judge_of: Callable[..., Judge], scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    folder = copy / "policies/hpsv2/seed0"
    record = read_sidecar(folder / ADAPTER)
    write_json(folder / f"{ADAPTER}.provenance.json", record | {"stage_key": "large", "mlflow_run_id": None})
    monkeypatch.setenv("SOFTPREF_ARTIFACT_MEGABYTES", "0.001")
    log_runs([copy])
    name, version, new = register(folder)
    assert new
    local = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}"))
    assert list(local.rglob("model.safetensors")) == [] and len(list(local.rglob(ADAPTER))) == 1
    prompt, pictures = scenes[0]
    images = list(pictures.values())
    asked = pd.DataFrame({"prompt": [prompt], "images": [[encoded(image) for image in images]]})
    answered = mlflow.pyfunc.load_model(f"models:/{name}/{version}").predict(asked, params={"k": 1})
    assert answered.to_dict("records") == [expected(judge_of("hpsv2", k=1), prompt, images, k=1)]


# --------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
def server(results: Path, tmp_path: Path) -> Iterator[str]:
    """Return the address of `mlflow models serve`, started away from the repository."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/softpref-hpsv2/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10) as answer:
                    assert answer.status == 200
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def post(url: str, body: dict[str, Any]) -> Any:
    """Answer of the server."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def test_served_over_http_it_says_what_the_judge_says(
    server: str, judge_of: Callable[..., Judge], scenes: Scenes
) -> None:
    rows = [(prompt, list(pictures.values())) for prompt, pictures in scenes[:2]]
    records = [{"prompt": prompt, "images": [encoded(image) for image in images]} for prompt, images in rows]
    answered = post(server, {"dataframe_records": records, "params": {"k": 2, "seed": 3}})["predictions"]
    judge = judge_of("hpsv2", k=1)
    assert answered == [expected(judge, prompt, images, k=2, seed=3) for prompt, images in rows]
    for images, reason in (
        (["no base64"], "row 0: "),
        ([base64.b64encode(b"no image").decode()] * 2, "row 0: UnidentifiedImageError"),
        ([records[0]["images"][0]], "give two or more different images of each prompt"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, {"dataframe_records": [{"prompt": "red", "images": images}]})
        assert refused.value.code == 400 and reason in refused.value.read().decode()

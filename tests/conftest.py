"""What several test files need: the bundled policy, pictures to show it, and stages run in this process."""

import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.preferences.schema import SUBSET, write_images, write_preferences
from workflow_scripts.preferences.synthetic_scenes import HUMAN, draw, sample_prompt, sample_scene
from workflow_scripts.running.arithmetic import pinned
from workflow_scripts.running.provenance import sidecar_path

# Tests see only these variables of the user's environment, and a home of their own: no setting of MLflow, the Hub,
# Snakemake or git changes their results. Git reads a checkout of another owner, as a container may have it.
KEPT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "VLLM_VENV", "SOFTPREF_SCREENSHOTS")
HOME = tempfile.TemporaryDirectory(prefix="softpref-home-")
for name in [name for name in os.environ if name not in KEPT and not name.startswith(("OPENBLAS_", "PYTEST_XDIST_"))]:
    del os.environ[name]
os.environ |= {"HOME": HOME.name, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
os.environ |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= pinned("avx2")  # before torch is loaded: what a test computes here has the bytes of a job's result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that the processes of `pytest --numprocesses` end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("workflow", "external"))


@pytest.hookimpl(optionalhook=True)  # the environment of vLLM has no pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, and all of tests/workflow, which share a whole run of the workflow."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/workflow" if nodeid.startswith("tests/workflow/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def outside_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no fixture find or leave anything in the checkout by a relative path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("nothing"))
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder of its own, and let the store that it sets end with it.

    MLflow writes the store into the environment.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", ""))


@pytest.fixture(scope="session")
def base_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of the bundled policy."""
    path = tmp_path_factory.mktemp("base") / "manifest.json"
    files = model_files(ROOT / "models/tiny-qwen2.5-vl")
    path.write_text(json.dumps({"path": "models/tiny-qwen2.5-vl", "repository": None, "files": files}))
    return path


@pytest.fixture(scope="session")
def policies(base_manifest: Path) -> dict[str, Any]:
    """Return the bundled policy with the question of each track."""
    from workflow_scripts.configuration.model import Configuration
    from workflow_scripts.configuration.stages import ModelConfig
    from workflow_scripts.policy.loading import load_policy

    return {
        track: load_policy(base_manifest, None, ModelConfig.of(Configuration(), track))  # type: ignore[arg-type]
        for track in ("imagereward", "hpsv2")
    }


@pytest.fixture(scope="session")
def adapter(base_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter that changes the pairwise policy visibly."""
    import torch
    from peft import LoraConfig, get_peft_model

    from workflow_scripts.configuration.model import Configuration
    from workflow_scripts.configuration.stages import ModelConfig
    from workflow_scripts.policy.loading import load_model

    lora = Configuration().training.hpsv2.lora
    torch.manual_seed(0)
    model = get_peft_model(
        load_model(base_manifest, ModelConfig.of(Configuration(), "hpsv2")),
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"),
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy_folders(adapter: Path, base_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base/, imagereward/seed0/ and hpsv2/seed0/ as trainings leave them."""
    from workflow_scripts.configuration.model import Configuration, Track
    from workflow_scripts.configuration.stages import TrainGrpo

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
def scenes() -> list[tuple[str, dict[str, Image.Image]]]:
    """Return prompts with four named pictures each."""
    rng = random.Random("tests")
    found = []
    for number in range(4):
        asked, background = sample_prompt(rng, test=False)
        drawn = [sample_scene(rng, asked, background) for _ in range(4)]
        found.append((drawn[0].prompt, {f"{number}-{i}": draw(scene) for i, scene in enumerate(drawn)}))
    return found


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a stage in this process by its command line and returns its sidecar."""

    def run(stage: str, config: Any, **files: Any) -> dict[str, Any]:
        words = []
        for name, value in files.items():
            values = value if isinstance(value, list) else [value]
            words += [word for path in values for word in (f"--{name}", str(path))]
        monkeypatch.setattr(sys, "argv", [stage, *words, "--config", config.canonical()])
        module = importlib.import_module(f"workflow_scripts.stages.{stage}")
        module.main()
        written = next(iter(module.Arguments.parse().files("output").values()))
        return json.loads(sidecar_path(written[0]).read_text())

    return run


@pytest.fixture
def with_sidecar() -> Callable[..., Path]:
    """Return a function that gives hand-made files the sidecar that a stage would have written."""

    def write(output: Path, *others: Path, **record: Any) -> Path:
        outputs = {path.name: file_record(path) for path in (output, *others)}
        defaults = {"config": {}, "inputs": {}, "outputs": outputs, "warnings": [], "mlflow_run_id": None}
        write_json(sidecar_path(output), defaults | record)
        return output

    return write


@pytest.fixture
def recorded_anew() -> Callable[[Path], None]:
    """Return a function that has a sidecar record its outputs as they are now."""

    def record(output: Path) -> None:
        sidecar = json.loads(sidecar_path(output).read_text())
        sidecar["outputs"] = {name: file_record(output.parent / name) for name in sidecar["outputs"]}
        write_json(sidecar_path(output), sidecar)

    return record


@pytest.fixture
def finished(tmp_path: Path, with_sidecar: Any) -> tuple[Any, Path]:
    """Return configs/test.yaml and results of it: the published tables, with made-up adapters, rollouts and scores."""
    from workflow_scripts.configuration.model import StageConfig
    from workflow_scripts.configuration.overlays import read_configuration
    from workflow_scripts.configuration.stages import GenerateRollouts, MakeTables, ScoreRollouts, TrainGrpo
    from workflow_scripts.reporting.expectation import EXPECTED, KEYS, compared_files
    from workflow_scripts.running.code_digest import code_digest

    def write(config: StageConfig, path: Path, *others: Path) -> None:
        code = code_digest(config.stage, config.code_engine)
        record = {"stage": config.stage, "config": config.model_dump(mode="json"), "code_digest": code}
        record |= {"processor": {"name": "zen3", "vendor": "AuthenticAMD", "instructions": "avx2"}}
        record |= {"started": "2025-01-01T00:00:00+00:00", "seconds": 1.0, "peak_memory_megabytes": 1}
        with_sidecar(path, *others, **record)

    history = [
        {"step": 0, "eval_soft_pair_accuracy": 0.61, "eval_soft_pair_accuracy_se": 0.02},
        *({"step": step, "kl": kl, "grad_norm": norm} for step, kl, norm in ((1, 0.01, 0.3), (2, 0.004, 0.1))),
        {"step": 2, "eval_soft_pair_accuracy": 0.64, "eval_soft_pair_accuracy_se": 0.03},
    ]
    results = tmp_path / "finished"
    c = read_configuration([ROOT / "configs/test.yaml"], {"results": str(results)})
    for name in compared_files(c):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(f"content of {name}")
        kind, track, *instance = Path(name).with_suffix("").parts
        if kind == "policies":
            record = results / name.replace("adapter_model.safetensors", "training.json")
            record.write_text(json.dumps({"history": history}))
            write(TrainGrpo.of(c, track, 0), results / name, record)  # type: ignore[arg-type]
        else:
            case: Any = (track, instance[0], instance[2], 0)
            block = [int(number) for number in instance[3].split("-")] if kind == "rollouts" else []
            write(GenerateRollouts.of(c, *case, *block) if block else ScoreRollouts.of(c, *case), results / name)
    tables = [results / f"{table}.csv" for table in KEYS]
    for path in tables:
        shutil.copyfile(EXPECTED / "test" / path.name, path)
    write(MakeTables.of(c), *tables)
    return c, results


@pytest.fixture(scope="session")
def image_rows() -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Return a function that makes rows of an images table."""

    def rows(pictures: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for name, picture in pictures.items():
            file = io.BytesIO()
            picture.save(file, "WEBP", lossless=True)
            found.append({"image_id": name, "bytes": file.getvalue(), "width": picture.width, "height": picture.height})
        return found

    return rows


@pytest.fixture
def training_inputs(tmp_path: Path, base_manifest: Path, with_sidecar: Any, image_rows: Any) -> dict[str, Path]:
    """Return small training and validation splits of rated pictures, and the bundled policy."""
    from workflow_scripts.policy.cold_start import rating, scenes_of_prompt

    shutil.copyfile(base_manifest, tmp_path / "manifest.json")
    files = {"base": with_sidecar(tmp_path / "manifest.json")}
    rng = random.Random(0)
    for split, prompts in {"train": 8, "validation": 4}.items():
        rows, pictures = [], {}
        for number in range(prompts):
            drawn = scenes_of_prompt(rng)
            names = [f"{split}-{number}-{i}" for i in range(len(drawn))]
            pictures |= dict(zip(names, map(draw, drawn), strict=True))
            utilities = [HUMAN.utility(scene) for scene in drawn]
            row = {"prompt_id": f"{split}{number}", "prompt": drawn[0].prompt, "position": number, "image_ids": names}
            row |= {"archives": ["z"] * len(names), "ratings": [rating(utility) for utility in utilities]}
            rows.append(
                dict.fromkeys(SUBSET.names) | row | {"ranks": [1 + sum(v > u for v in utilities) for u in utilities]}
            )
        write_preferences(tmp_path / f"{split}.parquet", rows, SUBSET)
        write_images(tmp_path / f"{split}_images.parquet", image_rows(pictures))
        files[split] = with_sidecar(tmp_path / f"{split}.parquet")
        files[f"{split}_images"] = with_sidecar(tmp_path / f"{split}_images.parquet")
    return files

"""A published policy with a published adapter as a row of the tables, from a Hub on loopback, without training."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from hub_server import Hub, Repository, published_hub
from peft import PeftModel
from safetensors.torch import load_file, save_file

from workflow_scripts.configuration import stages, targets
from workflow_scripts.configuration.data_stages import DownloadDataset, ReadAnnotations, ReadImages, SelectSubset
from workflow_scripts.configuration.data_stages import SynthesizeDataset as Synthesize
from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.configuration.stages import ModelConfig, PrepareBasePolicy
from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import load_model, load_policy
from workflow_scripts.policy.manifest import PolicyError, base_path
from workflow_scripts.policy.published_adapter import adapter_files
from workflow_scripts.running.recorded_files import altered_files

BASE, LORA = "lab/reasoner", "lab/reasoner-lora"
COMMIT = {BASE: "a" * 40, LORA: "b" * 40}
# On configs/test.yaml: what a user of a published policy writes.
OVERLAY: dict[str, Any] = {
    "policies": ["zeroshot"],
    "policy": {
        "source": "hub",
        "hub": {
            "repository": BASE,
            "revision": COMMIT[BASE],
            "adapter": {"repository": LORA, "revision": COMMIT[LORA]},
        },
    },
    "prompts": {
        "pointwise": "{image} prompt: {prompt}. rate it from 1 to 7.",
        "pairwise": "one: {image} two: {image} prompt: {prompt}. is two better, 0 or 1.",
    },
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def lora(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter on the bundled model as it is published: it names its base model."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text("its card")
    return edited(folder, base_model_name_or_path=BASE)


def edited(folder: Path, **values: Any) -> Path:
    """Set keys of an adapter's configuration; return the folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture(scope="module")
def hub(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return a Hub with the data of configs/hub_demo.yaml, the bundled model and the adapter under names of a lab."""
    hub = published_hub(tmp_path_factory.mktemp("hub"))
    for name, folder in ((BASE, ROOT / "models/tiny-qwen2.5-vl"), (LORA, lora)):
        hub.repositories["models", name] = Repository("models", name, folder, COMMIT[name])
    with hub.running():
        yield hub


def prepare(hub: Hub, c: Configuration, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run prepare_base_policy in a process of its own, which reads the Hub's address once."""
    command = [sys.executable, "-m", "workflow_scripts.stages.prepare_base_policy"]
    command += ["--manifest", str(folder / "manifest.json"), "--config", PrepareBasePolicy.of(c).canonical()]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def configuration(folder: Path, **changes: Any) -> Configuration:
    """Return OVERLAY, with its downloads in a folder, on a small synthetic world; the changes are keys of the root."""
    world = {"train_prompts": 8, "test_prompts": 4, "unreadable_images": 0}
    small = {"datasets": {"hpsv2": {"synthetic": world, "test_prompts": 4}}, "tracks": ["hpsv2"]}
    sizes = {"rollouts": {"block_size": 2}, "scoring": {"report_k": [1, 2], "bootstrap": {"resamples": 100}}}
    return load(OVERLAY | small | sizes | {"downloads": str(folder / "downloads")} | changes)


@pytest.fixture(scope="module")
def prepared(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of the published policy with its adapter."""
    folder = tmp_path_factory.mktemp("prepared")
    done = prepare(hub, configuration(folder), folder)
    assert done.returncode == 0, done.stderr
    return folder / "manifest.json"


def test_the_adapter_is_downloaded_and_recorded(hub: Hub, lora: Path, prepared: Path) -> None:
    manifest = json.loads(prepared.read_text())
    assert (manifest["repository"], manifest["revision"]) == (BASE, COMMIT[BASE])
    recorded = manifest["adapter"]
    assert (recorded["repository"], recorded["revision"]) == (LORA, COMMIT[LORA])
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert recorded["files"] == {name: file_digest(lora / name) for name in names}
    assert sorted(path.name for path in Path(recorded["path"]).iterdir()) == names  # and no card
    hub.requests.clear()
    again = prepare(hub, configuration(prepared.parent), prepared.parent)
    assert again.returncode == 0 and hub.transfers() == []


def test_the_policy_is_the_base_with_the_update_of_the_adapter(prepared: Path, lora: Path) -> None:
    """W + (alpha / r) B A, computed from the files; short types keep the two apart."""
    config = ModelConfig.of(configuration(prepared.parent), "hpsv2")
    base = load_model(prepared, config).state_dict()
    found = load_policy(prepared, None, config).model.state_dict()
    saved, update = (
        json.loads((lora / "adapter_config.json").read_text()),
        load_file(lora / "adapter_model.safetensors"),
    )
    scale, changed = saved["lora_alpha"] / saved["r"], 0
    for name, weights in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in update:
            changed += 1
            weights = weights + scale * update[key.format("B")] @ update[key.format("A")]
        torch.testing.assert_close(found[name], weights, atol=1e-6, rtol=1e-5)
    assert changed == len(update) / 2 > 0
    short = load_policy(prepared, None, config.model_copy(update={"dtype": "bfloat16"}))
    assert isinstance(short.model, PeftModel)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model_name_or_path": "lab/other"}, rf"trained on lab/other, but .*repository is {BASE}; set it to"),
        ({"base_model_name_or_path": None}, r"trained on None, but policy\.hub\.repository"),
        ({"peft_type": "IA3"}, r"holds an adapter of type IA3; set policy\.hub\.adapter to a LoRA"),
        ({}, None),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    values: dict[str, Any], message: str | None, lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(lora, tmp_path / "lora")
    folder = edited(tmp_path / "lora", **values)
    if message is None:
        assert adapter_files(folder, (BASE,)).keys() == {"adapter_config.json", "adapter_model.safetensors"}
        (folder / "adapter_model.safetensors").unlink()
        message = r"holds no adapter_model\.safetensors; set policy\.hub\.adapter"
    with pytest.raises(PolicyError, match=message):
        adapter_files(folder, (BASE,))


def test_an_adapter_in_a_folder_that_names_a_mirror_is_refused_in_one_line(
    hub: Hub, lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(lora, tmp_path / "lora")
    edited(tmp_path / "lora", base_model_name_or_path="mirror/reasoner")
    place = OVERLAY["policy"]["hub"] | {"adapter": {"path": str(tmp_path / "lora")}}
    done = prepare(hub, configuration(tmp_path, policy={"source": "hub", "hub": place}), tmp_path)
    assert done.returncode == 1 and not (tmp_path / "manifest.json").exists()
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/lora/adapter_config.json says that the adapter")


@pytest.fixture
def local(lora: Path, run_main: Any, tmp_path: Path) -> Path:
    """Return the manifest of a model and an adapter that are folders of the user."""
    shutil.copytree(ROOT / "models/tiny-qwen2.5-vl", tmp_path / "model")
    shutil.copytree(lora, tmp_path / "lora")
    place = {"path": str(tmp_path / "model"), "adapter": {"path": str(tmp_path / "lora")}}
    c = configuration(tmp_path, policy={"source": "hub", "hub": place})
    base_path.cache_clear()
    run_main("prepare_base_policy", PrepareBasePolicy.of(c), manifest=tmp_path / "manifest.json")
    return tmp_path / "manifest.json"


def test_an_adapter_that_changed_since_the_manifest_is_named(local: Path) -> None:
    config = ModelConfig.of(configuration(local.parent), "hpsv2")
    load_policy(local, None, config)
    assert altered_files(local) == []
    changed = edited(local.parent / "lora", lora_alpha=1) / "adapter_config.json"
    with pytest.raises(
        PolicyError, match=rf"{changed} is not as it was when {local} was written; restore it, or delete"
    ):
        load_policy(local, None, config)
    assert altered_files(local) == [f"{changed}, which it names, has changed since"]


def test_an_adapter_with_layers_of_other_names_is_refused(local: Path) -> None:
    """PEFT only warns: layers without weights in the file would stay those of the base policy."""
    path = local.parent / "lora/adapter_model.safetensors"
    save_file({name.replace("layers.0", "blocks.0"): w for name, w in load_file(path).items()}, path)
    manifest = json.loads(local.read_text())
    manifest["adapter"]["files"] = adapter_files(path.parent, ())
    local.write_text(json.dumps(manifest))
    with pytest.raises(
        PolicyError, match=r"lora cannot be loaded.*missing adapter keys.*; set policy\.hub\.adapter to"
    ):
        load_policy(local, None, ModelConfig.of(configuration(local.parent), "hpsv2"))


def test_only_the_files_of_the_test_sets_are_downloaded(hub: Hub, run_main: Any, tmp_path: Path) -> None:
    for dataset in ("imagereward", "hpsv2"):
        folder = hub.repositories["datasets", PUBLISHED[dataset]["repository"]].folder
        c = load(
            {
                "policies": ["zeroshot"],
                "datasets": {dataset: {"source": "hub", "hub": {"path": str(folder), "test_only": True}}},
            }
        )
        record = tmp_path / dataset / "dataset.json"
        run_main("download_dataset", DownloadDataset.of(c, dataset), record=record)  # type: ignore[arg-type]
        files = json.loads(record.read_text())["files"]
        assert files and not [name for name in files if "train" in name or "validation" in name]
        preferences = tmp_path / dataset / "preferences.parquet"
        run_main("read_annotations", ReadAnnotations.of(c, dataset, "test"), record=record, preferences=preferences)
        assert len(pd.read_parquet(preferences)) == 8


def test_one_policy_fills_tables_figures_and_report(
    prepared: Path, run_main: Callable[..., Any], tmp_path: Path
) -> None:
    """Every stage behind the report, on four test prompts, with a policy that nothing trained."""
    c = configuration(tmp_path)
    name = ("hpsv2", "zeroshot", "hpsv2", 0)
    files = {key: tmp_path / f"{key}.parquet" for key in ("preferences", "subset", "images", "rollouts", "scores")}
    record, accuracy = tmp_path / "world/dataset.json", tmp_path / "accuracy.json"
    run_main("synthesize_dataset", Synthesize.of(c, "hpsv2"), record=record)
    run_main(
        "read_annotations", ReadAnnotations.of(c, "hpsv2", "test"), record=record, preferences=files["preferences"]
    )
    selected = {key: files[key] for key in ("preferences", "subset")}
    run_main("select_subset", SelectSubset.of(c, "hpsv2", "test"), **selected)
    subset = files["subset"]
    listing = tmp_path / "images.json"
    run_main(
        "read_images",
        ReadImages.of(c, "hpsv2", "test", 0),
        record=record,
        subset=subset,
        images=files["images"],
        listing=listing,
    )
    base_path.cache_clear()
    rolled = {key: files[key] for key in ("subset", "images", "rollouts")}
    run_main("generate_rollouts", stages.GenerateRollouts.of(c, *name, 0, 0), base=prepared, **rolled)
    run_main("score_rollouts", stages.ScoreRollouts.of(c, *name), rollouts=files["rollouts"], scores=files["scores"])
    prompts = tmp_path / "accuracy-prompts.parquet"
    measured = {"scores": files["scores"], "subset": subset, "record": record}
    run_main("measure_accuracy", stages.MeasureAccuracy.of(c, *name), **measured, accuracy=accuracy, prompts=prompts)
    gallery = tmp_path / "gallery.parquet"
    run_main("make_gallery", stages.MakeGallery.of(c, *name), **rolled, scores=files["scores"], gallery=gallery)
    tables = {key: tmp_path / f"{key}.csv" for key in ("table1", "table2", "comparisons", "sensitivity")}
    markdown = tmp_path / "tables.md"
    run_main("make_tables", stages.MakeTables.of(c), accuracies=accuracy, base=prepared, **tables, markdown=markdown)
    drawn = [tmp_path / "figures" / f"{figure}.{kind}" for figure in targets.FIGURES for kind in ("csv", "svg")]
    shown = {"rollouts": files["rollouts"], "scores": files["scores"], "subsets": subset}
    run_main("make_figures", stages.MakeFigures.of(c), **shown, figures=drawn)
    page = tmp_path / "report.html"
    made = {"galleries": gallery, "table1": tables["table1"], "figures": drawn[0]}
    run_main("make_report", stages.MakeReport.of(c), **made, page=page)

    table = pd.read_csv(tables["table1"])
    assert set(table["training_data"]) == {"none (asked as for HPSv2)"}
    assert set(table["model"]) == {f"{BASE} + {LORA}"}
    assert table[["mean@1_paper", "mean@2_paper"]].isna().all(axis=None)  # the paper's are of trained policies
    cells = pd.DataFrame(json.loads(accuracy.read_text())["cells"])
    official = json.loads(accuracy.read_text())["official"]
    at = cells[(cells[list(official)] == pd.Series(official)).all(axis=1) & (cells["missing"] == "wrong")]
    at = at[(at["method"] == "soft") & (at["k"] == 1) & (at["against"] == "labels")]["estimate"]
    assert table[table["against"] == "labels"]["mean@1"].tolist() == pytest.approx([100 * at.item()], abs=0.005)
    claims = set(pd.read_csv(tables["comparisons"])["claim"])
    assert "zero-shot > chance, soft reward, Mean@1" in claims and not any("trained" in claim for claim in claims)
    assert "Table 1: zero-shot policy with soft reward" in markdown.read_text()
    assert set(pd.read_csv(tmp_path / "figures/answers.csv")["when"]) == {"before"}
    assert pd.read_csv(tmp_path / "figures/training_curves.csv").empty
    text = page.read_text()
    assert (
        f"Base policy {BASE} + {LORA}, data synthetic, seed 0: accuracy on human preferences without training" in text
    )
    assert 'id="figure-answers"' in text and 'id="figure-training_curves"' not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_workflow_evaluates_a_published_policy(hub: Hub, tmp_path: Path) -> None:
    """configs/published-policy.yaml as a user fills it in, with the tiny policy and data of configs/hub_demo.yaml."""
    hub.requests.clear()
    cpu = {"dtype": "float32", "device": "cpu", "min_pixels": 784, "max_pixels": 7056}
    filled_in = OVERLAY | {"policy": OVERLAY["policy"] | cpu, "results": "results", "downloads": "downloads"}
    (tmp_path / "filled_in.yaml").write_text(yaml.safe_dump(filled_in | {"numeric_threads": 1}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--workflow-profile", str(ROOT / "profiles/default"), "--cores", "2", "--configfile"]
    overlays = ("published-policy", "test", "hub_demo")
    command += [*(str(ROOT / f"configs/{name}.yaml") for name in overlays), str(tmp_path / "filled_in.yaml")]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results/table1.csv")
    assert set(table["model"]) == {f"{BASE} + {LORA}"} and set(table["data_source"]) == {"hub"}
    assert list(zip(table["training_data"], table["test_data"], strict=True)) == [
        ("none (asked as for HPSv2)", "HPDv2"),
        ("none (asked as for HPSv2)", "ImageReward"),
    ]
    assert not list((tmp_path / "results/policies").glob("*/seed*"))
    sent = {name for name, _ in hub.transfers()}
    assert {"test.tar.gz", "model.safetensors", "adapter_model.safetensors"} <= sent
    assert not [name for name in sent if "train" in name or "validation" in name]

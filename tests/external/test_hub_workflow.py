"""The workflow with data and policy from the Hub, on loopback, against the same run with the synthetic source.

`make hub-demo` is the whole run by itself. What each data set's part of it may differ in is what the record says of
the source.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hub_server import Hub, published_hub

from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT

SPLITS = [("imagereward", "test"), ("hpsv2", "validation")]  # of HPDv2 that reads both json files and train.tar.gz
SYNTHETIC = {"datasets": {name: {"source": "synthetic"} for name in ("imagereward", "hpsv2")}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return a Hub that serves what configs/hub_demo.yaml synthesises."""
    with published_hub(tmp_path_factory.mktemp("hub")).running() as hub:
        yield hub


def snakemake(hub: Hub, folder: Path, overlay: dict[str, Any], *options: str) -> None:
    """Run the workflow in a folder with configs/hub_demo.yaml and an overlay, its results at `results`."""
    folder.mkdir(exist_ok=True)
    overlay |= {"results": "results", "downloads": "downloads", "tracking": {"enabled": False}}
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--workflow-profile", str(ROOT / "profiles/default"), "--cores", "2", *options, "--configfile"]
    command += [*(str(ROOT / f"configs/{name}.yaml") for name in ("test", "hub_demo")), str(folder / "overlay.yaml")]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    logs = [path.read_text() for path in folder.glob("results/logs/**/*.log")]
    assert done.returncode == 0, "\n".join([done.stderr, *logs])


def same_files(one: Path, other: Path, pattern: str) -> set[str]:
    """Names of the files of both folders that match, after seeing that both have the same, byte for byte."""
    names = [{str(path.relative_to(folder)) for path in folder.glob(pattern)} for folder in (one, other)]
    assert names[0] == names[1] != set()
    for name in names[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names[0]


def test_data_and_policy_of_the_hub_are_those_of_the_synthetic_source(hub: Hub, tmp_path: Path) -> None:
    """Tables and images of one split of each data set, and the policy's files."""
    targets = [f"results/datasets/{dataset}/{split}/images-0000.parquet" for dataset, split in SPLITS]
    snakemake(hub, tmp_path / "hub", {}, *targets, "results/policies/base/manifest.json")
    snakemake(hub, tmp_path / "synthetic", SYNTHETIC, *targets)
    tables = same_files(tmp_path / "hub/results", tmp_path / "synthetic/results", "datasets/**/*.parquet")
    assert {f"datasets/{dataset}/{split}/subset.parquet" for dataset, split in SPLITS} <= tables
    manifest = json.loads((tmp_path / "hub/results/policies/base/manifest.json").read_text())
    facts = PUBLISHED["qwen2.5-vl-7b"]
    assert (manifest["repository"], manifest["revision"]) == (facts["repository"], facts["revision"])
    sent = {name for name, _ in hub.transfers()}
    assert {"images/train/train_4.zip", "train.tar.gz", "model.safetensors"} <= sent
    assert len(hub.transfers()) == len(sent)  # each file once, and no truth-*.parquet, README or picture
    assert not [name for name in sent if name.startswith("truth") or name.endswith(".md")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_workflow_from_the_hub_gives_the_tables_of_the_synthetic_source(hub: Hub, tmp_path: Path) -> None:
    """Adapters and rollouts are the same bytes; tables differ in what names the source, and in the known truth."""
    snakemake(hub, tmp_path / "hub", {})
    snakemake(hub, tmp_path / "synthetic", SYNTHETIC | {"policy": {"source": "bundled"}})
    one, other = tmp_path / "hub/results", tmp_path / "synthetic/results"
    for pattern in ("policies/*/seed*/adapter_model.safetensors", "rollouts/**/*.parquet", "scores/**/*.parquet"):
        same_files(one, other, pattern)
    for table, key in (("table1.csv", "training_data"), ("table2.csv", "method"), ("comparisons.csv", "claim")):
        frames = [pd.read_csv(folder / table) for folder in (one, other)]
        frames = [frame[frame["against"] == "labels"] for frame in frames]
        frames = [frame[frame[key] != "Single human"].reset_index(drop=True) for frame in frames]  # one annotator
        assert len(frames[0])
        for name in frames[0].columns.drop(["data_source", "model", "ceiling"], errors="ignore"):
            pd.testing.assert_series_equal(frames[0][name], frames[1][name])
    assert set(pd.read_csv(one / "table1.csv")["data_source"]) == {"hub"}
    assert set(pd.read_csv(one / "table1.csv")["model"]) == {PUBLISHED["qwen2.5-vl-7b"]["repository"]}

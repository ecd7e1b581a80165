"""GPUs and disk before a run: what is checked for which jobs, and from the workflow itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from nvidia_smi import H100, T4, fake_nvidia_smi

from workflow_scripts.configuration import jobs
from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preflight import machine
from workflow_scripts.preflight.machine import DiskError, check_run, downloads_to_come
from workflow_scripts.running import gpus
from workflow_scripts.running.gpus import GpuError

GPU_RULES = ("train_grpo", "generate_rollouts")


class Usage(NamedTuple):
    """What shutil.disk_usage returns, in part."""

    free: float


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data, no model, no GPU that is hidden or held; the torch of requirements.lock."""
    monkeypatch.setattr(machine, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: "13.2")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def paper(**changes: Any) -> Configuration:
    """The paper's configuration."""
    return read_configuration([ROOT / "configs/paper.yaml"], changes)


def test_the_paper_s_run_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", H100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12))
    assert [gpu.name for gpu in check_run(paper(), GPU_RULES)] == ["NVIDIA H100 80GB HBM3"]


def test_jobs_without_a_gpu_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data can be downloaded and read, and tables made, where there is no GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_run(paper(), ("download_dataset", "prepare_base_policy", "make_tables")) == []
    assert check_run(load({}), GPU_RULES) == []
    with pytest.raises(GpuError, match="no GPU was found"):
        check_run(paper(), ("download_dataset", "generate_rollouts"))


@pytest.mark.parametrize(
    ("gpu", "told"),
    [(T4, "bfloat16 needs 8.0"), (H100.replace("81007", "12000"), "the weights alone need 16.6")],
    ids=["type", "memory"],
)
def test_a_gpu_that_is_not_for_the_policy(gpu: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", gpu))
    with pytest.raises(GpuError, match=told):
        check_run(paper(), GPU_RULES)


def test_fewer_gpus_than_a_training_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", H100, H100))
    with pytest.raises(GpuError, match=r"a job uses 4 GPUs, but there are 2; set distributed\.processes"):
        check_run(paper(distributed={"processes": 4}), GPU_RULES)


def test_downloads_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", H100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(50e9))
    with pytest.raises(DiskError, match=r"has 50\.0 GB free, and 71\.\d GB are still to be downloaded .*HF_HOME"):
        check_run(paper(), GPU_RULES)


def test_what_is_here_already_is_not_downloaded_again(tmp_path: Path) -> None:
    c = paper()
    archives = sum(file["bytes"] for file in PUBLISHED["hpsv2"]["files"].values())
    before = downloads_to_come(c)
    assert before[Path("results/downloads/hub/hpsv2")] == archives
    assert sum(before.values()) == pytest.approx(71.7e9, rel=0.01)  # as docs/paper-run.md says, but for small files
    for record in ("results/downloads/hub/hpsv2/dataset.json", "results/paper/policies/base/manifest.json"):
        Path(record).parent.mkdir(parents=True)
        Path(record).write_text("{}")
    assert set(downloads_to_come(c)) == {Path("results/downloads/hub/imagereward")}
    given = paper(policy={"hub": {"path": str(tmp_path)}}, datasets={"hpsv2": {"hub": {"path": str(tmp_path)}}})
    assert set(downloads_to_come(given)) == {Path("results/downloads/hub/imagereward")}


def test_of_test_sets_alone_less_is_to_come() -> None:
    only = {"hub": {"test_only": True}}
    c = paper(policies=["zeroshot"], datasets={"imagereward": only, "hpsv2": only})
    tests = [
        f["bytes"] for name in ("imagereward", "hpsv2") for n, f in PUBLISHED[name]["files"].items() if "test" in n
    ]
    found = downloads_to_come(c)
    assert sum(size for folder, size in found.items() if "hub" in folder.parts) == sum(tests)


def test_jobs_say_what_they_need_of_a_gpu() -> None:
    launched = jobs.launcher(paper(), "generate_rollouts")
    python = ROOT / ".venv-vllm/bin/python"
    assert launched == f"python -m workflow_scripts.running.take_gpus --bfloat16 --gigabytes 16.58 1 {python}"
    own = {track: {"generation": "trl"} for track in ("imagereward", "hpsv2")}  # FSDP goes without vLLM
    shared = paper(distributed={"processes": 4, "strategy": "fsdp"}, training=own)
    assert "--gigabytes 4.15 4 " in jobs.launcher(shared, "train_grpo")


def test_the_workflow_refuses_before_its_first_job(tmp_path: Path) -> None:
    """Unless none of its jobs uses a GPU."""
    overlay = {"results": "made", "downloads": "raw", "policy": {"device": "cuda"}, "tracking": {"enabled": False}}
    overlay |= {"datasets": {"hpsv2": {"synthetic": {"train_prompts": 8, "test_prompts": 4}}}}
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(overlay))
    path = fake_nvidia_smi(tmp_path / "bin", H100, driver="550.54.14")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(tmp_path), "--configfile", "gpu.yaml", "--"]

    def run(target: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PATH": path}
        return subprocess.run([*command, target], cwd=tmp_path, env=variables, capture_output=True, text=True)

    refused = run("made/policies/hpsv2/seed0/adapter_model.safetensors")
    assert refused.returncode != 0 and not (tmp_path / "raw").exists()
    assert "needs NVIDIA driver 580 or newer, and this machine has 550.54.14; update the driver" in refused.stderr
    made = run("raw/synthetic/hpsv2/dataset.json")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "raw/synthetic/hpsv2/dataset.json").is_file()

"""What is said of GPUs before a job runs on them, by a stand-in for nvidia-smi."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from nvidia_smi import A100, H100, T4, V100, fake_nvidia_smi
from packaging.requirements import Requirement

from workflow_scripts.running import gpus
from workflow_scripts.running.gpus import GpuError, check_gpus, cuda_of_torch


@pytest.fixture(autouse=True)
def locked_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch is here, it brings the CUDA of requirements.lock, and no GPU is hidden."""
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *there: str, driver: str = "580.65.06", **needs: object
) -> list[str]:
    """Indices of the GPUs that are found fit."""
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path, *there, driver=driver))
    asked = {"bfloat16": True, "memory": 16.6e9} | needs
    return [gpu.index for gpu in check_gpus(**asked)]  # type: ignore[arg-type]


def test_gpus_that_fit_are_returned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checked(monkeypatch, tmp_path, H100, A100) == ["0", "1"]
    assert checked(monkeypatch, tmp_path, T4, bfloat16=False, memory=0) == ["0"]


@pytest.mark.parametrize(
    ("there", "driver", "told"),
    [
        ([H100], "570.86.15", r"CUDA 13\.2, which needs NVIDIA driver 580 or newer, .* has 570\.86\.15; update the dr"),
        ([H100], "470.82.01", "needs NVIDIA driver 580 or newer, and this machine has 470"),  # knows no compute_cap
        (
            [V100],
            "580.65.06",
            r"GPU 0 \(Tesla V100-SXM2-32GB\) has compute capability 7\.0, and CUDA 13\.2 needs 7\.5;",
        ),
        ([T4], "580.65.06", r"GPU 0 \(Tesla T4\) has .* 7\.5, and bfloat16 needs 8\.0; set policy\.dtype to float16"),
        ([H100, T4], "580.65.06", r"GPU 1 \(Tesla T4\).* CUDA_VISIBLE_DEVICES to other GPUs"),
        ([H100.replace("81007", "9000")], "580.65.06", r"has 9\.4 GB free of 85\.5, and the weights alone need 16\.6"),
        ([], "580.65.06", "this machine has none"),
    ],
    ids=["driver", "old driver", "CUDA", "bfloat16", "one of two", "memory", "no GPU"],
)
def test_what_cannot_run_is_said_in_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: list[str], driver: str, told: str
) -> None:
    with pytest.raises(GpuError, match=told) as error:
        checked(monkeypatch, tmp_path, *there, driver=driver)
    assert "\n" not in str(error.value)


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GpuError, match=r"no GPU was found .*; install the NVIDIA driver, or set policy\.device to cpu"):
        check_gpus(False, 0)


@pytest.mark.parametrize(("visible", "found"), [("1", ["1"]), ("GPU-2c", ["1"]), ("1,0", ["1", "0"])])
def test_only_visible_gpus_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, found: list[str]
) -> None:
    """By index or by the beginning of an id, as CUDA reads them; the T4 is hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert checked(monkeypatch, tmp_path, H100, A100, T4) == found


@pytest.mark.parametrize(("visible", "told"), [("", "hides all GPUs"), ("7", "names GPU 7, .* not list .GPUs 0.")])
def test_wrong_visible_gpus_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, told: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(GpuError, match=told):
        checked(monkeypatch, tmp_path, H100)


def test_a_part_of_a_gpu_is_not_looked_for_among_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-9f8e")
    assert checked(monkeypatch, tmp_path, H100) == []


def test_memory_that_another_job_holds_is_not_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    busy = H100.replace("81007", "9000")
    assert checked(monkeypatch, tmp_path, busy, occupied=["0"]) == ["0"]
    with pytest.raises(GpuError, match="the weights alone need 90"):
        checked(monkeypatch, tmp_path, busy, occupied=["0"], memory=90e9)


def test_the_gpu_s_memory_may_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checked(monkeypatch, tmp_path, "GPU-7c8d, NVIDIA GB10, 12.1, [N/A], [N/A]") == ["0"]


def test_a_torch_without_cuda_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: None)
    with pytest.raises(GpuError, match=r"the installed torch has no CUDA; install requirements\.lock"):
        checked(monkeypatch, tmp_path, H100)


def test_cuda_is_read_without_importing_torch() -> None:
    code = (
        "import sys; from workflow_scripts.running.gpus import cuda_of_torch as f; print(f(), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    imported = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True, check=True
    )
    assert said == [imported.stdout.strip(), "False"]


def test_the_table_of_drivers_knows_the_cuda_that_torch_brings() -> None:
    cuda = cuda_of_torch()
    needed = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    runtimes = [r for r in needed if r.name.startswith(("nvidia-cuda-runtime", "cuda-toolkit"))]
    assert cuda is None or int(cuda.split(".")[0]) in gpus.LEAST_DRIVER.keys() & gpus.LEAST_CAPABILITY.keys()
    assert all(not r.specifier or (cuda or "").split(".")[0] in str(r.specifier) for r in runtimes)

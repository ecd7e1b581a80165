"""The pinned instruction set: what libraries use once they are loaded, and processors that lack it."""

import os
import subprocess
import sys
from typing import Any

import archspec.cpu
import pytest

from workflow_scripts.configuration.jobs import pins_instructions
from workflow_scripts.configuration.model import load
from workflow_scripts.files.paths import ROOT
from workflow_scripts.running import arithmetic
from workflow_scripts.running.arithmetic import VARIABLES, other_digits, pinned, processor
from workflow_scripts.running.environment import stage_environment, start_of

CAPABLE = pytest.mark.skipif(not pinned("avx2"), reason="this processor lacks AVX2")

IN_USE = """
import ctypes, pathlib
import numpy, torch
from numpy._core._multiarray_umath import __cpu_features__
(openblas,) = pathlib.Path(numpy.__file__).parent.parent.glob("numpy.libs/libscipy_openblas*.so")
core = ctypes.CDLL(str(openblas)).scipy_openblas_get_corename64_
core.restype = ctypes.c_char_p
print("torch", torch.backends.cpu.get_cpu_capability())
print("numpy", [name for name, used in __cpu_features__.items() if used and ("AVX512" in name or name == "X86_V4")])
print("openblas", core().decode())
torch.ones(64, 64) @ torch.ones(64, 64)
torch.nn.functional.conv2d(torch.ones(4, 16, 64, 64), torch.ones(32, 16, 3, 3))
"""


def run(code: str, environment: dict[str, str]) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name not in VARIABLES} | environment,
        capture_output=True,
        text=True,
    )
    assert not ended.returncode, ended.stderr
    return ended.stdout


@CAPABLE
def test_every_library_uses_the_pinned_instructions_whatever_the_user_has_set() -> None:
    of_the_user = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Prescott"}
    of_the_user |= {"NPY_ENABLE_CPU_FEATURES": "X86_V4"}
    told = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    said = run(IN_USE, of_the_user | stage_environment(load({})) | told)
    assert "torch AVX2" in said and "numpy []" in said and "openblas Haswell" in said
    assert "isa:Intel AVX2" in said  # oneDNN's header
    (product,) = [line for line in said.splitlines() if "SGEMM" in line]
    # MKL has a branch for Intel's AVX2, and on other processors one that it chooses for all calls.
    assert ("CNR:AVX2" if processor()["vendor"] == "GenuineIntel" else "CNR:AUTO") in product


def test_native_instructions_pin_nothing_and_leave_what_the_user_has_set() -> None:
    assert pinned("native") == {}
    assert stage_environment(load({"numeric_instructions": "native"})).keys().isdisjoint(VARIABLES)


def test_every_newer_instruction_set_that_numpy_dispatches_by_is_switched_off() -> None:
    from numpy._core._multiarray_umath import __cpu_dispatch__

    older = {"X86_V3", "AVX2", "FMA3", "AVX", "F16C", "FMA4", "XOP", "SSE42", "SSE41", "SSSE3", "POPCNT"}
    assert set(__cpu_dispatch__) & older  # or these are not the names
    assert set(__cpu_dispatch__) - older <= set(VARIABLES["NPY_DISABLE_CPU_FEATURES"].split())


def with_processor(monkeypatch: pytest.MonkeyPatch, target: archspec.cpu.Microarchitecture) -> None:
    monkeypatch.setattr(arithmetic, "host", lambda: target)
    monkeypatch.setattr(arithmetic, "detected_info", lambda: target)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("nehalem", "AVX2, FMA"), ("sandybridge", "AVX2, FMA"), ("piledriver", "AVX2"), ("m1", "AVX2")],
)
def test_a_processor_without_the_instructions_is_told_and_runs_with_its_own(
    name: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_processor(monkeypatch, archspec.cpu.TARGETS[name])
    assert pinned("avx2") == {}
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    assert processor() == {"vendor": archspec.cpu.TARGETS[name].vendor, "name": name, "instructions": "native"}
    line = other_digits("avx2")
    assert line and name in line and f"no {lacking}" in line and "\n" not in line and other_digits("native") is None


@pytest.mark.parametrize("name", ["haswell", "zen3", "zen4", "sapphirerapids", "x86_64_v3"])
def test_a_processor_with_the_instructions_is_not_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_processor(monkeypatch, archspec.cpu.TARGETS[name])
    assert pinned("avx2") and other_digits("avx2") is None


@CAPABLE
def test_the_record_says_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in pinned("avx2").items():
        monkeypatch.setenv(name, value)
    assert processor()["instructions"] == "avx2"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert processor()["instructions"] == "native"


CUDA: dict[str, Any] = {"policy": {"device": "cuda"}}
VLLM: dict[str, Any] = {"rollouts": {"engine": "vllm"}}


@CAPABLE
@pytest.mark.parametrize(
    ("raw", "exempt"),
    [
        ({}, set()),
        (CUDA, {"train_grpo", "generate_rollouts", "rank_own_images"}),
        (VLLM, {"generate_rollouts"}),
    ],
)
def test_models_on_cuda_and_vllm_are_exempt(raw: dict[str, Any], exempt: set[str]) -> None:
    c = load(raw)
    for rule in ("cold_start_policy", "train_grpo", "generate_rollouts", "rank_own_images", "make_tables"):
        assert pins_instructions(c, rule) == (rule not in exempt)
        words = start_of(c, rule).split()
        assert [word for word in words if word in VARIABLES] == (list(VARIABLES) if rule in exempt else [])
        assert start_of(load(raw | {"numeric_instructions": "native"}), rule).split()[0] != "env"


TABLES = """
import hashlib
import numpy as np
from workflow_scripts.scoring.bootstrap import accuracy_intervals
from workflow_scripts.scoring.mean_at_k import subset_means
from workflow_scripts.scoring.pair_accuracy import expected_answer, pair_accuracy
rng = np.random.default_rng(0)
scores = expected_answer(rng.normal(size=(500, 12, 7)).astype(np.float32), np.arange(1, 8))
means = subset_means(scores, 3)
credit = rng.random(400) * 9, np.full(400, 9.0)
(interval,) = accuracy_intervals([credit], "macro", 0.95, 200, 0)
found = [scores, means, np.array(pair_accuracy(*credit)), np.array(interval)]
print(hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in found)).hexdigest())
a = rng.normal(size=(123, 456))
print(hashlib.sha256((a @ a.T).tobytes()).hexdigest())
"""


@CAPABLE
def test_no_score_passes_through_openblas() -> None:
    from_root = {"PYTHONPATH": str(ROOT)}
    haswell, nehalem = (
        run(TABLES, pinned("avx2") | from_root | {"OPENBLAS_CORETYPE": core}).split() for core in ("Haswell", "Nehalem")
    )
    assert haswell[0] == nehalem[0]
    assert haswell[1] != nehalem[1]  # a product of matrices does


def test_the_command_rank_pins_before_numpy_is_loaded() -> None:
    listed = run("import sys, workflow_scripts.__main__; print(*sys.modules)", {"PYTHONPATH": str(ROOT)}).split()
    assert {"numpy", "torch", "pyarrow", "pandas"}.isdisjoint(listed)


DENORMALS = """
import numpy as np, torch
import scipy.stats, pyarrow.compute, PIL.Image, pandas
torch.ones(64, 64) @ torch.ones(64, 64)
print(float(np.float32(1e-40) * np.float32(1)) > 0, (torch.tensor([1e-40]) * 1).item() > 0)
"""


def test_denormal_numbers_are_kept() -> None:
    assert run(DENORMALS, pinned("avx2")).split() == ["True", "True"]

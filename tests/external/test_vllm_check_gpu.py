"""check-gpu with vLLM: in vLLM's environment for CPU, by `make test-vllm`.

There vLLM takes no new weights unless it multiplies by torch (test_vllm_training.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm runs these in its own")

from workflow_scripts.configuration.model import load
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preflight.check import without_vllm

# Of a policy of which nothing but its config.json is here: every phase of training and of rollouts in one process.
CHECK = """
import json, sys
from pathlib import Path
from narrow_qwen import narrow
from vllm import _custom_ops
from vllm.model_executor.layers import utils
_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *args: False
from workflow_scripts.planning.devices import Assumptions
from workflow_scripts.preflight import check, run
from workflow_scripts.preflight.report import as_json, markdown

check.in_own_process = lambda measuring: measuring()  # with these kernels
check.BATCHES["cpu"] = 1
folder = Path(sys.argv[1])
c = narrow(folder / "model", json.loads(sys.argv[2]), dtype="bfloat16", device="cuda")
c = c.model_copy(update={"policy": c.policy.model_copy(update={"device": "cpu"})})  # training on a CPU is refused
report = run.check(c, Assumptions(), [], 2.0, folder)
(folder / "report.json").write_text(json.dumps(as_json(report)))
print(markdown(report))
"""


def test_every_phase_is_measured_by_vllm(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"prompts_per_step": 2, "group_size": 4, "max_completion_tokens": 24, "steps": 50}
    sizes |= {"reward_signal": "sampled"}
    told = {"gpu_memory_utilization": 0.05, "max_model_len": 512}  # of the main memory
    keys = {
        "tracks": ["hpsv2"],
        "training": {"hpsv2": sizes | {"validate_every": 10, "generation": "vllm_colocate", "vllm": told}},
        "rollouts": {
            "batch_items": 16,
            "block_size": 3,
            "sampling": {"max_thinking_tokens": 20, "max_answer_tokens": 4},
            "engine": "vllm",
        },
    }
    command = [sys.executable, "-c", CHECK, str(tmp_path), json.dumps(keys)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests/preflight")))
    # vLLM's own switch for tests on a CPU: no compilation.
    environment = os.environ | {"PYTHONPATH": paths, "VLLM_CPU_CI_ENV": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not any("in its place" in note for note in report["notes"])
    (track,) = report["tracks"]
    training = ["loading", "generation", "reference", "update", "validation"]
    rollouts = ["rollouts zeroshot", "rollouts grpo"]
    assert set(track["phases"]) == {*training, *rollouts, *(f"loading {name}" for name in rollouts)}
    assert all(phase["seconds"] > 0 and phase["peak"] > 0 for phase in track["phases"].values())
    assert all(stage["measured"] > 0 for stage in report["hours"])
    # 12 tokens on average, at random, and the tags around the answers.
    assert 8 * 6 < track["phases"]["generation"]["tokens"] < 8 * 20
    for name in rollouts:
        assert 48 * 8 < track["phases"][name]["tokens"] < 48 * (16 + 12)
    assert track["phases"]["rollouts grpo"]["planned"]["seconds"] > 0


def test_a_server_is_not_measured() -> None:
    training = {"hpsv2": {"generation": "vllm_server", "reward_signal": "sampled"}}
    c, told = without_vllm(load({"training": training, "policy": {"device": "cuda"}}))
    assert c.training.hpsv2.generation == "transformers"
    assert told == [
        "training.hpsv2.generation is vLLM: transformers was measured and planned in its place "
        "(a server is not measured)"
    ]

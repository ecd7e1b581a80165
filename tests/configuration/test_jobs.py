"""The interpreter of vLLM's environment, before the first job of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from workflow_scripts.configuration.jobs import check_interpreters
from workflow_scripts.configuration.model import ConfigurationError, load
from workflow_scripts.files.paths import ROOT

VLLM = {"rollouts": {"engine": "vllm"}}


def test_jobs_without_vllm_need_no_environment_of_it(tmp_path: Path) -> None:
    missing = {"vllm_python": str(tmp_path / "python")}
    check_interpreters(load(missing), ["train_grpo", "generate_rollouts"])
    check_interpreters(load(missing | VLLM), ["download_dataset", "make_tables"])
    check_interpreters(load(VLLM | {"vllm_python": sys.executable}), ["train_grpo", "generate_rollouts"])
    with pytest.raises(ConfigurationError, match=r"/python, is missing; make it with make vllm-cpu, or set rollouts\."):
        check_interpreters(load(missing | VLLM), ["download_dataset", "train_grpo"])
    with pytest.raises(ConfigurationError, match="make it with make vllm-gpu"):
        check_interpreters(load(missing | VLLM | {"policy": {"device": "cuda"}}), ["generate_rollouts"])


def test_a_run_without_it_is_refused_before_its_first_job(tmp_path: Path) -> None:
    overlay = VLLM | {"results": "made", "downloads": "raw", "tracking": {"enabled": False}, "vllm_python": "missing"}
    (tmp_path / "vllm.yaml").write_text(yaml.safe_dump(overlay))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(tmp_path), "--configfile", "vllm.yaml"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0 and not (tmp_path / "raw").exists()
    assert f"vllm_python, {ROOT}/missing, is missing" in refused.stderr

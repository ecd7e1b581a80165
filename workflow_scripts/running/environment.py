"""Environment variables of every job."""

import os
import sys
from pathlib import Path

from workflow_scripts.configuration.jobs import launcher, pins_instructions
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.arithmetic import pinned


def stage_environment(configuration: Configuration) -> dict[str, str]:
    """Environment variables of every job: this interpreter and package first, numeric kernels, tracking.

    The keys of `tracking` reach stages as variables, never as parameters of a rule, so they rerun nothing.
    """
    tracking = configuration.tracking
    threads = str(configuration.numeric_threads)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **pinned(configuration.numeric_instructions),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),  # TRL would set it to ERROR on import
        "MLFLOW_TRACKING_URI": uri if tracking.enabled else "",
        "MLFLOW_EXPERIMENT_NAME": tracking.experiment,
        "SOFTPREF_ARTIFACT_MEGABYTES": str(tracking.artifact_megabytes),
    }


def start_of(configuration: Configuration, rule: str) -> str:
    """Command that starts the stage of a rule: its launcher, without pinned instructions where it is exempt from them.

    CUDA and vLLM choose kernels by themselves, and what they do on the CPU need not be slower for it.
    """
    command = launcher(configuration, rule)
    if pins_instructions(configuration, rule) or not (pins := pinned(configuration.numeric_instructions)):
        return command
    return f"env {' '.join(f'-u {name}' for name in pins)} {command}"

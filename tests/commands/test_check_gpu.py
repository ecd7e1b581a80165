"""The command on a CPU with the bundled policy: what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from workflow_scripts.__main__ import main
from workflow_scripts.files.paths import ROOT

TINY = {
    "results": "made",
    "training": {
        track: {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 48}
        for track in ("imagereward", "hpsv2")
    },
    "rollouts": {"batch_items": 4, "block_size": 1},
    "scoring": {"report_k": [1]},
}


def test_it_measures_both_tracks_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(SystemExit) as stop:
        main(["check-gpu", "--configfile", "tiny.yaml"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert (tmp_path / "made/check-gpu.md").read_text(encoding="utf-8").strip() in said
    report = json.loads((tmp_path / "made/check-gpu.json").read_text(encoding="utf-8"))
    assert [track["track"] for track in report["tracks"]] == ["imagereward", "hpsv2"]
    names = ["loading", "generation", "reference", "update", "validation", "rollouts zeroshot", "rollouts grpo"]
    for track in report["tracks"]:
        assert set(track["phases"]) == set(names) and "the policy's own" in track["completions"]
        assert all(phase["seconds"] > 0 for phase in track["phases"].values())
        assert all(track["phases"][name]["planned"]["seconds"] > 0 for name in names[1:])
    # The policy answers by itself, in the lengths that were measured of it before (planning/facts.yaml).
    pointwise, pairwise = (track["phases"]["generation"]["tokens"] / 4 for track in report["tracks"])
    assert 15 < pointwise < 30 < pairwise < 45
    assert len(report["hours"]) == 6 and all(stage["measured"] > 0 for stage in report["hours"])
    assert report["does_not_fit"] == []


def test_the_interpreter_of_vllm_measures_where_it_is_there(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    words = ["check-gpu", "--config", "rollouts={engine: vllm}", "--config", f"vllm_python={python}"]
    done = subprocess.run(
        [sys.executable, "-m", "workflow_scripts", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == " ".join(["-m", "workflow_scripts", *words]).split()


def test_it_refuses_a_machine_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from workflow_scripts.running import gpus

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: "13.2")
    with pytest.raises(gpus.GpuError, match="no GPU was found"):
        main(["check-gpu", "--config", "policy={device: cuda}"])
    assert capsys.readouterr().out == ""

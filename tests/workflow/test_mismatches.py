"""Results that do not fit together, or not to the configuration: named, with the remedy, and never made into tables."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import Workflow, environment

TRAINED = "policies/hpsv2/seed0/adapter_model.safetensors"
SCORES = "scores/hpsv2/grpo/seed0/hpsv2.parquet"
TABLES = ("table1.csv", "table2.csv", "comparisons.csv", "sensitivity.csv", "tables.md")
OTHER_RATE = {"training": {"hpsv2": {"learning_rate": 0.0005}}}


@pytest.fixture
def copied(workflow: Workflow, tmp_path: Path) -> Workflow:
    """Return a copy of the finished checkout."""
    return workflow.copy(tmp_path / "checkout")


def refused(workflow: Workflow, *options: str, rate: bool = False) -> str:
    """What Snakemake says where it refuses to go on."""
    with pytest.raises(AssertionError) as caught:
        workflow.snakemake(*options, overlay=OTHER_RATE if rate else None)
    return str(caught.value)


def verify_results(workflow: Workflow, *options: str, overlay: dict[str, Any] | None = None) -> tuple[int, str]:
    """Exit code and output of the command."""
    command = [sys.executable, "-m", "workflow_scripts", "verify", "results/test", *options]
    command += ["--configfile", "configs/test.yaml"]
    if overlay:
        (workflow.folder / ".overlay.yaml").write_text(yaml.safe_dump(overlay))
        command += ["--configfile", ".overlay.yaml"]
    done = subprocess.run(command, cwd=workflow.folder, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_finished_run_fits(workflow: Workflow) -> None:
    code, said = verify_results(workflow)
    assert code == 0 and "train_grpo" in said and "does not fit" not in said, said


def test_changed_settings_without_a_record_are_refused(copied: Workflow) -> None:
    shutil.rmtree(copied.folder / ".snakemake")
    assert "Nothing to be done" in copied.snakemake("-n")
    said = refused(copied, "-n", rate=True)
    assert f"results/test/{TRAINED}: made with training.learning_rate = 0.002, now 0.0005" in said, said
    assert "verify --remove" in said
    code, said = verify_results(copied, "--remove", overlay=OTHER_RATE)
    assert code == 1 and TRAINED in said and f"made from results/test/{TRAINED}" in said
    planned = {job.rule for job in copied.planned(overlay=OTHER_RATE)}
    assert planned >= {"train_grpo", "generate_rollouts", "score_rollouts", "measure_accuracy", "make_tables"}
    assert not planned & {"read_annotations", "select_subset", "read_images", "prepare_base_policy"}


def test_changed_settings_with_a_record_rerun(copied: Workflow) -> None:
    planned = {job.rule for job in copied.planned(overlay=OTHER_RATE)}
    assert {"train_grpo", "generate_rollouts", "make_tables"} <= planned


def test_tables_are_not_made_from_another_training(copied: Workflow, tmp_path: Path) -> None:
    """A trained policy copied from elsewhere, whole and with its provenance, under rollouts of the one before."""
    adapter = copied.results / TRAINED
    sidecar = adapter.with_name(adapter.name + ".provenance.json")
    record = json.loads(sidecar.read_text())
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\1")
    status = adapter.stat()
    record["outputs"][adapter.name] = {
        "sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    sidecar.write_text(json.dumps(record))
    (copied.results / "table1.csv").unlink()
    said = refused(copied, "--cores", "1", "--allowed-rules", "make_tables")
    assert "was made from another results/test/policies/hpsv2/seed0/adapter_model.safetensors" in said, said
    code, table = verify_results(copied)
    assert code == 1 and f"made from another results/test/{TRAINED}" in table


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "is not what its stage wrote"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name(path.name + ".provenance.json").write_text("{"), "no readable provenance file"),
    ],
)
def test_the_command_names_and_removes_what_does_not_fit(
    workflow: Workflow, copied: Workflow, damage: Callable[[Path], object], reason: str
) -> None:
    path = copied.results / SCORES
    damage(path)
    code, said = verify_results(copied)
    assert code == 1 and reason in said and SCORES in said, said
    code, said = verify_results(copied, "--remove")
    assert code == 1 and not path.exists()
    (command,) = [line.strip() for line in said.splitlines() if line.strip().startswith("snakemake ")]
    before = {name: (copied.results / name).read_bytes() for name in TABLES}
    for again in (command, "snakemake --cores 2 --configfile configs/test.yaml"):
        subprocess.run([sys.executable, "-m", *again.split()], cwd=copied.folder, env=environment(), check=True)
    assert path.read_bytes() == (workflow.results / SCORES).read_bytes()
    assert verify_results(copied)[0] == 0
    assert {name: (copied.results / name).read_bytes() for name in TABLES} == before

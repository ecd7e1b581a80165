"""Writing an expectation: what a folder then holds, and what is refused."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.reference.expected import SeveralProcessorsError, write_expectation
from workflow_scripts.running.provenance import sidecar_path

Finished = tuple[Configuration, Path]


def test_tables_and_digests_are_those_of_the_run(finished: Finished, tmp_path: Path) -> None:
    configuration, results = finished
    folder = tmp_path / "new" / "expected"
    write_expectation(configuration, results, folder)
    tables = ["comparisons.csv", "table1.csv", "table2.csv"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*tables, "trainings.csv", "run.json"])
    assert all((folder / name).read_bytes() == (results / name).read_bytes() for name in tables)
    run = json.loads((folder / "run.json").read_text())
    assert run["processor"] == {"name": "zen3", "vendor": "AuthenticAMD", "instructions": "avx2"}
    paths = [path for pattern in ("*.safetensors", "*.parquet") for path in results.rglob(pattern)]
    digests = {str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert run["files"] == digests
    assert {name.split("/")[0] for name in digests} == {"policies", "rollouts", "scores"}


def test_a_training_is_told_by_its_validations_its_divergence_and_its_gradients(
    finished: Finished, tmp_path: Path
) -> None:
    configuration, results = finished
    write_expectation(configuration, results, tmp_path / "expected")
    trainings = pd.read_csv(tmp_path / "expected/trainings.csv").set_index("track")
    assert trainings.index.tolist() == ["imagereward", "hpsv2"] and trainings["seed"].tolist() == [0, 0]
    for track, row in trainings.iterrows():
        history = json.loads((results / f"policies/{track}/seed0/training.json").read_text())["history"]
        steps = pd.DataFrame(history).groupby("step").first()
        assert row["largest_kl"] == steps["kl"].max() and row["largest_gradient"] == steps["grad_norm"].max()
        assert row["median_gradient"] == steps["grad_norm"].median()
        for step in (0, 2):
            assert row[f"validation@{step}"] == steps.loc[step, "eval_soft_pair_accuracy"]
            assert row[f"validation@{step}_se"] == steps.loc[step, "eval_soft_pair_accuracy_se"]


def test_a_run_on_two_processors_is_refused(finished: Finished, tmp_path: Path) -> None:
    path = sidecar_path(next(finished[1].glob("policies/hpsv2/*/*.safetensors")))
    path.write_text(path.read_text().replace("AuthenticAMD", "GenuineIntel"))
    with pytest.raises(SeveralProcessorsError, match="GenuineIntel"):
        write_expectation(*finished, tmp_path / "expected")
    assert not (tmp_path / "expected").exists()


def test_a_changed_file_is_refused(finished: Finished, tmp_path: Path) -> None:
    next(finished[1].glob("scores/**/*.parquet")).write_text("changed")
    with pytest.raises(ProvenanceError, match="is not what its stage wrote"):
        write_expectation(*finished, tmp_path / "expected")


def test_results_of_another_configuration_are_refused(finished: Finished, tmp_path: Path) -> None:
    overlay = {"results": str(finished[1]), "rollouts": {"sampling": {"temperature": 0.5}}}
    other = read_configuration([ROOT / "configs/test.yaml"], overlay)
    with pytest.raises(ProvenanceError, match="temperature"):
        write_expectation(other, finished[1], tmp_path / "expected")


@pytest.mark.parametrize(("words", "said"), [(["nosuch"], "configs/nosuch.yaml"), (["test"], "table1.csv")])
def test_what_is_missing_is_said_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    words = [*words, "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "workflow_scripts.reference.expected", *words], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr

"""Descriptions, parameters and names of curves, as MLflow's pages show them."""

from pathlib import Path

import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import GenerateRollouts, TrainGrpo
from workflow_scripts.tracking import pages


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("reward", "train/reward"),
        ("rewards/format/mean", "train/reward_format"),
        ("rewards/format/std", "train/rewards/format/std"),
        ("kl", "train/kl"),
        ("completions/mean_length", "train/completion_length"),
        ("eval_soft_pair_accuracy", "validation/accuracy"),
        ("eval_answer_share/7", "validation/answer_share/7"),
        ("train_runtime", "trainer/runtime"),
    ],
)
def test_curves_are_grouped(name: str, shown: str) -> None:
    assert pages.curve_name(name) == shown


def test_a_handful_of_parameters_tells_runs_apart() -> None:
    configuration = Configuration()
    training = TrainGrpo.of(configuration, "imagereward", 1).model_dump(mode="json")
    shown = pages.chosen_params(training)
    assert {"track": "imagereward", "seed": "1", "training.learning_rate": "0.0012"}.items() <= shown.items()
    assert len(shown) <= 20 < len(pages.flat(training))
    rollouts = GenerateRollouts.of(configuration, "hpsv2", "grpo", "hpsv2", 0, 1, 2).model_dump(mode="json")
    assert {"shard": "1", "block": "2", "policy": "grpo"}.items() <= pages.chosen_params(rollouts).items()


def test_a_description_links_what_a_run_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"stage": "train_grpo", "config": {"track": "hpsv2", "seed": 0}, "mlflow_run_id": "abc"}
    unlogged = job | {"config": {"track": "hpsv2", "seed": 1}, "mlflow_run_id": None}
    inputs = {"results/policies/hpsv2/seed0/adapter": job, "r/p/q/adapter": unlogged, "own/table.csv": None}
    long = "\n".join(f"| row {i} | " + "x" * 90 for i in range(100))
    Path("tables.md").write_text(f"# Tables\n\n## Table 1\n\n| 64.8 |\n\n## Comparisons\n\n{long}\n")
    record = {"stage": "make_tables", "config": {}, "outputs": {"table1.csv": {}, "tables.md": {}}}
    note = pages.run_note(record, tmp_path / "table1.csv", inputs, "7")
    assert note.startswith("Make the paper's tables from measured accuracies")
    assert "[train_grpo · hpsv2 · seed 0](#/experiments/7/runs/abc): `hpsv2/seed0/adapter`" in note
    assert "- train_grpo · hpsv2 · seed 1: `p/q/adapter`" in note and "- made elsewhere: `own/table.csv`" in note
    assert "snakemake --cores all --force table1.csv" in note
    assert "| 64.8 |" in note and "row 1" not in note and "The rest is in the artifact `tables.md`" in note
    assert len(note) <= pages.LONGEST_NOTE

"""The record of a training, and its warnings."""

import re
from typing import Any

import pytest

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.training.epochs import optimizer_steps
from workflow_scripts.training.record import trained_on, training_record
from workflow_scripts.training.trainer import CREDIT

CONFIG = TrainGrpo.of(Configuration(), "hpsv2", 3)


def history(best: float, largest_share: float, *differences: float) -> list[dict[str, Any]]:
    """Log of a trainer that validates before and after one step, and of steps with these differences of sampling."""
    accuracy, share = "eval_soft_pair_accuracy", "eval_largest_answer_share"
    return [
        {"step": 0, accuracy: 0.5, share: 0.6, CREDIT: [[1.0, 2.0], [1.0, 2.0]]},
        {"step": 1, "reward": 1.0, "step_time": 2.0},
        {"step": 1, accuracy: best, share: largest_share, CREDIT: [[2.0, 2.0], [0.0, 2.0]]},
        *({"step": 1, "sampling/sampling_logp_difference/mean": value} for value in differences),
        {"step": 1, "train_loss": 0.1, "train_runtime": 9.0},
    ]


@pytest.mark.parametrize(
    ("best", "share", "expected"),
    [
        (0.6, 0.9, []),
        (0.5, 0.9, ["the kept adapter does not validate better than the base policy (0.500 against 0.500)"]),
        (0.6, 0.95, ["the policy has collapsed, one answer makes up 95% of its validation rollouts"]),
    ],
)
def test_a_training_that_failed_says_so(best: float, share: float, expected: list[str]) -> None:
    warnings: list[str] = []
    record = training_record(CONFIG, history(best, share), 1, warnings.append)
    assert warnings == [f"hpsv2, seed 3: {text}" for text in expected]
    assert record["collapsed"] == (share > 0.9)
    assert (record["kept_soft_pair_accuracy"], record["untrained_soft_pair_accuracy"]) == (best, 0.5)
    assert record["selection_se"] == 0.5  # half of the pairs of one prompt more, half of the other's fewer


def test_the_history_has_no_times_and_no_credits() -> None:
    record = training_record(CONFIG, history(0.6, 0.5), 1, list[str]().append)
    assert record["history"][1] == {"step": 1, "reward": 1.0} and len(record["history"]) == 3
    assert all(isinstance(value, int | float) for entry in record["history"] for value in entry.values())


def test_a_validation_with_one_prompt_leaves_the_error_of_the_selection_open() -> None:
    log = [entry | {CREDIT: [[1.0, 2.0]]} if CREDIT in entry else entry for entry in history(0.6, 0.5)]
    assert training_record(CONFIG, log, 1, list[str]().append)["selection_se"] is None


@pytest.mark.parametrize(
    ("training", "items", "steps", "seen", "epochs"),
    [
        ({"steps": 3, "prompts_per_step": 4}, 13, 3, 12, 12 / 13),
        # Of each pass of 13 items, 12 are drawn; which one is left out changes.
        ({"steps": 4, "prompts_per_step": 4}, 13, 4, None, 16 / 13),
        ({"epochs": 0.5, "prompts_per_step": 4}, 13, 2, 8, 8 / 13),
        ({"epochs": 1, "prompts_per_step": 4}, 12, 3, 12, 1),
        ({"epochs": 2, "prompts_per_step": 4}, 13, 7, None, 28 / 13),
        ({"epochs": 2, "prompts_per_step": 4, "num_iterations": 2}, 13, 14, None, 28 / 13),
        ({"epochs": 3, "prompts_per_step": 4, "num_iterations": 4}, 12, 36, 12, 3),
        ({"steps": 5, "prompts_per_step": 4, "num_iterations": 4}, 13, 5, 8, 8 / 13),
    ],
)
def test_steps_items_and_epochs(
    training: dict[str, Any], items: int, steps: int, seen: int | None, epochs: float
) -> None:
    t = load({"training": {"hpsv2": training | {"validate_every": 4}}}).training.hpsv2
    assert optimizer_steps(t, items) == steps
    found = trained_on(t, steps, items, 3)
    assert found["items_seen"] == seen or (seen is None and 12 <= found["items_seen"] <= 13)
    assert (found["steps"], found["items_available"], found["epochs"]) == (steps, items, epochs)


@pytest.mark.parametrize(
    ("dtype", "generation", "differences", "expected"),
    [
        ("float32", "transformers", [], None),
        ("float32", "transformers", [3e-6, 1.9e-4], None),
        (
            "float32",
            "transformers",
            [3e-6, 2.1e-4],
            r"differ by 0\.00011 .*float32 explains 0\.0001;.* to trl$",
        ),
        ("bfloat16", "vllm_server", [0.04, 0.05], None),
        (
            "bfloat16",
            "vllm_server",
            [0.02, 0.1],
            r"differ by 0\.06 .*bfloat16 explains 0\.05;.* to transformers$",
        ),
        ("float16", "trl", [0.006], None),
    ],
)
def test_a_policy_that_samples_otherwise_than_it_is_trained_is_told(
    dtype: str, generation: str, differences: list[float], expected: str | None
) -> None:
    training = {"hpsv2": {"generation": generation, "reward_signal": "sampled"}}
    raw = {"policy": {"dtype": dtype, "device": "cuda"}, "training": training}
    config = TrainGrpo.of(load(raw), "hpsv2", 3)
    warnings: list[str] = []
    training_record(config, history(0.6, 0.5, *differences), 1, warnings.append)
    assert len(warnings) == (expected is not None)
    assert expected is None or re.search(expected, warnings[0])

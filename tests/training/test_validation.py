"""The accuracy by which a training is validated, against a slower count."""

import math
import random
from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.prompts import PREFERENCES, RATINGS
from workflow_scripts.training.items import training_items
from workflow_scripts.training.validation import accuracy_metrics, paired_difference, soft_pair_credit


def logprobs(answers: tuple[int, ...], rng: random.Random) -> list[float]:
    """Random log-probabilities of the answers."""
    logits = [rng.gauss(0, 2) for _ in answers]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


@settings(deadline=None, max_examples=30)
@given(rng=st.integers(0, 2**32).map(random.Random))
def test_the_credit_of_each_prompt_is_that_of_brute_force(rng: random.Random) -> None:
    rows = []
    for number in range(3):
        images = [f"{number}-{n}" for n in range(4)]
        pairs = [{"a": a, "b": b, "preferred": rng.randint(0, 1)} for a, b in combinations(images, 2)]
        row = {"prompt_id": f"p{2 - number}", "prompt": "t", "image_ids": images, "ratings": [4] * 4, "pairs": pairs}
        rows.append(row | {"ranks": [rng.randint(1, 3) for _ in images]})
    for track, answers in (("imagereward", RATINGS), ("hpsv2", PREFERENCES)):
        config = TrainGrpo.of(Configuration(), track, 1)  # type: ignore[arg-type]
        readable = {image for row in rows for image in row["image_ids"]}
        items = training_items(rows, readable, config.model.protocol, config.seed)
        made = [
            {"item_id": item.item_id, "answer_logprobs": logprobs(answers, rng)} for item, _ in items for _ in range(2)
        ]
        soft: dict[str, float] = defaultdict(float)
        for r in made:
            soft[r["item_id"]] += sum(a * math.exp(p) for a, p in zip(answers, r["answer_logprobs"], strict=True)) / 2
        expected = []
        for row in rows:
            if track == "imagereward":
                scores, ranks = [soft[f"{row['prompt_id']}/{image}"] for image in row["image_ids"]], row["ranks"]
                strict = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
                right = [scores[i] > scores[j] for i, j in strict]
            else:
                asked = [(item, target) for item, target in items if item.prompt_id == row["prompt_id"]]
                right = [soft[item.item_id] > 0.5 if target else soft[item.item_id] < 0.5 for item, target in asked]
            expected.append((sum(right), len(right)))
        found = soft_pair_credit(made, rows, config)
        assert sorted(zip(*found, strict=True)) == sorted(expected)


def test_metrics_of_a_validation_by_hand() -> None:
    untrained, trained = [[1.0, 2.0], [1.0, 4.0], [2.0, 2.0]], [[2.0, 2.0], [3.0, 4.0], [1.0, 2.0]]
    name = "eval_soft_pair_accuracy"
    assert accuracy_metrics(untrained, None) == {name: 0.5, f"{name}_se": pytest.approx(math.sqrt(1.5 * 2) / 8)}
    # Right pairs change by 1, 2 and -1: by 2 of 8, and the deviations from a quarter of the pairs are 0.5, 1, -1.5.
    gain, error = paired_difference(untrained, trained)
    assert (gain, error) == (0.25, pytest.approx(math.sqrt(1.5 * 3.5) / 8))
    metrics = accuracy_metrics(trained, untrained)
    assert (metrics[f"{name}_gain"], metrics[f"{name}_gain_se"]) == (gain, error)


def test_a_validation_with_one_prompt_has_no_errors() -> None:
    name = "eval_soft_pair_accuracy"
    assert accuracy_metrics([[3.0, 4.0]], [[2.0, 4.0]]) == {name: 0.75, f"{name}_gain": 0.25}

"""The accuracy by which a training is validated, against a slower count."""

import math
import random
from collections import defaultdict
from itertools import combinations
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.prompts import PREFERENCES, RATINGS
from workflow_scripts.training.items import training_items
from workflow_scripts.training.validation import soft_pair_accuracy


def logprobs(answers: tuple[int, ...], rng: random.Random) -> list[float]:
    """Random log-probabilities of the answers."""
    logits = [rng.gauss(0, 2) for _ in answers]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


@settings(deadline=None, max_examples=30)
@given(rng=st.integers(0, 2**32).map(random.Random))
def test_validation_accuracy_is_that_of_brute_force(rng: random.Random) -> None:
    images = [f"i{n}" for n in range(4)]
    ranks = [rng.randint(1, 3) for _ in images]
    pairs = [{"a": a, "b": b, "preferred": rng.randint(0, 1)} for a, b in combinations(images, 2)]
    row = {"prompt_id": "p", "prompt": "t", "image_ids": images, "ratings": [4] * 4, "ranks": ranks, "pairs": pairs}
    for track, answers in (("imagereward", RATINGS), ("hpsv2", PREFERENCES)):
        config = TrainGrpo.of(Configuration(), track, 1)  # type: ignore[arg-type]
        items = training_items([row], set(images), config.model.protocol, config.seed)
        made = [
            {"item_id": item.item_id, "answer_logprobs": logprobs(answers, rng)} for item, _ in items for _ in range(2)
        ]
        soft: dict[str, float] = defaultdict(float)
        for r in made:
            soft[r["item_id"]] += sum(a * math.exp(p) for a, p in zip(answers, r["answer_logprobs"], strict=True)) / 2
        if track == "imagereward":
            strict = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
            right = [soft[f"p/{images[i]}"] > soft[f"p/{images[j]}"] for i, j in strict]
        else:
            right = [soft[item.item_id] > 0.5 if target else soft[item.item_id] < 0.5 for item, target in items]
        expected = mean(right) if right else math.nan
        assert soft_pair_accuracy(made, [row], config) == pytest.approx(expected, nan_ok=True)

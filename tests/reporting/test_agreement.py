"""Pairs and accuracies of groups against loops over pairs."""

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workflow_scripts.reporting.agreement import LARGEST_CHOICE, accuracy_at_k, curve_ks, grouped_mean, pair_verdicts
from workflow_scripts.scoring.bootstrap import Resampling
from workflow_scripts.scoring.judged_prompts import JudgedPrompt

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
RESAMPLING = Resampling(0.95, 200, 0)
PROMPTS = st.lists(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(1, 4), min_size=n, max_size=n),
            st.lists(
                st.lists(st.sampled_from([0.1, 0.2, 0.3, np.nan]), min_size=3, max_size=3), min_size=n, max_size=n
            ),
        )
    ),
    min_size=1,
    max_size=4,
)


def judged(number: int, ranks: Any, scores: Any) -> JudgedPrompt:
    """A prompt whose images have these ranks and soft scores."""
    images = [f"{number}-{j}" for j in range(len(ranks))]
    return JudgedPrompt(f"p{number}", "a p", images, np.array(ranks, float), None, None, {"soft": np.array(scores)})


@ANY
@given(PROMPTS, st.sampled_from(["wrong", "neutral", "dropped"]))
def test_pairs_are_those_that_people_rank_strictly(given: Any, missing: str) -> None:
    expected = {}
    for i, (ranks, scores) in enumerate(given):
        filled = [[4.0 if np.isnan(s) and missing == "neutral" else s for s in row] for row in scores]
        means = [np.mean([s for s in row if not np.isnan(s)] or [np.nan]) for row in filled]
        for a, b in combinations(range(len(ranks)), 2):
            if ranks[a] == ranks[b]:
                continue
            better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
            difference = means[better] - means[worse]
            if np.isnan(difference):
                correct = np.nan if missing == "dropped" else 0.0
            else:
                correct = (np.sign(difference) + 1) / 2
            expected[f"{i}-{better}", f"{i}-{worse}"] = (abs(ranks[a] - ranks[b]), correct)
    table = pair_verdicts([judged(i, *prompt) for i, prompt in enumerate(given)], "soft", missing, 4.0)  # type: ignore[arg-type]
    found = {(r.better, r.worse): (r.distance, r.correct) for r in table.itertuples()}
    assert found.keys() == expected.keys() and len(table) == len(expected)
    for pair, values in expected.items():
        assert found[pair] == pytest.approx(values, nan_ok=True)


def test_means_of_groups_with_intervals_that_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"prompt_id": np.repeat(np.arange(300), 4), "distance": np.tile([1, 1, 2, 3], 300)})
    truth = frame["distance"].map({1: 0.6, 2: 0.8, 3: 0.95})
    frame["correct"] = (rng.uniform(size=len(frame)) < truth).astype(float)
    frame.loc[0, "correct"] = np.nan
    table = grouped_mean(frame, ["distance"], "correct", RESAMPLING)
    assert table["distance"].tolist() == [1, 2, 3] and table["count"].tolist() == [599, 300, 300]
    for row, p in zip(table.itertuples(), (0.6, 0.8, 0.95), strict=True):
        assert row.mean == pytest.approx(frame[frame["distance"] == row.distance]["correct"].mean())
        assert row.low < p < row.high


def test_seeds_are_averaged_and_every_choice_of_rollouts_counts() -> None:
    right, wrong = np.array([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]), np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])

    def estimate(seeds: list[np.ndarray], k: int) -> float:
        prompts = [[judged(0, [1, 2], scores)] for scores in seeds]
        return accuracy_at_k(prompts, "soft", k, "half", "wrong", 4.0, "micro", RESAMPLING).estimate

    assert estimate([right], 1) == pytest.approx(2 / 3)
    assert estimate([right], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)  # mean 1 against 1 is a tie
    assert estimate([right, wrong], 1) == pytest.approx(1 / 3)


def test_a_curve_leaves_out_what_has_too_many_choices() -> None:
    assert curve_ks(12) == list(range(1, 13))
    ks = curve_ks(20)
    assert ks[0] == 1 and ks[-1] == 20 and all(comb(20, k) <= LARGEST_CHOICE for k in ks) and 10 not in ks

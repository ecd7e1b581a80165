"""Soft reward and pair accuracy against plain loops, and the invariances both must have."""

import math
from fractions import Fraction
from random import Random
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.scoring.pair_accuracy import (
    TieRule,
    credit,
    expected_answer,
    pair_accuracy,
    pair_credit,
    pair_outcomes,
    strict_pairs,
)

RATINGS = np.arange(1, 8)

logits = st.lists(st.floats(-30, 30), min_size=7, max_size=7).map(np.array)


@st.composite
def ranked_prompts(draw: st.DrawFn) -> tuple[list[np.ndarray], list[list[int]]]:
    """Scores and ranks of a few prompts, ties in both, at least one strict pair overall."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    scores = [np.array(draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)), dtype=float) for n in sizes]
    ranks = [draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)) for n in sizes]
    return [*scores, np.array([1.0, 0.0])], [*ranks, [1, 2]]


def accuracy_of(scores: list[Any], ranks: list[Any], tie: TieRule = "wrong") -> float:
    """Accuracy of these scores."""
    return pair_accuracy(*pair_credit(scores, ranks, tie))[0]


def imagereward_acc(scores_by_prompt: list[np.ndarray], ranks_by_prompt: list[list[int]]) -> float:
    """acc() of ImageReward's test.py: every i<j of unequal rank, equal rewards wrong, one sum over all prompts."""
    right = total = 0
    for rewards, ranking in zip(scores_by_prompt, ranks_by_prompt, strict=True):
        for i in range(len(ranking)):
            for j in range(i + 1, len(ranking)):
                if ranking[i] == ranking[j]:
                    continue
                total += 1
                better, worse = (i, j) if ranking[i] < ranking[j] else (j, i)
                right += bool(rewards[better] > rewards[worse])
    return right / total


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=7, max_size=7))
def test_expected_rating_is_the_weighted_mean_of_the_ratings(weights: list[int]) -> None:
    exact = Fraction(sum(r * w for r, w in zip(range(1, 8), weights, strict=True)), sum(weights))
    assert expected_answer(np.log(weights), RATINGS) == pytest.approx(float(exact), rel=1e-12)


@settings(deadline=None)
@given(logits, st.floats(-100, 100))
def test_expected_rating_ignores_a_shift_and_stays_on_the_scale(answer_logits: np.ndarray, shift: float) -> None:
    rating = expected_answer(answer_logits, RATINGS)
    assert 1 - 1e-12 <= rating <= 7 + 1e-12
    assert expected_answer(answer_logits + shift, RATINGS) == pytest.approx(rating, abs=1e-9)


@settings(deadline=None)
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_two_answers_give_the_probability_of_one(zero: float, one: float) -> None:
    assert expected_answer([zero, one], [0, 1]) == pytest.approx(1 / (1 + math.exp(zero - one)), rel=1e-12)


def test_expected_answer_is_taken_row_by_row() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4, 7))
    together = expected_answer(rows, RATINGS)
    assert together.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert together[i, j] == expected_answer(rows[i, j], RATINGS)  # bit for bit: no dependence on the batch


def test_expected_answer_of_impossible_missing_and_confident_answers() -> None:
    assert expected_answer([-np.inf, 0.0], [0, 1]) == 1.0
    assert np.isnan(expected_answer([np.nan, 0.0], [0, 1]))
    confident = expected_answer(np.array([[-25, 0], [-24, 0]], dtype=np.float32), [0, 1])
    assert confident[1] < confident[0] < 1.0


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=7))
def test_strict_pairs_are_all_pairs_of_unequal_rank(ranks: list[int]) -> None:
    n = len(ranks)
    better, worse = strict_pairs(ranks)
    assert list(zip(better, worse, strict=True)) == [(i, j) for i in range(n) for j in range(n) if ranks[i] < ranks[j]]


def test_pair_outcomes_keep_the_leading_axes_and_mark_missing_scores() -> None:
    scores = np.array([[2.0, 1.0, 1.0], [1.0, 2.0, np.nan]])
    outcomes = pair_outcomes(scores, *strict_pairs([1, 2, 3]))
    np.testing.assert_array_equal(outcomes, [[1, 1, 0], [-1, np.nan, np.nan]])


@pytest.mark.parametrize(
    ("tie", "missing", "expected"),
    [
        ("wrong", "wrong", [1, 0, 0, 0]),
        ("half", "wrong", [1, 0.5, 0, 0]),
        ("right", "dropped", [1, 1, 0, np.nan]),
        ("dropped", "wrong", [1, np.nan, 0, 0]),
        ("dropped", "dropped", [1, np.nan, 0, np.nan]),
    ],
)
def test_credit_of_a_right_a_tied_a_wrong_and_a_missing_pair(tie: str, missing: str, expected: list[float]) -> None:
    np.testing.assert_array_equal(credit(np.array([1, 0, -1, np.nan]), tie, missing), expected)  # type: ignore[arg-type]


@settings(deadline=None)
@given(ranked_prompts())
def test_pair_accuracy_is_imagereward_acc(prompts: tuple[list[np.ndarray], list[list[int]]]) -> None:
    assert accuracy_of(*prompts) == imagereward_acc(*prompts)


@settings(deadline=None)
@given(ranked_prompts(), st.randoms(use_true_random=False))
def test_pair_accuracy_is_invariant(prompts: tuple[list[np.ndarray], list[list[int]]], random: Random) -> None:
    scores, ranks = prompts
    accuracy = accuracy_of(scores, ranks)
    assert accuracy_of([np.exp(s) + s**3 for s in scores], ranks) == accuracy  # monotone transformation
    orders = [random.sample(range(len(r)), len(r)) for r in ranks]
    shuffled_scores = [s[order] for s, order in zip(scores, orders, strict=True)]
    shuffled_ranks = [[r[i] for i in order] for r, order in zip(ranks, orders, strict=True)]
    assert accuracy_of(shuffled_scores, shuffled_ranks) == accuracy


@settings(deadline=None)
@given(ranked_prompts())
def test_opposite_scores_have_the_complementary_accuracy(prompts: tuple[list[np.ndarray], list[list[int]]]) -> None:
    scores, ranks = prompts
    opposite = accuracy_of([-s for s in scores], ranks, tie="half")
    assert opposite == pytest.approx(1 - accuracy_of(scores, ranks, tie="half"), abs=1e-12)


def test_pair_accuracy_counts_missing_scores_as_wrong_and_no_pair_as_nan() -> None:
    assert accuracy_of([[3.0, np.nan, 1.0]], [[1, 2, 3]]) == pytest.approx(1 / 3)
    assert math.isnan(accuracy_of([[1.0, 2.0]], [[1, 1]]))
    assert math.isnan(accuracy_of([[1.0, 1.0]], [[1, 2]], tie="dropped"))


def judged_prompts(prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of each prompt, and how many of them two policies judge rightly; some prompts are easier than others."""
    pairs = rng.integers(0, 20, prompts)
    first, second = (rng.binomial(pairs, rng.beta(4, 2, prompts)) for _ in range(2))
    return pairs.astype(float), first.astype(float), (second + first) / 2


def test_the_error_of_an_accuracy_is_that_of_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(0)
    pairs, first, second = judged_prompts(300, rng)
    drawn = rng.integers(0, 300, (4000, 300))
    for correct in (first, second, second - first):
        estimates = correct[drawn].sum(axis=1) / pairs[drawn].sum(axis=1)
        accuracy, error = pair_accuracy(correct, pairs)
        assert accuracy == correct.sum() / pairs.sum()
        assert error == pytest.approx(estimates.std(ddof=1), rel=0.05)


def test_the_error_with_as_many_pairs_of_each_prompt_is_that_of_a_mean() -> None:
    correct = np.array([3.0, 1.0, 4.0, 0.0, 4.0])
    expected = stdev(correct / 4) / math.sqrt(5)
    assert pair_accuracy(correct, np.full(5, 4.0)) == pytest.approx((0.6, expected))
    # Prompts without a pair say nothing.
    padded = pair_accuracy(np.append(correct, 0.0), np.append(np.full(5, 4.0), 0.0))
    assert padded == pytest.approx((0.6, expected))


def test_one_prompt_has_no_error() -> None:
    accuracy, error = pair_accuracy(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert accuracy == 0.5 and math.isnan(error)

"""Bootstrap intervals against exhaustive resampling, analytic standard errors and simulated coverage."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workflow_scripts.scoring.bootstrap import (
    Interval,
    accuracy_intervals,
    difference_intervals,
    minimum_detectable_difference,
)
from workflow_scripts.scoring.protocols import Average, macro, micro

AVERAGES: list[Average] = ["micro", "macro"]


def accuracy_interval(correct: np.ndarray, pairs: np.ndarray, *rest: Any) -> Interval:
    """One of them."""
    (interval,) = accuracy_intervals([(correct, pairs)], *rest)
    return interval


def difference_interval(
    correct_a: np.ndarray, pairs_a: np.ndarray, correct_b: np.ndarray, pairs_b: np.ndarray, *rest: Any, **options: Any
) -> Interval:
    """One of them."""
    (interval,) = difference_intervals([((correct_a, pairs_a), (correct_b, pairs_b))], *rest, **options)
    return interval


def loop_accuracy(correct: np.ndarray, pairs: np.ndarray, prompts: tuple[int, ...], average: Average) -> float:
    """Accuracy of the drawn prompts, every one with a counted pair."""
    if average == "macro":
        return float(sum(correct[i] / pairs[i] for i in prompts) / len(prompts))
    return float(sum(correct[i] for i in prompts) / sum(pairs[i] for i in prompts))


def exhaustive_standard_error(prompts: int, statistic: Callable[[tuple[int, ...]], float]) -> float:
    """Standard deviation of a statistic over all equally likely resamples."""
    return float(np.std([statistic(drawn) for drawn in product(range(prompts), repeat=prompts)]))


@pytest.mark.parametrize("average", AVERAGES)
def test_standard_errors_equal_those_of_all_possible_resamples(average: Average) -> None:
    pairs_a, pairs_b = np.array([6.0, 3.0, 10.0, 1.0]), np.array([6.0, 2.0, 9.0, 1.0])
    correct_a, correct_b = np.array([4.0, 1.0, 9.0, 0.0]), np.array([5.0, 1.5, 4.0, 1.0])
    interval = accuracy_interval(correct_a, pairs_a, average, 0.95, 20_000, 0)
    exact = exhaustive_standard_error(4, lambda drawn: loop_accuracy(correct_a, pairs_a, drawn, average))
    assert interval.estimate == pytest.approx(loop_accuracy(correct_a, pairs_a, (0, 1, 2, 3), average))
    assert interval.standard_error == pytest.approx(exact, rel=0.02)

    def difference(drawn: tuple[int, ...]) -> float:
        return loop_accuracy(correct_b, pairs_b, drawn, average) - loop_accuracy(correct_a, pairs_a, drawn, average)

    paired = difference_interval(correct_a, pairs_a, correct_b, pairs_b, average, 0.95, 20_000, 0)
    assert paired.estimate == pytest.approx(difference((0, 1, 2, 3)))
    assert paired.standard_error == pytest.approx(exhaustive_standard_error(4, difference), rel=0.02)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 200), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from(AVERAGES))
def test_many_intervals_at_once_are_bit_for_bit_those_of_scipy_one_by_one(
    prompts: int, number: int, seed: int, average: Average
) -> None:
    rng = np.random.default_rng(seed)
    accuracy = micro if average == "micro" else macro

    def plain(statistic: Any, *samples: np.ndarray) -> tuple[float, ...]:
        rng = np.random.default_rng(seed)
        found = stats.bootstrap(
            samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=700, batch=90, rng=rng
        )
        estimate = statistic(*samples, axis=-1)
        return (float(estimate), float(found.standard_error), *map(float, found.confidence_interval))

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, axis: int) -> np.ndarray:
        return accuracy(c, d, axis) - accuracy(a, b, axis)

    credits = []
    for _ in range(number):
        pairs = rng.integers(0, 20, size=prompts) / 3
        credits.append((pairs * rng.random(prompts), pairs))
    credits.append(credits[0])
    for (correct, pairs), interval in zip(credits, accuracy_intervals(credits, average, 0.95, 700, seed), strict=True):
        if (kept := pairs > 0).sum() > 1:
            np.testing.assert_array_equal(interval, plain(accuracy, correct[kept], pairs[kept]))
    ends = [(credits[0], credit) for credit in credits]
    for (a, b), interval in zip(ends, difference_intervals(ends, average, 0.95, 700, seed), strict=True):
        if (kept := (a[1] > 0) | (b[1] > 0)).sum() > 1:
            samples = [sample[kept] for sample in (*a, *b)]
            with np.errstate(invalid="ignore"):
                np.testing.assert_array_equal(interval, plain(difference, *samples))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.sampled_from(AVERAGES))
def test_intervals_contain_the_estimate_and_repeat_with_the_seed(prompts: int, seed: int, average: Average) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(1, 20, size=prompts).astype(float)
    correct = rng.binomial(pairs.astype(int), 0.6).astype(float)
    interval = accuracy_interval(correct, pairs, average, 0.95, 500, seed)
    assert interval.low - 1e-12 <= interval.estimate <= interval.high + 1e-12
    assert 0 <= interval.low <= interval.high <= 1 + 1e-12
    assert interval == accuracy_interval(correct, pairs, average, 0.95, 500, seed)
    wider = accuracy_interval(correct, pairs, average, 0.99, 500, seed)
    assert wider.low <= interval.low + 1e-12
    assert wider.high >= interval.high - 1e-12


def test_another_seed_draws_other_resamples() -> None:
    correct = np.random.default_rng(0).random(50)
    assert accuracy_interval(correct, np.ones(50), "micro", 0.95, 500, 0) != accuracy_interval(
        correct, np.ones(50), "micro", 0.95, 500, 1
    )


@pytest.mark.parametrize("average", AVERAGES)
def test_a_method_does_not_differ_from_itself(average: Average) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 20, size=100).astype(float)
    correct = pairs * rng.random(100)
    assert difference_interval(correct, pairs, correct, pairs, average, 0.95, 500, 0) == (0.0, 0.0, 0.0, 0.0)


def test_pairing_removes_what_both_methods_share() -> None:
    rng = np.random.default_rng(0)
    pairs = np.full(300, 10.0)
    difficulty = rng.random(300) * 8
    a, b = difficulty, difficulty + 1 + rng.normal(scale=0.1, size=300)
    paired = difference_interval(a, pairs, b, pairs, "micro", 0.95, 1000, 0)
    alone = accuracy_interval(b, pairs, "micro", 0.95, 1000, 0)
    assert paired.low > 0.09
    assert paired.standard_error < alone.standard_error / 10


@pytest.mark.parametrize("average", AVERAGES)
def test_standard_error_is_the_binomial_one_for_one_pair_prompts(average: Average) -> None:
    correct = (np.random.default_rng(0).random(1000) < 0.65).astype(float)
    interval = accuracy_interval(correct, np.ones(1000), average, 0.95, 5000, 0)
    analytic = math.sqrt(correct.mean() * (1 - correct.mean()) / 1000)
    assert interval.standard_error == pytest.approx(analytic, rel=0.05)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * analytic, rel=0.05)
    narrower = accuracy_interval(correct, np.ones(1000), average, 0.8, 5000, 0)
    assert narrower.high - narrower.low == pytest.approx(2 * 1.2816 * analytic, rel=0.05)


def test_pairs_of_one_prompt_are_not_counted_as_independent() -> None:
    correct = (np.random.default_rng(0).random(400) < 0.65).astype(float)
    one_pair = accuracy_interval(correct, np.ones(400), "micro", 0.95, 2000, 0)
    ten_equal_pairs = accuracy_interval(10 * correct, np.full(400, 10.0), "micro", 0.95, 2000, 0)
    assert ten_equal_pairs == pytest.approx(one_pair)


def test_coverage_of_independent_one_pair_prompts() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for simulation in range(300):
        correct = (rng.random(100) < 0.65).astype(float)
        interval = accuracy_interval(correct, np.ones(100), "micro", 0.9, 300, simulation)
        covered += interval.low <= 0.65 <= interval.high
    assert covered / 300 == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("average", AVERAGES)
def test_prompts_without_a_counted_pair_change_nothing(average: Average) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 20, size=30).astype(float)
    correct = pairs * rng.random(30)
    padded = accuracy_interval(np.append(correct, [0, 0]), np.append(pairs, [0, 0]), average, 0.95, 500, 0)
    assert padded == accuracy_interval(correct, pairs, average, 0.95, 500, 0)


@pytest.mark.parametrize("average", AVERAGES)
def test_an_interval_over_fewer_than_two_prompts_is_undefined(average: Average) -> None:
    one = accuracy_interval(np.array([1.0, 0.0]), np.array([2.0, 0.0]), average, 0.95, 500, 0)
    np.testing.assert_equal(tuple(one), (0.5, math.nan, math.nan, math.nan))
    none = accuracy_interval(np.zeros(2), np.zeros(2), average, 0.95, 500, 0)
    np.testing.assert_equal(tuple(none), (math.nan,) * 4)


def test_minimum_detectable_difference_is_found_with_the_stated_power() -> None:
    prompts, sd = 466, 0.3
    difference = minimum_detectable_difference(prompts, sd)
    assert difference == pytest.approx((1.959964 + 0.841621) * sd / math.sqrt(prompts), rel=1e-6)
    measured = np.random.default_rng(0).normal(difference, sd / math.sqrt(prompts), size=20_000)
    assert (measured > 1.959964 * sd / math.sqrt(prompts)).mean() == pytest.approx(0.8, abs=0.01)

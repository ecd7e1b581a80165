"""Calibration against definitions written out, and against answers drawn by chance."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workflow_scripts.reporting.calibration import (
    brier_score,
    expected_calibration_error,
    probability_bins,
)
from workflow_scripts.reporting.comparisons import probability_higher

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JUDGED = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
WEIGHTS = st.lists(st.integers(0, 9), min_size=7, max_size=7).filter(any)


@ANY
@given(WEIGHTS, WEIGHTS)
def test_the_probability_of_a_higher_answer_is_the_sum_over_all_pairs_of_answers(a: list[int], b: list[int]) -> None:
    expected = Fraction(0)
    for i in range(7):
        for j in range(7):
            expected += Fraction(a[i] * b[j], sum(a) * sum(b)) * (1 if i > j else Fraction(1, 2) if i == j else 0)
    first, second = np.array(a) / sum(a), np.array(b) / sum(b)
    assert probability_higher(first, second) == pytest.approx(float(expected))
    assert probability_higher(second, first) == pytest.approx(1 - float(expected))


def test_many_are_compared_at_once() -> None:
    a, b = np.eye(7)[[0, 3, 6]], np.eye(7)[[6, 3, 0]]
    assert probability_higher(a, b).tolist() == [0, 0.5, 1]


@ANY
@given(JUDGED, st.integers(1, 20))
def test_the_calibration_error_is_the_weighted_gap_of_each_bin(judged: list[tuple[float, bool]], bins: int) -> None:
    total = 0.0
    for b in range(bins):
        inside = [(p, y) for p, y in judged if b / bins <= p and (p < (b + 1) / bins or b == bins - 1)]
        if inside:
            gap = sum(y for _, y in inside) / len(inside) - sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(judged) * abs(gap)
    p, y = map(np.array, zip(*judged, strict=True))
    assert expected_calibration_error(p, y, bins) == pytest.approx(total, abs=1e-12)
    assert 0 <= expected_calibration_error(p, y, bins) <= 1


@ANY
@given(JUDGED)
def test_the_brier_score_is_the_mean_squared_difference(judged: list[tuple[float, bool]]) -> None:
    p, y = zip(*judged, strict=True)
    assert brier_score(p, y) == pytest.approx(sum((a - b) ** 2 for a, b in judged) / len(judged))


def test_edges_belong_to_the_bin_above_but_for_the_last() -> None:
    assert [probability_bins([i / 100], 100)[0] for i in range(101)] == [*range(100), 99]


def test_a_calibrated_forecast_has_hardly_an_error_and_an_overconfident_one_has() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=100_000)
    y = rng.uniform(size=p.size) < p
    assert expected_calibration_error(p, y, 10) < 0.01
    assert brier_score(p, y) == pytest.approx(1 / 6, abs=0.01)  # E[p (1 - p)] of uniform p
    assert expected_calibration_error((p > 0.5).astype(float), y, 10) == pytest.approx(0.25, abs=0.01)


def test_nothing_to_judge_has_no_score() -> None:
    assert math.isnan(brier_score([], [])) and math.isnan(expected_calibration_error([], [], 10))

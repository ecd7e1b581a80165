"""Mean@k against itertools and exact fractions."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.scoring.mean_at_k import TooFewRolloutsError, fill_missing, subset_means


@st.composite
def recorded_scores(draw: st.DrawFn) -> tuple[list[list[int | None]], int]:
    """(N, K) integer scores, some missing, and a k that K allows."""
    rollouts = draw(st.integers(1, 5))
    row = st.lists(st.one_of(st.none(), st.integers(1, 7)), min_size=rollouts, max_size=rollouts)
    return draw(st.lists(row, min_size=1, max_size=4)), draw(st.integers(1, rollouts))


@settings(deadline=None)
@given(recorded_scores())
def test_subset_means_are_the_means_of_all_combinations(recorded: tuple[list[list[int | None]], int]) -> None:
    rows, k = recorded
    means = subset_means(np.array(rows, dtype=float), k)
    assert means.shape == (math.comb(len(rows[0]), k), len(rows))
    for image, row in enumerate(rows):
        for subset, chosen in enumerate(combinations(row, k)):
            present = [score for score in chosen if score is not None]
            if present:
                assert means[subset, image] == float(Fraction(sum(present), len(present)))
            else:
                assert math.isnan(means[subset, image])


def test_all_rollouts_give_one_mean_and_single_rollouts_give_themselves() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(subset_means(scores, 4), [scores.mean(axis=1)])
    np.testing.assert_array_equal(subset_means(scores, 1), scores.T)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_recorded_rollouts_names_both_and_the_remedy(k: int) -> None:
    with pytest.raises(TooFewRolloutsError, match=rf"Mean@{k} .* 3, .*record more rollouts \(rollouts\.blocks\)"):
        subset_means(np.zeros((2, 3)), k)


def test_fill_missing_leaves_recorded_scores_alone() -> None:
    np.testing.assert_array_equal(fill_missing([[1.0, np.nan], [np.nan, 7.0]], 4.0), [[1.0, 4.0], [4.0, 7.0]])

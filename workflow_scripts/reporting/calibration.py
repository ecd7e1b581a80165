"""Calibration of the soft reward: is what is given 70 % right 70 % of the time?"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def probability_higher(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Probability that an answer drawn from `first` is higher than one from `second`, a tie counting half.

    The two are drawn independently: P(X > Y) + P(X = Y) / 2, what a ROC curve has as its area.

    Args:
        first: (..., A) probabilities of the A answers in ascending order.
        second: (..., A) the other's.

    Returns:
        (...) float64 in [0, 1].
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    below = np.cumsum(second, axis=-1) - second / 2
    higher: NDArray[np.float64] = (first * below).sum(axis=-1)
    return higher


def probability_bins(probabilities: ArrayLike, bins: int) -> NDArray[np.intp]:
    """Number of the bin, of `bins` equally wide ones over [0, 1], that each probability falls into.

    Bin b is [b / bins, (b + 1) / bins), the last one with its upper end.

    Args:
        probabilities: (N,) each in [0, 1].
        bins: how many.

    Returns:
        (N,) integers in 0..bins-1.
    """
    # Searched among the edges themselves: 0.29 * 100 is less than 29.
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, np.asarray(probabilities, dtype=np.float64), side="right")


def brier_score(probabilities: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared difference between probability and outcome (Brier 1950, for two classes): 0.25 for always 0.5.

    Args:
        probabilities: (N,) each in [0, 1].
        outcomes: (N,) 1 where it happened, else 0.

    Returns:
        Value in [0, 1]; nan if there is none.
    """
    squares = (np.asarray(probabilities, dtype=np.float64) - np.asarray(outcomes, dtype=np.float64)) ** 2
    return float(squares.mean()) if squares.size else math.nan


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int) -> float:
    """Mean over the bins, weighted by their counts, of |mean outcome - mean probability| (Naeini et al. 2015).

    Args:
        probabilities: (N,) each in [0, 1].
        outcomes: (N,) 1 where it happened, else 0.
        bins: how many equally wide bins over [0, 1]; see `probability_bins`.

    Returns:
        Value in [0, 1]; nan if there is none.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if not probabilities.size:
        return math.nan
    gaps = np.bincount(
        probability_bins(probabilities, bins), weights=np.asarray(outcomes, dtype=np.float64) - probabilities
    )
    return float(np.abs(gaps).sum() / probabilities.size)

"""Calibration of the soft reward: are people in favour 70 % of the time where the policy says 70 %?"""

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from workflow_scripts.reporting.agreement import grouped_mean
from workflow_scripts.reporting.comparisons import comparisons, rated_comparisons
from workflow_scripts.reporting.policies import Policies
from workflow_scripts.scoring.bootstrap import Resampling
from workflow_scripts.scoring.judged_prompts import JudgedPrompt

BINS = 10  # equally wide, of a probability
RATING_EDGES = np.arange(1, 7.25, 0.5)  # bins of an expected rating


def probability_bins(probabilities: ArrayLike, bins: int) -> NDArray[np.intp]:
    """Assign each probability to one of `bins` equally wide bins over [0, 1].

    Bin b is [b / bins, (b + 1) / bins); the last one includes its upper end.

    Args:
        probabilities: (N,) each in [0, 1].
        bins: how many.

    Returns:
        (N,) integers in 0..bins-1.
    """
    # Compares with the edges themselves, since 0.29 * 100 is less than 29.
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


# ----------------------------------------------------------------------------------------------- tables of the figures


def calibration_pairs(policies: Policies) -> pd.DataFrame:
    """Reliability of the probability that one image is preferred, of single rollouts and of their mean."""
    tables = []
    for key, seeds in policies.recorded.items():
        predicted = comparisons if policies.pairwise(key[0]) else rated_comparisons
        for number in dict.fromkeys((1, policies.rollouts(key))):
            frame = pd.concat([predicted(seed, number > 1) for seed in seeds], ignore_index=True)
            if frame.empty:
                continue
            values = frame.assign(bin=probability_bins(frame["soft"], BINS))
            scores = (frame["soft"].to_numpy(), frame["outcome"].to_numpy())
            tables.append(
                _reliability(values, "soft", "outcome", np.arange(BINS + 1) / BINS, policies.resampling).assign(
                    **policies.head(*key),
                    rollouts=number,
                    brier=brier_score(*scores),
                    ece=expected_calibration_error(*scores, BINS),
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def calibration_ratings(policies: Policies) -> pd.DataFrame:
    """Human rating of the images that have about the same expected rating, mean of all rollouts."""
    tables = []
    for key, seeds in policies.recorded.items():
        rated = [seed for seed in seeds if all(prompt.ratings is not None for prompt in seed.prompts)]
        if policies.pairwise(key[0]) or not rated:
            continue
        frame = pd.concat([expected_ratings(prompt) for seed in rated for prompt in seed.prompts], ignore_index=True)
        bins = np.clip(np.searchsorted(RATING_EDGES, frame["expected"], side="right") - 1, 0, len(RATING_EDGES) - 2)
        table = _reliability(frame.assign(bin=bins), "expected", "rating", RATING_EDGES, policies.resampling)
        rmse = math.sqrt(float(((frame["expected"] - frame["rating"]) ** 2).mean()))
        tables.append(table.assign(**policies.head(*key), rmse=rmse))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def expected_ratings(prompt: JudgedPrompt) -> pd.DataFrame:
    """`expected` rating of each image, mean of its rollouts, and the human `rating`."""
    expected = np.nanmean(prompt.scores["soft"], axis=1)
    return pd.DataFrame({"prompt_id": prompt.prompt_id, "expected": expected, "rating": prompt.ratings})


def _reliability(
    frame: pd.DataFrame, predicted: str, observed: str, edges: NDArray[np.float64], resampling: Resampling
) -> pd.DataFrame:
    """Mean of the observed column in each `bin` with its interval, beside that of the predicted column."""
    table = grouped_mean(frame, ["bin"], observed, resampling)
    bins = table["bin"].to_numpy(int)
    return table.assign(
        bin_low=edges[bins],
        bin_high=edges[bins + 1],
        predicted=frame.groupby("bin")[predicted].mean().reindex(bins).to_numpy(),
    )

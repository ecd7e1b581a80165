"""Mean@k: the average score of k independent reasoning rollouts (paper, section 4)."""

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TooFewRolloutsError(ValueError):
    """More rollouts are requested than recorded: names both numbers and the remedy."""


def fill_missing(scores: ArrayLike, neutral: float) -> NDArray[np.float64]:
    """Replace missing scores by one that prefers nothing: 4 on the rating scale, 0.5 for a probability.

    Args:
        scores: (...) scores, nan where there is none.
        neutral: the score to put there.

    Returns:
        (...) float64 without nan.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(scores), neutral, scores)


def subset_means(scores: ArrayLike, k: int) -> NDArray[np.float64]:
    """Mean@k scores for every choice of k of the K recorded rollouts.

    Averaging an accuracy over all C(K, k) choices gives its expectation over the rollouts without drawing any.

    Args:
        scores: (N, K) score of each image in each rollout, nan where the rollout gave none.
        k: number of rollouts averaged.

    Returns:
        (C(K, k), N) float64, subsets in lexicographic order. Missing scores are left out of the mean; nan if all are.

    Raises:
        TooFewRolloutsError: k < 1, or k exceeds the recorded rollouts.
    """
    scores = np.asarray(scores, dtype=np.float64)
    rollouts = scores.shape[1]
    if not 1 <= k <= rollouts:
        raise TooFewRolloutsError(
            f"Mean@{k} needs 1 <= k <= {rollouts}, the number of recorded rollouts; record more rollouts "
            "(rollouts.blocks) or report a smaller k (scoring.report_k)"
        )
    chosen = scores.T[list(combinations(range(rollouts), k))]  # (C(K, k), k, N)
    present = ~np.isnan(chosen)
    count = present.sum(axis=1)
    total = np.where(present, chosen, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return means

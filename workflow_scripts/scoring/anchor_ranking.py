"""Scores of N images from N-1 comparisons with one anchor image (paper, section 3)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ANCHOR_SCORE = 0.5


def candidate_probability(probability_second: ArrayLike, candidate_second: ArrayLike) -> NDArray[np.float64]:
    """Probability that the candidate is preferred over the anchor, the paper's p(1|C), in either presentation order.

    The policy answers 1 when it prefers the second image it is shown, whichever of the two that is.

    Args:
        probability_second: (...) p(1|C) of the answer, or a sampled answer 0 or 1; nan where there is none.
        candidate_second: (...) bool, broadcast against it: whether the candidate was the second image shown.

    Returns:
        (...) float64 in [0, 1], nan where `probability_second` is.
    """
    probability = np.asarray(probability_second, dtype=np.float64)
    return np.where(candidate_second, probability, 1.0 - probability)


def anchor_scores(
    images: int, anchor: ArrayLike, candidates: ArrayLike, probabilities: ArrayLike
) -> NDArray[np.float64]:
    """Scores of images of one prompt or several: 0.5 for an anchor, p(candidate preferred over it) for the others.

    An image compared twice, once in each presentation order, gets the mean of its comparisons, rollout by rollout;
    missing answers are left out of that mean.

    Args:
        images: N, the number of images.
        anchor: index of the anchor image, or of that of each prompt.
        candidates: (M,) index of each image compared with its prompt's anchor; of one prompt M = N-1, or 2(N-1) with
            both orders.
        probabilities: (M, K) `candidate_probability` of each comparison and rollout, nan where there is none.

    Returns:
        (N, K) float64, nan for an image without any answer in that rollout.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    candidates = np.asarray(candidates, dtype=np.intp)
    answered = ~np.isnan(probabilities)
    total = np.zeros((images, probabilities.shape[1]))
    count = np.zeros_like(total)
    np.add.at(total, candidates, np.where(answered, probabilities, 0.0))
    np.add.at(count, candidates, answered)
    scores = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    scores[np.asarray(anchor, dtype=np.intp)] = ANCHOR_SCORE
    return scores

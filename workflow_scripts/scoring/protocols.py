"""Accuracy of one set of prompts under a stated protocol: which pairs count, what ties count as, micro or macro."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workflow_scripts.scoring.mean_at_k import fill_missing, subset_means
from workflow_scripts.scoring.pair_accuracy import MissingRule, TieRule, credit, pair_outcomes, strict_pairs

Average = Literal["micro", "macro"]
LabelTieRule = Literal["dropped", "right"]


class Protocol(NamedTuple):
    """How pairs become one accuracy."""

    tie: TieRule  # what equal scores count as
    average: Average  # over all pairs together, or over the prompts' accuracies
    label_tie: LabelTieRule  # what a pair with equal human ranks counts as


# ImageReward, test.py acc(): all strict pairs together.
IMAGEREWARD = Protocol(tie="wrong", average="micro", label_tie="dropped")
# The same pairs as averaged by HPSv2, calc_ImageReward().
IMAGEREWARD_MACRO = Protocol(tie="wrong", average="macro", label_tie="dropped")
# HPSv2, inversion_score(): mean over prompts of 1 - discordant pairs / (n (n - 1) / 2), where a tie on either side is
# not discordant. The official evaluation ranks by argsort and so never has tied scores; for scores that do tie,
# `HPDV2._replace(tie="half")` is its expectation, while this one gives a constant score 100 %.
HPDV2 = Protocol(tie="right", average="macro", label_tie="right")

OFFICIAL = {"imagereward": IMAGEREWARD, "hpsv2": HPDV2, "own": IMAGEREWARD}  # of each test set
NEUTRAL = {"pointwise": 4.0, "pairwise": 0.5}  # the score that prefers nothing


def _label_tied_pairs(ranks: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index arrays (T,), (T,) of the pairs of one prompt whose images share a rank."""
    ranks = np.asarray(ranks)
    first, second = np.nonzero(np.triu(ranks[:, None] == ranks[None, :], k=1))
    return first, second


def prompt_credit(
    scores_by_prompt: Sequence[ArrayLike],
    ranks_by_prompt: Sequence[ArrayLike],
    *,
    k: int,
    tie: TieRule,
    label_tie: LabelTieRule,
    missing: MissingRule | Literal["neutral"],
    neutral: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and number of counted pairs of each prompt at Mean@k, averaged over all k-subsets of its rollouts.

    Args:
        scores_by_prompt: for each prompt (N, K) scores, higher is better, nan where a rollout gave none.
        ranks_by_prompt: for each prompt (N,) ranks, lower is better.
        k: number of rollouts averaged into a score.
        tie: what equal scores count as.
        label_tie: whether pairs of equal rank are left out or count as right.
        missing: what a pair counts as that has an image without a score in all k rollouts, whether its ranks tie or
            not. "neutral" instead gives every rollout without a score the score `neutral`, before the mean.
        neutral: the score that prefers nothing, in the unit of the scores; read only for missing="neutral".

    Returns:
        (correct, pairs): two float64 arrays of length n_prompts. `pairs` is 0 where a prompt has no pair that counts,
        and fractional where some subsets drop a pair and others do not.

    Raises:
        ValueError: the sequences differ in length.
        TooFewRolloutsError: k is not within 1..K.
    """
    correct = np.zeros(len(scores_by_prompt))
    pairs = np.zeros(len(scores_by_prompt))
    for prompt, (scores, ranks) in enumerate(zip(scores_by_prompt, ranks_by_prompt, strict=True)):
        means = subset_means(fill_missing(scores, neutral) if missing == "neutral" else scores, k)
        outcomes = pair_outcomes(means, *strict_pairs(ranks))
        if label_tie == "right":
            label_tied = pair_outcomes(means, *_label_tied_pairs(ranks))
            # Whatever the two scores are, they cannot be in the wrong order; that both exist is still asked for.
            outcomes = np.concatenate([outcomes, np.where(np.isnan(label_tied), np.nan, 1.0)], axis=-1)
        credits = credit(outcomes, tie, "wrong" if missing == "neutral" else missing)
        correct[prompt] = np.nansum(credits) / len(means)
        pairs[prompt] = np.count_nonzero(~np.isnan(credits)) / len(means)
    return correct, pairs


def micro(correct: NDArray[np.float64], pairs: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Accuracy over the pairs of all prompts together.

    Args:
        correct: (..., n_prompts) credit of each prompt.
        pairs: (..., n_prompts) number of pairs counted in each prompt.
        axis: the axis of the prompts.

    Returns:
        (...) fraction in [0, 1], nan where no pair counts; a scalar for one-dimensional input.
    """
    with np.errstate(invalid="ignore"):
        accuracy: NDArray[np.float64] = correct.sum(axis=axis) / pairs.sum(axis=axis)
    return accuracy


def macro(correct: NDArray[np.float64], pairs: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Mean over the prompts of each prompt's accuracy; prompts without a counted pair are left out.

    Args:
        correct: (..., n_prompts) credit of each prompt.
        pairs: (..., n_prompts) number of pairs counted in each prompt.
        axis: the axis of the prompts.

    Returns:
        (...) fraction in [0, 1], nan where no pair counts; a scalar for one-dimensional input.
    """
    counted = pairs > 0
    by_prompt = np.divide(correct, pairs, out=np.zeros_like(correct), where=counted)
    with np.errstate(invalid="ignore"):
        accuracy: NDArray[np.float64] = by_prompt.sum(axis=axis) / counted.sum(axis=axis)
    return accuracy


def first_listed(images: int) -> NDArray[np.float64]:
    """Scores of the baseline that always prefers the image listed first: 59.02 % on ImageReward's test set (micro).

    Args:
        images: N, the number of images of the prompt.

    Returns:
        (N, 1) float64, one rollout of scores 0, -1, -2, ...
    """
    return -np.arange(images, dtype=np.float64)[:, None]

"""Accuracy of one set of prompts under a stated protocol: which pairs count, what ties count as, micro or macro."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workflow_scripts.scoring.mean_at_k import fill_missing, subset_means
from workflow_scripts.scoring.pair_accuracy import MISSING_CREDIT, TIE_CREDIT, MissingRule, TieRule

Average = Literal["micro", "macro"]
LabelTieRule = Literal["dropped", "right"]
MissingAnswerRule = MissingRule | Literal["neutral"]  # neutral: takes the score that prefers nothing

SUBSETS_AT_ONCE = 2**19  # of all prompts together; some ten MB


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


class Outcomes(NamedTuple):
    """How the pairs of each prompt came out, summed over the k-subsets of its rollouts: (n_prompts,) float64 each."""

    right: NDArray[np.float64]  # strict pairs in the right order
    tied: NDArray[np.float64]  # strict pairs of equal scores
    missing: NDArray[np.float64]  # strict pairs with an image without a score
    strict: NDArray[np.float64]  # all strict pairs
    label_tied: NDArray[np.float64]  # pairs of equal rank with both scores
    label_tied_missing: NDArray[np.float64]  # pairs of equal rank with an image without a score
    subsets: NDArray[np.float64]  # C(K, k), the number of subsets in the sums


def prompt_outcomes(scores_by_prompt: Sequence[ArrayLike], ranks_by_prompt: Sequence[ArrayLike], k: int) -> Outcomes:
    """Compare the Mean@k scores of every pair of images of each prompt with the human order, in every k-subset.

    Args:
        scores_by_prompt: for each prompt (N, K) scores, higher is better, nan where a rollout gave none.
        ranks_by_prompt: for each prompt (N,) ranks, lower is better.
        k: number of rollouts averaged into a score.

    Raises:
        ValueError: the sequences differ in length.
        TooFewRolloutsError: k is not within 1..K.
    """
    judged = [(np.asarray(s, float), np.asarray(r)) for s, r in zip(scores_by_prompt, ranks_by_prompt, strict=True)]
    counts = np.zeros((len(Outcomes._fields), len(judged)))
    for rollouts, alike in groupby(range(len(judged)), lambda prompt: judged[prompt][0].shape[1]):
        numbers = list(alike)
        # A prompt has at most 2**K subsets.
        at_once = max(1, SUBSETS_AT_ONCE >> rollouts)
        for start in range(0, len(numbers), at_once):
            chosen = numbers[start : start + at_once]
            scores, ranks = (np.concatenate(parts) for parts in zip(*(judged[i] for i in chosen), strict=True))
            counts[:, chosen] = _counts(subset_means(scores, k).T, ranks, [judged[i][1].size for i in chosen])
    return Outcomes(*counts)


def _counts(means: NDArray[np.float64], ranks: NDArray[Any], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Outcomes (7, prompts) of prompts with these numbers of images; means (images, subsets), ranks (images,)."""
    better, worse, prompt = _pairs(np.array(sizes))
    better, worse = np.where(ranks[better] <= ranks[worse], (better, worse), (worse, better))
    strict = ranks[better] != ranks[worse]
    means = np.ascontiguousarray(means)
    absent = np.isnan(means)
    missing = np.count_nonzero(absent[better] | absent[worse], axis=1) if absent.any() else np.zeros(len(prompt))
    first, second = means[better[strict]], means[worse[strict]]
    right, tied = np.count_nonzero(first > second, axis=1), np.count_nonzero(first == second, axis=1)

    def total(counted: NDArray[np.bool_], numbers: Any) -> NDArray[np.float64]:
        weights = np.broadcast_to(numbers, counted.sum())
        return np.bincount(prompt[counted], weights, len(sizes)).astype(np.float64)

    subsets = means.shape[1]
    return np.stack(
        [
            total(strict, right),
            total(strict, tied),
            total(strict, missing[strict]),
            total(strict, subsets),
            total(~strict, subsets - missing[~strict]),
            total(~strict, missing[~strict]),
            np.full(len(sizes), subsets),
        ]
    )


def _pairs(sizes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """All pairs of images within each of several consecutive prompts: (P,) image, image, prompt."""
    starts = np.cumsum(sizes) - sizes
    found = []
    for images in np.unique(sizes):
        first, second = np.triu_indices(images, k=1)
        prompts = np.flatnonzero(sizes == images)
        of = starts[prompts][:, None]
        found.append(((of + first).ravel(), (of + second).ravel(), np.repeat(prompts, len(first))))
    first, second, prompt = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, prompt


def outcome_credit(
    outcomes: Outcomes, tie: TieRule, label_tie: LabelTieRule, missing: MissingRule
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and number of counted pairs of each prompt, averaged over all k-subsets of its rollouts.

    Args:
        outcomes: of the prompts.
        tie: what equal scores count as.
        label_tie: whether pairs of equal rank are left out or count as right.
        missing: what a pair counts as that has an image without a score in all k rollouts, whether its ranks tie or
            not.

    Returns:
        (correct, pairs): two float64 arrays of length n_prompts. `pairs` is 0 where a prompt has no pair that counts,
        and fractional where some subsets drop a pair and others do not.

    Raises:
        KeyError: `tie` or `missing` is no such rule.
    """
    correct, pairs = outcomes.right, outcomes.strict
    if math.isnan(TIE_CREDIT[tie]):
        pairs = pairs - outcomes.tied
    else:
        correct = correct + TIE_CREDIT[tie] * outcomes.tied
    if math.isnan(MISSING_CREDIT[missing]):
        pairs = pairs - outcomes.missing
    if label_tie == "right":
        # Two scores of such a pair cannot be in the wrong order, but both must exist.
        correct, pairs = correct + outcomes.label_tied, pairs + outcomes.label_tied
        if not math.isnan(MISSING_CREDIT[missing]):
            pairs = pairs + outcomes.label_tied_missing
    return correct / outcomes.subsets, pairs / outcomes.subsets


def prompt_credit(
    scores_by_prompt: Sequence[ArrayLike],
    ranks_by_prompt: Sequence[ArrayLike],
    *,
    k: int,
    tie: TieRule,
    label_tie: LabelTieRule,
    missing: MissingAnswerRule,
    neutral: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and number of counted pairs of each prompt at Mean@k, under one set of rules.

    Args:
        scores_by_prompt: as `prompt_outcomes` takes them.
        ranks_by_prompt: as `prompt_outcomes` takes them.
        k: number of rollouts averaged into a score.
        tie: as `outcome_credit` takes it.
        label_tie: as `outcome_credit` takes it.
        missing: as `outcome_credit` takes it. "neutral" instead gives every rollout without a score the score
            `neutral`, before the mean.
        neutral: the score that prefers nothing, in the unit of the scores; read only for missing="neutral".

    Returns:
        (correct, pairs) of `outcome_credit`.
    """
    if missing == "neutral":
        scores_by_prompt, missing = [fill_missing(scores, neutral) for scores in scores_by_prompt], "wrong"
    return outcome_credit(prompt_outcomes(scores_by_prompt, ranks_by_prompt, k), tie, label_tie, missing)


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

"""Soft reward of an answer and accuracy over preference pairs: the part of scoring that validation uses."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

TieRule = Literal["wrong", "half", "right", "dropped"]
MissingRule = Literal["wrong", "dropped"]

TIE_CREDIT: dict[TieRule, float] = {"wrong": 0.0, "half": 0.5, "right": 1.0, "dropped": math.nan}
MISSING_CREDIT: dict[MissingRule, float] = {"wrong": 0.0, "dropped": math.nan}


def expected_answer(answer_logprobs: ArrayLike, answers: ArrayLike) -> NDArray[np.float64]:
    """Soft reward of the paper, section 3: sum of a * p(a) with p a softmax over the answer tokens alone.

    With answers 1..7 this is the expected rating E[r|C], with answers (0, 1) it is p(1|C).

    Args:
        answer_logprobs: (..., A) log-probabilities or raw logits in nats of the A answer tokens. They are renormalised
            here, which leaves log-probabilities that already are normalised over these tokens as they were.
        answers: (A,) the numbers the answer tokens stand for.

    Returns:
        (...) float64, in the unit of `answers`; nan where a log-probability is nan.
    """
    # float64 before the exponential: in float32 confident rollouts saturate and distinct images tie.
    logits = np.asarray(answer_logprobs, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected: NDArray[np.float64] = (weights * np.asarray(answers)).sum(axis=-1) / weights.sum(axis=-1)
    return expected


def strict_pairs(ranks: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All preference pairs of one prompt whose images differ in rank; tied pairs are left out.

    Args:
        ranks: (N,) rank of each image, lower is better; rank 1 need not occur.

    Returns:
        (better, worse): two (P,) integer arrays of image indices, in lexicographic order.
    """
    ranks = np.asarray(ranks)
    better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
    return better, worse


def pair_outcomes(scores: ArrayLike, better: NDArray[np.intp], worse: NDArray[np.intp]) -> NDArray[np.float64]:
    """Compare the scores of each preference pair with the human order.

    Args:
        scores: (..., N) score of each image, higher is better, nan where there is none.
        better: (P,) index of the image humans prefer.
        worse: (P,) index of the other image.

    Returns:
        (..., P) float64: +1 right order, 0 tied scores, -1 wrong order, nan where either score is missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    outcomes: NDArray[np.float64] = np.sign(scores[..., better] - scores[..., worse])
    return outcomes


def credit(outcomes: NDArray[np.float64], tie: TieRule, missing: MissingRule) -> NDArray[np.float64]:
    """Turn pair outcomes into what each pair contributes to an accuracy.

    Args:
        outcomes: (...) as returned by `pair_outcomes`.
        tie: what tied scores count as; "half" is the expectation of breaking the tie at random.
        missing: what a pair with a missing score counts as.

    Returns:
        (...) float64 in {0, 0.5, 1}, nan where the pair is dropped.

    Raises:
        KeyError: `tie` or `missing` is no such rule.
    """
    conditions = [outcomes > 0, outcomes == 0, outcomes < 0]
    return np.select(conditions, [1.0, TIE_CREDIT[tie], 0.0], default=MISSING_CREDIT[missing])


def pair_accuracy(
    scores_by_prompt: Sequence[ArrayLike], ranks_by_prompt: Sequence[ArrayLike], tie: TieRule = "wrong"
) -> float:
    """Accuracy over the strict pairs of all prompts together (micro average), the number watched during training.

    With the default tie rule this is `acc()` of ImageReward's test.py. Pairs with a missing score count as wrong.

    Args:
        scores_by_prompt: for each prompt (N,) scores, higher is better, nan where there is none.
        ranks_by_prompt: for each prompt (N,) ranks, lower is better.
        tie: what tied scores count as.

    Returns:
        Fraction in [0, 1]; nan if no pair counts.

    Raises:
        ValueError: the two sequences differ in length, or there is no prompt.
    """
    credits = np.concatenate(
        [
            credit(pair_outcomes(scores, *strict_pairs(ranks)), tie, missing="wrong")
            for scores, ranks in zip(scores_by_prompt, ranks_by_prompt, strict=True)
        ]
    )
    counted = credits[~np.isnan(credits)]
    return float(counted.mean()) if counted.size else math.nan

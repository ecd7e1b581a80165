"""Soft reward of an answer and accuracy over preference pairs with its error: what validation uses of scoring."""

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


def pair_credit(
    scores_by_prompt: Sequence[ArrayLike], ranks_by_prompt: Sequence[ArrayLike], tie: TieRule = "wrong"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and number of counted strict pairs of each prompt. Pairs with a missing score count as wrong.

    Args:
        scores_by_prompt: for each prompt (N,) scores, higher is better, nan where there is none.
        ranks_by_prompt: for each prompt (N,) ranks, lower is better.
        tie: what tied scores count as.

    Returns:
        (correct, pairs): two float64 arrays of length n_prompts; `pairs` is 0 where a prompt has no pair that counts.

    Raises:
        ValueError: the two sequences differ in length.
    """
    credits = [
        credit(pair_outcomes(scores, *strict_pairs(ranks)), tie, missing="wrong")
        for scores, ranks in zip(scores_by_prompt, ranks_by_prompt, strict=True)
    ]
    correct = np.array([np.nansum(found) for found in credits])
    pairs = np.array([np.count_nonzero(~np.isnan(found)) for found in credits], dtype=np.float64)
    return correct, pairs


def pair_accuracy(correct: NDArray[np.float64], pairs: NDArray[np.float64]) -> tuple[float, float]:
    """Accuracy over the pairs of all prompts together (micro average) with its standard error over prompts.

    With the tie rule "wrong" the accuracy is `acc()` of ImageReward's test.py. The pairs of one prompt are not
    independent, so the error is that of a ratio of two means over prompts, linearised (Cochran, Sampling Techniques,
    3rd edition, chapter 6). With the difference of two policies' credits as `correct`, both numbers are those of their
    paired difference.

    Args:
        correct: (n_prompts,) credit of each prompt.
        pairs: (n_prompts,) number of pairs counted in each prompt.

    Returns:
        (accuracy, standard error), fractions of 1; nan without a pair that counts, the error also with one prompt.
    """
    counted = pairs > 0
    correct, pairs, prompts = correct[counted], pairs[counted], np.count_nonzero(counted)
    if not prompts:
        return math.nan, math.nan
    accuracy = correct.sum() / pairs.sum()
    if prompts == 1:
        return float(accuracy), math.nan
    variance = prompts / (prompts - 1) * np.square(correct - accuracy * pairs).sum()
    return float(accuracy), float(np.sqrt(variance) / pairs.sum())

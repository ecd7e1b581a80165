"""Comparisons of two images by a policy and by people, and the effect of the presentation order."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from workflow_scripts.reporting.agreement import grouped_mean
from workflow_scripts.reporting.policies import Policies, Recorded
from workflow_scripts.scoring.judged_prompts import METHODS


def comparisons(seed: Recorded, mean: bool = False) -> pd.DataFrame:
    """Comparisons of a pairwise policy whose two images people rank strictly.

    Args:
        seed: what was recorded of the policy.
        mean: average all rollouts of a candidate, both presentation orders among them, instead of taking each alone.

    Returns:
        `prompt_id`, `second` (the candidate was shown second), `soft` and `hard` (probability that the candidate is
        preferred) and `outcome` (1 where people prefer it).
    """
    ranks = {
        (prompt.prompt_id, image): rank
        for prompt in seed.prompts
        for image, rank in zip(prompt.image_ids, prompt.ranks, strict=True)
    }
    frame = seed.rollouts
    difference = np.array(
        [
            ranks[prompt, anchor] - ranks[prompt, candidate]
            for prompt, anchor, candidate in zip(frame["prompt_id"], frame["anchor"], frame["candidate"], strict=True)
        ]
    )
    table = frame[["prompt_id", "candidate", "soft", "hard"]].assign(
        second=frame["candidate_second"].astype(bool), outcome=(difference > 0).astype(float)
    )[difference != 0]
    if mean:
        table = table.groupby(["prompt_id", "candidate"], as_index=False).mean()
    return table


def rated_comparisons(seed: Recorded, mean: bool = False) -> pd.DataFrame:
    """Comparisons by a policy that rates: the probability that a rating of one image is higher than one of the other.

    The names of two images decide which is the first, as for anchors, since the published order reveals the better one.

    Args:
        seed: what was recorded of the policy.
        mean: take the mean probabilities of all rollouts instead of those of each by itself.

    Returns:
        `prompt_id`, `soft` and `outcome`.
    """
    given = {
        name: np.stack(list(rows.sort_values("k")["probabilities"]))
        for name, rows in seed.rollouts.groupby(["prompt_id", "candidate"])
    }
    tables = []
    for prompt in seed.prompts:
        order = np.argsort(prompt.image_ids)
        images = np.stack([given[prompt.prompt_id, prompt.image_ids[i]] for i in order])  # (N, K, A)
        ranks = prompt.ranks[order]
        first, other = np.triu_indices(len(order), 1)
        strict = ranks[first] != ranks[other]
        first, other = first[strict], other[strict]
        if mean:
            images = images.mean(axis=1, keepdims=True)
        probability = probability_higher(images[first], images[other])  # (P, K)
        outcome = np.repeat((ranks[first] < ranks[other]).astype(float), probability.shape[1])
        tables.append(pd.DataFrame({"prompt_id": prompt.prompt_id, "soft": probability.ravel(), "outcome": outcome}))
    return pd.concat(tables, ignore_index=True)


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


def presentation_order(policies: Policies) -> pd.DataFrame:
    """Single rollouts of pairwise policies: accuracy by the candidate's place, and preference for the second image."""
    tables = []
    for key, seeds in policies.recorded.items():
        if not policies.pairwise(key[0]):
            continue
        compared = pd.concat([comparisons(seed) for seed in seeds], ignore_index=True)
        second, outcome = compared["second"], compared["outcome"]
        for method in METHODS:
            probability = compared[method]
            agreed = np.where(probability == 0.5, 0.5, (probability > 0.5) == (outcome == 1))
            measured = {
                "second preferred, by policy": np.where(second, probability, 1 - probability),
                "second preferred, by people": np.where(second, outcome, 1 - outcome),
            }
            place = np.where(second, "correct, candidate second", "correct, candidate first")
            frames = [compared.assign(order=place, value=np.where(probability.isna(), np.nan, agreed))]
            frames += [compared.assign(order=order, value=value) for order, value in measured.items()]
            table = grouped_mean(pd.concat(frames), ["order"], "value", policies.resampling)
            tables.append(table.assign(**policies.head(*key), method=method))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

"""Where scores and people agree: accuracies of all pairs of images, and of groups of them.

Accuracies are over strictly ranked pairs of human labels, a predicted tie counting half unless it says otherwise, so
that sampled answers and soft rewards can be compared on one scale. With several seeds of training they are means.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from workflow_scripts.reporting.policies import Key, Policies, Recorded
from workflow_scripts.scoring.accuracies import TIES
from workflow_scripts.scoring.bootstrap import Interval, Resampling, accuracy_intervals
from workflow_scripts.scoring.judged_prompts import METHODS, JudgedPrompt
from workflow_scripts.scoring.mean_at_k import fill_missing
from workflow_scripts.scoring.pair_accuracy import TieRule, credit, strict_pairs
from workflow_scripts.scoring.protocols import OFFICIAL, Average, MissingAnswerRule, prompt_credit

LARGEST_CHOICE = 2000  # of k-subsets of the rollouts that one point of a curve averages over: 924 for 6 of 12


def curve_ks(rollouts: int) -> list[int]:
    """Values of k on a Mean@k curve: all of 1..rollouts except those with too many choices to average over."""
    return [k for k in range(1, rollouts + 1) if math.comb(rollouts, k) <= LARGEST_CHOICE]


def accuracy_at_k(
    by_seed: Sequence[Sequence[JudgedPrompt]],
    method: str,
    k: int,
    tie: TieRule,
    missing: MissingAnswerRule,
    neutral: float,
    average: Average,
    resampling: Resampling,
) -> Interval:
    """Accuracy at Mean@k over the strictly ranked pairs, averaged over the seeds of training.

    Args:
        by_seed: for each seed the same prompts with its scores.
        method: "soft" or "hard".
        k: number of rollouts averaged.
        tie: what equal scores count as.
        missing: what a missing score does.
        neutral: the score that prefers nothing.
        average: over pairs ("micro") or over prompts ("macro").
        resampling: of the interval.
    """
    credits = [
        prompt_credit(
            [prompt.scores[method] for prompt in prompts],
            [prompt.ranks for prompt in prompts],
            k=k,
            tie=tie,
            label_tie="dropped",
            missing=missing,
            neutral=neutral,
        )
        for prompts in by_seed
    ]
    correct, pairs = (np.mean(part, axis=0) for part in zip(*credits, strict=True))
    return accuracy_intervals([(correct, pairs)], average, *resampling)[0]


def pair_verdicts(
    prompts: Iterable[JudgedPrompt], method: str, missing: MissingAnswerRule, neutral: float
) -> pd.DataFrame:
    """Judge every pair of images that people rank strictly by the mean score of all rollouts, a tie counting half.

    Args:
        prompts: of a test set.
        method: "soft" or "hard".
        missing: what a missing score does.
        neutral: the score that prefers nothing.

    Returns:
        `prompt_id`, `better` and `worse` (image names), `distance` (difference of the human ranks), `margin` (absolute
        difference of the scores) and `correct` (1, 0.5, 0; nan where the pair is dropped).
    """
    tables = []
    for prompt in prompts:
        values = prompt.scores[method]
        given = fill_missing(values, neutral) if missing == "neutral" else values
        present = ~np.isnan(given)
        means = np.divide(
            np.where(present, given, 0).sum(axis=1),
            present.sum(axis=1),
            out=np.full(len(given), np.nan),
            where=present.any(axis=1),
        )
        better, worse = strict_pairs(prompt.ranks)
        difference = means[better] - means[worse]
        images = np.array(prompt.image_ids, dtype=object)
        tables.append(
            pd.DataFrame(
                {
                    "prompt_id": prompt.prompt_id,
                    "better": images[better],
                    "worse": images[worse],
                    "distance": prompt.ranks[worse] - prompt.ranks[better],
                    "margin": np.abs(difference),
                    "correct": credit(np.sign(difference), "half", "wrong" if missing != "dropped" else "dropped"),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def grouped_mean(frame: pd.DataFrame, by: list[str], value: str, resampling: Resampling) -> pd.DataFrame:
    """Mean of a column in each group of rows, all rows alike, with its bootstrap interval over prompts.

    Args:
        frame: has `prompt_id`, `value` and the columns of `by`; rows without a value are left out.
        by: columns that make a group.
        value: the column that is averaged.
        resampling: of the interval.

    Returns:
        The columns of `by`, `mean`, `low`, `high` and `count`, in the order of `by`.
    """
    rows = []
    for names, group in frame.dropna(subset=[value]).groupby(by, observed=True):
        prompts = group.groupby("prompt_id")[value].agg(["sum", "count"])
        counted = prompts["sum"].to_numpy(float), prompts["count"].to_numpy(float)
        (interval,) = accuracy_intervals([counted], "micro", *resampling)
        keys = dict(zip(by, names, strict=True))
        rows.append(
            {**keys, "mean": interval.estimate, "low": interval.low, "high": interval.high, "count": len(group)}
        )
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "count"])


# ----------------------------------------------------------------------------------------------- tables of the figures


def mean_at_k(policies: Policies) -> pd.DataFrame:
    """Accuracy for every number of averaged rollouts, with the tokens that they take."""
    rows = []
    for key, seeds in policies.recorded.items():
        tokens = float(np.mean([seed.rollouts["tokens"].mean() for seed in seeds]))
        for method in METHODS:
            for k in curve_ks(policies.rollouts(key)):
                head = {**policies.head(*key), "method": method, "k": k, "tokens": k * tokens}
                rows.append(head | _point(policies, key, method, k, "half"))
    return pd.DataFrame(rows)


def tie_rules(policies: Policies) -> pd.DataFrame:
    """Accuracy of one rollout under every tie rule."""
    rows = [
        {**policies.head(*key), "method": method, "k": 1, "tie": tie} | _point(policies, key, method, 1, tie)
        for key in policies.recorded
        for method in METHODS
        for tie in TIES
    ]
    return pd.DataFrame(rows)


def _point(policies: Policies, key: Key, method: str, k: int, tie: TieRule) -> dict[str, float]:
    """Accuracy of a policy at Mean@k with its interval."""
    track, _, test = key
    interval = accuracy_at_k(
        [seed.prompts for seed in policies.recorded[key]],
        method,
        k,
        tie,
        policies.config.missing_answer,
        policies.neutral(track),
        OFFICIAL[test].average,
        policies.resampling,
    )
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}


def rank_distance(policies: Policies) -> pd.DataFrame:
    """Accuracy by difference of the human ranks."""
    return _by_group(policies, "distance", policies.recorded)


def confidence(policies: Policies) -> pd.DataFrame:
    """Accuracy by fifths of the difference of the soft scores; a sampled answer has hardly any differences."""
    return _by_group(policies, "fifth", policies.recorded, ["soft"])


def anchor_rank(policies: Policies) -> pd.DataFrame:
    """Accuracy of pairwise policies by the human rank of the image that the others were compared with."""
    return _by_group(policies, "anchor_rank", [key for key in policies.recorded if policies.pairwise(key[0])])


def _by_group(policies: Policies, column: str, keys: Iterable[Key], methods: Iterable[str] = METHODS) -> pd.DataFrame:
    """Accuracy by "distance", "fifth" or "anchor_rank"; empty without a key."""
    tables = []
    for key in keys:
        for method in methods:
            pairs = _all_pairs(policies, key, method)
            pairs["fifth"] = np.ceil(pairs["margin"].rank(method="first") / len(pairs) * 5)
            table = grouped_mean(pairs, [column], "correct", policies.resampling)
            tables.append(table.assign(**policies.head(*key), method=method))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _all_pairs(policies: Policies, key: Key, method: str) -> pd.DataFrame:
    """`pair_verdicts` of all seeds of a policy, each with the human rank of its prompt's anchor."""
    missing, neutral = policies.config.missing_answer, policies.neutral(key[0])
    tables = []
    for seed in policies.recorded[key]:
        pairs = pair_verdicts(seed.prompts, method, missing, neutral)
        tables.append(pairs.assign(anchor_rank=pairs["prompt_id"].map(anchor_ranks(seed))))
    return pd.concat(tables, ignore_index=True)


def anchor_ranks(seed: Recorded) -> dict[str, float]:
    """Human rank of each prompt's anchor; empty where images were judged by themselves."""
    ranks = {prompt.prompt_id: dict(zip(prompt.image_ids, prompt.ranks, strict=True)) for prompt in seed.prompts}
    anchors = seed.rollouts.groupby("prompt_id")["anchor"].first().dropna()
    return {str(name): ranks[str(name)][anchor] for name, anchor in anchors.items()}

"""Where scores and people agree: their pairs of images with what sets them apart, and accuracies of groups of them."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workflow_scripts.scoring.bootstrap import Interval, accuracy_intervals
from workflow_scripts.scoring.mean_at_k import fill_missing
from workflow_scripts.scoring.pair_accuracy import MissingRule, TieRule, credit, strict_pairs
from workflow_scripts.scoring.protocols import Average, prompt_credit

LARGEST_CHOICE = 2000  # of k-subsets of the rollouts that one point of a curve averages over: 924 for 6 of 12


class Resampling(NamedTuple):
    """How intervals are made: percentile bootstrap over prompts."""

    confidence: float
    resamples: int
    seed: int


def judged_prompts(rows: list[dict[str, Any]], scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Test prompts that have scores, with the images that have: name, images, human ranks and ratings.

    Args:
        rows: of SUBSET.
        scores: columns of SCORE.

    Returns:
        For each prompt `prompt_id`, `image_ids` (N), `ranks` (N,) float64 and `ratings` (N,) float64 or None.
    """
    images = scores.groupby("prompt_id")["image_id"].unique()
    found = []
    for row in rows:
        if row["prompt_id"] not in images:
            continue
        readable = set(images[row["prompt_id"]])
        kept = [i for i, name in enumerate(row["image_ids"]) if name in readable]
        judged = {column: row[column] and np.array(row[column], float)[kept] for column in ("ranks", "ratings")}
        found.append({"prompt_id": row["prompt_id"], "image_ids": [row["image_ids"][i] for i in kept], **judged})
    return found


def score_matrices(scores: pd.DataFrame, prompts: list[dict[str, Any]], column: str) -> list[NDArray[np.float64]]:
    """Scores of each prompt, (N, K), in the order of its images; nan where a rollout gave none."""
    wide = scores.pivot(index=["prompt_id", "image_id"], columns="k", values=column).sort_index(axis=1)
    index = [(prompt["prompt_id"], image) for prompt in prompts for image in prompt["image_ids"]]
    ends = np.cumsum([len(prompt["image_ids"]) for prompt in prompts])[:-1]
    return np.split(wide.reindex(index).to_numpy(dtype=float), ends)


def curve_ks(rollouts: int) -> list[int]:
    """The k of a Mean@k curve: all of 1..rollouts but those with too many choices to average over."""
    return [k for k in range(1, rollouts + 1) if math.comb(rollouts, k) <= LARGEST_CHOICE]


def mean_at_k(
    by_seed: list[tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]],
    k: int,
    tie: TieRule,
    missing: MissingRule | str,
    neutral: float,
    average: Average,
    resampling: Resampling,
) -> Interval:
    """Accuracy at Mean@k over the strictly ranked pairs, averaged over the seeds of training.

    Args:
        by_seed: for each seed scores and ranks of the same prompts, as `prompt_credit` takes them.
        k: number of rollouts averaged.
        tie: what equal scores count as.
        missing: what a missing score does, "wrong", "neutral" or "dropped".
        neutral: the score that prefers nothing.
        average: over pairs ("micro") or over prompts ("macro").
        resampling: of the interval.
    """
    credits = [
        prompt_credit(scores, ranks, k=k, tie=tie, label_tie="dropped", missing=missing, neutral=neutral)  # type: ignore[arg-type]
        for scores, ranks in by_seed
    ]
    correct, pairs = (np.mean(part, axis=0) for part in zip(*credits, strict=True))
    return accuracy_intervals([(correct, pairs)], average, *resampling)[0]


def judged_pairs(
    prompts: list[dict[str, Any]],
    scores: list[NDArray[np.float64]],
    missing: MissingRule | str,
    neutral: float,
) -> pd.DataFrame:
    """Every pair of images that people rank strictly, with the scores' verdict: mean of all rollouts, a tie half.

    Args:
        prompts: of `judged_prompts`.
        scores: (N, K) of each.
        missing: as for `mean_at_k`.
        neutral: as for `mean_at_k`.

    Returns:
        `prompt_id`, `better` and `worse` (image names), `better_rank`, `distance` (difference of the human ranks),
        `margin` (absolute difference of the scores) and `correct` (1, 0.5, 0; nan where the pair is dropped).
    """
    tables = []
    for prompt, values in zip(prompts, scores, strict=True):
        given = fill_missing(values, neutral) if missing == "neutral" else values
        present = ~np.isnan(given)
        means = np.divide(
            np.where(present, given, 0).sum(axis=1),
            present.sum(axis=1),
            out=np.full(len(given), np.nan),
            where=present.any(axis=1),
        )
        better, worse = strict_pairs(prompt["ranks"])
        difference = means[better] - means[worse]
        tables.append(
            pd.DataFrame(
                {
                    "prompt_id": prompt["prompt_id"],
                    "better": np.array(prompt["image_ids"], dtype=object)[better],
                    "worse": np.array(prompt["image_ids"], dtype=object)[worse],
                    "better_rank": prompt["ranks"][better],
                    "distance": prompt["ranks"][worse] - prompt["ranks"][better],
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

"""Uncertainty of an accuracy: percentile bootstrap over prompts, since the pairs of one prompt are not independent."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workflow_scripts.scoring.protocols import Average, macro, micro

BATCH_VALUES = 2**16  # drawn at once: 512 kB, which stay in the processor cache

Credit = tuple[NDArray[np.float64], NDArray[np.float64]]  # (n_prompts,) credit and (n_prompts,) counted pairs


class Interval(NamedTuple):
    """An accuracy, or a difference of two, as fractions of 1."""

    estimate: float
    standard_error: float
    low: float
    high: float


class Resampling(NamedTuple):
    """How intervals are made: level of the two-sided interval, number of resamples, and seed."""

    confidence: float
    resamples: int
    seed: int


def accuracy_intervals(
    credits: Sequence[Credit], average: Average, confidence: float, resamples: int, seed: int
) -> list[Interval]:
    """Accuracies with their bootstrap standard errors and confidence intervals over prompts.

    Prompts without a counted pair are left out: they add nothing to either average. To pool training seeds of the same
    prompts, average `correct` and `pairs` over the seeds first; the interval then is that of the seeds' mean accuracy
    on other prompts, and does not cover the variation between seeds.

    Args:
        credits: for each accuracy (n_prompts,) credit and (n_prompts,) number of counted pairs, as returned by
            `prompt_credit`.
        average: "micro" or "macro".
        confidence: level of the two-sided interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        An interval for each; all but the estimate nan with fewer than two prompts that count, the estimate too with
        none.
    """
    counted = [pairs > 0 for _, pairs in credits]
    cases = [[(correct[c], pairs[c])] for (correct, pairs), c in zip(credits, counted, strict=True)]
    return _percentile_intervals(cases, average, confidence, resamples, seed)


def difference_intervals(
    differences: Sequence[tuple[Credit, Credit]], average: Average, confidence: float, resamples: int, seed: int
) -> list[Interval]:
    """Improvements b - a of two methods on the same prompts, each resample drawing the same prompts for both.

    An improvement is claimed if the interval excludes 0. Seeds are pooled as in `accuracy_intervals`.

    Args:
        differences: for each improvement the credit of method a and that of method b, prompts in the same order.
        average: "micro" or "macro".
        confidence: level of the two-sided interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        An interval for each; all but the estimate nan with fewer than two prompts that count.
    """
    cases = []
    for a, b in differences:
        counted = (a[1] > 0) | (b[1] > 0)
        cases.append([(correct[counted], pairs[counted]) for correct, pairs in (a, b)])
    return _percentile_intervals(cases, average, confidence, resamples, seed)


def _percentile_intervals(
    cases: Sequence[Sequence[Credit]], average: Average, confidence: float, resamples: int, seed: int
) -> list[Interval]:
    """Percentile bootstrap of the accuracy of each case, or of the last one minus the first one.

    Numbers and random stream are those of scipy.stats.bootstrap(paired=True, method="percentile"), which draws for
    each statistic alone. Here statistics of equally many prompts share the draws, and equal credits share their sums.
    """
    accuracy = micro if average == "micro" else macro
    estimates = [float(accuracy(*case[-1]) - (accuracy(*case[0]) if case[1:] else 0.0)) for case in cases]
    found = [Interval(estimate, math.nan, math.nan, math.nan) for estimate in estimates]
    sizes = [case[0][0].size for case in cases]
    for prompts in set(sizes) - {0, 1}:  # undefined for 0 and 1, which must not stop the others
        members = [number for number, size in enumerate(sizes) if size == prompts]
        place: dict[bytes, int] = {}
        fractions = [
            [
                [place.setdefault(part.tobytes(), len(place)) for part in _numerator_and_denominator(*credit, average)]
                for credit in cases[number]
            ]
            for number in members
        ]
        vectors = np.frombuffer(b"".join(place)).reshape(len(place), prompts)
        sums = _resampled_sums(vectors, resamples, seed)
        drawn = np.empty((len(members), resamples))
        for row, ends in zip(drawn, fractions, strict=True):
            with np.errstate(invalid="ignore"):
                accuracies = [sums[above] / sums[below] for above, below in ends]
            row[:] = accuracies[-1] - accuracies[0] if ends[1:] else accuracies[0]
        bounds = _percentiles(drawn, (1 - confidence) / 2).tolist()
        errors = drawn.std(axis=-1, ddof=1).tolist()
        for number, error, (low, high) in zip(members, errors, bounds, strict=True):
            found[number] = Interval(estimates[number], error, low, high)
    return found


def _percentiles(drawn: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Quantiles alpha and 1 - alpha (m, 2) of each row (m, resamples); nan where a row has one.

    As scipy.stats.quantile to the last bit, without a second of importing scipy.stats in every stage that scores.
    """
    p, n = np.array([alpha, 1 - alpha]), drawn.shape[1]
    place = p * n + (1 - p)  # counted from 1
    below = np.clip(place // 1 - 1, 0, n - 1).astype(np.intp)
    above = np.clip(place // 1, 0, n - 1).astype(np.intp)
    drawn = np.sort(drawn, axis=-1)
    bounds: NDArray[np.float64] = (1 - place % 1) * drawn[:, below] + place % 1 * drawn[:, above]
    bounds[np.isnan(drawn[:, -1])] = np.nan  # nan is sorted last
    return bounds


def _numerator_and_denominator(correct: NDArray[np.float64], pairs: NDArray[np.float64], average: Average) -> Credit:
    """Two (n_prompts,) vectors; the quotient of their sums over prompts is the accuracy, as of `micro` or `macro`."""
    if average == "micro":
        return correct, pairs
    counted = pairs > 0
    return np.divide(correct, pairs, out=np.zeros_like(correct), where=counted), counted.astype(np.float64)


def _resampled_sums(vectors: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Sums (m, resamples) of m vectors (m, n_prompts) over prompts that are drawn with replacement."""
    sums = np.empty((len(vectors), resamples))
    start = 0
    for drawn in _draws(vectors.shape[1], resamples, seed):
        values = np.empty(drawn.shape)
        for row, vector in enumerate(vectors):
            vector.take(drawn, out=values, mode="clip")  # nothing is clipped; the mode saves a buffer
            values.sum(axis=-1, out=sums[row, start : start + len(drawn)])
        start += len(drawn)
    return sums


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the prompts in each resample, (batch, n_prompts) at a time."""
    rng = np.random.default_rng(seed)
    batch = max(1, BATCH_VALUES // prompts)
    for start in range(0, resamples, batch):
        yield rng.integers(0, prompts, (min(batch, resamples - start), prompts))


def minimum_detectable_difference(prompts: int, pair_sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true paired difference found with the given power: (z_(1-alpha/2) + z_power) * sd / sqrt(prompts).

    Normal approximation of the two-sided paired test over prompts.

    Args:
        prompts: number of prompts both methods are tested on.
        pair_sd: standard deviation over prompts of the paired difference, for macro that of the prompts' accuracies;
            in general `difference_intervals(...)[0].standard_error * sqrt(prompts)`.
        power: probability of finding the difference.
        alpha: probability of finding one where there is none.

    Returns:
        Difference in the unit of `pair_sd`.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * pair_sd / math.sqrt(prompts)

"""Uncertainty of an accuracy: percentile bootstrap over prompts, since the pairs of one prompt are not independent."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from workflow_scripts.scoring.protocols import Average, macro, micro

BATCH_VALUES = 2**19  # resampled values held at once: 4 MB an array


class Interval(NamedTuple):
    """An accuracy, or a difference of two, as fractions of 1."""

    estimate: float
    standard_error: float
    low: float
    high: float


def _percentile_interval(
    statistic: Callable[..., NDArray[np.float64]],
    samples: list[NDArray[np.float64]],
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile bootstrap of statistic(*samples, axis), all samples (n_prompts,) and resampled together."""
    estimate = float(statistic(*samples, axis=-1))
    prompts = samples[0].size
    if prompts < 2:  # undefined, but one empty cell of a table must not stop the others
        return Interval(estimate, math.nan, math.nan, math.nan)
    result = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, BATCH_VALUES // prompts),
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(estimate, float(result.standard_error), float(low), float(high))


def accuracy_interval(
    correct: NDArray[np.float64],
    pairs: NDArray[np.float64],
    average: Average,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Accuracy with its bootstrap standard error and confidence interval over prompts.

    Prompts without a counted pair are left out: they add nothing to either average. To pool training seeds of the same
    prompts, average `correct` and `pairs` over the seeds first; the interval then is that of the seeds' mean accuracy
    on other prompts, and does not cover the variation between seeds.

    Args:
        correct: (n_prompts,) credit, as returned by `prompt_credit`.
        pairs: (n_prompts,) number of counted pairs.
        average: "micro" or "macro".
        confidence: level of the two-sided interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        Interval; all but the estimate nan with fewer than two prompts that count, the estimate too with none.
    """
    counted = pairs > 0
    statistic = micro if average == "micro" else macro
    return _percentile_interval(statistic, [correct[counted], pairs[counted]], confidence, resamples, seed)


def difference_interval(
    correct_a: NDArray[np.float64],
    pairs_a: NDArray[np.float64],
    correct_b: NDArray[np.float64],
    pairs_b: NDArray[np.float64],
    average: Average,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Improvement b - a of two methods on the same prompts, each resample drawing the same prompts for both.

    An improvement is claimed if the interval excludes 0. Seeds are pooled as in `accuracy_interval`.

    Args:
        correct_a: (n_prompts,) credit of method a.
        pairs_a: (n_prompts,) number of pairs counted for a.
        correct_b: (n_prompts,) credit of method b, prompts in the same order.
        pairs_b: (n_prompts,) number of pairs counted for b.
        average: "micro" or "macro".
        confidence: level of the two-sided interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        Interval; all but the estimate nan with fewer than two prompts that count.
    """
    accuracy = micro if average == "micro" else macro

    def difference(
        correct_a: NDArray[np.float64],
        pairs_a: NDArray[np.float64],
        correct_b: NDArray[np.float64],
        pairs_b: NDArray[np.float64],
        axis: int,
    ) -> NDArray[np.float64]:
        return accuracy(correct_b, pairs_b, axis) - accuracy(correct_a, pairs_a, axis)

    counted = (pairs_a > 0) | (pairs_b > 0)
    samples = [sample[counted] for sample in (correct_a, pairs_a, correct_b, pairs_b)]
    return _percentile_interval(difference, samples, confidence, resamples, seed)


def minimum_detectable_difference(prompts: int, pair_sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true paired difference found with the given power: (z_(1-alpha/2) + z_power) * sd / sqrt(prompts).

    Normal approximation of the two-sided paired test over prompts.

    Args:
        prompts: number of prompts both methods are tested on.
        pair_sd: standard deviation over prompts of the paired difference, for macro that of the prompts' accuracies;
            in general `difference_interval(...).standard_error * sqrt(prompts)`.
        power: probability of finding the difference.
        alpha: probability of finding one where there is none.

    Returns:
        Difference in the unit of `pair_sd`.
    """
    return float((stats.norm.isf(alpha / 2) + stats.norm.ppf(power)) * pair_sd / math.sqrt(prompts))

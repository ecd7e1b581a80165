"""Protocols against the loops of the official evaluation codes, exact fractions and the published human ranks."""

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.scoring import protocols
from workflow_scripts.scoring.protocols import (
    HPDV2,
    IMAGEREWARD,
    IMAGEREWARD_MACRO,
    Protocol,
    first_listed,
    macro,
    micro,
    prompt_credit,
    prompt_outcomes,
)

RANKINGS = Path(__file__).parents[2] / "../shared/data/imagereward_test_rankings.json"
NEUTRAL = 4

Prompts = tuple[list[list[list[int | None]]], list[list[int]]]


@st.composite
def prompts(draw: st.DrawFn, missing: bool, rollouts: int | None = None) -> Prompts:
    """Integer scores (N, K) of a few prompts, None where missing, and tied ranks; two images at least."""
    depth = rollouts or draw(st.integers(1, 4))
    score = st.one_of(st.none(), st.integers(1, 7)) if missing else st.integers(1, 7)
    scores, ranks = [], []
    for images in draw(st.lists(st.integers(2, 5), min_size=1, max_size=4)):
        row = st.lists(score, min_size=depth, max_size=depth)
        scores.append(draw(st.lists(row, min_size=images, max_size=images)))
        ranks.append(draw(st.lists(st.integers(1, 4), min_size=images, max_size=images)))
    return scores, ranks


def accuracy(scores: list[np.ndarray], ranks: list[list[int]], k: int, protocol: Protocol) -> float:
    correct, pairs = prompt_credit(
        scores, ranks, k=k, tie=protocol.tie, label_tie=protocol.label_tie, missing="wrong", neutral=NEUTRAL
    )
    return float(micro(correct, pairs) if protocol.average == "micro" else macro(correct, pairs))


def imagereward_counts(rewards: list[int], ranking: list[int]) -> tuple[int, int]:
    """Right and counted pairs of one prompt in ImageReward's acc() and in HPSv2's calc_ImageReward()."""
    right = total = 0
    for i, j in combinations(range(len(ranking)), 2):
        if ranking[i] != ranking[j]:
            total += 1
            right += (ranking[i] < ranking[j] and rewards[i] > rewards[j]) or (
                ranking[i] > ranking[j] and rewards[i] < rewards[j]
            )
    return right, total


def inversion_score(p1: list[int], p2: list[int]) -> Fraction:
    """Agreement of two lists of ranks as HPSv2 computes it."""
    n, inversions = len(p1), 0
    for i in range(n - 1):
        for j in range(i + 1, n):
            inversions += (p1[i] > p1[j] and p2[i] < p2[j]) or (p1[i] < p1[j] and p2[i] > p2[j])
    return 1 - Fraction(inversions, n * (n - 1) // 2)


@settings(deadline=None)
@given(prompts(missing=False, rollouts=1))
def test_official_protocols_at_one_rollout(data: Prompts) -> None:
    scores, ranks = data
    arrays = [np.array(s, dtype=float) for s in scores]
    rewards = [[row[0] for row in s if row[0] is not None] for s in scores]
    counts = [imagereward_counts(r, ranking) for r, ranking in zip(rewards, ranks, strict=True)]
    counted = [(right, total) for right, total in counts if total]
    if counted:
        micro_expected = Fraction(sum(right for right, _ in counted), sum(total for _, total in counted))
        macro_expected = sum((Fraction(*count) for count in counted), Fraction(0)) / len(counted)
        assert accuracy(arrays, ranks, 1, IMAGEREWARD) == float(micro_expected)
        assert accuracy(arrays, ranks, 1, IMAGEREWARD_MACRO) == pytest.approx(float(macro_expected), rel=1e-12)
    else:
        assert math.isnan(accuracy(arrays, ranks, 1, IMAGEREWARD))
        assert math.isnan(accuracy(arrays, ranks, 1, IMAGEREWARD_MACRO))
    predicted_ranks = [[-reward for reward in r] for r in rewards]
    inversion = [inversion_score(p, ranking) for p, ranking in zip(predicted_ranks, ranks, strict=True)]
    expected = float(sum(inversion, Fraction(0)) / len(inversion))
    assert accuracy(arrays, ranks, 1, HPDV2) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(prompts(missing=False, rollouts=1))
def test_hpdv2_with_half_ties_is_the_mean_over_all_ways_to_break_them(data: Prompts) -> None:
    scores, ranks = data
    by_prompt = []
    for s, ranking in zip(scores, ranks, strict=True):
        orders = strict_orders([row[0] for row in s if row[0] is not None])
        by_prompt.append(sum((inversion_score(order, ranking) for order in orders), Fraction(0)) / len(orders))
    expected = float(sum(by_prompt, Fraction(0)) / len(by_prompt))
    arrays = [np.array(s, dtype=float) for s in scores]
    assert accuracy(arrays, ranks, 1, HPDV2._replace(tie="half")) == pytest.approx(expected, rel=1e-12)


def strict_orders(rewards: list[int]) -> list[list[int]]:
    """Every list of untied ranks that agrees with the rewards wherever they differ."""
    orders: list[list[int]] = [[]]
    for image in sorted(range(len(rewards)), key=lambda i: -rewards[i]):
        orders = [
            [*order[:place], image, *order[place:]]
            for order in orders
            for place in range(len(order) + 1)
            if all(rewards[before] >= rewards[image] for before in order[:place])
            and all(rewards[after] <= rewards[image] for after in order[place:])
        ]
    return [[order.index(image) for image in range(len(rewards))] for order in orders]


def fraction_credit(
    scores: list[list[int | None]], ranks: list[int], k: int, tie: str, label_tie: str, missing: str
) -> tuple[Fraction, Fraction]:
    """prompt_credit of one prompt with loops over subsets and pairs."""
    if missing == "neutral":
        scores = [[NEUTRAL if score is None else score for score in row] for row in scores]
    correct, pairs, subsets = Fraction(0), 0, list(combinations(range(len(scores[0])), k))
    for subset in subsets:
        means: list[Fraction | None] = []
        for row in scores:
            present = [score for rollout in subset if (score := row[rollout]) is not None]
            means.append(Fraction(sum(present), len(present)) if present else None)
        for i, j in combinations(range(len(ranks)), 2):
            a, b = (means[i], means[j]) if ranks[i] < ranks[j] else (means[j], means[i])
            if ranks[i] == ranks[j] and label_tie == "dropped":
                continue
            if a is None or b is None:
                pairs += missing != "dropped"
            elif ranks[i] == ranks[j] or a > b:
                pairs, correct = pairs + 1, correct + 1
            elif a == b and tie != "dropped":
                pairs += 1
                correct += {"wrong": Fraction(0), "half": Fraction(1, 2), "right": Fraction(1)}[tie]
            elif a < b:
                pairs += 1
    return correct / len(subsets), Fraction(pairs, len(subsets))


@settings(deadline=None, max_examples=200)
@given(
    prompts(missing=True),
    st.integers(1, 4),
    st.sampled_from(["wrong", "half", "right", "dropped"]),
    st.sampled_from(["dropped", "right"]),
    st.sampled_from(["wrong", "dropped", "neutral"]),
)
def test_prompt_credit_equals_exact_loops(data: Prompts, k: int, tie: str, label_tie: str, missing: str) -> None:
    scores, ranks = data
    k = min(k, len(scores[0][0]))
    correct, pairs = prompt_credit(
        [np.array(s, dtype=float) for s in scores],
        ranks,
        k=k,
        tie=tie,  # type: ignore[arg-type]
        label_tie=label_tie,  # type: ignore[arg-type]
        missing=missing,  # type: ignore[arg-type]
        neutral=NEUTRAL,
    )
    expected = [fraction_credit(s, r, k, tie, label_tie, missing) for s, r in zip(scores, ranks, strict=True)]
    assert correct.tolist() == [float(c) for c, _ in expected]
    assert pairs.tolist() == [float(p) for _, p in expected]


@settings(deadline=None)
@given(prompts(missing=False), st.integers(1, 4), st.randoms(use_true_random=False))
def test_order_of_images_and_of_rollouts_does_not_matter(data: Prompts, k: int, random: Random) -> None:
    scores, ranks = data
    arrays = [np.array(s, dtype=float) for s in scores]
    k = min(k, arrays[0].shape[1])
    images = [random.sample(range(len(r)), len(r)) for r in ranks]
    rollouts = random.sample(range(arrays[0].shape[1]), arrays[0].shape[1])
    shuffled = [s[order][:, rollouts] for s, order in zip(arrays, images, strict=True)]
    shuffled_ranks = [[r[i] for i in order] for r, order in zip(ranks, images, strict=True)]
    for protocol in (IMAGEREWARD, IMAGEREWARD_MACRO, HPDV2):
        np.testing.assert_equal(accuracy(shuffled, shuffled_ranks, k, protocol), accuracy(arrays, ranks, k, protocol))


@settings(deadline=None)
@given(prompts(missing=False))
def test_a_monotone_transformation_changes_nothing_at_one_rollout(data: Prompts) -> None:
    scores, ranks = data
    arrays = [np.array(s, dtype=float) for s in scores]
    for protocol in (IMAGEREWARD, IMAGEREWARD_MACRO, HPDV2):
        transformed = accuracy([np.exp(s) - 100 for s in arrays], ranks, 1, protocol)
        np.testing.assert_equal(transformed, accuracy(arrays, ranks, 1, protocol))


def test_averages_are_taken_along_the_axis_of_the_prompts() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 3, size=(4, 5)).astype(float)
    correct = pairs * rng.random((4, 5))
    for average in (micro, macro):
        expected = [average(c, p) for c, p in zip(correct, pairs, strict=True)]
        np.testing.assert_allclose(average(correct, pairs, axis=-1), expected)
        np.testing.assert_allclose(average(correct.T, pairs.T, axis=0), expected)


def test_a_constant_score_is_perfect_only_where_predicted_ties_count_as_right() -> None:
    scores, ranks = [np.zeros((3, 1))], [[1, 2, 3]]
    assert accuracy(scores, ranks, 1, HPDV2) == 1.0
    assert accuracy(scores, ranks, 1, HPDV2._replace(tie="half")) == 0.5
    assert accuracy(scores, ranks, 1, IMAGEREWARD) == 0.0


def test_published_imagereward_ranks() -> None:
    if not RANKINGS.exists():
        pytest.skip("the published ImageReward test ranks do not stand beside this repository")
    ranks = [row["ranking"] for row in json.loads(RANKINGS.read_text())]
    assert len(ranks) == 466
    scores = [first_listed(len(ranking)) for ranking in ranks]
    strict_only, all_pairs = (
        prompt_credit(scores, ranks, k=1, tie="wrong", label_tie=rule, missing="wrong", neutral=0.0)
        for rule in ("dropped", "right")
    )
    assert strict_only[1].sum() == 6399
    assert all_pairs[1].sum() == 7230
    assert all_pairs[0].sum() - strict_only[0].sum() == 831
    assert accuracy(scores, ranks, 1, IMAGEREWARD) == pytest.approx(0.5902, abs=5e-5)
    assert accuracy(scores, ranks, 1, IMAGEREWARD_MACRO) == pytest.approx(0.5904, abs=5e-5)
    perfect = [-np.array(ranking, dtype=float)[:, None] for ranking in ranks]
    for protocol in (IMAGEREWARD, IMAGEREWARD_MACRO, HPDV2):
        assert accuracy(perfect, ranks, 1, protocol) == 1.0


def test_prompts_of_any_depth_and_at_any_number_at_once_come_out_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    depths = [3, 3, 3, 5, 5, 3, 2, 2]
    scores = [rng.choice([1.0, 2.0, np.nan], (rng.integers(1, 6), depth)) for depth in depths]
    ranks = [rng.integers(1, 4, len(one)) for one in scores]
    alone = [np.concatenate(prompt_outcomes([s], [r], 2)) for s, r in zip(scores, ranks, strict=True)]
    for at_once in (1, 16, protocols.SUBSETS_AT_ONCE):
        monkeypatch.setattr(protocols, "SUBSETS_AT_ONCE", at_once)
        np.testing.assert_array_equal(np.array(prompt_outcomes(scores, ranks, 2)).T, alone)

"""Anchor ranking against a loop over a dict, and its independence of the presentation order."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.scoring.anchor_ranking import anchor_scores, candidate_probability

EIGHTHS = [i / 8 for i in range(9)]  # exact in binary, so that means compare exactly


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[int, int, list[int], np.ndarray, np.ndarray]:
    """One prompt: images, anchor, candidates, which was shown second, p(1|C) of each comparison and rollout."""
    images = draw(st.integers(1, 6))
    anchor = draw(st.integers(0, images - 1))
    others = [i for i in range(images) if i != anchor]
    candidates = draw(st.permutations(others * draw(st.integers(0, 2))))
    rollouts = draw(st.integers(1, 4))
    second = draw(st.lists(st.booleans(), min_size=len(candidates), max_size=len(candidates)))
    values = st.sampled_from([*EIGHTHS, math.nan])
    row = st.lists(values, min_size=rollouts, max_size=rollouts)
    probability_second = draw(st.lists(row, min_size=len(candidates), max_size=len(candidates)))
    shown_second = np.array(second, dtype=bool)[:, None]
    return images, anchor, candidates, shown_second, np.array(probability_second).reshape(len(candidates), rollouts)


@settings(deadline=None)
@given(comparisons())
def test_scores_equal_a_loop_over_the_comparisons(prompt: tuple[int, int, list[int], np.ndarray, np.ndarray]) -> None:
    images, anchor, candidates, second, probability_second = prompt
    scores = anchor_scores(images, anchor, candidates, candidate_probability(probability_second, second))
    assert scores.shape == (images, probability_second.shape[1])
    for rollout in range(probability_second.shape[1]):
        collected: dict[int, list[Fraction]] = {}
        for comparison, image in enumerate(candidates):
            p = probability_second[comparison, rollout]
            if not math.isnan(p):
                preferred = Fraction(p) if second[comparison, 0] else 1 - Fraction(p)
                collected.setdefault(image, []).append(preferred)
        for image in range(images):
            if image == anchor:
                assert scores[image, rollout] == 0.5
            elif image in collected:
                assert scores[image, rollout] == float(sum(collected[image]) / len(collected[image]))
            else:
                assert math.isnan(scores[image, rollout])


@settings(deadline=None)
@given(comparisons())
def test_a_policy_blind_to_the_order_scores_the_same_in_either(
    prompt: tuple[int, int, list[int], np.ndarray, np.ndarray],
) -> None:
    images, anchor, candidates, second, probability_second = prompt
    one = anchor_scores(images, anchor, candidates, candidate_probability(probability_second, second))
    other = anchor_scores(images, anchor, candidates, candidate_probability(1 - probability_second, ~second))
    np.testing.assert_array_equal(one, other)


def test_a_policy_that_only_sees_the_order_prefers_nothing_when_both_are_scored() -> None:
    always_second = np.full((4, 1), 0.875)
    shown_second = np.array([True, False, True, False])[:, None]
    scores = anchor_scores(3, 1, [0, 0, 2, 2], candidate_probability(always_second, shown_second))
    np.testing.assert_array_equal(scores, np.full((3, 1), 0.5))


def test_sampled_answers_are_scored_like_probabilities() -> None:
    answers = candidate_probability([1, 0, 1, 0, np.nan], [True, True, False, False, False])
    np.testing.assert_array_equal(answers, [1, 0, 0, 1, np.nan])


@settings(deadline=None)
@given(st.lists(comparisons(), min_size=1, max_size=4))
def test_prompts_at_once_score_as_one_by_one(
    prompts: list[tuple[int, int, list[int], np.ndarray, np.ndarray]],
) -> None:
    rollouts = min(probability.shape[1] for *_, probability in prompts)
    starts = np.cumsum([0, *(images for images, *_ in prompts)])
    alone = [anchor_scores(n, anchor, c, p[:, :rollouts]) for n, anchor, c, _, p in prompts]
    together = anchor_scores(
        starts[-1],
        [start + anchor for start, (_, anchor, *_) in zip(starts, prompts, strict=False)],
        [start + one for start, (_, _, c, *_) in zip(starts, prompts, strict=False) for one in c],
        np.concatenate([p[:, :rollouts] for *_, p in prompts]),
    )
    np.testing.assert_array_equal(together, np.concatenate(alone))

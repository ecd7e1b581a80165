"""Pairs read the same whichever image was shown first; scores of images are tested with their stage."""

import math

import numpy as np
import pandas as pd
import pytest

from workflow_scripts.scoring.image_scores import rollout_scores


def recorded(logprobs: list[list[float]], **columns: list[object]) -> pd.DataFrame:
    """Columns of rollouts that scores are made of."""
    return pd.DataFrame({"answer_logprobs": logprobs, **columns})


def test_everything_about_a_pair_is_about_its_candidate() -> None:
    second, first = [math.log(0.1), math.log(0.9)], [math.log(0.8), math.log(0.2)]
    shown = {"anchor": ["a"] * 3, "candidate_second": [True, False, False], "sampled_answer": [1, 0, None]}
    scored = rollout_scores(recorded([second, first, first], **shown), (0, 1))
    assert np.stack(list(scored["probabilities"])) == pytest.approx(np.array([[0.1, 0.9], [0.2, 0.8], [0.2, 0.8]]))
    assert np.stack(list(scored["answer_probabilities"])) == pytest.approx(np.exp([second, first, first]))
    assert scored["soft"].tolist() == pytest.approx([0.9, 0.8, 0.8])
    assert scored["hard"].tolist()[:2] == [1, 1] and math.isnan(scored["hard"][2])
    assert scored["sampled_answer"][1] == 0  # stays as it was said


def test_ratings_have_no_order() -> None:
    logprobs = np.log(np.arange(1, 8) / 28).tolist()
    alone = {"anchor": [None], "candidate_second": [None], "sampled_answer": [7]}
    scored = rollout_scores(recorded([logprobs], **alone), tuple(range(1, 8)))
    assert scored["probabilities"][0] == pytest.approx(np.exp(logprobs))
    assert scored["soft"][0] == pytest.approx(sum(a * a for a in range(1, 8)) / 28) and scored["hard"][0] == 7


def test_no_rollout_is_no_error() -> None:
    empty = {"anchor": [], "candidate_second": [], "sampled_answer": []}
    assert rollout_scores(recorded([], **empty), (0, 1)).empty

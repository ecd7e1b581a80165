"""Scores and annotations joined by prompt and image, whatever order they come in."""

import pandas as pd

from workflow_scripts.scoring.judged_prompts import judged_prompts


def test_unjudged_prompts_and_unreadable_images_are_left_out() -> None:
    rows = [
        {"prompt_id": "p", "prompt": "a p", "image_ids": ["b", "a", "c"], "ranks": [2, 1, 3], "ratings": [5, 7, 1]},
        {"prompt_id": "q", "prompt": "a q", "image_ids": ["d"], "ranks": [1], "ratings": [4]},
    ]
    scores = pd.DataFrame(
        [("p", image, k, 10 * k + value, None) for k in (1, 0) for image, value in (("c", 3.0), ("b", 2.0))],
        columns=["prompt_id", "image_id", "k", "soft", "hard"],
    )
    (prompt,) = judged_prompts([row | {"annotations": [row["ranks"]]} for row in rows], scores)
    assert prompt.image_ids == ["b", "c"]
    assert prompt.ranks.tolist() == [2, 3] and prompt.ratings is not None and prompt.ratings.tolist() == [5, 1]
    assert prompt.annotations is not None and prompt.annotations.tolist() == [[2, 3]]
    assert prompt.scores["soft"].tolist() == [[2, 12], [3, 13]]


def test_none_of_the_prompts_may_be_judged() -> None:
    scores = pd.DataFrame([("q", "d", 0, 1.0, 1.0)], columns=["prompt_id", "image_id", "k", "soft", "hard"])
    assert judged_prompts([{"prompt_id": "p", "image_ids": ["a"]}], scores) == []

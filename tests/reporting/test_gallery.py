"""The gallery says what scores, rollouts and labels say, counted here pair by pair."""

import io
import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from workflow_scripts.reporting.gallery import GALLERY, LONGEST_SIDE, confidence, encoded, pairs_by_image
from workflow_scripts.reporting.gallery import gallery_rows as rows_of
from workflow_scripts.scoring.image_scores import rollout_scores
from workflow_scripts.scoring.judged_prompts import judged_prompts

ORIGIN = {"dataset": "imagereward", "track": "imagereward", "policy": "grpo", "seed": 0}


def rollout(prompt: str, image: str, k: int, probabilities: list[float], **other: Any) -> dict[str, Any]:
    """A recorded rollout with these answer probabilities."""
    row = {"item_id": f"{prompt}/{image}/{other}", "prompt_id": prompt, "candidate": image, "anchor": None, "k": k}
    row |= {"candidate_second": None, "text": f"<think>{image} {k}</think>", "sampled_answer": None, "forced": False}
    return row | {"answer_logprobs": [math.log(p) for p in probabilities]} | other


def subset_row(prompt: str, ranks: list[int] | None, ratings: list[int] | None = None) -> dict[str, Any]:
    """A test prompt of five images."""
    images = [f"{prompt}-{i}" for i in range(5)]
    row = {"prompt_id": prompt, "prompt": f"a {prompt}", "image_ids": images, "ranks": ranks, "ratings": ratings}
    return row | {"annotations": None}


def gallery_rows(
    prompts: list[dict[str, Any]],
    scores: dict[str, dict[str, list[float]]],
    rollouts: list[dict[str, Any]],
    pictures: dict[str, Image.Image],
    answers: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Rows of the gallery, from scores by prompt and image and rollouts as they are recorded."""
    table = [
        {"prompt_id": p, "image_id": image, "k": k, "soft": soft, "hard": soft}
        for p, images in scores.items()
        for image, values in images.items()
        for k, soft in enumerate(values)
    ]
    scored = rollout_scores(pd.DataFrame(rollouts), answers)
    return list(rows_of(judged_prompts(prompts, pd.DataFrame(table)), scored, pictures))


@pytest.fixture
def pictures() -> dict[str, Image.Image]:
    """Return pictures of three prompts but for one that could not be read."""
    names = [f"{prompt}-{i}" for prompt in "abc" for i in range(5)]
    return {name: Image.new("RGB", (40, 30), (i, 0, 0)) for i, name in enumerate(names) if name != "a-3"}


def test_ratings_by_pair_counting(pictures: dict[str, Image.Image]) -> None:
    rng = random.Random(0)
    prompts = [
        subset_row("a", [2, 3, 3, 1, 5], [7, 5, 5, 7, 1]),
        subset_row("b", [1, 1, 1, 1, 1]),
        subset_row("c", [1]),
    ]
    scores = {p: {f"{p}-{i}": [float(rng.randint(1, 3)) for _ in range(3)] for i in range(5)} for p in "ab"}
    del scores["a"]["a-3"]
    recorded = [rollout(p, image, k, [1 / 7] * 7) for p in "ab" for image in scores[p] for k in range(3)]
    rows = gallery_rows(prompts, scores, recorded, pictures, tuple(range(1, 8)))
    pa.Table.from_pylist([row | ORIGIN for row in rows], schema=GALLERY).validate(full=True)

    assert [row["prompt_id"] for row in rows] == ["a"] * 4 + ["b"] * 5  # c has no score
    first = {row["image_id"]: row for row in rows if row["prompt_id"] == "a"}
    human = {"a-0": 2, "a-1": 3, "a-2": 3, "a-4": 5}
    mean = {image: sum(scores["a"][image]) / 3 for image in human}
    for image, row in first.items():
        others = [other for other in human if other != image and human[other] != human[image]]
        right = sum(
            0.5 if mean[image] == mean[other] else (mean[image] > mean[other]) == (human[image] < human[other])
            for other in others
        )
        assert (row["pairs"], row["pairs_right"]) == (len(others), right)
        assert row["right"] is (right > len(others) / 2)
        assert row["human_rank"] == 1 + sum(rank < human[image] for rank in human.values())
        assert row["predicted_rank"] == 1 + sum(other > mean[image] for other in mean.values())
        assert row["score"] == pytest.approx(mean[image]) and row["k"] == 3 and not row["anchor"]
        spread = sum((value - mean[image]) ** 2 for value in scores["a"][image]) / 2
        assert row["score_se"] == pytest.approx(math.sqrt(spread / 3))
        assert [r["k"] for r in row["rollouts"]] == [0, 1, 2] and row["rollouts"][1][
            "text"
        ] == f"<think>{image} 1</think>"
        assert all(r["soft"] == pytest.approx(4) for r in row["rollouts"])
    assert first["a-4"]["human_rating"] == 1.0
    assert [row["predicted_rank"] for row in rows[:4]] == sorted(row["predicted_rank"] for row in rows[:4])
    for row in rows[4:]:  # all tied: nothing to be right about
        assert (row["pairs"], row["right"], row["human_rank"], row["human_rating"]) == (0, None, 1.0, None)


def test_pairs_with_their_anchor(pictures: dict[str, Image.Image]) -> None:
    shown_second, shown_first = [0.1, 0.9], [0.8, 0.2]  # p(0), p(1): both prefer the candidate
    common = {"anchor": "b-0"}
    recorded = [
        rollout("b", "b-1", 0, shown_second, candidate_second=True, **common),
        rollout("b", "b-1", 0, shown_first, candidate_second=False, **common),
        rollout("b", "b-2", 0, [0.5, 0.5], candidate_second=True, **common),
    ]
    scores = {"b": {"b-0": [0.5], "b-1": [0.85], "b-2": [0.5]}}
    rows = {row["image_id"]: row for row in gallery_rows([subset_row("b", None)], scores, recorded, pictures, (0, 1))}
    assert {name: row["anchor"] for name, row in rows.items()} == {"b-0": True, "b-1": False, "b-2": False}
    assert sorted(r["soft"] for r in rows["b-1"]["rollouts"]) == pytest.approx([0.8, 0.9])
    assert sorted(r["second"] for r in rows["b-1"]["rollouts"]) == [False, True]
    assert rows["b-0"]["rollouts"] == [] and rows["b-0"]["score_se"] is None
    entropy = -(0.85 * math.log2(0.85) + 0.15 * math.log2(0.15))
    assert rows["b-1"]["confidence"] == pytest.approx(1 - entropy) and rows["b-2"]["confidence"] == 0
    assert rows["b-0"]["confidence"] == pytest.approx((1 - entropy) / 2)
    assert [row["human_rank"] for row in rows.values()] == [None] * 3
    assert [row["predicted_rank"] for row in rows.values()] == [1, 2, 2]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([[1, 0, 0], [1, 0, 0]], 1.0), ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 0.0), ([[0.5, 0.5, 0]], 1 - math.log(2, 3))],
)
def test_confidence(answers: list[list[float]], expected: float) -> None:
    assert confidence(np.mean(answers, axis=0)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "shown"), [((40, 30), (40, 30)), ((1024, 512), (256, 128)), ((300, 900), (85, 256))])
def test_pictures_are_small(size: tuple[int, int], shown: tuple[int, int]) -> None:
    pixels = random.Random(0).randbytes(size[0] * size[1] * 3)
    picture = Image.frombytes("RGB", size, pixels)
    data, told = encoded(picture)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == told == shown and max(told) <= LONGEST_SIDE and opened.format == "WEBP"
        if size == shown:
            assert opened.convert("RGB").tobytes() == pixels
    assert picture.size == size


def test_all_pairs_are_counted_twice() -> None:
    """Once for each of its two images."""
    ranks = [1, 2, 2, 4]
    strict = sum(a != b for a, b in combinations(ranks, 2))
    pairs, right = pairs_by_image(np.array([4.0, 3.0, 2.0, 1.0]), ranks)
    assert pairs.sum() == right.sum() == 2 * strict

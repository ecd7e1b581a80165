"""The judge in memory: its scores are the engine's, in whatever order images come; what it refuses."""

import dataclasses
import io
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.preferences.images import UnreadableImageError, decoded, in_memory
from workflow_scripts.ranking.judge import Judge, JudgeError, as_shown, ranks_of
from workflow_scripts.rollouts.items import Item
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.running.provenance import sidecar_path

Scenes = list[tuple[str, dict[str, Image.Image]]]
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, max_thinking_tokens=64, max_answer_tokens=4)


def flat(scenes: Scenes) -> tuple[list[str], list[Image.Image]]:
    """One prompt for each picture."""
    pairs = [(prompt, image) for prompt, pictures in scenes for image in pictures.values()]
    return [prompt for prompt, _ in pairs], [image for _, image in pairs]


def probabilities(row: dict[str, Any]) -> list[float]:
    """Of the answers, by hand."""
    weights = [math.exp(value) for value in row["answer_logprobs"]]
    return [weight / sum(weights) for weight in weights]


def test_ratings_are_those_that_the_engine_gives(judge_of: Callable[..., Judge], scenes: Scenes) -> None:
    """Greedily, so that they do not depend on what is asked together; asked here one by one."""
    judge = dataclasses.replace(judge_of("imagereward", k=1), sampling=GREEDY)
    prompts, images = flat(scenes[:2])
    expected = []
    for prompt, image in zip(prompts, images, strict=True):
        item = Item("p", prompt, ("i",), "i")
        options: dict[str, Any] = {"rollouts": 1, "first_k": 0, "sampling": GREEDY, "batch_items": 1, "seed": "any"}
        (row,) = generate(judge.policy, [item], in_memory({"i": image}), **options)
        expected.append(sum(rating * p for rating, p in zip(range(1, 8), probabilities(row), strict=True)))
    assert judge.score(prompts, images) == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.1


def test_pairs_are_scored_against_one_anchor(judge_of: Callable[..., Judge], scenes: Scenes) -> None:
    judge = dataclasses.replace(judge_of("hpsv2", k=1, both_orders=True), sampling=GREEDY)
    prompt, pictures = scenes[0]
    images = list(pictures.values())
    ranked = judge.rank(prompt, images)
    anchors = [row for row in ranked if not row.judgement.thoughts]
    assert len(anchors) == 1 and anchors[0].score == 0.5
    for row in ranked:
        if row is anchors[0]:
            continue
        pair = {"anchor": images[anchors[0].index], "candidate": images[row.index]}
        items = [Item("p", prompt, order, "candidate", "anchor") for order in (tuple(pair), tuple(pair)[::-1])]
        options: dict[str, Any] = {"rollouts": 1, "first_k": 0, "sampling": GREEDY, "batch_items": 1, "seed": "any"}
        rows = {
            r["candidate_second"]: probabilities(r)[1]
            for r in generate(judge.policy, items, in_memory(pair), **options)
        }
        assert row.score == pytest.approx((rows[True] + 1 - rows[False]) / 2, abs=1e-4)
        assert {thought.shown for thought in row.judgement.thoughts} == {"first", "second"}


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_the_order_of_the_images_changes_nothing(judge_of: Callable[..., Judge], scenes: Scenes, track: str) -> None:
    judge = judge_of(track, k=2)
    prompts, images = flat(scenes[:3])
    scores = judge.score(prompts, images)
    assert np.array_equal(judge.score(prompts, images), scores)
    order = random.Random(1).sample(range(len(images)), len(images))
    assert np.array_equal(judge.score([prompts[i] for i in order], [images[i] for i in order]), scores[order])
    assert not np.array_equal(judge.score(prompts, images, seed=1), scores)
    assert len(set(scores)) > len(scores) // 2


@pytest.mark.parametrize(("track", "settings"), [("imagereward", {}), ("hpsv2", {"both_orders": True})])
def test_a_judgement_fits_together(
    judge_of: Callable[..., Judge], scenes: Scenes, track: str, settings: dict[str, Any]
) -> None:
    judge = judge_of(track, k=2, **settings)
    prompt, pictures = scenes[1]
    images = list(pictures.values())
    ranked = judge.rank(prompt, images)
    scores = judge.score([prompt] * len(images), images)
    assert [row.score for row in ranked] == sorted(scores, reverse=True)
    assert sorted(row.index for row in ranked) == list(range(len(images)))
    for row in ranked:
        assert row.score == scores[row.index] and row.rank == 1 + sum(scores > row.score)
        judged = row.judgement
        if not judged.thoughts:
            continue
        by_rollout = np.array([thought.score for thought in judged.thoughts]).reshape(-1, 2).mean(axis=0)
        assert len(judged.thoughts) == (4 if settings else 2)
        assert row.score == pytest.approx(by_rollout.mean())
        assert judged.standard_error == pytest.approx(abs(by_rollout[0] - by_rollout[1]) / 2)
        assert sum(judged.distribution.values()) == pytest.approx(1)
        assert sum(int(a) * p for a, p in judged.distribution.items()) == pytest.approx(row.score)
        assert any(thought.reasoning for thought in judged.thoughts)


def test_equal_images_are_one_image(judge_of: Callable[..., Judge], scenes: Scenes) -> None:
    prompt, pictures = scenes[0]
    first, second, *_ = pictures.values()
    scores = judge_of("imagereward", k=2).score([prompt] * 3, [first, second, first.copy()])
    assert scores[0] == scores[2] != scores[1]
    assert ranks_of([0.5, 0.7, 0.5]) == [2, 1, 2]


def test_what_cannot_be_judged_is_refused(judge_of: Callable[..., Judge], scenes: Scenes) -> None:
    prompt, pictures = scenes[0]
    image = next(iter(pictures.values()))
    ratings, pairs = judge_of("imagereward", k=2), judge_of("hpsv2", k=2)
    with pytest.raises(JudgeError, match="2 prompts and 1 images"):
        ratings.score([prompt, prompt], [image])
    with pytest.raises(JudgeError, match="image 1 cannot be shown to the policy: 900 x 3 pixels are narrower"):
        ratings.score([prompt, prompt], [image, Image.new("RGB", (900, 3))])
    with pytest.raises(JudgeError, match="give two or more different images of each prompt"):
        pairs.score([prompt, prompt], [image, image.copy()])
    with pytest.raises(JudgeError, match="longer than the policy's context; shorten it"):
        ratings.score(["very " * 5000], [image])
    with pytest.raises(JudgeError, match="k is 0"):
        ratings.score([prompt], [image], k=0)


# ------------------------------------------------------------------------------------------------- images and policies


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGB", "BMP"), ("I;16", "PNG")),
        *(("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF")),
    ],
)
def test_an_image_in_memory_is_shown_as_its_file(mode: str, format: str) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (20, 30), dtype=np.uint16))
    elif mode == "RGBA":
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (30, 20), rng.bytes(1800))
    else:
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format)
    shown = as_shown(image)
    assert shown.mode == "RGB" and shown.size == (30, 20)
    assert np.array_equal(np.asarray(shown), np.asarray(decoded(file.getvalue())))


def test_an_image_without_a_range_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match="no stated range"):
        as_shown(Image.new("F", (20, 20)))
    with pytest.raises(UnreadableImageError, match="mode HSV"):
        as_shown(Image.new("HSV", (20, 20)))


def copied(policy_folders: Path, folder: Path) -> Path:
    """A copy of the trained policies that may be changed: the folder of one of them."""
    shutil.copytree(policy_folders, folder / "policies")
    return folder / "policies" / "hpsv2" / "seed0"


def test_the_base_policy_may_lie_elsewhere(policy_folders: Path, scenes: Scenes, tmp_path: Path) -> None:
    folder = copied(policy_folders, tmp_path)
    shutil.copytree(ROOT / "models/tiny-qwen2.5-vl", tmp_path / "model")
    prompts, images = flat(scenes[:1])
    moved = Judge.load(folder, 1, base=tmp_path / "model").score(prompts, images)
    assert np.array_equal(moved, Judge.load(folder, 1).score(prompts, images))
    assert not np.array_equal(moved, Judge.load(folder, 1, zero_shot=True).score(prompts, images))
    (tmp_path / "model" / "chat_template.jinja").write_text("another")
    with pytest.raises(PolicyError, match=r"chat_template\.jinja is not as it was"):
        Judge.load(folder, 1, base=tmp_path / "model")


def test_a_policy_that_does_not_fit_is_refused(policy_folders: Path, tmp_path: Path) -> None:
    folder = copied(policy_folders, tmp_path)
    with pytest.raises(PolicyError, match="name the folder of a finished training"):
        Judge.load(tmp_path)
    manifest = folder.parent.parent / "base" / "manifest.json"
    sidecar = sidecar_path(folder / "adapter_model.safetensors")
    record = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(record | {"inputs": {str(manifest): "0" * 64}}))
    with pytest.raises(PolicyError, match="was trained on another base policy than"):
        Judge.load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ProvenanceError, match=r"adapter_config\.json is not what its stage wrote"):
        Judge.load(folder)

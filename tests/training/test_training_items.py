"""Items of training and validation, their targets and their images."""

import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trl.trainer.utils import RepeatSampler

from workflow_scripts.preferences.images import Images
from workflow_scripts.preferences.schema import write_images
from workflow_scripts.rollouts.items import Item
from workflow_scripts.training.items import image_reader, training_items, trl_dataset


@settings(deadline=None)
@given(rng=st.integers(0, 2**32).map(random.Random), seed=st.integers(0, 5))
def test_the_target_of_a_pair_is_1_where_the_second_image_is_preferred(rng: random.Random, seed: int) -> None:
    images = [f"i{n}" for n in range(5)]
    pairs = [{"a": a, "b": b, "preferred": rng.randint(0, 1)} for a, b in combinations(rng.sample(images, 5), 2)]
    readable = set(rng.sample(images, 4))
    preferred = {frozenset((p["a"], p["b"])): (p["b"] if p["preferred"] else p["a"]) for p in pairs}
    items = training_items([{"prompt_id": "p", "prompt": "t", "pairs": pairs}], readable, "pairwise", seed)
    assert {frozenset(item.image_ids) for item, _ in items} == {pair for pair in preferred if pair <= readable}
    for item, target in items:
        assert target == (preferred[frozenset(item.image_ids)] == item.image_ids[1])


def test_both_targets_are_about_as_frequent_although_the_data_list_the_better_first() -> None:
    rows = [{"prompt_id": f"p{n}", "prompt": "t", "pairs": [{"a": "x", "b": "y", "preferred": 0}]} for n in range(1000)]
    targets = [target for _, target in training_items(rows, {"x", "y"}, "pairwise", 0)]
    assert 420 < sum(targets) < 580


def test_the_target_of_an_image_is_its_rating() -> None:
    rows = [{"prompt_id": "p", "prompt": "t", "image_ids": ["a", "b", "c"], "ratings": [7, 1, 4]}]
    items = training_items(rows, {"a", "c"}, "pointwise", 0)
    assert [(item.image_ids, item.candidate, target) for item, target in items] == [(("a",), "a", 7), (("c",), "c", 4)]


def test_images_are_decoded_when_they_are_asked_for(tmp_path: Path, scenes: Any, image_rows: Any) -> None:
    _, pictures = scenes[0]
    write_images(tmp_path / "images.parquet", image_rows(pictures))
    images = image_reader(tmp_path / "images.parquet", tmp_path / "cache")
    assert images.sizes == {name: picture.size for name, picture in pictures.items()}
    for name, picture in pictures.items():
        assert images.read(name).tobytes() == picture.tobytes()


@pytest.mark.parametrize("accumulation", [1, 4, 16])
def test_each_image_is_decoded_once_a_step_whatever_the_accumulation(accumulation: int) -> None:
    read = Counter[str]()

    def reader(name: str) -> Image.Image:
        read[name] += 1
        return Image.new("RGB", (8, 8))

    items = [(Item(f"p{n}", "t", (f"{n}a", f"{n}b"), f"{n}b"), 1) for n in range(24)]
    names = [name for item, _ in items for name in item.image_ids]
    dataset = trl_dataset(items, Images(dict.fromkeys(names, (8, 8)), reader), "{image}{image}", step_items=8)
    sampler = RepeatSampler(dataset, mini_repeat_count=4, batch_size=8, repeat_count=accumulation, seed=0)
    rows = [dataset[i] for i in sampler]
    assert len(rows) == 24 * 4 * accumulation and set(read) == set(names)
    assert set(read.values()) == {1}
    assert len({id(image) for row in rows[: 8 * 4] for image in row["images"]}) == 16  # one object for each image

"""Items: which images are judged, against which anchor, and in which order they are shown."""

import random
from collections import Counter
from itertools import groupby
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.rollouts.items import anchor_items, pointwise_items, stable_random

ROWS = st.lists(st.sets(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6).map(
    lambda prompts: [
        {"prompt_id": f"p{i}", "prompt": f"prompt {i}", "image_ids": [f"p{i}-{n}" for n in sorted(names)]}
        for i, names in enumerate(prompts)
    ]
)


def every(rows: list[dict[str, Any]]) -> set[str]:
    """Names of all images."""
    return {image for row in rows for image in row["image_ids"]}


def prompts(number: int, images: int = 4) -> list[dict[str, Any]]:
    """So many prompts with so many images each."""
    return [
        {"prompt_id": f"p{i}", "prompt": "a cat", "image_ids": [f"{i}-{j}" for j in range(images)]}
        for i in range(number)
    ]


@settings(deadline=None)
@given(rows=ROWS, seed=st.integers(0, 9), both=st.booleans())
def test_each_image_but_the_anchor_is_compared_with_it(rows: list[dict[str, Any]], seed: int, both: bool) -> None:
    items = anchor_items(rows, every(rows), seed, both)
    found = {name: list(group) for name, group in groupby(items, key=lambda item: item.prompt_id)}
    for row in rows:
        group = found.pop(row["prompt_id"], [])
        images = row["image_ids"]
        assert len(group) == (len(images) - 1) * (1 + both)
        if group:
            (anchor,) = {item.anchor for item in group}
            assert Counter(item.candidate for item in group) == {i: 1 + both for i in images if i != anchor}
            assert all(set(item.image_ids) == {anchor, item.candidate} for item in group)
            assert {item.prompt for item in group} == {row["prompt"]}
    assert not found
    assert len({item.item_id for item in items}) == len(items)


@settings(deadline=None)
@given(rows=ROWS, seed=st.integers(0, 9), shuffle=st.randoms())
def test_published_order_changes_no_item(rows: list[dict[str, Any]], seed: int, shuffle: random.Random) -> None:
    shuffled = [row | {"image_ids": shuffle.sample(row["image_ids"], len(row["image_ids"]))} for row in rows]
    shuffle.shuffle(shuffled)
    for make in (
        lambda rows: anchor_items(rows, every(rows), seed, False),
        lambda rows: anchor_items(rows, every(rows), seed, True),
        lambda rows: pointwise_items(rows, every(rows)),
    ):
        assert set(make(shuffled)) == set(make(rows))


@settings(deadline=None)
@given(rows=ROWS, seed=st.integers(0, 9))
def test_a_prompt_has_the_same_items_whatever_other_prompts_there_are(rows: list[dict[str, Any]], seed: int) -> None:
    alone = [item for row in rows for item in anchor_items([row], set(row["image_ids"]), seed, False)]
    assert alone == anchor_items(rows, every(rows), seed, False)


def test_both_orders_show_each_pair_both_ways() -> None:
    rows = prompts(20)
    once, both = (anchor_items(rows, every(rows), 0, both) for both in (False, True))
    assert len(both) == 2 * len(once)
    assert set(once) < set(both)
    shown = {item.image_ids for item in both}
    assert all(ids[::-1] in shown for ids in shown)


def test_the_candidate_is_shown_second_about_half_of_the_time() -> None:
    rows = prompts(500)
    items = anchor_items(rows, every(rows), 0, False)
    second = sum(item.image_ids[1] == item.candidate for item in items)
    assert abs(second - len(items) / 2) < 4 * (len(items) / 4) ** 0.5
    # Within a prompt, too: the anchor's place must not be one draw for all of its pairs.
    places = [{i.image_ids[1] == i.candidate for i in group} for _, group in groupby(items, key=lambda i: i.prompt_id)]
    assert 0.6 < sum(len(place) == 2 for place in places) / len(places) < 0.9


def test_every_place_of_the_list_is_anchor_as_often() -> None:
    rows = prompts(800)
    anchors = {item.prompt_id: item.anchor for item in anchor_items(rows, every(rows), 0, False)}
    places = Counter(str(anchor).split("-")[1] for anchor in anchors.values())
    assert len(places) == 4 and min(places.values()) > 150


def test_the_seed_draws_other_anchors_and_orders() -> None:
    rows = prompts(100)
    one, two = (anchor_items(rows, every(rows), seed, False) for seed in (0, 1))
    same = sum(a.anchor == b.anchor for a, b in zip(one, two, strict=True))
    assert 0.1 < same / len(one) < 0.4


def test_unreadable_images_are_left_out() -> None:
    rows = prompts(30)
    lost = {f"{i}-{i % 4}" for i in range(0, 30, 2)}
    readable = every(rows) - lost
    assert {item.candidate for item in pointwise_items(rows, readable)} == readable
    items = anchor_items(rows, readable, 0, False)
    shown = {image for item in items for image in item.image_ids}
    assert shown == readable
    assert Counter(item.prompt_id for item in items) == {f"p{i}": 3 if i % 2 else 2 for i in range(30)}


def test_a_prompt_with_less_than_two_readable_images_asks_nothing() -> None:
    rows = prompts(2, images=2)
    assert {item.prompt_id for item in anchor_items(rows, {"0-0", "1-0", "1-1"}, 0, False)} == {"p1"}
    assert [item.candidate for item in pointwise_items(rows, {"0-0", "1-0", "1-1"})] == ["0-0", "1-0", "1-1"]
    assert anchor_items(rows, set(), 0, True) == pointwise_items(rows, set()) == []


def test_names_say_prompt_and_images_in_the_order_shown() -> None:
    rows = prompts(3)
    for item in anchor_items(rows, every(rows), 0, True):
        assert item.item_id == "/".join((item.prompt_id, *item.image_ids))


def test_stable_random_is_the_same_on_every_machine() -> None:
    assert stable_random("anchor", 0, "p") == 0x085136352DC65CC3  # printf 'anchor|0|p' | sha256sum
    assert stable_random("a", "b") != stable_random("ab") != stable_random("b", "a")

"""Which prompts and pairs are kept: exact, stable, nested, disjoint."""

import math
from itertools import combinations

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from workflow_scripts.preferences.schema import PREFERENCES
from workflow_scripts.preferences.subsampling import (
    SubsamplingError,
    draw_validation,
    hash_order,
    keep_fraction,
    normalised,
    overlap,
    pair_unit,
    restricted,
    share,
)
from workflow_scripts.stages.select_subset import filter_pairs

ids = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=60)
fractions = st.floats(0.02, 1)
seeds = st.integers(0, 5)


def units(names: list[str]) -> dict[str, list[str]]:
    """Six pairs for each prompt."""
    return {n: [pair_unit(n, a, b) for a, b in combinations("wxyz", 2)] for n in names}


@settings(deadline=None)
@given(ids, seeds)
def test_order_is_independent_of_the_order_of_rows(names: set[str], seed: int) -> None:
    """Only names and seed decide."""
    assert hash_order(seed, sorted(names)) == hash_order(seed, sorted(names, reverse=True))
    assert set(hash_order(seed, names)) == names


@settings(deadline=None)
@given(ids, seeds, fractions, st.booleans())
def test_fraction_is_exact_to_one_unit(names: set[str], seed: int, fraction: float, by_pair: bool) -> None:
    """Halves are rounded up."""
    order = hash_order(seed, names)
    of = len(order) * (6 if by_pair else 1)
    expected = math.floor(fraction * of + 0.5)
    assume(expected > 0)
    kept = keep_fraction(order, fraction, seed, units(order) if by_pair else None)
    assert kept.of == of
    assert len(kept.prompts if kept.pairs is None else kept.pairs) == expected


@settings(deadline=None)
@given(ids, seeds, fractions, fractions, st.booleans())
def test_larger_fraction_contains_the_smaller(
    names: set[str], seed: int, one: float, other: float, by_pair: bool
) -> None:
    """Nested subsets, prompts as well as pairs."""
    order = hash_order(seed, names)
    assume(min(one, other) * len(order) >= 1)
    pairs = units(order) if by_pair else None
    small, large = (keep_fraction(order, fraction, seed, pairs) for fraction in sorted((one, other)))
    assert set(small.prompts) <= set(large.prompts)
    assert (small.pairs or set()) <= (large.pairs or set())


@settings(deadline=None)
@given(ids, seeds, fractions, st.booleans(), st.integers(1, 10))
def test_validation_is_disjoint_or_refused(
    names: set[str], seed: int, fraction: float, by_pair: bool, count: int
) -> None:
    """No validation prompt gives training a prompt or a pair; more prompts add to fewer."""
    order = hash_order(seed, names)
    assume(fraction * len(order) >= 1)
    pairs = units(order)
    kept = keep_fraction(order, fraction, seed, pairs if by_pair else None)
    texts = {name: name for name in names}
    free = len(order) - len(kept.prompts)
    if free < count:
        with pytest.raises(SubsamplingError, match=f"leaves only {free} of {len(order)}"):
            draw_validation(order, kept.prompts, texts, count)
        return
    drawn = draw_validation(order, kept.prompts, texts, count)
    assert len(drawn) == count and not set(drawn) & set(kept.prompts)
    assert not (kept.pairs or set()) & {unit for name in drawn for unit in pairs[name]}
    assert draw_validation(order, kept.prompts, texts, 1) == drawn[:1]


def test_validation_comes_from_the_other_end() -> None:
    """The last in hash order come first, but not with the text of a kept prompt."""
    order = ["a", "b", "c", "d"]
    assert draw_validation(order, ["a"], {n: n for n in order}, 2) == ["d", "c"]
    assert draw_validation(order, ["a"], {"a": "same", "b": "b", "c": "c", "d": "same"}, 2) == ["c", "b"]


def test_seeds_differ() -> None:
    """Another seed keeps others."""
    names = [str(i) for i in range(200)]
    kept = [set(keep_fraction(hash_order(seed, names), 0.25, seed, None).prompts) for seed in (0, 1)]
    assert 5 <= len(kept[0] & kept[1]) <= 25  # 12.5 expected


@pytest.mark.parametrize(("fraction", "count", "kept"), [(0.25, 10, 3), (0.25, 9, 2), (1.0, 7, 7), (0.5, 1, 1)])
def test_share(fraction: float, count: int, kept: int) -> None:
    """Rounded half up."""
    assert share(fraction, count) == kept


def test_keeping_nothing_is_refused() -> None:
    """The error says what to raise."""
    with pytest.raises(SubsamplingError, match="raise the fraction"):
        share(0.01, 10)


def test_overlap_by_id_and_by_normalised_text() -> None:
    """Case and white space do not hide a leak."""
    train = {"1": normalised("A  red\nCat"), "2": normalised("a dog"), "3": normalised("a fish")}
    test = {"9": normalised("a red cat "), "3": normalised("something else")}
    found = overlap(train, [test, {"2": "x"}])
    assert found.ids == {"2", "3"} and found.texts == {"1"}


def test_pair_unit_ignores_which_image_comes_first() -> None:
    """One judged pair, one name."""
    assert pair_unit("p", "x", "y") == pair_unit("p", "y", "x") == "p\nx\ny"


def test_restricted_rows_hold_only_images_of_their_pairs() -> None:
    """The other images are gone, the archives stay aligned."""
    pairs = [{"a": "z", "b": "x", "preferred": 0}]
    row = {"prompt_id": "p", "image_ids": ["x", "y", "z"], "archives": ["1", "2", "3"], "pairs": pairs}
    assert list(restricted([row])) == [row | {"image_ids": ["x", "z"], "archives": ["1", "3"]}]


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.lists(st.tuples(st.sampled_from("xyz"), st.booleans()), max_size=4))))
def test_pairs_are_filtered_as_row_by_row(rows: list[list[tuple[str, bool]] | None]) -> None:
    """Rows without pairs, and those that lose all of theirs, keep their places."""
    pairs = [row and [{"a": a, "b": "w", "preferred": 0} for a, _ in row] for row in rows]
    column = pa.array(pairs, PREFERENCES.field("pairs").type)
    table = pa.table({"prompt_id": [str(i) for i in range(len(rows))], "pairs": column})
    found = filter_pairs(table, [keep for row in rows for _, keep in row or []])
    assert found["prompt_id"] == table["prompt_id"]
    assert found["pairs"].to_pylist() == [
        [pair for pair, (_, keep) in zip(of_row or [], row or [], strict=True) if keep]
        for of_row, row in zip(pairs, rows, strict=True)
    ]

"""Selection of prompts and pairs by seeded hashes of their names, whatever the order of the rows.

A larger fraction contains a smaller one, and validation prompts come from the other end of the same order.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from workflow_scripts.configuration.data_stages import SelectSubset
from workflow_scripts.configuration.model import VALIDATION_FROM


class SubsamplingError(ValueError):
    """More is asked for than there is: says how much there is."""


class Overlap(NamedTuple):
    """prompt_ids that also occur elsewhere, by id and by normalised text."""

    ids: set[str]
    texts: set[str]


class Kept(NamedTuple):
    """Prompts and pairs that training keeps."""

    prompts: list[str]  # prompt_ids in hash order
    pairs: set[str] | None  # names of the kept pairs; None: all pairs of these prompts
    of: int  # number of units that the fraction was taken of


class Selection(NamedTuple):
    """Prompts and pairs of a split that are used."""

    leaked: Overlap
    dropped: set[str]  # prompt_ids left out because they leak
    prompts: list[str]  # prompt_ids in hash order
    pairs: set[str] | None  # names of the kept pairs; None: all pairs of these prompts
    of: int  # number of units (prompts or pairs) that these were taken from


def select(
    config: SelectSubset,
    texts: Mapping[str, str],
    others: Iterable[Mapping[str, str]],
    pairs: Mapping[str, Sequence[str]] | None,
) -> Selection:
    """Select a fraction for training, a number of prompts for validation, or the whole test split.

    Args:
        config: settings of the split.
        texts: normalised text by prompt_id, of the split that the prompts are taken from.
        others: the same for each split that must not overlap with it.
        pairs: names of each prompt's pairs by `pair_unit`, to keep single pairs; None keeps prompts with all pairs.

    Raises:
        SubsamplingError: the fraction keeps nothing, or training leaves too few prompts for validation.
    """
    leaked = overlap(texts, others)
    dropped = leaked.ids | leaked.texts if config.drop_overlap else set()
    order = hash_order(config.seed, texts.keys() - dropped)
    if config.split == "test":
        return Selection(leaked, dropped, order, None, len(order))
    if config.split == "validation" and VALIDATION_FROM[config.dataset] == "validation":
        return Selection(leaked, dropped, order[: config.prompts], None, len(order))
    kept = keep_fraction(order, config.fraction, config.seed, pairs)
    if config.split == "train":
        return Selection(leaked, dropped, *kept)
    drawn = draw_validation(order, kept.prompts, texts, config.prompts or 0)
    return Selection(leaked, dropped, drawn, None, len(order))


def hash_order(seed: int, ids: Iterable[str]) -> list[str]:
    """Sort ids by SHA-256 of "{seed}:{id}"."""
    return sorted(ids, key=lambda name: sha256(f"{seed}:{name}".encode()).digest())


def share(fraction: float, count: int) -> int:
    """Return the number of units in a fraction, halves rounded up.

    Raises:
        SubsamplingError: the number is zero.
    """
    units = math.floor(fraction * count + 0.5)
    if not units:
        raise SubsamplingError(f"a fraction of {fraction} of {count} keeps nothing; raise the fraction")
    return units


def normalised(text: str) -> str:
    """Remove differences in case and white space from a text."""
    return " ".join(text.casefold().split())


def overlap(texts: Mapping[str, str], others: Iterable[Mapping[str, str]]) -> Overlap:
    """Find the prompts of a split that other splits have too.

    Args:
        texts: normalised text by prompt_id.
        others: the same for each of the other splits.
    """
    found = Overlap(set(), set())
    for other in others:
        found.ids.update(texts.keys() & other.keys())
        shared = set(other.values())
        found.texts.update(name for name, text in texts.items() if text in shared)
    return found


def pair_unit(prompt_id: str, a: str, b: str) -> str:
    """Name a judged pair, the same whichever image comes first."""
    return f"{prompt_id}\n{a}\n{b}" if a < b else f"{prompt_id}\n{b}\n{a}"


def keep_fraction(order: Sequence[str], fraction: float, seed: int, pairs: Mapping[str, Sequence[str]] | None) -> Kept:
    """Keep the first units in hash order, exactly a fraction of them.

    Args:
        order: prompt_ids in hash order.
        fraction: share to keep.
        seed: of the hash that orders pairs.
        pairs: names of each prompt's pairs by `pair_unit`, to keep single pairs; None keeps prompts with all pairs.

    Raises:
        SubsamplingError: the fraction keeps nothing.
    """
    if pairs is None:
        return Kept(list(order[: share(fraction, len(order))]), None, len(order))
    units = hash_order(seed, {unit for name in order for unit in pairs[name]})
    kept = set(units[: share(fraction, len(units))])
    return Kept([name for name in order if not kept.isdisjoint(pairs[name])], kept, len(units))


def draw_validation(order: Sequence[str], kept: Collection[str], texts: Mapping[str, str], prompts: int) -> list[str]:
    """Draw validation prompts from the end of the hash order, for training data without a validation split.

    Args:
        order: all prompt_ids in hash order.
        kept: prompt_ids of which training keeps any pair.
        texts: normalised text by prompt_id; a prompt with the text of a kept one is not drawn.
        prompts: number to draw.

    Raises:
        SubsamplingError: training leaves fewer.
    """
    names, seen = set(kept), {texts[name] for name in kept}
    free = [name for name in reversed(order) if name not in names and texts[name] not in seen]
    if len(free) < prompts:
        raise SubsamplingError(
            f"{prompts} validation prompts are asked for, but training leaves only {len(free)} of {len(order)}; "
            "lower train_fraction or validation_prompts, or subsample by prompt"
        )
    return free[:prompts]


def restricted(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Restrict the images of each row to those in its pairs."""
    for row in rows:
        used = {pair[side] for pair in row["pairs"] for side in ("a", "b")}
        images = [
            (name, archive) for name, archive in zip(row["image_ids"], row["archives"], strict=True) if name in used
        ]
        yield row | {"image_ids": [i for i, _ in images], "archives": [a for _, a in images]}

"""Questions for the policy: single images, or pairs of an anchor and a candidate (paper §3)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question. `image_ids` are in the order shown; the candidate is the image that the score belongs to."""

    prompt_id: str
    prompt: str
    image_ids: tuple[str, ...]
    candidate: str
    anchor: str | None = None

    @property
    def item_id(self) -> str:
        """Unique name, made of the prompt and the images in the order shown."""
        return "/".join((self.prompt_id, *self.image_ids))

    def columns(self) -> dict[str, Any]:
        """Columns of `rollouts.record.ROLLOUT` that describe the item."""
        return {
            "item_id": self.item_id,
            "prompt_id": self.prompt_id,
            "candidate": self.candidate,
            "anchor": self.anchor,
            "candidate_second": None if self.anchor is None else self.image_ids[1] == self.candidate,
        }


def stable_random(*parts: object) -> int:
    """A 64-bit number that depends only on these parts and is the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def pointwise_items(rows: Iterable[dict[str, Any]], readable: set[str]) -> list[Item]:
    """One item for each readable image of each prompt, which is rated by itself."""
    return [
        Item(row["prompt_id"], row["prompt"], (image,), image)
        for row in rows
        for image in row["image_ids"]
        if image in readable
    ]


def anchor_items(rows: Iterable[dict[str, Any]], readable: set[str], seed: int, both_orders: bool) -> list[Item]:
    """N-1 comparisons for each prompt with N readable images, all with the anchor drawn for the prompt.

    The anchor depends on (seed, prompt_id) and is the same for all rollouts. The image shown first is drawn for each
    pair, because published lists are in a fixed generator order. With `both_orders` every pair is shown both ways.
    """
    items = []
    for row in rows:
        images = [image for image in row["image_ids"] if image in readable]
        if len(images) < 2:
            continue
        # Drawn from sorted names, because the anchor must not depend on the published order either.
        anchor = sorted(images)[stable_random("anchor", seed, row["prompt_id"]) % len(images)]
        for candidate in images:
            if candidate == anchor:
                continue
            shown = (anchor, candidate)
            if stable_random("order", seed, row["prompt_id"], candidate) % 2:
                shown = (candidate, anchor)
            orders = [shown, shown[::-1]] if both_orders else [shown]
            items += [Item(row["prompt_id"], row["prompt"], order, candidate, anchor) for order in orders]
    return items

"""Simulated annotators of the synthetic world: each perceives the latent utility of an image through noise.

One annotator gives an ImageReward label; an HPDv2 test label is the mean of ten. The two noise levels below make single
annotators agree with these labels as often as published: a second annotator with an ImageReward label on 65 % of the
pairs, one of the ten with an HPDv2 test label on 78 % ("single human", README of github.com/tgxs002/HPSv2).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import NamedTuple

from workflow_scripts.preferences.synthetic_scenes import HUMAN, Scene

IMAGEREWARD_NOISE = 1.3  # standard deviation, in units of utility
HPDV2_NOISE = 1.25
RANK_SLOTS = 5  # ImageReward's annotators sort into five slots of at most two images
TIE_GAP = 0.6  # utility difference below which images share a slot although there is room
EMPTY_SLOT_CHOICES = 8  # an empty slot is each of the better ones with probability 1/8, else the last
TEST_ANNOTATORS = 10


class ImageRewardLabel(NamedTuple):
    """Label of the n images of a prompt by one annotator."""

    ranks: list[int]  # (n,) slots 1..5, 1 = best
    overall: list[int]  # (n,) 1..7
    alignment: list[int]  # (n,) 1..7
    fidelity: list[int]  # (n,) 1..7


class Agreement(NamedTuple):
    """Number of pairs that an order gets right; a tie in the order counts half."""

    right: float
    pairs: int

    def __add__(self, other: object) -> "Agreement":
        """Add up both counts."""
        if not isinstance(other, Agreement):
            return NotImplemented
        return Agreement(self.right + other.right, self.pairs + other.pairs)


def utilities(scenes: Sequence[Scene]) -> list[float]:
    """Return the latent utility of each image, 0 at best."""
    return [HUMAN.utility(scene) for scene in scenes]


def noisy(rng: random.Random, values: Sequence[float], noise: float) -> list[float]:
    """Add the noise of one annotator to the values."""
    return [value + rng.gauss(0, noise) for value in values]


def rating(utility: float) -> int:
    """Convert a utility to a rating 1..7: 7 for 0, 1 from about -3 down."""
    return min(max(round(7 + 1.9 * utility), 1), 7)


def imagereward_label(rng: random.Random, scenes: Sequence[Scene]) -> ImageRewardLabel:
    """Rank and rate 4 to 9 images as one annotator, whose ranks and overall ratings come from one perception."""
    perceived = noisy(rng, utilities(scenes), IMAGEREWARD_NOISE)
    faithful = utilities([replace(scene, quality="sharp") for scene in scenes])
    clean = utilities([replace(scene, drawn=scene.asked) for scene in scenes])
    return ImageRewardLabel(
        ranks=slot_ranks(rng, perceived),
        overall=[rating(value) for value in perceived],
        alignment=[rating(value) for value in noisy(rng, faithful, IMAGEREWARD_NOISE)],
        fidelity=[rating(value) for value in noisy(rng, clean, IMAGEREWARD_NOISE)],
    )


def slot_ranks(rng: random.Random, perceived: Sequence[float]) -> list[int]:
    """Sort at most ten images into slots 1..5 of at most two images, as ImageReward's annotators do.

    Neighbours share a slot if their number requires it or they look alike. Empty slots are random, so that the best
    rank is not always 1, as in the published data.
    """
    order = sorted(range(len(perceived)), key=lambda i: -perceived[i])
    gaps = [perceived[a] - perceived[b] for a, b in pairwise(order)]
    sharing: tuple[int, ...] = min(
        (
            places
            for size in range(max(0, len(order) - RANK_SLOTS), len(order) // 2 + 1)
            for places in combinations(range(len(gaps)), size)
            if all(later - earlier > 1 for earlier, later in pairwise(places))
        ),
        key=lambda places: sum(gaps[place] - TIE_GAP for place in places),
    )
    slots = list(range(1, RANK_SLOTS + 1))
    while len(slots) > len(order) - len(sharing):
        slots.pop(min(rng.randrange(EMPTY_SLOT_CHOICES), len(slots) - 1))
    ranks = [0] * len(order)
    for place, image in enumerate(order):
        ranks[image] = ranks[order[place - 1]] if place - 1 in sharing else slots.pop(0)
    return ranks


def ordinal_ranks(keys: Sequence[float | tuple[float, ...]]) -> list[int]:
    """Return ranks 0..n-1 by ascending key."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    ranks = [0] * len(order)
    for place, image in enumerate(order):
        ranks[image] = place
    return ranks


def hpdv2_label(rng: random.Random, scenes: Sequence[Scene]) -> tuple[list[int], list[list[int]]]:
    """Label the n images of a prompt as in the HPDv2 test split.

    Returns:
        The ranks (n,) by mean rank, and the ten annotators' ranks (10, n) behind them, all 0..n-1 with 0 = best. Equal
        mean ranks are ordered by the mean perceived utility.
    """
    latent = utilities(scenes)
    perceived = [noisy(rng, latent, HPDV2_NOISE) for _ in range(TEST_ANNOTATORS)]
    annotations = [ordinal_ranks([-value for value in values]) for values in perceived]
    totals = zip(*annotations, strict=True), zip(*perceived, strict=True)
    return ordinal_ranks([(sum(ranks), -sum(values)) for ranks, values in zip(*totals, strict=True)]), annotations


def hpdv2_pairs(rng: random.Random, scenes: Sequence[Scene]) -> list[tuple[int, int, int]]:
    """Judge all pairs as one annotator: (a, b, preferred) with image indices a < b; preferred 0 is a, 1 is b."""
    perceived = noisy(rng, utilities(scenes), HPDV2_NOISE)
    return [(a, b, int(perceived[b] > perceived[a])) for a, b in combinations(range(len(scenes)), 2)]


def agreement(ranks: Sequence[int], scores: Sequence[float]) -> Agreement:
    """Count the strictly ranked pairs of one prompt that scores (higher is better) order as the ranks do."""
    right, pairs = 0.0, 0
    for a, b in combinations(range(len(ranks)), 2):
        if ranks[a] != ranks[b]:
            pairs += 1
            right += 0.5 if scores[a] == scores[b] else float((ranks[a] < ranks[b]) == (scores[a] > scores[b]))
    return Agreement(right, pairs)

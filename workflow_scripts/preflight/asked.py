"""Made-up questions of the planned sizes: rows as of a subset, and images that are drawn when they are asked for."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from workflow_scripts.configuration.model import VALIDATION_FROM, Configuration, Dataset, Split
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.planning.devices import FACTS
from workflow_scripts.planning.workload import Questions
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences import synthetic_layouts
from workflow_scripts.preferences.images import Images
from workflow_scripts.preferences.synthetic_scenes import SIDE, draw, prompt_text

WORDS = ("red", "green", "blue", "yellow")  # each a token of most vocabularies, behind a space

Prompt = tuple[str, Callable[[int], Image.Image]]  # a text, and the images that it has, by number


@dataclass(frozen=True)
class Asked:
    """Questions of one split."""

    rows: list[dict[str, Any]]
    images: Images

    @classmethod
    def of(
        cls, prompts: Iterator[Prompt], count: int, images: int, pairs: Sequence[int], size: tuple[int, int]
    ) -> "Asked":
        """Make rows.

        Args:
            prompts: endless.
            count: number of rows.
            images: number of images of each row.
            pairs: number of judged pairs of each row; empty where images are rated or ranked.
            size: of an image, width and height in pixels.
        """
        rows: list[dict[str, Any]] = []
        drawn: dict[str, tuple[Callable[[int], Image.Image], int]] = {}
        for index, (text, picture) in enumerate(itertools.islice(prompts, count)):
            names = [f"{index:04d}-{number}" for number in range(images)]
            drawn |= {name: (picture, number) for number, name in enumerate(names)}
            judged = itertools.islice(itertools.combinations(names, 2), pairs[index] if pairs else 0)
            rows.append(
                {
                    "prompt_id": f"{index:04d}",
                    "prompt": text,
                    "image_ids": names,
                    "ranks": list(range(1, images + 1)),
                    "ratings": [1 + number % 7 for number in range(images)],
                    "pairs": [{"a": a, "b": b, "preferred": number % 2} for number, (a, b) in enumerate(judged)],
                }
            )

        def read(name: str) -> Image.Image:
            picture, number = drawn[name]
            return picture(number)

        return cls(rows, Images(dict.fromkeys(drawn, size), read))


def asked(
    c: Configuration,
    config: ModelConfig,
    processor: Any,
    own: bool,
    dataset: Dataset,
    split: Split,
    q: Questions,
    n: int,
) -> Asked:
    """Make `n` questions or a few more, as many for each prompt as `q` has; a training draws its own from all prompts.

    Args:
        c: the configuration.
        config: how the policy is asked.
        processor: counts tokens.
        own: whether the policy has weights of its own, whose completions depend on what they are asked.
        dataset: whose questions.
        split: of it.
        q: what is planned for it.
        n: number of questions.
    """
    each = 1 if split == "train" else max(1, round(q.items / q.prompts))
    pairs: list[int] = []
    if config.protocol == "pointwise":
        images, count = each, math.ceil(n / each)
    elif split == "test":
        images = 1 + each // (2 if c.rollouts.both_orders else 1)
        count = math.ceil(n / each)
    else:
        images = math.ceil((1 + math.sqrt(1 + 8 * each)) / 2)  # i images have i (i - 1) / 2 pairs
        pairs = [min(each, n - done) for done in range(0, n, each)]
        count = len(pairs)
    if own and getattr(c.datasets, dataset).source == "synthetic":
        return Asked.of(synthetic(c, dataset, split), count, images, pairs, (SIDE, SIDE))
    synthetic_size = (SIDE, SIDE) if getattr(c.datasets, dataset).source == "synthetic" else None
    width, height = synthetic_size or FACTS["questions"][dataset]["typical_image"]
    words = filling(config.template, processor, q.mean - sum(image.tokens for image in q.images))
    return Asked.of(noise(words, width, height), count, images, pairs, (width, height))


def synthetic(c: Configuration, dataset: Any, split: Split) -> Iterator[Prompt]:
    """Yield prompts of the synthetic world with their images, again from the first where there are no more."""
    world = getattr(c.datasets, dataset).synthetic
    origin: Any = VALIDATION_FROM[dataset] if split == "validation" else split
    count = getattr(world, f"{origin}_prompts")
    scenes_of = synthetic_layouts.imagereward_scenes if dataset == "imagereward" else synthetic_layouts.hpdv2_scenes
    prompts = synthetic_layouts.prompts(dataset, world.seed, origin, count, world.test_prompts)
    for index, prompt in itertools.cycle(enumerate(prompts)):
        scenes = scenes_of(world.seed, origin, index, prompt)
        yield prompt_text(*prompt), lambda number, scenes=scenes: draw(scenes[number % len(scenes)])  # type: ignore[misc]


def noise(words: int, width: int, height: int) -> Iterator[Prompt]:
    """Yield prompts of this many words with images of noise, all different."""
    for index in itertools.count():

        def picture(number: int, index: int = index) -> Image.Image:
            pixels = np.random.default_rng([index, number]).integers(0, 256, (height, width, 3), dtype=np.uint8)
            return Image.fromarray(pixels)

        yield " ".join(random.Random(index).choices(WORDS, k=words)), picture


def filling(template: str, processor: Any, tokens: float) -> int:
    """Number of words with which a question has this many tokens, visual ones left out."""

    def length(words: int) -> int:
        chat = messages(template, " ".join(itertools.islice(itertools.cycle(WORDS), words)))
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - template.count("{image}")

    few, many = 8, 72
    each = (length(many) - length(few)) / (many - few)
    return max(1, round(few + (tokens - length(few)) / each))

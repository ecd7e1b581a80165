"""Training and validation sets: their images, their items with targets, and the data set that TRL reads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import datasets
from PIL import Image

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import Images, decoded
from workflow_scripts.preferences.schema import IMAGES, SUBSET, SchemaError, check_schema, read_table
from workflow_scripts.rollouts.context import within_context
from workflow_scripts.rollouts.items import Item, stable_random


@dataclass(frozen=True)
class Split:
    """Annotated prompts and images of the training or validation set."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    images: Images

    @classmethod
    def read(cls, name: str, subset: Path, images: Path, cache: Path) -> Self:
        """Read a subset and open its images, with the memory-mapped copy of the images in `cache`."""
        return cls(name, subset, read_table(subset, SUBSET).to_pylist(), image_reader(images, cache))

    def items(
        self, config: TrainGrpo, policy: Policy, sampling: Sampling, warn: Callable[[str], None]
    ) -> list[tuple[Item, int]]:
        """Items with targets, without questions that exceed the policy's context; a warning counts those.

        Raises:
            SchemaError: no question is left.
        """
        found = training_items(self.rows, set(self.images.sizes), config.model.protocol, config.seed)
        questions = [item for item, _ in found]
        kept = set(within_context(policy, questions, self.images.sizes, sampling, warn, f"{self.name} questions"))
        if not kept:
            raise SchemaError(f"{self.path}: no {self.name} question is left; check the subset and its images")
        return [(item, target) for item, target in found if item in kept]


def image_reader(path: Path, cache: Path) -> Images:
    """Open a file of images, memory-mapped in the folder `cache`, so that any number of images fits into memory."""
    check_schema(path, IMAGES)
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache), keep_in_memory=False)
    row_of = {name: row for row, name in enumerate(table["image_id"])}

    def read(name: str) -> Image.Image:
        return decoded(table[row_of[name]]["bytes"])

    return Images(dict(zip(row_of, zip(table["width"], table["height"], strict=True), strict=True)), read)


def training_items(rows: list[dict[str, Any]], readable: set[str], protocol: str, seed: int) -> list[tuple[Item, int]]:
    """Items with targets: an image with its rating, or a pair in random order with 1 where the second is preferred.

    Raises:
        SchemaError: the protocol is pointwise and a prompt has no ratings.
    """
    items = []
    for row in rows:
        if protocol == "pointwise":
            if row["ratings"] is None:
                raise SchemaError(
                    f"prompt_id {row['prompt_id']} has no ratings to train on; give them, or set "
                    "datasets.own.protocol to pairwise"
                )
            for image, rating in zip(row["image_ids"], row["ratings"], strict=True):
                if image in readable:
                    items.append((Item(row["prompt_id"], row["prompt"], (image,), image), rating))
            continue
        for pair in row["pairs"]:
            shown = [pair["a"], pair["b"]]
            if not set(shown) <= readable:
                continue
            if stable_random("order", seed, row["prompt_id"], *sorted(shown)) % 2:
                shown.reverse()
            preferred = pair["b"] if pair["preferred"] else pair["a"]
            items.append((Item(row["prompt_id"], row["prompt"], tuple(shown), shown[1]), int(shown[1] == preferred)))
    return items


def trl_dataset(items: list[tuple[Item, int]], images: Images, template: str, step_items: int) -> datasets.Dataset:
    """Data set for TRL, with columns `prompt` (a chat), `images` and `target`; images are decoded on access.

    TRL asks for the items of a step again for each completion and each accumulation step. The images of a step are
    kept: each is decoded once, and is one object for all rows that show it, which is processed once.

    Args:
        items: questions with their targets.
        images: their images.
        template: of the question.
        step_items: number of items in a step.

    Raises:
        SchemaError: there are fewer items than a step takes, so that TRL would not train.
    """
    if len(items) < step_items:
        raise SchemaError(
            f"there are {len(items)} training items; lower prompts_per_step, {step_items}, to at most that"
        )
    shown = lru_cache(maxsize=step_items * max(len(item.image_ids) for item, _ in items))(images.read)

    def columns(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [items[i] for i in batch["item"]]
        return {
            "prompt": [messages(template, item.prompt) for item, _ in chosen],
            "images": [[shown(name) for name in item.image_ids] for item, _ in chosen],
            "target": [target for _, target in chosen],
        }

    return datasets.Dataset.from_dict({"item": list(range(len(items)))}).with_transform(columns)

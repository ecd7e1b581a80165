"""How much there is to do: questions of every stage, counted where the data are known, expected where they are not.

The synthetic world is counted exactly, without drawing an image; so are data that have been read already. Of published
data that are not here only the published counts are known.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from workflow_scripts.configuration.data_stages import SelectSubset
from workflow_scripts.configuration.model import VALIDATION_FROM, Configuration, Dataset, Split, Track
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.planning.architecture import Image
from workflow_scripts.planning.devices import FACTS, PlanError
from workflow_scripts.planning.tokens import Reader
from workflow_scripts.preferences import subsampling, synthetic_layouts
from workflow_scripts.preferences.hpdv2 import text_digest
from workflow_scripts.preferences.synthetic_annotators import hpdv2_pairs
from workflow_scripts.preferences.synthetic_scenes import SIDE, prompt_text


class Row(NamedTuple):
    """A prompt: its images that can be read, and its judged pairs of two such images."""

    prompt_id: str
    prompt: str
    images: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Questions:
    """What the policy is asked: all questions of one stage instance."""

    prompts: float
    items: float
    tokens: float  # of all questions together, visual ones included
    longest: float  # tokens of the longest question
    images: tuple[Image, ...]  # of a typical question
    largest: tuple[Image, ...]  # of the largest one
    counted: bool  # from data, not from published totals

    @property
    def mean(self) -> float:
        """Tokens of a question."""
        return self.tokens / self.items


def synthetic_rows(c: Configuration, dataset: Dataset, split: Split) -> list[Row]:
    """Rows of a split of the synthetic world as its reader finds them, without images that cannot be read."""
    return _synthetic_rows(getattr(c.datasets, dataset).synthetic, dataset, split)


@cache  # the splits are asked for by each other
def _synthetic_rows(world: Any, dataset: Any, split: Split) -> list[Row]:
    count = getattr(world, f"{split}_prompts")
    rows, images = [], 0
    for index, prompt in enumerate(synthetic_layouts.prompts(dataset, world.seed, split, count, world.test_prompts)):
        text = prompt_text(*prompt)
        draw = synthetic_layouts.imagereward_scenes if dataset == "imagereward" else synthetic_layouts.hpdv2_scenes
        scenes = draw(world.seed, split, index, prompt)
        names = [f"{images + i:08d}.jpg" for i in range(len(scenes))]
        images += len(names)
        pairs: list[tuple[str, str]] = []
        if dataset == "imagereward":
            prompt_id = f"{index:06d}-{synthetic_layouts.SPLIT_NUMBER[split]:04d}"
        elif split == "train":
            prompt_id = f"train-{text_digest(text)}"
            judged = hpdv2_pairs(synthetic_layouts.stream(dataset, world.seed, split, index, "annotator"), scenes)
            pairs = [(names[a], names[b]) for a, b, _ in judged]
        else:
            prompt_id = f"test-{index:04d}-{text_digest(text)}"
        rows.append(Row(prompt_id, text, tuple(names), tuple(pairs)))
    if split != "train":
        return rows
    unreadable = {rows[index].images[-1] for index in range(1, min(world.unreadable_images + 1, len(rows)))}
    return [_readable(row, unreadable) for row in rows]


def _readable(row: Row, unreadable: set[str]) -> Row:
    images = tuple(name for name in row.images if name not in unreadable)
    return row._replace(images=images, pairs=tuple(pair for pair in row.pairs if unreadable.isdisjoint(pair)))


def read_rows(path: Path) -> list[Row]:
    """Rows of a canonical subset that an earlier run has selected."""
    columns = ["position", "prompt_id", "prompt", "image_ids", "pairs"]
    rows = sorted(pq.read_table(path, columns=columns).to_pylist(), key=lambda row: row["position"])
    return [
        Row(r["prompt_id"], r["prompt"], tuple(r["image_ids"]), tuple((p["a"], p["b"]) for p in r["pairs"] or []))
        for r in rows
    ]


def selected_rows(c: Configuration, dataset: Dataset, split: Split) -> list[Row] | None:
    """Rows that the stages use of a split, in hash order: `select_subset` on the synthetic world, or what it wrote.

    Returns:
        None where the data are published and not here yet.

    Raises:
        PlanError: the data are neither synthetic nor published nor here.
    """
    data = getattr(c.datasets, dataset)
    if data.source != "synthetic":
        path = Path(c.results) / "datasets" / dataset / split / "subset.parquet"
        read = read_rows(path) if path.is_file() else None
        if read is None and data.source != "hub":
            raise PlanError(
                f"{path} is not there yet, and only it tells how much data there is; make it with snakemake"
            )
        return read[: data.test_prompts] if read and split == "test" else read
    origin = VALIDATION_FROM[dataset] if split == "validation" else split
    rows = {row.prompt_id: row for row in synthetic_rows(c, dataset, origin)}
    others: list[Split] = [] if split == "test" else ["test"]
    if split == "validation" and origin == "validation":
        others.append("train")
    units = {name: [_unit(row, pair) for pair in row.pairs] for name, row in rows.items()}
    config = SelectSubset.of(c, dataset, split)
    selection = subsampling.select(
        config,
        _normalised(rows.values()),
        [_normalised(synthetic_rows(c, dataset, other)) for other in others],
        units if config.by == "pair" else None,
    )
    chosen = [rows[name] for name in selection.prompts]
    if split == "test":
        return chosen[: data.test_prompts]
    if selection.pairs is None:
        return chosen
    kept = selection.pairs
    return [row._replace(pairs=tuple(pair for pair in row.pairs if _unit(row, pair) in kept)) for row in chosen]


def _normalised(rows: Any) -> dict[str, str]:
    return {row.prompt_id: subsampling.normalised(row.prompt) for row in rows}


def _unit(row: Row, pair: tuple[str, str]) -> str:
    return subsampling.pair_unit(row.prompt_id, *pair)


# ------------------------------------------------------------------------------------------------------- the questions


def questions(c: Configuration, reader: Reader, track: Track, dataset: Dataset, split: Split) -> Questions:
    """What a policy of this track is asked of this split: training and validation items, or test items.

    Args:
        c: the configuration.
        reader: says how many tokens texts and images are for the policy.
        track: pointwise questions show an image, pairwise ones two.
        dataset: whose questions.
        split: pairs of the training data are judged ones, pairs of a test set are those with the anchor.
    """
    asking = ModelConfig.of(c, track)
    pairwise, template = asking.protocol == "pairwise", asking.template
    orders = 2 if pairwise and split == "test" and c.rollouts.both_orders else 1
    about = FACTS["questions"][dataset]

    def seen(width: int, height: int) -> tuple[Image, ...]:
        return (reader.image(width, height),) * (2 if pairwise else 1)

    rows = selected_rows(c, dataset, split)
    synthetic = getattr(c.datasets, dataset).source == "synthetic"
    typical, largest = (
        (seen(SIDE, SIDE),) * 2 if synthetic else (seen(*about[f"{n}_image"]) for n in ("typical", "largest"))
    )
    if rows is None:
        prompts, images, pairs = published_totals(c, dataset, split)
        judged = (images - prompts) * orders if split == "test" else pairs
        items = judged if pairwise else images
        texts = [reader.text(template, "x" * about[f"{n}_prompt"]) for n in ("typical", "longest")]
        means = texts[0] + sum(image.tokens for image in typical)
        return Questions(
            prompts, items, items * means, texts[1] + sum(i.tokens for i in largest), typical, largest, counted=False
        )
    visual = sum(image.tokens for image in typical)
    tokens, items, longest, asked = 0.0, 0, 0.0, 0
    for row in rows:
        if not pairwise:
            count = len(row.images)
        elif split == "test":
            count = max(0, len(row.images) - 1) * orders
        else:
            count = len(row.pairs)
        if count:
            each = reader.text(template, row.prompt) + visual
            tokens, items, longest, asked = tokens + count * each, items + count, max(longest, each), asked + 1
    if not items:
        raise PlanError(
            f"datasets.{dataset}: nothing is left of its {split} split to ask about; raise what is kept of it"
        )
    return Questions(asked, items, tokens, longest, typical, largest, counted=True)


def published_totals(c: Configuration, dataset: Dataset, split: Split) -> tuple[float, float, float]:
    """Prompts, images and pairs that are used of a published split, from its published totals.

    Of a share the same share of all is expected; prompts that a filter drops are not known and not taken off.
    """
    data = getattr(c.datasets, dataset)
    counts = PUBLISHED[dataset]["counts"]
    if split == "train":
        total = counts[f"train-{data.hub.train_set}" if dataset == "imagereward" else "train"]
        share = data.train_fraction
        if data.subsample_by == "pair":  # an image stays with any of its three pairs
            return (
                total["prompts"] * (1 - (1 - share) ** 6),
                total["images"] * (1 - (1 - share) ** 3),
                total["pairs"] * share,
            )
    else:
        total = counts[VALIDATION_FROM[dataset] if split == "validation" else split]
        share = min(1.0, getattr(data, f"{split}_prompts") / total["prompts"])
    return total["prompts"] * share, total["images"] * share, total["pairs"] * share

"""What lands on the disk and what is downloaded for it, in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workflow_scripts.configuration.model import VALIDATION_FROM, Configuration, Dataset
from workflow_scripts.configuration.published import PUBLISHED, download_sizes, published_files
from workflow_scripts.planning.architecture import BYTES, FULL
from workflow_scripts.planning.memory import Model
from workflow_scripts.planning.workload import published_totals, selected_rows, synthetic_rows

SYNTHETIC_IMAGE = {"imagereward": 4_700, "hpsv2": 3_300}  # bytes of an 84 x 84 image, lossless WebP and JPEG, measured
ROLLOUT_TOKEN = 2.5  # bytes of a completion's token in a rollouts file, text included, measured
CHECKPOINTS = 3  # the last two, and the best


@dataclass(frozen=True)
class Artifact:
    """Files of one kind."""

    name: str
    where: str
    download: float
    disk: float
    lasting: bool = True


def artifacts(c: Configuration, models: Mapping[Any, Model], completion_tokens: dict[str, float]) -> list[Artifact]:
    """All artifacts of a configuration; policies with their adapters by track, `completion_tokens` by stage."""
    found = [_policy(c, next(iter(models.values())))]
    for dataset in dict.fromkeys([*c.tracks, *(cross.test for cross in c.cross_tests)]):
        found += _dataset(c, dataset, trained=c.trains() and dataset in c.tracks)
    rollouts = sum(tokens for name, tokens in completion_tokens.items() if name.startswith("generate_rollouts"))
    if c.trains():
        adapter = FULL * len(c.seeds) * sum(model.adapter for model in models.values())
        checkpoints = CHECKPOINTS * 3 * adapter
        found += [
            Artifact("adapters", f"{c.results}/policies", 0, adapter),
            Artifact("checkpoints with optimizer", f"{c.results}/checkpoints", 0, checkpoints, lasting=False),
        ]
    return [*found, Artifact("rollouts", f"{c.results}/rollouts", 0, ROLLOUT_TOKEN * rollouts * len(c.seeds))]


def _policy(c: Configuration, m: Model) -> Artifact:
    weights = float(m.architecture.parameters * BYTES["float16"])
    if c.policy.source != "hub":
        return Artifact("policy", c.policy.bundled, 0, weights)
    if c.policy.hub.path:
        return Artifact("policy", c.policy.hub.path, 0, 0)
    if published := published_files(c.policy.hub.repository):
        weights = float(sum(file["bytes"] for file in published.values()))
    return Artifact("policy", "the Hub's cache (HF_HOME)", weights, weights)


def _dataset(c: Configuration, dataset: Dataset, trained: bool) -> list[Artifact]:
    """Raw data, the images of what is kept, and the copy of these that a training maps into memory."""
    data = getattr(c.datasets, dataset)
    where = f"{c.downloads}/{data.source}/{dataset}"
    splits: list[Any] = ["train", "validation", "test"] if trained else ["test"]
    if data.source == "synthetic":
        size = SYNTHETIC_IMAGE[dataset]
        counted = {split: selected_rows(c, dataset, split) or [] for split in splits}
        kept = {split: float(size * sum(len(row.images) for row in rows)) for split, rows in counted.items()}
        all_splits: list[Any] = ["train", "validation", "test"] if dataset == "imagereward" else ["train", "test"]
        raw = float(size * sum(len(row.images) for split in all_splits for row in synthetic_rows(c, dataset, split)))
        download = 0.0
    elif data.source == "hub":
        raw, kept = _published(c, dataset, splits)
        download = 0.0 if data.hub.path else raw
        raw = download
    else:
        return []
    copied = kept.get("train", 0) + kept.get("validation", 0)
    found = [
        Artifact(f"{dataset}, raw", where, download, raw),
        Artifact(f"{dataset}, images kept", f"{c.results}/datasets/{dataset}", 0, sum(kept.values())),
        Artifact(f"{dataset}, mapped copy", f"{c.results}/checkpoints", 0, copied, lasting=False),
    ]
    return found if c.trains() else found[:2]


def _published(c: Configuration, dataset: Dataset, splits: list[Any]) -> tuple[float, dict[str, float]]:
    """Bytes of the published files, and of the images kept of each split: as many as its share of the images."""
    published = PUBLISHED[dataset]
    files = download_sizes(dataset, getattr(c.datasets, dataset).hub)
    parts = {"imagereward": "images/{}", "hpsv2": "{}.tar.gz"}[dataset]
    kept = {}
    for split in splits:
        origin = VALIDATION_FROM[dataset] if split == "validation" else split
        held = sum(size for name, size in files.items() if name.startswith(parts.format(origin)))
        key = (
            f"train-{c.datasets.imagereward.hub.train_set}" if (dataset, origin) == ("imagereward", "train") else origin
        )
        kept[split] = held * published_totals(c, dataset, split)[1] / published["counts"][key]["images"]
    return sum(files.values()), kept

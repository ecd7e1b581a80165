"""The keys of the configuration that the stages up to the images use (`stages` has those that follow)."""

from typing import Any, ClassVar, Self

from workflow_scripts.configuration.model import (
    VALIDATION_FROM,
    Configuration,
    Dataset,
    Hpdv2Hub,
    Hpdv2World,
    ImageRewardHub,
    ImageRewardWorld,
    Section,
    Split,
    StageConfig,
    SubsampleUnit,
)
from workflow_scripts.configuration.published import PUBLISHED


class PublishedSplit(Section):
    """A split as it is published: where, and how much it holds."""

    name: str
    repository: str
    revision: str
    counts: dict[str, int]
    """Prompts, images and pairs (ties included)."""
    within: dict[str, int]
    """Largest difference from each count that rounding explains."""

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split) -> Self | None:
        """Select from the published facts; None for data from elsewhere, and where no counts are published."""
        data: Any = getattr(c.datasets, dataset)
        if data.source != "hub":
            return None
        name = f"train-{data.hub.train_set}" if (dataset, split) == ("imagereward", "train") else split
        facts = PUBLISHED[dataset]
        if name not in facts["counts"]:
            return None
        counts = dict(facts["counts"][name])
        within = counts.pop("within")
        return cls(name=name, repository=facts["repository"], revision=facts["revision"], counts=counts, within=within)


class SynthesizeDataset(StageConfig):
    """Config of `synthesize_dataset`."""

    stage: ClassVar[str] = "synthesize_dataset"
    dataset: Dataset
    world: Hpdv2World | ImageRewardWorld  # the one with fewer keys first: the first that fits is taken

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset) -> Self:
        """Select from the configuration."""
        return cls(dataset=dataset, world=getattr(c.datasets, dataset).synthetic)


class DownloadDataset(StageConfig):
    """Config of `download_dataset`."""

    stage: ClassVar[str] = "download_dataset"
    dataset: Dataset
    hub: Hpdv2Hub | ImageRewardHub

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset) -> Self:
        """Select from the configuration."""
        return cls(dataset=dataset, hub=getattr(c.datasets, dataset).hub)


class RecordOwnData(StageConfig):
    """Config of `record_own_data`."""

    stage: ClassVar[str] = "record_own_data"
    folder: str
    annotations: str
    split_seed: int
    validation_fraction: float
    test_fraction: float

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        own = c.datasets.own
        return cls(**{name: getattr(own, name) for name in cls.model_fields})


class ReadAnnotations(StageConfig):
    """Config of `read_annotations`."""

    stage: ClassVar[str] = "read_annotations"
    dataset: Dataset
    split: Split
    published: PublishedSplit | None = None

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split) -> Self:
        """Select from the configuration, with what is published of the split where the data are from the Hub."""
        return cls(dataset=dataset, split=split, published=PublishedSplit.of(c, dataset, split))


class SelectSubset(StageConfig):
    """Config of `select_subset`: `fraction` for training, `prompts` for validation, everything (in order) for test."""

    stage: ClassVar[str] = "select_subset"
    dataset: Dataset
    split: Split
    seed: int
    by: SubsampleUnit
    fraction: float
    prompts: int | None
    drop_overlap: bool

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split) -> Self:
        """Select from the configuration."""
        data = getattr(c.datasets, dataset)
        whole = split == "test"
        # Validation prompts of HPDv2 come from its training split, beside those that training keeps.
        shares = split == "train" or (split == "validation" and VALIDATION_FROM[dataset] == "train")
        return cls(
            dataset=dataset,
            split=split,
            seed=data.subsample_seed,
            by=data.subsample_by if shares else "prompt",
            fraction=data.train_fraction if shares else 1.0,
            prompts=data.validation_prompts if split == "validation" else None,
            drop_overlap=not whole and data.drop_overlap,
        )


class ReadImages(StageConfig):
    """Config of `read_images`: positions [start, stop) in the hash order of the subset; no `stop`: to the end."""

    stage: ClassVar[str] = "read_images"
    dataset: Dataset
    split: Split
    shard: int
    start: int
    stop: int | None

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split, shard: int) -> Self:
        """Select from the configuration: test images by shard, those of the other splits in one piece."""
        start, stop = c.shard_range(dataset, shard) if split == "test" else (0, None)
        return cls(dataset=dataset, split=split, shard=shard, start=start, stop=stop)

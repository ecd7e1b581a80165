"""Which keys of the configuration each stage uses: its `config` argument, and nothing else reaches it.

The canonical JSON of these models is a rule's parameter, so a stage reruns exactly when one of its own keys changed.
"""

import inspect
from typing import Any, Literal, Self

from pydantic import Field

from workflow_scripts.configuration.model import (
    PROTOCOL,
    Bootstrap,
    ColdStart,
    Configuration,
    CrossTest,
    Dataset,
    Distributed,
    Hpdv2Hub,
    Hpdv2World,
    ImageRewardHub,
    ImageRewardWorld,
    PairwiseRewards,
    PairwiseTraining,
    PointwiseTraining,
    PolicyHub,
    Protocol,
    RolloutsVllm,
    Sampling,
    Section,
    Split,
    Track,
    TrainingVllm,
)
from workflow_scripts.files.digests import canonical_json

VALIDATION_FROM = {"imagereward": "validation", "hpsv2": "train", "own": "validation"}  # HPDv2 has no such split


class StageConfig(Section):
    """What one stage instance uses, wildcards included."""

    def canonical(self) -> str:
        """Text that differs exactly when the stage has to rerun."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return next(name for name, model in STAGES.items() if type(self) is model)

    @property
    def code_engine(self) -> str:
        """Rollout engine whose code the stage runs, if it runs any."""
        return "transformers"


class SynthesizeDataset(StageConfig):
    """Config of `synthesize_dataset`."""

    dataset: Dataset
    world: Hpdv2World | ImageRewardWorld  # the one with fewer keys first: the first that fits is taken

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset) -> Self:
        """Select from the configuration."""
        return cls(dataset=dataset, world=getattr(c.datasets, dataset).synthetic)


class DownloadDataset(StageConfig):
    """Config of `download_dataset`."""

    dataset: Dataset
    hub: Hpdv2Hub | ImageRewardHub

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset) -> Self:
        """Select from the configuration."""
        return cls(dataset=dataset, hub=getattr(c.datasets, dataset).hub)


class RecordOwnData(StageConfig):
    """Config of `record_own_data`."""

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

    dataset: Dataset
    split: Split

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split) -> Self:
        """Select from the configuration."""
        return cls(dataset=dataset, split=split)


class SelectSubset(StageConfig):
    """Config of `select_subset`: `fraction` for training, `prompts` for validation, everything (in order) for test."""

    dataset: Dataset
    split: Split
    seed: int
    by: Literal["prompt", "pair"]
    fraction: float
    prompts: int | None
    drop_overlap: bool

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split) -> Self:
        """Select from the configuration."""
        data = getattr(c.datasets, dataset)
        whole = split == "test"
        # A validation split of its own is drawn without looking at what training keeps; that of HPDv2 is not.
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
    """Config of `read_images`: which positions of the subset's hash order; `stop` None is to the end."""

    dataset: Dataset
    split: Split
    shard: int
    start: int
    stop: int | None

    @classmethod
    def of(cls, c: Configuration, dataset: Dataset, split: Split, shard: int) -> Self:
        """Select from the configuration: test images by shard, those of the other splits in one piece."""
        start, stop = shard_range(c, dataset, shard) if split == "test" else (0, None)
        return cls(dataset=dataset, split=split, shard=shard, start=start, stop=stop)


class ColdStartPolicy(StageConfig):
    """Config of `cold_start_policy`."""

    cold_start: ColdStart
    templates: dict[Protocol, str]
    numeric_threads: int

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            cold_start=c.policy.cold_start,
            templates={"pointwise": c.prompts.pointwise, "pairwise": c.prompts.pairwise},
            numeric_threads=c.numeric_threads,
        )


class PrepareBasePolicy(StageConfig):
    """Config of `prepare_base_policy`."""

    source: Literal["bundled", "cold_start", "hub"]
    bundled: str | None
    hub: PolicyHub | None
    downloads: str | None = None

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        source = c.policy.source
        return cls(
            source=source,
            bundled=c.policy.bundled if source == "bundled" else None,
            hub=c.policy.hub if source == "hub" else None,
            downloads=c.downloads if source == "hub" else None,
        )


class ModelConfig(Section):
    """How a model is loaded and what it is asked: shared by training and rollouts."""

    protocol: Protocol
    template: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    # These two are left out at their defaults, which is what was taken before there were the keys.
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", exclude_if=lambda name: name == "sdpa")
    min_pixels: int | None
    max_pixels: int | None
    image_processor: dict[str, Any] = Field(default={}, exclude_if=lambda settings: not settings)
    numeric_threads: int

    @classmethod
    def of(cls, c: Configuration, track: Track) -> Self:
        """Select from the configuration."""
        protocol = protocol_of(c, track)
        return cls(
            protocol=protocol,
            template=getattr(c.prompts, protocol),
            dtype=c.policy.dtype,
            device=c.policy.device,
            attention=c.policy.attention,
            min_pixels=c.policy.min_pixels,
            max_pixels=c.policy.max_pixels,
            image_processor=c.policy.image_processor,
            numeric_threads=c.numeric_threads,
        )


class TrainGrpo(StageConfig):
    """Config of `train_grpo`."""

    track: Track
    seed: int
    model: ModelConfig
    training: PairwiseTraining | PointwiseTraining
    distributed: Distributed | None = None

    @classmethod
    def of(cls, c: Configuration, track: Track, seed: int) -> Self:
        """Select from the configuration: several processes sum in another order; of vLLM where it generates."""
        training = getattr(c.training, track)
        if track == "own":  # the keys of its protocol alone
            keys = dict(training)
            if protocol_of(c, track) == "pointwise":
                training = PointwiseTraining(**keys)
            else:
                rewards = PairwiseRewards(format=training.rewards.format, exact=training.rewards.exact)
                training = PairwiseTraining(**keys | {"rewards": rewards})
        if training.generation == "transformers":
            training = training.model_copy(update={"vllm": TrainingVllm()})
        return cls(
            track=track,
            seed=seed,
            model=ModelConfig.of(c, track),
            training=training,
            distributed=c.distributed if c.distributed.processes > 1 else None,
        )


class GenerateRollouts(StageConfig):
    """Config of `generate_rollouts`; `start` and `stop` are positions in the hash order of the test prompts."""

    track: Track
    policy: Literal["zeroshot", "grpo"]
    test: Dataset
    seed: int
    shard: int
    start: int
    stop: int
    block: int
    rollouts: int
    batch_items: int
    both_orders: bool
    engine: Literal["transformers", "vllm"]
    # Of the other engine nothing is known here: its canonical JSON is the one that it had before there were two.
    vllm: RolloutsVllm | None = Field(None, exclude_if=lambda vllm: vllm is None)
    sampling: Sampling
    model: ModelConfig

    @classmethod
    def of(
        cls,
        c: Configuration,
        track: Track,
        policy: Literal["zeroshot", "grpo"],
        test: Dataset,
        seed: int,
        shard: int,
        block: int,
    ) -> Self:
        """Select from the configuration."""
        start, stop = shard_range(c, test, shard)
        return cls(
            track=track,
            policy=policy,
            test=test,
            seed=seed,
            shard=shard,
            start=start,
            stop=stop,
            block=block,
            rollouts=c.rollouts.block_size,
            batch_items=c.rollouts.batch_items,
            both_orders=protocol_of(c, track) == "pairwise" and c.rollouts.both_orders,
            engine=c.rollouts.engine,
            vllm=c.rollouts.vllm if c.rollouts.engine == "vllm" else None,
            sampling=c.rollouts.sampling,
            model=ModelConfig.of(c, track),
        )

    @property
    def code_engine(self) -> str:
        """The engine that generates."""
        return self.engine


class ScoreRollouts(StageConfig):
    """Config of `score_rollouts`."""

    track: Track
    policy: Literal["zeroshot", "grpo"]
    test: Dataset
    seed: int
    protocol: Protocol

    @classmethod
    def of(cls, c: Configuration, track: Track, policy: Literal["zeroshot", "grpo"], test: Dataset, seed: int) -> Self:
        """Select from the configuration."""
        return cls(track=track, policy=policy, test=test, seed=seed, protocol=protocol_of(c, track))


class MeasureAccuracy(StageConfig):
    """Config of `measure_accuracy`."""

    track: Track
    policy: Literal["zeroshot", "grpo"]
    test: Dataset
    seed: int
    protocol: Protocol
    report_k: list[int]
    missing_answer: Literal["wrong", "neutral", "dropped"]
    bootstrap: Bootstrap

    @classmethod
    def of(cls, c: Configuration, track: Track, policy: Literal["zeroshot", "grpo"], test: Dataset, seed: int) -> Self:
        """Select from the configuration."""
        return cls(
            track=track,
            policy=policy,
            test=test,
            seed=seed,
            protocol=protocol_of(c, track),
            report_k=c.scoring.report_k,
            missing_answer=c.scoring.missing_answer,
            bootstrap=c.scoring.bootstrap,
        )


class MakeGallery(StageConfig):
    """Config of `make_gallery`."""

    track: Track
    policy: Literal["zeroshot", "grpo"]
    test: Dataset
    seed: int
    protocol: Protocol
    prompts: int
    traces: int

    @classmethod
    def of(cls, c: Configuration, track: Track, policy: Literal["zeroshot", "grpo"], test: Dataset, seed: int) -> Self:
        """Select from the configuration: no more prompts than are tested."""
        return cls(
            track=track,
            policy=policy,
            test=test,
            seed=seed,
            protocol=protocol_of(c, track),
            prompts=min(c.report.gallery_prompts, getattr(c.datasets, test).test_prompts),
            traces=c.report.traces,
        )


class MakeTables(StageConfig):
    """Config of `make_tables`."""

    tracks: list[Track]
    cross_tests: list[CrossTest]
    seeds: list[int]
    report_k: list[int]
    missing_answer: Literal["wrong", "neutral", "dropped"]
    bootstrap: Bootstrap
    hpsv2_fraction: float
    # Left out without own data: tables without it keep the canonical JSON that they had before the key.
    own_title: str | None = Field(default=None, exclude_if=lambda title: title is None)

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            tracks=c.tracks,
            cross_tests=c.cross_tests,
            seeds=c.seeds,
            report_k=c.scoring.report_k,
            missing_answer=c.scoring.missing_answer,
            bootstrap=c.scoring.bootstrap,
            hpsv2_fraction=c.datasets.hpsv2.train_fraction,
            own_title=c.datasets.own.title if uses_own_data(c) else None,
        )


class RankOwnImages(StageConfig):
    """Config of `rank_own_images`."""

    images: str
    prompt: str
    track: Track
    seed: int
    k: int
    batch: int
    both_orders: bool

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(**c.ranking.model_dump())


class MakeFigures(StageConfig):
    """Config of `make_figures`."""

    tracks: dict[str, Protocol]
    missing_answer: Literal["wrong", "neutral", "dropped"]
    bootstrap: Bootstrap
    own_title: str | None = Field(default=None, exclude_if=lambda title: title is None)

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            tracks={track: protocol_of(c, track) for track in c.tracks},
            missing_answer=c.scoring.missing_answer,
            bootstrap=c.scoring.bootstrap,
            own_title=c.datasets.own.title if uses_own_data(c) else None,
        )


class MakeReport(StageConfig):
    """Config of `make_report`."""

    report_k: list[int]
    confidence: float
    own_title: str | None = Field(default=None, exclude_if=lambda title: title is None)

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            report_k=c.scoring.report_k,
            confidence=c.scoring.bootstrap.confidence,
            own_title=c.datasets.own.title if uses_own_data(c) else None,
        )


STAGES: dict[str, Any] = {
    "synthesize_dataset": SynthesizeDataset,
    "download_dataset": DownloadDataset,
    "record_own_data": RecordOwnData,
    "read_annotations": ReadAnnotations,
    "select_subset": SelectSubset,
    "read_images": ReadImages,
    "cold_start_policy": ColdStartPolicy,
    "prepare_base_policy": PrepareBasePolicy,
    "train_grpo": TrainGrpo,
    "generate_rollouts": GenerateRollouts,
    "score_rollouts": ScoreRollouts,
    "measure_accuracy": MeasureAccuracy,
    "make_gallery": MakeGallery,
    "make_tables": MakeTables,
    "make_figures": MakeFigures,
    "make_report": MakeReport,
    "rank_own_images": RankOwnImages,
}

# Those that run a model; the others import no torch and start in a second or two.
RUN_MODELS = ("cold_start_policy", "train_grpo", "generate_rollouts", "rank_own_images")


def same_instance(c: Configuration, stage: str, recorded: dict[str, Any]) -> StageConfig:
    """What this configuration asks of the stage instance (data set, track, seed, ...) of a recorded config."""
    model = STAGES[stage]
    _, *instance = inspect.signature(model.of).parameters
    found: StageConfig = model.of(c, **{name: recorded[name] for name in instance})
    return found


def protocol_of(c: Configuration, track: Track) -> Protocol:
    """What a track trains and asks: of the user's own data it is configured, of the others published."""
    return c.datasets.own.protocol if track == "own" else PROTOCOL[track]


def uses_own_data(c: Configuration) -> bool:
    """Whether a policy is trained or tested on the user's own data."""
    return "own" in c.tracks or any(cross.test == "own" for cross in c.cross_tests)


def shard_range(c: Configuration, test: Dataset, shard: int) -> tuple[int, int]:
    """Positions [start, stop) of a shard in the hash order of the test prompts; only the last one is cut short."""
    start = shard * c.rollouts.shard_prompts
    return start, min(start + c.rollouts.shard_prompts, getattr(c.datasets, test).test_prompts)

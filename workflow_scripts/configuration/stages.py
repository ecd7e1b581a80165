"""The keys of the configuration that each stage uses: its `config` argument, all that a stage sees of it.

The canonical JSON of these models is a parameter of each rule: a stage reruns exactly when one of its own keys changes.
"""

import inspect
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from workflow_scripts.configuration.data_stages import (
    DownloadDataset,
    ReadAnnotations,
    ReadImages,
    RecordOwnData,
    SelectSubset,
    SynthesizeDataset,
)
from workflow_scripts.configuration.model import (
    BOTH_POLICIES,
    Attention,
    Bootstrap,
    ColdStart,
    Configuration,
    CrossTest,
    Dataset,
    Device,
    Distributed,
    Dtype,
    Engine,
    Instructions,
    MissingAnswer,
    PairwiseTraining,
    PointwiseTraining,
    PolicyHub,
    PolicyName,
    PolicySource,
    Protocol,
    RolloutsVllm,
    Sampling,
    Section,
    StageConfig,
    Track,
)

# Omitted without own data to keep old digests.
OwnTitle = Annotated[str | None, Field(exclude_if=lambda title: title is None)]
# Omitted at the default to keep old digests.
Policies = Annotated[list[PolicyName], Field(exclude_if=lambda policies: policies == BOTH_POLICIES)]


class ColdStartPolicy(StageConfig):
    """Config of `cold_start_policy`."""

    stage: ClassVar[str] = "cold_start_policy"
    cold_start: ColdStart
    templates: dict[Protocol, str]
    numeric_threads: int
    numeric_instructions: Instructions

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            cold_start=c.policy.cold_start,
            templates={"pointwise": c.prompts.pointwise, "pairwise": c.prompts.pairwise},
            numeric_threads=c.numeric_threads,
            numeric_instructions=c.numeric_instructions,
        )


class PrepareBasePolicy(StageConfig):
    """Config of `prepare_base_policy`."""

    stage: ClassVar[str] = "prepare_base_policy"
    source: PolicySource
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
    """How training and rollouts load a model and what they ask it."""

    protocol: Protocol
    template: str
    dtype: Dtype
    device: Device
    # `attention` and `image_processor` are omitted at the default to keep old digests.
    attention: Attention = Field("sdpa", exclude_if=lambda name: name == "sdpa")
    min_pixels: int | None
    max_pixels: int | None
    image_processor: dict[str, Any] = Field(default={}, exclude_if=lambda settings: not settings)
    numeric_threads: int
    numeric_instructions: Instructions | None = Field(None, exclude_if=lambda instructions: instructions is None)
    """None where they have no effect: on CUDA and for vLLM, which have kernels of their own."""

    @classmethod
    def of(cls, c: Configuration, track: Track, *, vllm: bool = False) -> Self:
        """Select from the configuration, for vLLM or not."""
        protocol = c.protocol_of(track)
        same = ("dtype", "device", "attention", "min_pixels", "max_pixels", "image_processor")
        return cls(
            protocol=protocol,
            template=getattr(c.prompts, protocol),
            numeric_threads=c.numeric_threads,
            numeric_instructions=None if vllm or c.policy.device == "cuda" else c.numeric_instructions,
            **{name: getattr(c.policy, name) for name in same},
        )


class TrainGrpo(StageConfig):
    """Config of `train_grpo`."""

    stage: ClassVar[str] = "train_grpo"
    track: Track
    seed: int
    model: ModelConfig
    training: PairwiseTraining | PointwiseTraining
    distributed: Distributed | None = None

    @classmethod
    def of(cls, c: Configuration, track: Track, seed: int) -> Self:
        """Select from the configuration, without keys that have no effect on this training."""
        model, given = ModelConfig.of(c, track), getattr(c.training, track)
        pairwise = model.protocol == "pairwise"
        # Own data have the keys of both protocols. Several processes sum in another order than one.
        unused: dict[str, Any] = {"rewards": {"approximate"}} if pairwise else {}
        if not given.generation.startswith("vllm"):
            unused["vllm"] = True
        return cls(
            track=track,
            seed=seed,
            model=model,
            training=(PairwiseTraining if pairwise else PointwiseTraining)(**given.model_dump(exclude=unused)),
            distributed=c.distributed if c.distributed.processes > 1 else None,
        )


class GenerateRollouts(StageConfig):
    """Config of `generate_rollouts`; `start` and `stop` are positions in the hash order of the test prompts."""

    stage: ClassVar[str] = "generate_rollouts"
    track: Track
    policy: PolicyName
    test: Dataset
    seed: int
    shard: int
    start: int
    stop: int
    block: int
    rollouts: int
    batch_items: int
    both_orders: bool
    engine: Engine
    # Set only for vLLM.
    vllm: RolloutsVllm | None = Field(None, exclude_if=lambda vllm: vllm is None)
    sampling: Sampling
    model: ModelConfig

    @classmethod
    def of(
        cls, c: Configuration, track: Track, policy: PolicyName, test: Dataset, seed: int, shard: int, block: int
    ) -> Self:
        """Select from the configuration."""
        start, stop = c.shard_range(test, shard)
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
            both_orders=c.protocol_of(track) == "pairwise" and c.rollouts.both_orders,
            engine=c.rollouts.engine,
            vllm=c.rollouts.vllm if c.rollouts.engine == "vllm" else None,
            sampling=c.rollouts.sampling,
            model=ModelConfig.of(c, track, vllm=c.rollouts.engine == "vllm"),
        )

    @property
    def code_engine(self) -> str:
        """The engine that generates."""
        return self.engine


class PolicyOnTest(StageConfig):
    """What the stages have in common that score, measure and show one policy on one test set."""

    track: Track
    policy: PolicyName
    test: Dataset
    seed: int
    protocol: Protocol

    @classmethod
    def of(cls, c: Configuration, track: Track, policy: PolicyName, test: Dataset, seed: int) -> Self:
        """Select from the configuration."""
        instance = {"track": track, "policy": policy, "test": test, "seed": seed}
        return cls(**instance, protocol=c.protocol_of(track), **cls.settings(c, test))

    @classmethod
    def settings(cls, c: Configuration, test: Dataset) -> dict[str, Any]:
        """Keys that only one of these stages has."""
        return {}


class ScoreRollouts(PolicyOnTest):
    """Config of `score_rollouts`."""

    stage: ClassVar[str] = "score_rollouts"


class MeasureAccuracy(PolicyOnTest):
    """Config of `measure_accuracy`."""

    stage: ClassVar[str] = "measure_accuracy"
    report_k: list[int]
    missing_answer: MissingAnswer
    bootstrap: Bootstrap

    @classmethod
    def settings(cls, c: Configuration, test: Dataset) -> dict[str, Any]:
        """Settings of the scoring."""
        return dict(c.scoring)


class MakeGallery(PolicyOnTest):
    """Config of `make_gallery`."""

    stage: ClassVar[str] = "make_gallery"
    prompts: int
    traces: int

    @classmethod
    def settings(cls, c: Configuration, test: Dataset) -> dict[str, Any]:
        """Size of the gallery: at most the prompts that are tested."""
        tested = getattr(c.datasets, test).test_prompts
        return {"prompts": min(c.report.gallery_prompts, tested), "traces": c.report.traces}


class MakeTables(StageConfig):
    """Config of `make_tables`."""

    stage: ClassVar[str] = "make_tables"
    tracks: list[Track]
    policies: Policies = BOTH_POLICIES
    cross_tests: list[CrossTest]
    seeds: list[int]
    report_k: list[int]
    missing_answer: MissingAnswer
    bootstrap: Bootstrap
    hpsv2_fraction: float
    own_title: OwnTitle = None

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            tracks=c.tracks,
            policies=c.policies,
            cross_tests=c.cross_tests,
            seeds=c.seeds,
            hpsv2_fraction=c.datasets.hpsv2.train_fraction,
            own_title=own_title(c),
            **dict(c.scoring),
        )


class RankOwnImages(StageConfig):
    """Config of `rank_own_images`."""

    stage: ClassVar[str] = "rank_own_images"
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

    stage: ClassVar[str] = "make_figures"
    tracks: dict[str, Protocol]
    missing_answer: MissingAnswer
    bootstrap: Bootstrap
    own_title: OwnTitle = None

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(
            tracks={track: c.protocol_of(track) for track in c.tracks},
            missing_answer=c.scoring.missing_answer,
            bootstrap=c.scoring.bootstrap,
            own_title=own_title(c),
        )


class MakeReport(StageConfig):
    """Config of `make_report`."""

    stage: ClassVar[str] = "make_report"
    report_k: list[int]
    confidence: float
    own_title: OwnTitle = None

    @classmethod
    def of(cls, c: Configuration) -> Self:
        """Select from the configuration."""
        return cls(report_k=c.scoring.report_k, confidence=c.scoring.bootstrap.confidence, own_title=own_title(c))


STAGES: dict[str, Any] = {
    model.stage: model
    for model in (
        SynthesizeDataset,
        DownloadDataset,
        RecordOwnData,
        ReadAnnotations,
        SelectSubset,
        ReadImages,
        ColdStartPolicy,
        PrepareBasePolicy,
        TrainGrpo,
        GenerateRollouts,
        ScoreRollouts,
        MeasureAccuracy,
        MakeGallery,
        MakeTables,
        MakeFigures,
        MakeReport,
        RankOwnImages,
    )
}

# Stages that run a model; the others import no torch and start in a second or two.
RUN_MODELS = ("cold_start_policy", "train_grpo", "generate_rollouts", "rank_own_images")


def same_instance(c: Configuration, stage: str, recorded: dict[str, Any]) -> StageConfig:
    """Config that this configuration gives the stage instance (data set, track, seed, ...) of a recorded config."""
    model = STAGES[stage]
    _, *instance = inspect.signature(model.of).parameters
    found: StageConfig = model.of(c, **{name: recorded[name] for name in instance})
    return found


def own_title(c: Configuration) -> str | None:
    """Title of the user's own data where a policy is trained or tested on them."""
    return c.datasets.own.title if c.uses_own_data() else None

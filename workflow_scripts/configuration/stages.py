"""Which keys of the configuration each stage uses: its `config` argument, and nothing else reaches it.

The canonical JSON of these models is a rule's parameter, so a stage reruns exactly when one of its own keys changed.
"""

import inspect
import shlex
from pathlib import Path
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
from workflow_scripts.running.provenance import ROOT, canonical_json

VALIDATION_FROM = {"imagereward": "validation", "hpsv2": "train", "own": "validation"}  # HPDv2 has no such split

FIGURES = (
    *("training_curves", "mean_at_k", "calibration_pairs", "calibration_ratings", "answers", "rank_distance"),
    *("confidence", "tie_rules", "presentation_order", "anchor_rank"),
)


class StageConfig(Section):
    """What one stage instance uses, wildcards included."""

    def canonical(self) -> str:
        """Text that differs exactly when the stage has to rerun."""
        return canonical_json(self.model_dump(mode="json"))


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


def job_resources(c: Configuration, rule: str) -> dict[str, int]:
    """What Snakemake and a cluster reserve for a job of a rule: GPUs, `mem_mb` and `runtime` in minutes."""
    asked = getattr(c.resources, rule, c.resources.others)
    return {"gpu": gpus(c, rule), "mem_mb": round(1000 * asked.memory_gigabytes), "runtime": asked.minutes}


def gpus(c: Configuration, rule: str) -> int:
    """GPUs that a job of a rule uses."""
    shared = c.rollouts.vllm.tensor_parallel_size if c.rollouts.engine == "vllm" else 1
    used = {"train_grpo": c.distributed.processes, "generate_rollouts": shared, "rank_own_images": 1}
    return used.get(rule, 0) * (c.policy.device == "cuda")


def interpreter(c: Configuration, rule: str) -> str:
    """Word of the shell for the Python that runs a rule's stage: the one of vLLM's environment where that generates."""
    uses_vllm = {
        "generate_rollouts": c.rollouts.engine == "vllm",
        "train_grpo": any(getattr(c.training, track).generation != "transformers" for track in c.tracks),
    }
    return shlex.quote(str(ROOT / c.vllm_python)) if uses_vllm.get(rule) else "python"


def launcher(c: Configuration, rule: str) -> str:
    """What starts a rule's stage: the interpreter, on GPUs of its own, in as many processes as it asks for."""
    processes = c.distributed.processes if rule == "train_grpo" else 1
    several = f" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {processes}"
    taken = f"python -m workflow_scripts.running.take_gpus {gpus(c, rule)} " if gpus(c, rule) else ""
    return taken + interpreter(c, rule) + (several if processes > 1 else "")


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


def shards(c: Configuration, test: Dataset) -> list[int]:
    """Numbers of the shards that cover the test prompts."""
    return list(range(-(-getattr(c.datasets, test).test_prompts // c.rollouts.shard_prompts)))


def gallery_shards(c: Configuration, test: Dataset) -> list[int]:
    """Numbers of the shards that hold the prompts of the gallery: the first in hash order."""
    prompts = min(c.report.gallery_prompts, getattr(c.datasets, test).test_prompts)
    return list(range(-(-prompts // c.rollouts.shard_prompts)))


def measured(c: Configuration) -> list[tuple[Track, str, Dataset, int]]:
    """(track, policy, test, seed) of every accuracy that the tables need; cross rows are of trained policies only."""
    own: list[tuple[Track, str, Dataset]] = [(t, policy, t) for t in c.tracks for policy in ("zeroshot", "grpo")]
    cross: list[tuple[Track, str, Dataset]] = [(x.track, "grpo", x.test) for x in c.cross_tests]
    return [(*case, seed) for case in own + cross for seed in c.seeds]


def accuracy_files(c: Configuration) -> list[str]:
    """Accuracies that the tables are made from."""
    return [f"{c.results}/accuracy/{t}/{policy}/seed{seed}/{test}.json" for t, policy, test, seed in measured(c)]


def score_files(c: Configuration) -> list[str]:
    """Scores of every policy on every test set of the tables."""
    return [f"{c.results}/scores/{t}/{policy}/seed{seed}/{test}.parquet" for t, policy, test, seed in measured(c)]


def rollout_files(c: Configuration) -> list[str]:
    """Rollouts of the same: all shards and blocks."""
    return [
        f"{c.results}/rollouts/{t}/{policy}/seed{seed}/{test}/{shard:04d}-{block:04d}.parquet"
        for t, policy, test, seed in measured(c)
        for shard in shards(c, test)
        for block in range(c.rollouts.blocks)
    ]


def test_sets(c: Configuration) -> list[Dataset]:
    """Data sets that any policy is tested on."""
    return list(dict.fromkeys(test for _, _, test, _ in measured(c)))


def gallery_files(c: Configuration) -> list[str]:
    """Galleries of every policy on every test set of the tables."""
    return [f"{c.results}/gallery/{t}/{policy}/seed{seed}/{test}.parquet" for t, policy, test, seed in measured(c)]


def dataset_record(c: Configuration, dataset: Dataset) -> str:
    """Record of the raw data set; synthetic and published data never share a folder, and own data are not copied."""
    if dataset == "own":
        return f"{c.results}/datasets/own/dataset.json"
    return f"{c.downloads}/{getattr(c.datasets, dataset).source}/{dataset}/dataset.json"


def bundled_files(c: Configuration) -> list[str]:
    """Files of the bundled policy that a changed model would change.

    Relative to the working directory where they are in it: a moved repository has the same inputs.
    """
    if c.policy.source != "bundled":
        return []
    return _from_here(sorted((ROOT / c.policy.bundled).glob("*.safetensors")))


def own_files(c: Configuration) -> list[str]:
    """The user's table, and all other files of its folder: a changed image is another data set. None if not used."""
    if not uses_own_data(c):
        return []
    own = c.datasets.own
    folder = ROOT / own.folder
    images = [
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".csv", ".jsonl", ".parquet")
    ]
    return _from_here([folder / own.annotations, *sorted(images)])


def ranked_images(c: Configuration) -> list[str]:
    """The user's table and the images to rank that are there; none where nothing is to be ranked."""
    if not c.ranking.images:
        return []
    from workflow_scripts.ranking.listing import listed  # here, so that no stage loads it

    given = ROOT / c.ranking.images
    paths = {one.path for one in listed(given, c.ranking.prompt)}
    return _from_here([*([given] if given.is_file() else []), *sorted(path for path in paths if path.is_file())])


def ranking_files(c: Configuration) -> list[str]:
    """Ranking of the user's images, where there are some to rank."""
    endings = ("csv", "jsonl", "html") if c.ranking.images else ()
    return [f"{c.results}/ranking/ranking.{ending}" for ending in endings]


def _from_here(paths: list[Path]) -> list[str]:
    here = Path.cwd()
    return [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]


def separate_training_preferences(c: Configuration, dataset: Dataset) -> list[str]:
    """Training annotations that a validation split must not overlap with; none where it is drawn from them."""
    own = VALIDATION_FROM[dataset] == "validation"
    return [f"{c.results}/datasets/{dataset}/train/preferences.parquet"] if own else []

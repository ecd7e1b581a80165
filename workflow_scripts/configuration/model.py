"""The configuration: one typed model that is the source of defaults, schema, reference page and error messages.

`reference.configuration` writes config.yaml, config.schema.json and docs/configuration.md from it.
"""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.digests import canonical_json
from workflow_scripts.files.redaction import IN_QUERY, redacted

Dataset = Literal["imagereward", "hpsv2", "own"]
Track = Literal["imagereward", "hpsv2", "own"]
Split = Literal["train", "validation", "test"]
DataSource = Literal["synthetic", "hub"]
SubsampleUnit = Literal["prompt", "pair"]
PolicyName = Literal["zeroshot", "grpo"]
BOTH_POLICIES: list[PolicyName] = ["zeroshot", "grpo"]
PolicySource = Literal["bundled", "cold_start", "hub"]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]
Instructions = Literal["avx2", "native"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Engine = Literal["transformers", "vllm"]
MissingAnswer = Literal["wrong", "neutral", "dropped"]
Protocol = Literal["pointwise", "pairwise"]
PROTOCOL: dict[str, Protocol] = {"imagereward": "pointwise", "hpsv2": "pairwise"}  # datasets.own.protocol is a key
# Split that validation prompts are taken from: HPDv2 is published without a validation split.
VALIDATION_FROM: dict[str, Split] = {"imagereward": "validation", "hpsv2": "train", "own": "validation"}


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class StageConfig(Section):
    """Keys that one stage instance uses, wildcards included."""

    stage: ClassVar[str]
    """Name of the stage."""

    def canonical(self) -> str:
        """Text that differs exactly when the stage has to rerun."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def code_engine(self) -> str:
        """Rollout engine whose code the stage runs, if it runs any."""
        return "transformers"


class ImageRewardHub(Section):
    """Where ImageRewardDB is published."""

    repository: str = PUBLISHED["imagereward"]["repository"]
    """Data set repository on the Hub."""
    revision: str = PUBLISHED["imagereward"]["revision"]
    """Commit, tag or branch; a commit id pins the data."""
    path: str = ""
    """Folder that already holds the published files; nothing is then downloaded or copied, and no repository used."""
    test_only: bool = Field(False, exclude_if=lambda test_only: not test_only)  # keeps old digests
    """Leave out the files that only training reads, nearly all of them; for policies: [zeroshot]."""
    train_set: Literal["1k", "2k", "4k", "8k"] = "8k"
    """Published training set by its number of prompts: the first 4, 8, 16 or all 32 training archives."""


class Hpdv2Hub(Section):
    """Where HPDv2 is published."""

    repository: str = PUBLISHED["hpsv2"]["repository"]
    """Data set repository on the Hub."""
    revision: str = PUBLISHED["hpsv2"]["revision"]
    """Commit, tag or branch; a commit id pins the data."""
    path: str = ""
    """Folder that already holds the published files; nothing is then downloaded or copied, and no repository used."""
    test_only: bool = Field(False, exclude_if=lambda test_only: not test_only)  # keeps old digests
    """Leave out the files that only training reads, nearly all of them; for policies: [zeroshot]."""


class ImageRewardWorld(Section):
    """Size of the synthetic ImageRewardDB."""

    seed: int = Field(0, ge=0)
    """Seed of prompts, images and annotators."""
    train_prompts: int = Field(900, ge=8)
    """Training prompts, 4 to 9 images each."""
    validation_prompts: int = Field(350, ge=4)
    """Validation prompts."""
    test_prompts: int = Field(2000, ge=4)
    """Test prompts; see the power estimate in docs/synthetic-world.md."""
    prompts_per_archive: int = Field(250, ge=1)
    """Prompts in one zip archive."""
    unreadable_images: int = Field(4, ge=0)
    """Training images published empty or truncated, as in the real data."""


class Hpdv2World(Section):
    """Size of the synthetic HPDv2."""

    seed: int = Field(0, ge=0)
    """Seed of prompts, images and annotators."""
    train_prompts: int = Field(2900, ge=8)
    """Training prompts, 4 images and 6 pairs each."""
    test_prompts: int = Field(400, ge=4)
    """Test prompts, 9 or 10 images each; the published number is 400."""
    unreadable_images: int = Field(4, ge=0)
    """Training images published empty or truncated, as in the real data."""


class ImageRewardData(Section):
    """ImageRewardDB: ratings and ranks of 4 to 9 images a prompt."""

    source: DataSource = "synthetic"
    """The embedded synthetic world or the published data."""
    hub: ImageRewardHub = ImageRewardHub()
    synthetic: ImageRewardWorld = ImageRewardWorld()
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training prompts to keep, by seeded hash."""
    subsample_by: Literal["prompt"] = "prompt"
    """Unit that the fraction counts."""
    subsample_seed: int = Field(0, ge=0)
    """Seed of the hash that orders prompts, for the fraction and for validation and test shards."""
    drop_overlap: bool = True
    """Drop training and validation prompts whose id or text also occurs in the test split (validation: train too)."""
    validation_prompts: int = Field(350, ge=1)
    """Validation prompts used during training, first in hash order."""
    test_prompts: int = Field(2000, ge=1)
    """Test prompts used, first in hash order; the published test split has 466."""


class Hpdv2Data(Section):
    """HPDv2 ("HPSv2" in the paper): pairs for training, ranks of 9 or 10 images a prompt for testing."""

    source: DataSource = "synthetic"
    """The embedded synthetic world or the published data."""
    hub: Hpdv2Hub = Hpdv2Hub()
    synthetic: Hpdv2World = Hpdv2World()
    train_fraction: float = Field(0.25, gt=0, le=1)
    """Share of the training data to keep, by seeded hash (paper §4: 25 %)."""
    subsample_by: SubsampleUnit = "prompt"
    """Whether the fraction counts prompts (all pairs of a kept prompt) or single pairs."""
    subsample_seed: int = Field(0, ge=0)
    """Seed of the hash that orders prompts and pairs."""
    drop_overlap: bool = True
    """Drop training and validation prompts whose id or text also occurs in the test split."""
    validation_prompts: int = Field(250, ge=1)
    """Validation prompts, from the other end of the hash range than the kept ones (HPDv2 has no validation split)."""
    test_prompts: int = Field(400, ge=1)
    """Test prompts used, first in hash order; the published test split has 400."""


class OwnData(Section):
    """Preference data of your own, a table and a folder of images (docs/own-data.md); for tracks: [own]."""

    source: Literal["own"] = "own"
    """Origin that the tables state."""
    title: str = Field("own data", min_length=1)
    """Name in the tables."""
    folder: str = "examples/own_data"
    """Folder of table and images, relative to the repository."""
    annotations: str = Field("ratings.csv", pattern=r"^[^/\\]+\.(csv|jsonl|parquet)$")
    """Table in it: .csv or .jsonl with ratings, ranks or pairs, or .parquet in the canonical format."""
    protocol: Protocol = "pointwise"
    """Training target: ratings of single images, or preferences between two."""
    split_seed: int = Field(0, ge=0)
    """Seed of the hash of a prompt's text that puts it into a split, where the table has no column `split`."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts for validation, where the table has no column `split`."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the prompts for testing, where the table has no column `split`."""
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training prompts to keep, by seeded hash."""
    subsample_by: Literal["prompt"] = "prompt"
    """Unit that the fraction counts."""
    subsample_seed: int = Field(0, ge=0)
    """Seed of the hash that orders prompts, for the fraction and for validation and test shards."""
    drop_overlap: bool = True
    """Drop training and validation prompts whose id or text also occurs in the test split (validation: train too)."""
    validation_prompts: int = Field(200, ge=1)
    """Validation prompts used during training, first in hash order."""
    test_prompts: int = Field(1000, ge=1)
    """Test prompts used, first in hash order."""

    @model_validator(mode="after")
    def _fractions(self) -> "OwnData":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction must leave something for training")
        return self


class Datasets(Section):
    """The two data sets of the paper, and one of your own."""

    imagereward: ImageRewardData = ImageRewardData()
    hpsv2: Hpdv2Data = Hpdv2Data()
    own: OwnData = OwnData()


class ColdStart(Section):
    """How the bundled tiny policy was made; `source: cold_start` makes it again."""

    caption_steps: int = Field(400, ge=0)
    """Steps on descriptions of single images."""
    trace_steps: int = Field(2400, ge=1)
    """Steps on reasoning traces, ratings and pairs in one batch."""
    batch: int = Field(32, ge=1)
    """Examples of each kind in a step."""
    muon_learning_rate: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, for weight matrices."""
    adamw_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, for everything else."""
    seed: int = Field(0, ge=0)
    """Seed of weights, scenes and teacher."""


class PolicyAdapter(Section):
    """A published LoRA adapter on the base policy of the Hub, for policies: [zeroshot]; none by default."""

    repository: str = ""
    """Adapter repository; empty: none."""
    revision: str = ""
    """Commit, tag or branch of this repository; a commit id pins the adapter."""
    path: str = ""
    """Folder that already holds the adapter's files; nothing is then downloaded, and no repository used."""

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self.repository or self.path)


class PolicyHub(Section):
    """A base policy from the Hub."""

    repository: str = PUBLISHED["qwen2.5-vl-7b"]["repository"]
    """Model repository."""
    revision: str = PUBLISHED["qwen2.5-vl-7b"]["revision"]
    """Commit, tag or branch of this repository; a commit id pins the weights."""
    path: str = ""
    """Folder that already holds the model's files; nothing is then downloaded or copied, and no repository used."""
    adapter: PolicyAdapter = Field(PolicyAdapter(), exclude_if=lambda adapter: not adapter)  # keeps old digests


class Policy(Section):
    """The base policy."""

    source: PolicySource = "bundled"
    """The tiny Qwen2.5-VL of this repository, the same trained again from scratch, or a model from the Hub."""
    bundled: str = "models/tiny-qwen2.5-vl"
    """Folder of the bundled model, relative to the repository."""
    cold_start: ColdStart = ColdStart()
    hub: PolicyHub = PolicyHub()
    dtype: Dtype = "float32"
    """Numeric type of the weights in memory."""
    device: Device = "cpu"
    """Where the policy runs."""
    attention: Attention = "sdpa"
    """Implementation of attention: PyTorch's kernels, plain products, or the package flash-attn (cuda, 16 bits)."""
    min_pixels: int | None = Field(784, ge=784)
    """An image with fewer pixels is scaled up to this area (784 = 28 x 28, one visual token). Null, like max_pixels,
    leaves the size to the model's own processor: for families that do not scale to an area."""
    max_pixels: int | None = Field(7056, ge=784)
    """An image with more pixels is scaled down to this area; the paper's run: 200704 = 256 visual tokens."""
    image_processor: dict[str, Any] = {}
    """Settings of the model's own image processor, by its own names, such as {size: {longest_edge: 512}}; see
    docs/other-models.md."""

    @model_validator(mode="after")
    def _one_size(self) -> "Policy":
        if (self.min_pixels is None) != (self.max_pixels is None):
            raise ValueError("min_pixels and max_pixels are numbers or null together")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels, {self.min_pixels}, is more than max_pixels, {self.max_pixels}")
        if self.max_pixels and "size" in self.image_processor:
            raise ValueError("image_processor.size needs min_pixels: null and max_pixels: null")
        return self


class Prompts(Section):
    """Questions to the policy; `{image}` marks the place of an image, `{prompt}` that of the text prompt."""

    pointwise: str = "{image} prompt: {prompt}. rate the image from 1 to 7."
    """One image, to be rated 1 to 7."""
    pairwise: str = "one: {image} two: {image} prompt: {prompt}. is two better, 1 or 0."
    """Two images; the answer 1 means that the second one is preferred. Text must stand before each image."""

    @field_validator("pointwise", "pairwise")
    @classmethod
    def _placeholders(cls, value: str, info: Any) -> str:
        wanted = 1 if info.field_name == "pointwise" else 2
        if not value:
            return value  # to be filled in: refused where a track asks it
        if value.count("{image}") != wanted or value.count("{prompt}") != 1:
            raise ValueError(f"must contain {{image}} {wanted} time(s) and {{prompt}} once")
        return value


class PointwiseRewards(Section):
    """Weights of the rewards for ratings (paper §4)."""

    format: float = Field(0.1, ge=0)
    """Thought and answer in their tags."""
    exact: float = Field(0.5, ge=0)
    """Answer equals the annotator's rating."""
    approximate: float = Field(2.0, ge=0)
    """1, 0.75, 0.5 for a distance of 0, 1, 2 from the annotator's rating, else 0."""


class PairwiseRewards(Section):
    """Weights of the rewards for pairs (paper §4)."""

    format: float = Field(0.1, ge=0)
    """Thought and answer in their tags."""
    exact: float = Field(1.0, ge=0)
    """Answer names the preferred image."""


class Lora(Section):
    """Low-rank adapter on the language model."""

    rank: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """Scale; the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression of the adapted layers; it must not match the vision tower."""


class TrainingVllm(Section):
    """Generation by vLLM in training; see docs/vllm.md. Used if `generation` is vllm_colocate or vllm_server."""

    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1)
    """Colocate: share of the GPU's memory for vLLM, including its copy of the weights."""
    max_model_len: int = Field(4096, ge=64)
    """Colocate: longest question with its completion, in tokens; at most the model's context."""
    server_url: str = "http://127.0.0.1:8000"
    """Server: address of the running `vllm serve`."""


class Training(Section):
    """GRPO with LoRA (paper §2.2); docs/method.md says which key is which symbol of the paper."""

    steps: int | None = Field(80, ge=1)
    """Optimizer steps; null, or left out, where `epochs` are given."""
    epochs: float | None = Field(None, gt=0, exclude_if=lambda epochs: epochs is None)
    """Passes over the training items, in place of `steps`; rounded up to whole steps."""
    prompts_per_step: int = Field(64, ge=1)
    """Training items (states s) in one step. With many items and few completions each, the tiny policy learns
    faster."""
    group_size: int = Field(2, ge=2)
    """Completions sampled for each item, G."""
    gradient_accumulation: int = Field(1, ge=1)
    """Parts in which one step's completions pass through the model: less memory, the same result up to rounding."""
    learning_rate: float = Field(1.2e-3, gt=0)
    """Peak learning rate, reached by linear warm-up."""
    learning_rate_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    """After the warm-up: constant, or down to zero at the last step."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of warm-up."""
    max_grad_norm: float = Field(0.03, gt=0)
    """Gradient clipping. The norm of the tiny policy is about 0.01."""
    # Omitted from the canonical JSON at the default, to keep old digests; so is `vllm`.
    weight_decay: float = Field(0.0, ge=0, exclude_if=lambda decay: decay == 0)
    """Decay of the adapter's weights by AdamW: in each step, this times the learning rate."""
    adam_beta1: float = Field(0.9, ge=0, lt=1, exclude_if=lambda beta: beta == 0.9)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the rollouts in training."""
    max_completion_tokens: int = Field(64, ge=8)
    """Longest completion in training; a longer one is cut and earns no format reward."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged; "dapo": all tokens alike; "grpo": over each completion, then over the group (paper
    §2.2.2)."""
    reward_signal: Literal["sampled", "expected"] = "expected"
    """Rewards `exact` and `approximate` of the sampled answer, or their expectation over the distribution of answers,
    whose gradient reaches thought and answer each by its own; see docs/method.md."""
    scale_rewards: Literal["group", "batch", "none"] = "none"
    """Divisor of the advantage: standard deviation sigma of the group (paper §2.2.1), of the batch, or none."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio rho per completion (paper §2.2.2, length-normalised by TRL) or per token."""
    epsilon: float = Field(0.2, gt=0)
    """Clip of the ratio."""
    beta: float = Field(0.12, ge=0)
    """Weight of the KL penalty to the reference policy (the adapter switched off)."""
    num_iterations: int = Field(1, ge=1)
    """Updates on each batch of rollouts; with 1 the ratio is 1 and the clip idle."""
    gradient_checkpointing: bool = False
    """Trade time for memory; for large models."""
    generation: Literal["transformers", "trl", "vllm_colocate", "vllm_server"] = "transformers"
    """Engine that generates in training: the transformers engine of the rollouts, TRL's own loop (always with fsdp),
    vLLM on the same GPU, or a vLLM server on others."""
    share_prompts: bool = True
    """Qwen2-VL and Qwen2.5-VL: compute each prompt and image once for its group in the passes over completions; TRL's
    plain passes if false."""
    # Omitted from the canonical JSON at the default, to keep old digests.
    vllm: TrainingVllm = Field(TrainingVllm(), exclude_if=lambda vllm: vllm == TrainingVllm())
    lora: Lora = Lora()
    validate_every: int = Field(40, ge=1)
    """Steps between validations and checkpoints; a multiple of num_iterations."""
    validation_rollouts: int = Field(1, ge=1)
    """Rollouts of each validation item."""
    keep: Literal["best", "last"] = "last"
    """Adapter that is kept: the one that validates best, or that of the last step, which is no lucky one of many."""
    collapse_share: float = Field(0.9, gt=0, le=1)
    """A policy that gives one answer in more than this share of its rollouts is reported as collapsed."""

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        steps, epochs = given.get("steps"), given.get("epochs")
        if epochs is None and "steps" in given and steps is None:
            raise ValueError("steps and epochs are both null; set one of them")
        if epochs is not None and steps is not None:
            raise ValueError(f"steps ({steps}) and epochs ({epochs}) exclude each other; set one of them to null")
        return given if epochs is None else {**given, "steps": None}

    @model_validator(mode="after")
    def _cycles(self) -> "Training":
        if self.validate_every % self.num_iterations:
            raise ValueError("validate_every must be a multiple of num_iterations, or a resumed run differs")
        if (self.prompts_per_step * self.group_size) % self.gradient_accumulation:
            raise ValueError("gradient_accumulation must divide prompts_per_step * group_size")
        if self.reward_signal == "expected":
            for key, wanted in {"importance_sampling_level": "token", "scale_rewards": "none"}.items():
                if (found := getattr(self, key)) != wanted:
                    raise ValueError(
                        "reward_signal expected gives the token of the answer an advantage of its own, which needs "
                        f"{key} {wanted}; it is {found}: set it so, or reward_signal to sampled"
                    )
        return self


class PointwiseTraining(Training):
    """Training on ratings of single images (ImageReward)."""

    rewards: PointwiseRewards = PointwiseRewards()


class PairwiseTraining(Training):
    """Training on pairs of images (HPSv2)."""

    steps: int | None = Field(100, ge=1)
    """Optimizer steps; null, or left out, where `epochs` are given."""
    prompts_per_step: int = Field(40, ge=1)
    """Training items (states s) in one step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate, reached by linear warm-up."""
    max_grad_norm: float = Field(0.02, gt=0)
    """Gradient clipping. The norm of the tiny policy is about 0.005."""
    beta: float = Field(0.1, ge=0)
    """Weight of the KL penalty to the reference policy (the adapter switched off)."""
    validate_every: int = Field(50, ge=1)
    """Steps between validations and checkpoints; a multiple of num_iterations."""
    rewards: PairwiseRewards = PairwiseRewards()


class OwnTraining(PointwiseTraining):
    """Training on own data, by the protocol of datasets.own."""

    rewards: PointwiseRewards = PointwiseRewards()
    """Weights; with the pairwise protocol there is no approximate reward."""


class TrainingByTrack(Section):
    """Training of each track."""

    imagereward: PointwiseTraining = PointwiseTraining()
    hpsv2: PairwiseTraining = PairwiseTraining()
    own: OwnTraining = OwnTraining()


class Distributed(Section):
    """Several processes for one training, on one machine; see docs/cluster.md."""

    processes: int = Field(1, ge=1)
    """Processes of one training, each with its own GPU (or on CPU); they share the completions of a step."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp keeps the whole model in each process, fsdp a part of it; deepspeed divides gradients and optimizer only."""


class Sampling(Section):
    """How one rollout is sampled; the model's own generation_config is ignored."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: keep the most probable tokens up to this mass."""
    top_k: int = Field(0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    max_thinking_tokens: int = Field(64, ge=1)
    """Budget for thinking; when it is used up without an answer, the engine closes it and reads the logits there."""
    max_answer_tokens: int = Field(4, ge=2)
    """Tokens allowed after `<answer>`, the closing tag included."""


class RolloutsVllm(Section):
    """The vLLM engine, used with `rollouts.engine: vllm`; see docs/vllm.md."""

    gpu_memory_utilization: float = Field(0.9, gt=0, lt=1)
    """Share of the GPU's memory for weights and KV cache."""
    cpu_cache_gigabytes: int = Field(1, ge=1)
    """KV cache on CPU."""
    max_model_len: int = Field(4096, ge=64)
    """Longest question with its completion, in tokens, if the model's context is not shorter. Questions that do not
    fit are left out with a warning."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model."""
    enforce_eager: bool = False
    """Without CUDA graphs and compilation: slower, but starts sooner. Always the case on CPU."""


class Rollouts(Section):
    """Recording of rollouts on the test sets."""

    engine: Engine = "transformers"
    """Engine that generates; vllm needs its own environment (docs/vllm.md)."""
    vllm: RolloutsVllm = RolloutsVllm()
    sampling: Sampling = Sampling()
    block_size: int = Field(3, ge=1)
    """Rollouts of every item in one block; a block is one job and one file for each shard."""
    blocks: int = Field(1, ge=1)
    """Blocks to record: blocks x block_size rollouts of every item."""
    shard_prompts: int = Field(1000, ge=1)
    """Prompts in one shard, in hash order."""
    batch_items: int = Field(64, ge=1)
    """Items that one forward pass prefills together; with vLLM, items submitted together."""
    both_orders: bool = False
    """Pairwise: show every pair in both orders and average; twice the rollouts."""


class Bootstrap(Section):
    """Intervals by resampling prompts."""

    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    seed: int = Field(0, ge=0)
    """Seed of the resampling."""


class Scoring(Section):
    """Scores from the recorded logits; recomputing them needs no model."""

    report_k: list[int] = [1, 3]
    """The k of Mean@k to report; each at most blocks x block_size."""
    missing_answer: MissingAnswer = "wrong"
    """An image without a valid sampled answer: its pairs are wrong, it gets the middle score, or its pairs drop out."""
    bootstrap: Bootstrap = Bootstrap()

    @field_validator("report_k")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 1 or sorted(set(value)) != value:
            raise ValueError("must be ascending whole numbers from 1, such as [1, 3]")
        return value


class Ranking(Section):
    """Ranking of images outside the data sets with a trained policy (docs/ranking.md); none by default."""

    images: str = ""
    """Images to rank: a CSV with the columns prompt and path (relative to the CSV), or a folder with images for one
    prompt. Relative to the repository; empty: none."""
    prompt: str = ""
    """The prompt of a folder; a CSV has its own."""
    track: Track = "imagereward"
    """Track that the ranking policy was trained on."""
    seed: int = Field(0, ge=0)
    """Seed of the training, and of the rollouts."""
    k: int = Field(3, ge=1)
    """Rollouts of each question, whose mean is the score."""
    batch: int = Field(16, ge=1)
    """Questions that pass through the model together."""
    both_orders: bool = False
    """Pairwise: show every pair in both orders and average; twice the rollouts."""

    @model_validator(mode="after")
    def _has_prompts(self) -> "Ranking":
        if self.images and not self.images.endswith(".csv") and not self.prompt.strip():
            raise ValueError("images is a folder, which needs a prompt; set prompt, or images to a CSV with prompts")
        return self


class CrossTest(Section):
    """A policy trained on one data set and tested on another."""

    track: Track
    """Training set."""
    test: Dataset
    """Test set."""


class Report(Section):
    """Gallery and reasoning traces beside the tables."""

    gallery_prompts: int = Field(24, ge=1)
    """Prompts in the gallery of a policy on a test set: the first ones in hash order, the same for every policy."""
    traces: int = Field(12, ge=0)
    """Images of a gallery whose reasoning is logged to MLflow as a trace; about 0.1 s each."""


class Tracking(Section):
    """MLflow; no key of this section reruns anything."""

    enabled: bool = True
    """Log every stage as a run."""
    uri: str = "sqlite:///mlflow.db"
    """Tracking store; the environment variable MLFLOW_TRACKING_URI wins."""
    experiment: str = "softpref"
    """Experiment name."""
    artifact_megabytes: float = Field(20.0, ge=0)
    """Larger outputs are logged by digest and path instead of a copy."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if urlsplit(value).password or IN_QUERY.search(value):
            raise ValueError(
                "a password does not belong into the configuration; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the environment, or for a database MLFLOW_TRACKING_URI"
            )
        return value


class JobResources(Section):
    """Resources of one job."""

    memory_gigabytes: float = Field(4.0, gt=0)
    """Main memory, without that of the GPU."""
    minutes: int = Field(240, ge=1)
    """Time limit."""


class DownloadResources(JobResources):
    """Resources of a download."""

    minutes: int = Field(1440, ge=1)
    """Time limit."""


class SmallResources(JobResources):
    """Resources of a job without a model or an image."""

    memory_gigabytes: float = Field(2.0, gt=0)
    """Main memory, without that of the GPU."""
    minutes: int = Field(60, ge=1)
    """Time limit."""


class Resources(Section):
    """What a cluster reserves for one job; no key of this section reruns anything. GPUs follow from `policy.device`."""

    download_dataset: DownloadResources = DownloadResources()
    read_images: JobResources = JobResources()
    cold_start_policy: JobResources = JobResources()
    train_grpo: JobResources = JobResources()
    generate_rollouts: JobResources = JobResources()
    rank_own_images: JobResources = JobResources()
    others: SmallResources = SmallResources()


class Configuration(Section):
    """Root of the configuration."""

    results: str = "results"
    """Folder of all results; two configurations need two folders."""
    downloads: str = "results/downloads"
    """Folder of the raw data sets, shared by all configurations."""
    seeds: list[int] = [0]
    """Seeds of training and rollouts; with several, tables show each and the pooled result."""
    tracks: list[Track] = ["imagereward", "hpsv2"]
    """Training sets to run."""
    policies: list[PolicyName] = BOTH_POLICIES
    """What is tested: the base policy as it is (zeroshot), the trained ones (grpo), or both. [zeroshot] trains nothing
    and reads test splits alone: a published policy as a row (docs/other-models.md)."""
    cross_tests: list[CrossTest] = []
    """Extra rows of table1.csv, such as [{track: hpsv2, test: imagereward}]."""
    numeric_threads: int = Field(1, ge=1)
    """Threads of one numeric job; every result depends on it, since float32 sums do."""
    numeric_instructions: Instructions = "avx2"
    """Instruction set of numeric jobs on an x86-64 CPU: avx2, so that digits do not depend on what more the processor
    has, or native, all that it has. No effect on a model on CUDA, nor on vLLM."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment with vLLM, for all trainings and rollouts of a run in which vLLM generates;
    relative to the repository. A change reruns nothing."""
    datasets: Datasets = Datasets()
    policy: Policy = Policy()
    prompts: Prompts = Prompts()
    training: TrainingByTrack = TrainingByTrack()
    distributed: Distributed = Distributed()
    rollouts: Rollouts = Rollouts()
    scoring: Scoring = Scoring()
    report: Report = Report()
    ranking: Ranking = Ranking()
    tracking: Tracking = Tracking()
    resources: Resources = Resources()

    def protocol_of(self, track: Track) -> Protocol:
        """Protocol of a track: configured for the user's own data, published for the others."""
        return self.datasets.own.protocol if track == "own" else PROTOCOL[track]

    def uses_own_data(self) -> bool:
        """Whether a policy is trained or tested on the user's own data."""
        return "own" in self.tracks or any(cross.test == "own" for cross in self.cross_tests)

    def trains(self) -> bool:
        """Whether policies are trained."""
        return "grpo" in self.policies

    def shard_range(self, test: Dataset, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard in the hash order of the test prompts; only the last one is cut short."""
        start = shard * self.rollouts.shard_prompts
        return start, min(start + self.rollouts.shard_prompts, getattr(self.datasets, test).test_prompts)

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: list[int]) -> list[int]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ValueError("must be one or more different whole numbers from 0")
        return value

    @field_validator("policies")
    @classmethod
    def _ordered_policies(cls, value: list[PolicyName]) -> list[PolicyName]:
        if not value or value != [policy for policy in BOTH_POLICIES if policy in value]:
            raise ValueError("must be [zeroshot], [grpo] or [zeroshot, grpo]")
        return value

    @model_validator(mode="after")
    def _attention_fits(self) -> "Configuration":
        policy = self.policy
        if policy.attention == "flash_attention_2" and (policy.device == "cpu" or policy.dtype == "float32"):
            raise ValueError(
                "policy.attention flash_attention_2 needs device cuda and dtype bfloat16 or float16, not "
                f"{policy.device} and {policy.dtype}; set it to sdpa"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_complete(self) -> "Configuration":
        hub = self.policy.hub if self.policy.source == "hub" else None
        missing = []
        for key, place in (("policy.hub", hub), ("policy.hub.adapter", hub and hub.adapter)):
            if place and place.repository and not place.path and not _may_be_of(place.revision, place.repository):
                missing.append(f"{key}.revision (a commit of {place.repository})")
        # The default questions are the bundled policy's; a published policy is tested by its own.
        known = not hub or hub.repository in {facts["repository"] for facts in PUBLISHED.values()}
        for protocol in dict.fromkeys(self.protocol_of(track) for track in self.tracks):
            asked = getattr(self.prompts, protocol)
            if not asked or not (known or self.trains() or asked != Prompts.model_fields[protocol].default):
                missing.append(f"prompts.{protocol} (the question that it was trained to answer)")
        if missing:
            card = f"; see the policy's card, https://huggingface.co/{hub.repository}" if hub else ""
            raise ValueError(f"{' and '.join(missing)} must be filled in{card}")
        if hub and hub.adapter and self.trains():
            raise ValueError(
                "policy.hub.adapter needs policies: [zeroshot]; to train on top of it, merge it into its base model "
                "(PEFT's merge_and_unload), save that to a folder, and name the folder by policy.hub.path"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "Configuration":
        recorded = self.rollouts.blocks * self.rollouts.block_size
        if max(self.scoring.report_k) > recorded:
            raise ValueError(
                f"scoring.report_k asks for Mean@{max(self.scoring.report_k)} but rollouts.blocks x "
                f"rollouts.block_size records {recorded}; record more blocks or report a smaller k"
            )
        if self.rollouts.engine == "vllm" and self.rollouts.sampling.temperature > 2:
            raise ValueError(
                f"rollouts.sampling.temperature {self.rollouts.sampling.temperature} is more than vLLM takes, 2; lower "
                "it or set rollouts.engine to transformers"
            )
        processes, strategy = self.distributed.processes, self.distributed.strategy
        if strategy != "ddp" and (self.policy.device == "cpu" or processes == 1):
            raise ValueError(
                f"distributed.strategy {strategy} needs policy.device cuda and distributed.processes of 2 or more: on "
                "CPU, or in one process, accelerate would silently do without it; set it to ddp"
            )
        if self.ranking.images and not self.trains():
            raise ValueError(
                "ranking.images is ranked by a trained policy, but policies is [zeroshot]; add grpo, or leave it empty"
            )
        for track in self.tracks if self.trains() else []:
            if track != "own" and getattr(self.datasets, track).hub.test_only:
                raise ValueError(
                    f"datasets.{track}.hub.test_only leaves nothing to train on; set it to false, or policies to "
                    "[zeroshot]"
                )
            t: Training = getattr(self.training, track)
            part = t.prompts_per_step * t.group_size // t.gradient_accumulation
            if t.generation.startswith("vllm") and self.policy.device == "cpu":
                raise ValueError(
                    f"training.{track}.generation {t.generation} is for a GPU but policy.device is cpu, where vLLM "
                    "takes no new weights; set it to transformers"
                )
            if t.generation == "vllm_colocate" and self.policy.dtype == "float32":
                raise ValueError(
                    f"training.{track}.generation vllm_colocate needs policy.dtype bfloat16 or float16, not float32: "
                    "TRL lets vLLM choose the type, which is never float32; set it to transformers"
                )
            if t.generation.startswith("vllm") and strategy == "fsdp":
                raise ValueError(
                    f"training.{track}.generation {t.generation} needs whole weights in each process, which "
                    "distributed.strategy fsdp does not leave there; set the strategy to ddp, or generation to trl"
                )
            if t.reward_signal == "expected" and (t.generation != "transformers" or strategy == "fsdp"):
                found, remedy = f"training.{track}.generation {t.generation}", "it to transformers"
                if t.generation == "transformers":
                    found, remedy = "distributed.strategy fsdp", "the strategy to ddp"
                raise ValueError(
                    f"training.{track}.reward_signal expected needs the distribution over the answers, which "
                    f"{found} does not record; set {remedy}, or reward_signal to sampled"
                )
            if part % processes:
                raise ValueError(
                    f"distributed.processes {processes} does not divide the {part} completions that "
                    f"training.{track} passes through the model at once (prompts_per_step x group_size / "
                    "gradient_accumulation)"
                )
        for cross in self.cross_tests:
            if cross.track not in self.tracks or cross.test == cross.track:
                raise ValueError(
                    f"cross_tests: {cross.track} on {cross.test} needs a track of `tracks` and another test set"
                )
        return self


def _may_be_of(revision: str, repository: str) -> bool:
    """Whether a revision is given, and is not the published one of another repository, as the default may be."""
    return bool(revision) and all(
        facts["repository"] == repository for facts in PUBLISHED.values() if facts["revision"] == revision
    )


class ConfigurationError(ValueError):
    """A wrong key or value: names the key, the value, what is allowed and the nearest valid name."""


def load(raw: Mapping[str, Any]) -> Configuration:
    """Validate what Snakemake merged from config files and `--config`.

    Raises:
        ConfigurationError: one line for each wrong key or value.
    """
    try:
        return Configuration.model_validate(raw)
    except ValidationError as error:
        raise ConfigurationError(
            "\n".join(["the configuration is not valid:"] + [f"  {_explain(e)}" for e in error.errors()])
        ) from None


def _explain(error: Any) -> str:
    location = error["loc"]
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        names = list(_section_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if isinstance(error["input"], Mapping):
        return f"{key}: {message}"
    near = []
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(error["input"]), choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: {redacted(repr(error['input']))} is not allowed: {message}{hint}"


def _section_at(location: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = Configuration
    for name in location:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        inner = [annotation, *get_args(annotation)]
        section = next(a for a in inner if isinstance(a, type) and issubclass(a, Section))
    return section

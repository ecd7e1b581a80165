"""FLOPs and time of training and rollouts, from sizes and counts. docs/plan.md says what was measured."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from workflow_scripts.configuration.model import Distributed, Training
from workflow_scripts.planning.architecture import FULL, Image
from workflow_scripts.planning.devices import CPU, FACTS, GIGABYTE, Assumptions, Gpu
from workflow_scripts.planning.memory import VLLM_WORKSPACE, Model, engine_generates
from workflow_scripts.planning.workload import Questions

SERVER_SHARE = 0.9  # of a GPU that serves vLLM, its default
WIDENED = 5  # times the cache in 16 bits: read, written in float32, and read again, which is twice as wide
APPENDED = 3  # times the cache: transformers' own is read, copied with a token more, and read


class Length(NamedTuple):
    """Completions of one kind, in tokens: the mean, and the longest of a batch, which the batch waits for."""

    mean: float
    longest: float


def product_seconds(gpu: Gpu, assumed: Assumptions, flops: float) -> float:
    """Time of large products."""
    return flops / (gpu.flops * assumed.flops_used)


def decoding_seconds(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    rows: float,
    prompts: float,
    question: float,
    length: Length,
    adapted: bool,
    copies: int = 1,
    launched: bool = True,
) -> float:
    """Time until the longest of a batch's completions is there.

    A step reads the weights and the cache, computes the rows' products and launches its kernels; what takes longest
    counts.

    Args:
        m: the policy.
        gpu: the device.
        assumed: rates.
        rows: completions that are decoded together.
        prompts: questions in the cache, as many as rows where each row has its own.
        question: tokens of a question.
        length: of the completions.
        adapted: the adapter is beside the weights.
        copies: how often the bytes of the cache move in a step.
        launched: kernels are launched one by one from Python, not as CUDA graphs.
    """
    a = m.architecture
    context = question + length.mean / 2
    cached = copies * (prompts * question + rows * length.mean / 2)
    read = m.language_bytes + adapted * FULL * m.adapter + cached * m.kv_bytes
    computed = rows * (a.language_flops(1, context) + a.head_flops(1) + adapted * 2 * m.adapter)
    step = max(
        read / (gpu.bandwidth * assumed.bandwidth_used),
        product_seconds(gpu, assumed, computed),
        launched * m.kernels(adapted) * assumed.kernel_microseconds / 1e6,
    )
    return step * length.longest


def prefill_flops(m: Model, question: float, images: tuple[Image, ...], adapted: bool) -> float:
    """Forward of one question up to its first logits."""
    a = m.architecture
    seen = sum(a.vision_flops(image) for image in images)
    return seen + a.language_flops(question) + a.head_flops(1) + adapted * 2 * m.adapter * question


def decoding_flops(m: Model, question: float, completion: float, adapted: bool) -> float:
    """Forward of one completion, token by token."""
    a = m.architecture
    context = question + completion / 2
    return a.language_flops(completion, context) + a.head_flops(completion) + adapted * 2 * m.adapter * completion


def update_flops(m: Model, tokens: float, scored: float, images: tuple[Image, ...], checkpointing: bool) -> float:
    """Forward and backward of one sequence; the head's forward is redone."""
    a = m.architecture
    language = a.language_update_flops(m.rank, m.target_modules, checkpointing, m.attention).of(tokens)
    if checkpointing:
        vision = sum(a.vision_update_flops(image, m.attention) for image in images)
    else:
        vision = sum(a.vision_flops(image) for image in images)
    return language + vision + 3 * a.head_flops(scored)


def shared_update_flops(m: Model, question: float, completion: float, scored: float, group: int) -> float:
    """Forward and backward of one completion whose question passes once for its group, images seen before."""
    update = m.architecture.language_update_flops(m.rank, m.target_modules, False, m.attention)
    alone = update.of(question) / group + update.of(completion, question + completion)
    return alone + 3 * m.architecture.head_flops(scored)


@dataclass(frozen=True)
class Cost:
    """FLOPs and seconds."""

    flops: float
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(self.flops + other.flops, self.seconds + other.seconds)

    def times(self, count: float) -> "Cost":
        """So often."""
        return Cost(self.flops * count, self.seconds * count)


def rollout_cost(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    test: Questions,
    batch: float,
    rollouts: float,
    length: Length,
    adapted: bool,
) -> Cost:
    """Rollouts of all questions with the transformers engine.

    Each is prefilled once and its cache read once for all its rows; finished rows are dropped.
    """
    prefill = prefill_flops(m, test.mean, test.images, adapted) * test.items
    completions = decoding_flops(m, test.mean, length.mean, adapted) * test.items * rollouts
    batches = max(1.0, test.items / batch)
    prompts = min(batch, test.items)
    rows = prompts * rollouts * length.mean / length.longest  # on average
    waiting = decoding_seconds(m, gpu, assumed, rows, prompts, test.mean, length, adapted, widened(m)) * batches
    return Cost(prefill + completions, product_seconds(gpu, assumed, prefill) + waiting)


def widened(m: Model) -> int:
    """How often the engine moves the bytes of the cache in a step: with sdpa it attends in float32."""
    return WIDENED if m.attention == "sdpa" and m.dtype != "float32" else 1


def vllm_cost(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    asked: Questions,
    items: float,
    batch: float,
    rollouts: float,
    length: Length,
    share: float,
    adapted: bool,
    eager: bool = False,
) -> Cost:
    """Rollouts with vLLM, which has a `share` of the GPU and gets so many items of a `batch` together.

    A question is prefilled once, and its cache held once, for its rollouts. As many rows are decoded at once as fit
    into the cache, and as vLLM takes by default. A row that ends makes room for the next, no cache is copied, and CUDA
    graphs launch the kernels unless `eager`.
    """
    prefill = prefill_flops(m, asked.mean, asked.images, adapted) * items
    completions = decoding_flops(m, asked.mean, length.mean, adapted) * items * rollouts
    together = min(batch, items) * rollouts
    cache = share * gpu.memory - m.weights - VLLM_WORKSPACE
    room = cache / (m.kv_bytes * (asked.mean / rollouts + length.mean / 2))
    steps = max(length.longest, together * length.mean / max(1.0, min(together, room, vllm_rows(gpu))))
    rows = together * length.mean / steps  # on average
    step = decoding_seconds(m, gpu, assumed, rows, rows, asked.mean, Length(length.mean, 1), adapted, launched=eager)
    waiting = (step + rows * assumed.vllm_row_microseconds / 1e6) * steps * items * rollouts / together
    return Cost(prefill + completions, product_seconds(gpu, assumed, prefill) + waiting)


def vllm_rows(gpu: Gpu) -> int:
    """Rows that vLLM 0.31 decodes at once by default (max_num_seqs of EngineArgs.get_batch_defaults)."""
    return 1024 if gpu.memory >= 70 * GIGABYTE and "a100" not in gpu.name else 256


def generation_cost(
    m: Model, gpu: Gpu, assumed: Assumptions, t: Training, d: Distributed, train: Questions, length: Length
) -> Cost:
    """Generation of a process's share of a step.

    The engine's loop prefills a prompt once for its group and drops what has ended; TRL's own prefills every completion
    by itself and goes on until the last has ended.
    """
    completions = t.prompts_per_step * t.group_size // d.processes
    groups = completions / t.group_size
    if t.generation.startswith("vllm"):
        share = t.vllm.gpu_memory_utilization if t.generation == "vllm_colocate" else SERVER_SHARE
        return vllm_cost(m, gpu, assumed, train, groups, groups, t.group_size, length, share, adapted=False)
    engine = engine_generates(t, d)
    beside = not engine or m.dtype != "float32"  # the engine's loop merges the adapter where that rounds nothing
    prompts = groups if engine else completions
    rows = completions * length.mean / length.longest if engine else completions
    prefill = prefill_flops(m, train.mean, (), beside) * prompts
    prefill += image_flops(m, train) * (groups if engine or t.share_prompts else completions)
    decoding = decoding_flops(m, train.mean, length.mean if engine else length.longest, beside) * completions
    copies = widened(m) if engine else APPENDED
    seconds = decoding_seconds(m, gpu, assumed, rows, prompts, train.mean, length, beside, copies)
    return Cost(prefill + decoding, product_seconds(gpu, assumed, prefill) + seconds)


def image_flops(m: Model, asked: Questions) -> float:
    """Forward of a question's images through the vision tower."""
    return sum(m.architecture.vision_flops(image) for image in asked.images)


def training_costs(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    t: Training,
    steps: int,
    d: Distributed,
    train: Questions,
    validation: Questions,
    length: Length,
) -> dict[str, Cost]:
    """Cost of a whole training by part, on all its GPUs together, as TRL runs it.

    Each process has its share of a step's completions, and of the validation unless FSDP makes all do all of it.

    All completions of a step are padded to the longest, and scored under the reference policy in a forward of their
    own. With `share_prompts` an image is encoded once in a step, and without gradient checkpointing the question of a
    group passes once.
    """
    a, completions = m.architecture, t.prompts_per_step * t.group_size // d.processes
    tokens = train.mean + length.longest
    scored = length.mean if gpu.name != CPU else tokens - 1  # only with Triton the padding is left out
    groups = completions / t.group_size
    vllm = t.generation.startswith("vllm")
    if vllm:
        looked = image_flops(m, train) * (groups if t.share_prompts else completions)
    else:
        looked = 0.0 if t.share_prompts else image_flops(m, train) * completions  # in each pass that follows

    # Reference policy; the policy that sampled, which TRL scores again where vLLM did or where it changes meanwhile.
    passes = (t.beta > 0) + (t.num_iterations > 1 or vllm)
    if t.share_prompts and not t.gradient_checkpointing:
        question = a.language_flops(train.mean) / t.group_size
        forward = question + a.language_flops(length.longest, tokens)
        updating = shared_update_flops(m, train.mean, length.longest, scored, t.group_size)
    else:
        forward = a.language_flops(tokens)
        shown = () if t.share_prompts else train.images
        updating = update_flops(m, tokens, scored, shown, t.gradient_checkpointing)
    scoring = (forward + a.head_flops(scored)) * completions * passes
    scoring += looked * (1 if t.share_prompts else passes)  # features of the images are kept from pass to pass

    validations = 1 + math.ceil(steps / t.validate_every)  # the last one after the last step
    if d.strategy != "fsdp":
        of = d.processes
        validation = replace(validation, items=validation.items / of, tokens=validation.tokens / of)
    batch = t.prompts_per_step * t.group_size // 2
    beside = m.dtype != "float32" or d.strategy == "fsdp"  # validation merges the adapter, too
    validated = rollout_cost(m, gpu, assumed, validation, batch, t.validation_rollouts, length, adapted=beside)
    batches = steps / t.num_iterations
    prepared = groups * image_seconds(train.images, preparations(t, d)) * batches
    prepared += validation.items * image_seconds(validation.images, 1) * validations
    each = {
        "generation": generation_cost(m, gpu, assumed, t, d, train, length).times(batches),
        "reference": Cost(scoring, product_seconds(gpu, assumed, scoring)).times(batches),
        "update": Cost(updating, product_seconds(gpu, assumed, updating)).times(completions * steps),
        "validation": validated.times(validations),
        "images": Cost(0, prepared),
        "loading": loading_cost(m, assumed, t.generation == "vllm_colocate", policies=1),
    }
    return {part: cost.times(d.processes) for part, cost in each.items()}


# ----------------------------------------------------------------------------------- what the GPU waits for, without it


def image_seconds(images: tuple[Image, ...], preparations: float) -> float:
    """Time to decode a question's images once and to prepare them so often for the policy, on one thread of the CPU.

    No worker does so beside the GPU: TRL's loader has none (dataloader_num_workers 0), and both engines read a batch
    before they generate.
    """
    cost = FACTS["image_milliseconds"]
    each = {
        name: [per["image"] + per["megapixel"] * image.pixels / 1e6 for image in images] for name, per in cost.items()
    }
    return (sum(each["decoding"]) + preparations * sum(each["preparing"])) / 1000


def preparations(t: Training, d: Distributed) -> int:
    """How often an image of a step passes through the image processor: for generation, and for the passes over it.

    Before it generates, TRL also prepares the images of its tokens, and vLLM those that it is given. Without
    `share_prompts` TRL prepares an image for each completion.
    """
    by_trl = 1 if t.share_prompts else t.group_size
    if engine_generates(t, d):
        return 1 + by_trl
    return 2 * by_trl + t.generation.startswith("vllm")


def loading_cost(m: Model, assumed: Assumptions, vllm: bool, policies: int, eager: bool = False) -> Cost:
    """Time until a job's policy can be asked: imports, weights from the disk to the device, and vLLM's start.

    The files are not hashed again: the job that wrote the manifest did so.

    Args:
        m: the policy.
        assumed: rates.
        vllm: it is in vLLM.
        policies: copies of it that transformers loads beside it.
        eager: vLLM compiles and captures nothing.
    """
    weights = (policies + vllm) * m.weights / (assumed.load_gigabytes_per_second * 1e9)
    return Cost(0, assumed.start_seconds + weights + (vllm and not eager) * assumed.vllm_start_seconds)

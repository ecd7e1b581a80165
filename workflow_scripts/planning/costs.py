"""FLOPs and time of training and rollouts, from sizes and counts. docs/plan.md says what was measured."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from workflow_scripts.configuration.model import Distributed, Training
from workflow_scripts.planning.architecture import FULL, Image
from workflow_scripts.planning.devices import CPU, Assumptions, Gpu
from workflow_scripts.planning.memory import Model, engine_generates
from workflow_scripts.planning.workload import Questions

SERVER_SHARE = 0.9  # of a GPU that serves vLLM, its default
VLLM_ROWS = 256  # max_num_seqs, vLLM's default


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
) -> float:
    """Time until the longest of a batch's completions is there.

    A step reads the weights and the cache, computes the rows' products and launches its kernels; what takes longest
    counts. In the cache are the questions of so many `prompts`, as many as rows where each row has its own. `copies`:
    transformers' own cache is also read and written as a whole to append one token to it, 3 in all.
    """
    a = m.architecture
    context = question + length.mean / 2
    cached = copies * (prompts * question + rows * length.mean / 2)
    read = m.language_bytes + adapted * FULL * m.adapter + cached * m.kv_bytes
    computed = rows * (a.language_flops(1, context) + a.head_flops(1) + adapted * 2 * m.adapter)
    step = max(
        read / (gpu.bandwidth * assumed.bandwidth_used),
        product_seconds(gpu, assumed, computed),
        a.layers * assumed.layer_milliseconds / 1000,
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
    waiting = decoding_seconds(m, gpu, assumed, rows, prompts, test.mean, length, adapted) * batches
    return Cost(prefill + completions, product_seconds(gpu, assumed, prefill) + waiting)


def vllm_cost(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    asked: Questions,
    items: float,
    rollouts: float,
    length: Length,
    cache: float,
    adapted: bool,
) -> Cost:
    """Rollouts with vLLM: questions prefilled once, as many rows at once as the cache of so many bytes holds.

    A row that ends makes room for the next, no cache is copied, and CUDA graphs launch the kernels.
    """
    prefill = prefill_flops(m, asked.mean, asked.images, adapted) * items
    completions = decoding_flops(m, asked.mean, length.mean, adapted) * items * rollouts
    room = cache / (m.kv_bytes * (asked.mean + length.mean / 2))
    rows = max(1.0, min(items * rollouts, room, VLLM_ROWS))
    graphs = assumed.model_copy(update={"layer_milliseconds": 0.0})
    step = decoding_seconds(m, gpu, graphs, rows, rows, asked.mean, Length(length.mean, 1), adapted)
    steps = max(length.longest, items * rollouts * length.mean / rows)
    return Cost(prefill + completions, product_seconds(gpu, assumed, prefill) + step * steps)


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
    """Cost of a whole training by part, on all its GPUs together, as TRL runs it with transformers generating.

    Each process has its share of a step's completions, and of the validation unless FSDP makes all do all of it.

    The engine's loop prefills a prompt once for its group and drops what has ended; TRL's own prefills every completion
    by itself and goes on until the last has ended. All completions of a step are padded to the longest, and scored
    under the reference policy in a forward of their own. With `share_prompts` an image is encoded once in a step, and
    without gradient checkpointing the question of a group passes once. vLLM gets merged weights after each step.
    """
    a, completions = m.architecture, t.prompts_per_step * t.group_size // d.processes
    tokens = train.mean + length.longest
    scored = length.mean if gpu.name != CPU else tokens - 1  # only with Triton the padding is left out

    groups = completions / t.group_size
    seen = sum(a.vision_flops(image) for image in train.images)
    engine = engine_generates(t, d)
    if t.generation in ("transformers", "trl"):
        beside = not engine or m.dtype != "float32"  # the engine's loop merges the adapter where that rounds nothing
        prompts = groups if engine else completions
        rows = completions * length.mean / length.longest if engine else completions
        prefill = prefill_flops(m, train.mean, (), beside) * prompts
        prefill += seen * (groups if engine or t.share_prompts else completions)
        decoded = length.mean if engine else length.longest
        decoding = decoding_flops(m, train.mean, decoded, beside) * completions
        copies = 1 if engine else 3
        seconds = decoding_seconds(m, gpu, assumed, rows, prompts, train.mean, length, beside, copies)
        generation = Cost(prefill + decoding, product_seconds(gpu, assumed, prefill) + seconds)
        looked = 0.0 if t.share_prompts else seen * completions  # in each pass that follows
    else:
        share = t.vllm.gpu_memory_utilization if t.generation == "vllm_colocate" else SERVER_SHARE
        cache = share * gpu.memory - m.weights
        generation = vllm_cost(m, gpu, assumed, train, groups, t.group_size, length, cache, False)
        looked = seen * (groups if t.share_prompts else completions)

    # Reference policy; the policy that sampled, which TRL scores again where vLLM did or where it changes meanwhile.
    passes = (t.beta > 0) + (t.num_iterations > 1 or t.generation not in ("transformers", "trl"))
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
    reference = Cost(scoring, product_seconds(gpu, assumed, scoring))
    update = Cost(updating * completions, product_seconds(gpu, assumed, updating * completions))

    validations = 1 + math.ceil(steps / t.validate_every)  # the last one after the last step
    if d.strategy != "fsdp":
        of = d.processes
        validation = replace(validation, items=validation.items / of, tokens=validation.tokens / of)
    batch = t.prompts_per_step * t.group_size // 2
    beside = m.dtype != "float32" or d.strategy == "fsdp"  # validation merges the adapter, too
    validated = rollout_cost(m, gpu, assumed, validation, batch, t.validation_rollouts, length, adapted=beside)
    batches = steps / t.num_iterations
    each = {
        "generation": generation.times(batches),
        "reference": reference.times(batches),
        "update": update.times(steps),
        "validation": validated.times(validations),
    }
    return {part: cost.times(d.processes) for part, cost in each.items()}

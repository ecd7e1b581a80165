"""Memory and time of training and rollouts on one GPU, from sizes and counts. docs/plan.md says what was measured."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from workflow_scripts.configuration.model import Distributed, Rollouts, Training
from workflow_scripts.planning.architecture import BYTES, FULL, SCORED_AT_ONCE, Architecture, Attention, Image
from workflow_scripts.planning.workload import Questions

GIGABYTE = 2**30  # what vendors call a GB of memory
CPU = "cpu"
SERVER_SHARE = 0.9  # of a GPU that serves vLLM, its default


@dataclass(frozen=True)
class Gpu:
    """A device: products in FLOP/s, memory in bytes, bandwidth in bytes/s, all at their peak."""

    name: str
    flops: float
    memory: float
    bandwidth: float


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says; each is an option of the command."""

    flops_used: float = 0.35
    """Share of the peak FLOP/s that prefill, scoring and training reach (MFU)."""
    bandwidth_used: float = 0.6
    """Share of the peak bandwidth that decoding reaches."""
    layer_milliseconds: float = 1.0
    """Time that transformers takes at least for a layer in a decoding step, to launch its kernels from Python."""
    memory_reserved: float = 0.1
    """Share of the memory that is not ours: CUDA's context, cuBLAS, fragments."""
    completion_share: float = 0.5
    """Mean length of a completion as a share of its budget, where the policy has not been measured."""


@dataclass(frozen=True)
class Model:
    """A policy as it is run: sizes, types, adapter."""

    architecture: Architecture
    dtype: str
    attention: Attention
    rank: int
    target_modules: str

    @property
    def adapter(self) -> int:
        """Parameters of the adapter."""
        return self.architecture.adapter_parameters(self.rank, self.target_modules)

    @property
    def language_bytes(self) -> float:
        """Weights that a decoding step reads: those of the layers and of the head."""
        a = self.architecture
        layers = a.layers * sum(linear.weights for linear in a.layer(0))
        return BYTES[self.dtype] * (layers + a.vocabulary * a.hidden)


class Length(NamedTuple):
    """Completions of one kind, in tokens: the mean, and the longest of a batch, which the batch waits for."""

    mean: float
    longest: float


# ----------------------------------------------------------------------------------------------------------- memory


def generation_bytes(
    m: Model, items: float, rollouts: float, question: float, images: tuple[Image, ...], longest: float, merged: bool
) -> dict[str, float]:
    """Memory while completions are generated, without weights.

    Args:
        m: the policy.
        items: questions that are prefilled together.
        rollouts: rows that each of them has afterwards.
        question: tokens of the longest question.
        images: of one question.
        longest: tokens of the longest completion.
        merged: no adapter beside the weights.
    """
    a, rows = m.architecture, items * rollouts
    questions = items if m.attention == "sdpa" else rows  # others have a copy of it for each row
    cache = (questions * question + rows * longest) * a.kv_bytes(m.dtype)
    prefill = items * a.language_workspace_bytes(question, m.dtype, not merged, m.attention)
    seeing = items * sum(a.vision_workspace_bytes(image, m.dtype) for image in images)
    drawing = (
        rows * a.vocabulary * (BYTES[m.dtype] + 2 * FULL) + cache / a.layers
    )  # one layer's cache is copied to grow
    return {"kv cache": cache, "workspace": max(prefill, seeing, drawing)}


def update_bytes(
    m: Model, sequences: float, tokens: float, scored: float, images: tuple[Image, ...], checkpointing: bool
) -> dict[str, float]:
    """Memory of one forward and backward pass, without weights and optimizer: padded sequences of T tokens."""
    a, d = m.architecture, BYTES[m.dtype]
    layer = a.layer_activation_bytes(sequences, tokens, m.dtype, m.rank, m.target_modules, m.attention, padded=True)
    per_token = a.update_workspace_bytes(m.dtype)
    tile = min(sequences * scored, SCORED_AT_ONCE[0]) * min(a.vocabulary, SCORED_AT_ONCE[1])
    head = d * tile + sequences * scored * a.hidden * (2 * FULL + d)
    seeing = sequences * sum(a.vision_workspace_bytes(image, m.dtype) for image in images)
    if not checkpointing:
        kept = a.layers * layer
    else:
        patches = sum(image.patches for image in images)
        blocks = a.vision.depth * patches * a.vision.hidden * d
        kept = sequences * (a.layers * tokens * a.hidden * d + blocks) + layer
    return {"activations": kept, "workspace": max(sequences * tokens * per_token, head, seeing)}


def engine_generates(t: Training, d: Distributed) -> bool:
    """Whether the engine's loop generates in training; with FSDP all processes pass through the model in TRL's."""
    return t.generation == "transformers" and d.strategy != "fsdp"


def training_memory(
    m: Model, gpu: Gpu, t: Training, d: Distributed, train: Questions, validation: Questions
) -> dict[str, dict[str, float]]:
    """Memory of a training on each of its GPUs by phase and part, in bytes.

    DDP keeps the adapter's gradient once more, to sum it over processes. FSDP gathers two layers at a time, and what is
    in no layer for the whole pass.
    """
    a, completions = m.architecture, t.prompts_per_step * t.group_size // d.processes
    part = completions // t.gradient_accumulation
    weights = float(a.parameters() * BYTES[m.dtype])
    optimizer = 3.0 * FULL * m.adapter  # gradient and Adam's two moments
    if d.strategy == "fsdp":
        layers = m.language_bytes - BYTES[m.dtype] * a.vocabulary * a.hidden
        gathered = weights - layers * (1 - 2 / a.layers)
        weights, optimizer = gathered + weights / d.processes, optimizer / d.processes
    elif d.strategy == "deepspeed":
        optimizer /= d.processes
    elif d.processes > 1:
        optimizer += FULL * m.adapter
    resident = {"weights": weights, "adapter": float(FULL * m.adapter), "optimizer": optimizer}
    tokens = train.longest + t.max_completion_tokens
    if t.generation == "vllm_colocate":
        resident["vLLM"] = vllm_bytes(m, gpu, t.vllm.gpu_memory_utilization, tokens, adapted=False)
    pixels = completions * a.pixel_bytes("float32") * sum(image.patches for image in train.largest)
    phases = {}
    if t.generation in ("transformers", "trl"):
        group = t.group_size if engine_generates(t, d) else 1
        phases["generation"] = resident | {"pixels": pixels}
        phases["generation"] |= generation_bytes(
            m, completions / group, group, train.longest, train.largest, t.max_completion_tokens, merged=False
        )
    updating = update_bytes(m, part, tokens, t.max_completion_tokens, train.largest, t.gradient_checkpointing)
    validating = generation_bytes(
        m,
        min(validation.items, t.prompts_per_step * t.group_size // 2),
        t.validation_rollouts,
        validation.longest,
        validation.largest,
        t.max_completion_tokens + ENDING,
        merged=False,
    )
    return phases | {"update": resident | updating | {"pixels": pixels}, "validation": resident | validating}


ENDING = 12  # tokens of a forced ending and of an answer, about


def vllm_bytes(m: Model, gpu: Gpu, utilization: float, tokens: float, adapted: bool) -> float:
    """What vLLM takes: its share of the GPU, or more where that does not hold weights and one longest sequence."""
    weights = m.architecture.parameters() * BYTES[m.dtype] + adapted * FULL * m.adapter
    return max(utilization * gpu.memory, weights + tokens * m.architecture.kv_bytes(m.dtype))


def rollout_memory(m: Model, gpu: Gpu, r: Rollouts, test: Questions, trained: bool) -> dict[str, float]:
    """Memory of a job of rollouts by part, in bytes; in float32 transformers merges the adapter into the weights."""
    longest = r.sampling.max_thinking_tokens + r.sampling.max_answer_tokens + ENDING
    if r.engine == "vllm":
        return {"vLLM": vllm_bytes(m, gpu, r.vllm.gpu_memory_utilization, test.longest + longest, trained)}
    beside = trained and m.dtype != "float32"
    items = min(r.batch_items, test.items)
    return {
        "weights": float(m.architecture.parameters() * BYTES[m.dtype]),
        "adapter": float(FULL * m.adapter * beside),
        **generation_bytes(m, items, r.block_size, test.longest, test.largest, longest, merged=not beside),
    }


# ------------------------------------------------------------------------------------------------------------- time


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
    read = m.language_bytes + adapted * FULL * m.adapter + cached * a.kv_bytes(m.dtype)
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
    room = cache / (m.architecture.kv_bytes(m.dtype) * (asked.mean + length.mean / 2))
    rows = max(1.0, min(items * rollouts, room, VLLM_ROWS))
    graphs = replace(assumed, layer_milliseconds=0)
    step = decoding_seconds(m, gpu, graphs, rows, rows, asked.mean, Length(length.mean, 1), adapted)
    steps = max(length.longest, items * rollouts * length.mean / rows)
    return Cost(prefill + completions, product_seconds(gpu, assumed, prefill) + step * steps)


VLLM_ROWS = 256  # max_num_seqs, vLLM's default


def training_costs(
    m: Model,
    gpu: Gpu,
    assumed: Assumptions,
    t: Training,
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
        cache = share * gpu.memory - a.parameters() * BYTES[m.dtype]
        generation = vllm_cost(m, gpu, assumed, train, groups, t.group_size, length, cache, False)
        looked = seen * (groups if t.share_prompts else completions)

    # Reference policy; the policy that sampled, which TRL scores again where vLLM did or where it changes meanwhile.
    passes = (t.beta > 0) + (t.num_iterations > 1 or t.generation not in ("transformers", "trl"))
    if t.share_prompts and not t.gradient_checkpointing:
        question = a.language_flops(train.mean) / t.group_size
        forward = question + a.language_flops(length.longest, tokens)
        updating = a.shared_update_flops(
            train.mean, length.longest, scored, t.group_size, m.rank, m.target_modules, m.attention
        )
    else:
        forward = a.language_flops(tokens)
        shown = [] if t.share_prompts else train.images
        updating = a.update_flops(
            tokens, scored, shown, m.rank, m.target_modules, t.gradient_checkpointing, m.attention
        )
    scoring = (forward + a.head_flops(scored)) * completions * passes
    scoring += looked * (1 if t.share_prompts else passes)  # features of the images are kept from pass to pass
    reference = Cost(scoring, product_seconds(gpu, assumed, scoring))
    update = Cost(updating * completions, product_seconds(gpu, assumed, updating * completions))

    validations = 1 + t.steps // t.validate_every
    if d.strategy != "fsdp":
        of = d.processes
        validation = replace(validation, items=validation.items / of, tokens=validation.tokens / of)
    batch = t.prompts_per_step * t.group_size // 2
    beside = m.dtype != "float32" or d.strategy == "fsdp"  # validation merges the adapter, too
    validated = rollout_cost(m, gpu, assumed, validation, batch, t.validation_rollouts, length, adapted=beside)
    batches = t.steps / t.num_iterations
    each = {
        "generation": generation.times(batches),
        "reference": reference.times(batches),
        "update": update.times(t.steps),
        "validation": validated.times(validations),
    }
    return {part: cost.times(d.processes) for part, cost in each.items()}

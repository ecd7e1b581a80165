"""Memory of training and rollouts on one GPU, as closed formulas. docs/plan.md derives and checks them.

T are tokens of a sequence, p patches of an image.
"""

from dataclasses import dataclass

from workflow_scripts.configuration.model import Distributed, Rollouts, Training
from workflow_scripts.planning.architecture import BYTES, FULL, Architecture, Attention, Image, Vision
from workflow_scripts.planning.devices import Gpu
from workflow_scripts.planning.workload import Questions

SCORED_AT_ONCE = (4096, 32768)  # tokens and vocabulary of one tile of TRL's log-probabilities
ENDING = 12  # tokens of a forced ending and of an answer, about
VLLM_WORKSPACE = 4e9  # bytes that vLLM keeps for activations, logits and CUDA graphs, about


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
    def weights(self) -> float:
        """Bytes of all weights, without the adapter."""
        return float(self.architecture.parameters * BYTES[self.dtype])

    @property
    def language_bytes(self) -> float:
        """Bytes of weights that a decoding step reads: those of the layers and of the head."""
        return float(BYTES[self.dtype] * (self.architecture.layer_weights + self.architecture.head_weights))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.architecture.layers * self.architecture.kv_width * BYTES[self.dtype]

    def kernels(self, adapted: bool) -> float:
        """Kernels of a decoding step of the transformers engine."""
        rank = self.rank if adapted else None
        return self.architecture.decoding_kernels(rank, self.target_modules, self.dtype, self.attention)


# ------------------------------------------------------------------------------------------------------- a model's own


def layer_activation_bytes(m: Model, sequences: float, tokens: float, padded: bool) -> float:
    """What one layer of the language model keeps for its backward, its adapted matrices included.

    Args:
        m: the policy; in short types its layers run under autocast, as TRL does; eager attention keeps the T x T
            weights of every head.
        sequences: in the batch.
        tokens: T, of each sequence with its padding.
        padded: with padding, sdpa repeats keys and values for every head and keeps its mask.
    """
    a, attention = m.architecture, m.attention
    q, d, short = a.query_width, BYTES[m.dtype], m.dtype != "float32"
    first = f"{a.decoder}.layers.0."
    matched = {name.split(".")[-1] for name in a.adapted(m.target_modules) if name.startswith(first)}
    adapted = [name for name in a.layer if name in matched]
    if short:  # autocast copies the input of each adapted layer, and the adapter's weights
        inputs = sum(a.layer[name][0] for name in adapted)
        copies = d * sum(m.rank * sum(a.layer[name]) for name in adapted)
    else:  # layers with the same input share it
        same = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
        inputs = sum(a.layer[names[0]][0] for names in same if not set(names).isdisjoint(adapted))
        copies = 0
    repeated = q if attention == "eager" or (attention == "sdpa" and padded) else a.kv_width
    attended = q + 2 * repeated  # q, k, v
    if attention == "eager":
        weights = a.heads * tokens * (FULL + d * short)
    else:
        attended += 0 if "o_proj" in adapted and not short else q  # the result, unless it is an input counted above
        weights = a.heads * FULL + (tokens * d if attention == "sdpa" and padded else 0)
    norms = 2 * (a.hidden + 1) * FULL
    per_token = d * (inputs + attended + 3 * a.intermediate + len(adapted) * m.rank) + weights + norms
    return sequences * tokens * per_token + copies


def language_workspace_bytes(m: Model, tokens: float, adapted: bool) -> float:
    """Most that a forward without gradients holds at once for a sequence, keys and values left out.

    The coefficients were measured: inside the MLP, or with eager attention at its T x T weights.
    """
    a = m.architecture
    if m.dtype == "float32":
        mlp, rest = 4.0 * (3 + adapted), 17.0
    else:  # the adapter computes in float32
        mlp, rest = 6.0 + 6 * adapted, 8.5 + 4 * adapted
    per_token = mlp * a.intermediate + rest * a.hidden + tokens
    if m.attention == "eager":
        per_token = max(per_token, (2 * BYTES[m.dtype] + FULL) * a.heads * tokens + rest * a.hidden)
    return per_token * tokens


def vision_workspace_bytes(m: Model, image: Image) -> float:
    """Most that the vision tower holds at once for an image, its pixels included; measured coefficients."""
    v, d = m.architecture.vision, BYTES[m.dtype]
    attention, rest = (44, 16) if m.dtype == "float32" else (38, 10)
    held = max(attention * v.hidden, 3 * d * v.intermediate + rest * v.hidden)
    return image.patches * (held + pixel_bytes(v, m.dtype))


def pixel_bytes(v: Vision, dtype: str) -> int:
    """Pixels of one patch: in float32 from the processor, and in the type of the weights."""
    return v.values * (FULL + (0 if dtype == "float32" else BYTES[dtype]))


def update_workspace_bytes(m: Model) -> float:
    """Most that a backward holds beside what the forward kept, for a token; measured coefficients, rounded up."""
    mlp, rest = (8, 8) if m.dtype == "float32" else (6, 12)
    return mlp * m.architecture.intermediate + rest * m.architecture.hidden


# ------------------------------------------------------------------------------------------------------ of the phases


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
    cache = (questions * question + rows * longest) * m.kv_bytes
    prefill = items * language_workspace_bytes(m, question, not merged)
    seeing = items * sum(vision_workspace_bytes(m, image) for image in images)
    copied = FULL / BYTES[m.dtype] if m.attention == "sdpa" else 1  # one layer's cache, to float32 or to grow
    drawing = rows * a.vocabulary * (BYTES[m.dtype] + 2 * FULL) + copied * cache / a.layers
    return {"kv cache": cache, "workspace": max(prefill, seeing, drawing)}


def update_bytes(
    m: Model, sequences: float, tokens: float, scored: float, images: tuple[Image, ...], checkpointing: bool
) -> dict[str, float]:
    """Memory of one forward and backward pass, without weights and optimizer: padded sequences of T tokens."""
    a, d = m.architecture, BYTES[m.dtype]
    layer = layer_activation_bytes(m, sequences, tokens, padded=True)
    per_token = update_workspace_bytes(m)
    tile = min(sequences * scored, SCORED_AT_ONCE[0]) * min(a.vocabulary, SCORED_AT_ONCE[1])
    head = d * tile + sequences * scored * a.hidden * (2 * FULL + d)
    seeing = sequences * sum(vision_workspace_bytes(m, image) for image in images)
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
    weights = m.weights
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
    pixels = completions * pixel_bytes(a.vision, "float32") * sum(image.patches for image in train.largest)
    phases = {}
    if not t.generation.startswith("vllm"):
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


def vllm_bytes(m: Model, gpu: Gpu, utilization: float, tokens: float, adapted: bool) -> float:
    """What vLLM takes: its share of the GPU, or what it needs at least: weights, workspace and one longest sequence."""
    weights = m.weights + adapted * FULL * m.adapter
    return max(utilization * gpu.memory, weights + VLLM_WORKSPACE + tokens * m.kv_bytes)


def rollout_memory(m: Model, gpu: Gpu, r: Rollouts, test: Questions, trained: bool) -> dict[str, float]:
    """Memory of a job of rollouts by part, in bytes; in float32 transformers merges the adapter into the weights."""
    longest = r.sampling.max_thinking_tokens + r.sampling.max_answer_tokens + ENDING
    if r.engine == "vllm":
        return {"vLLM": vllm_bytes(m, gpu, r.vllm.gpu_memory_utilization, test.longest + longest, trained)}
    beside = trained and m.dtype != "float32"
    items = min(r.batch_items, test.items)
    return {
        "weights": m.weights,
        "adapter": float(FULL * m.adapter * beside),
        **generation_bytes(m, items, r.block_size, test.longest, test.largest, longest, merged=not beside),
    }

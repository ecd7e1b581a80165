"""A vision-language model of any family: sizes, parameters, adapters and FLOPs, from its config.json."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch

from workflow_scripts.planning import counting

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL = 4  # bytes of a float32: adapters, their gradients and optimizer states, whatever the type of the weights
LENGTHS = (64, 128)  # tokens at which the language model is counted, for the terms in T and T²

Attention = Literal["sdpa", "eager", "flash_attention_2"]


class Flops(NamedTuple):
    """FLOPs of tokens: for each one, and for each pair of one and another that it attends to."""

    token: float
    pair: float

    def of(self, tokens: float, context: float | None = None) -> float:
        """FLOPs of tokens that attend to `context` others each (default: to each other, masked ones included)."""
        return self.token * tokens + self.pair * tokens * (tokens if context is None else context)


@dataclass(frozen=True)
class Image:
    """An image as the policy takes it."""

    tokens: int
    """Visual tokens, and marks that the processor adds."""
    patches: int
    """Patches that the vision tower encodes."""
    pixels: int
    """Pixels of the image as it is stored."""
    inputs: counting.Inputs = field(repr=False, compare=False)


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision tower; `values` counts the numbers of a patch."""

    depth: int
    hidden: int
    intermediate: int
    values: int


@dataclass(frozen=True, eq=False)
class Architecture:
    """Sizes of a model; `architecture_of` reads them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query_width: int
    kv_width: int
    """Width of keys (and of values) of one token in one layer."""
    vocabulary: int
    parameters: int
    layer_weights: int
    """Entries of all matrices of the layers."""
    head_weights: int
    layer: dict[str, tuple[int, int]]
    """Inputs and outputs of the linear layers in the first layer of the language model."""
    decoder: str
    """Name of the language model in the whole one."""
    vision: Vision
    config: Any = field(repr=False)

    def adapted(self, target_modules: str) -> list[str]:
        """Names of the layers that PEFT adapts.

        Raises:
            PlanError: there is none.
        """
        return [name for name, _ in _adapter(self, 1, target_modules)]

    def adapter_parameters(self, rank: int, target_modules: str) -> int:
        """Parameters of a LoRA adapter."""
        return sum(size for _, size in _adapter(self, rank, target_modules))

    def language_flops(self, tokens: float, context: float | None = None) -> float:
        """Forward through all layers; `context` is what each token attends to (default: T, masked ones included)."""
        return _language(self, None, "", False).of(tokens, context)

    def decoding_kernels(self, rank: int | None, target_modules: str, dtype: str, attention: Attention) -> float:
        """Kernels of a decoding step of the transformers engine, with an adapter of this rank beside the weights."""
        return _kernels(self, rank, target_modules, dtype, attention)

    def head_flops(self, positions: float) -> float:
        """Logits of a number of positions."""
        return 2 * self.head_weights * positions

    def vision_flops(self, image: Image) -> float:
        """Forward of an image through the vision tower."""
        return _vision(self, image, False)[0]

    def language_update_flops(self, rank: int, target_modules: str, checkpointing: bool, attention: Attention) -> Flops:
        """Forward and backward through the layers, with an adapter on frozen weights."""
        counted = _language(self, rank, target_modules, checkpointing)
        return counted._replace(pair=counted.pair + REDONE[attention] * _language(self, None, "", False).pair)

    def vision_update_flops(self, image: Image, attention: Attention) -> float:
        """Forward and backward through the frozen vision tower with gradient checkpointing.

        Gradients flow through it although it has nothing to train, since transformers then makes the outputs of its
        embedding require them.
        """
        flops, attended = _vision(self, image, True)
        return flops + REDONE[attention] * attended


# A fused kernel computes one of attention's two products once more in backward: half of the forward's FLOPs.
REDONE: dict[Attention, float] = {"eager": 0, "sdpa": 0.5, "flash_attention_2": 0.5}


def architecture_of(config: Mapping[str, Any], source: str = "config.json") -> Architecture:
    """Read a config.json, as published or as transformers writes it.

    Raises:
        PlanError: names `source`, the key and the remedy where it is not that of a vision-language model.
    """
    return _read(json.dumps(config), source)


@cache
def _read(text: str, source: str) -> Architecture:
    config = counting.read_config(json.loads(text), source)
    model = counting.without_weights(config)
    decoder, language, vision = model.get_decoder(), config.get_text_config(), config.vision_config
    heads = language.num_attention_heads
    head_width = getattr(language, "head_dim", None) or language.hidden_size // heads
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    width = getattr(vision, "embed_dim", vision.hidden_size)
    linears = [(n, m) for n, m in decoder.layers[0].named_modules() if isinstance(m, torch.nn.Linear)]
    return Architecture(
        layers=len(decoder.layers),
        hidden=language.hidden_size,
        intermediate=language.intermediate_size,
        heads=heads,
        query_width=heads * head_width,
        kv_width=head_width * (getattr(language, "num_key_value_heads", None) or heads),
        vocabulary=language.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_weights=sum(p.numel() for p in decoder.layers.parameters() if p.dim() > 1),
        head_weights=model.get_output_embeddings().weight.numel(),
        layer={name.split(".")[-1]: (linear.in_features, linear.out_features) for name, linear in linears},
        decoder={module: name for name, module in model.named_modules()}[decoder],
        vision=Vision(
            depth=getattr(vision, counting.depth_key(vision)),
            hidden=width,
            intermediate=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
            values=channels * getattr(vision, "temporal_patch_size", 1) * patch**2,
        ),
        config=config,
    )


@cache
def _adapter(a: Architecture, rank: int, target_modules: str) -> list[tuple[str, int]]:
    """Name and added parameters of each adapted layer."""
    model = counting.add_adapter(counting.without_weights(a.config), rank, target_modules)
    return [
        (name.removeprefix("base_model.model."), sum(p.numel() for p in module.parameters() if p.requires_grad))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


@cache
def _language(a: Architecture, rank: int | None, target_modules: str, checkpointing: bool) -> Flops:
    """Forward through the layers, or forward and backward with an adapter of this rank.

    The first layer passes no gradient to the embedding.
    """

    def counted(few: list[str | None], tokens: int) -> int:
        model = counting.shallow(a.config, few)
        if rank is not None:
            counting.add_adapter(model, rank, target_modules)
        return counting.count_language(model, tokens, rank is not None, checkpointing)

    adapter = None if rank is None else target_modules
    short, long = (_all_layers(a, adapter, partial(counted, tokens=n)) / n for n in LENGTHS)
    pair = (long - short) / (LENGTHS[1] - LENGTHS[0])
    return Flops(short - pair * LENGTHS[0], pair)


@cache
def _kernels(a: Architecture, rank: int | None, target_modules: str, dtype: str, attention: Attention) -> float:
    """Kernels of a decoding step."""

    def counted(few: list[str | None]) -> int:
        return counting.count_kernels(a.config, few, rank, target_modules, dtype, attention)

    return _all_layers(a, None if rank is None else target_modules, counted)


def _all_layers(a: Architecture, adapter: str | None, counted: Callable[[list[str | None]], int]) -> float:
    """Extend what `counted` finds for a few layers, by their kinds, to all of them.

    Layers of one kind cost the same, so each kind is counted once, behind the first layer. With an adapter that is on
    some layers alone all are counted.
    """
    kinds = getattr(a.config.get_text_config(), "layer_types", None) or [None] * a.layers
    if adapter is not None and not _on_every_layer(a, adapter):
        return counted(kinds)
    first = counted(kinds[:1])
    further = {kind: counted([kinds[0], kind]) - first for kind in set(kinds[1:])}
    return first + sum(further[kind] for kind in kinds[1:])


def _on_every_layer(a: Architecture, target_modules: str) -> bool:
    """Whether an adapter is on the same matrices of each layer of the language model."""
    matrices: dict[str, set[str]] = defaultdict(set)
    for name in a.adapted(target_modules):
        if name.startswith(f"{a.decoder}.layers."):
            layer, _, matrix = name.removeprefix(f"{a.decoder}.layers.").partition(".")
            matrices[layer].add(matrix)
    return len(matrices) == a.layers and len({frozenset(names) for names in matrices.values()}) == 1


@cache
def _vision(a: Architecture, image: Image, checkpointing: bool) -> tuple[float, float]:
    """FLOPs of an image, with checkpointing those of backward too, and those of attention in its forward.

    Towers of one block, of two, and with one of each special kind (Qwen2.5-VL: attention to the whole image; Qwen3-VL:
    features for layers of the language model) give those of the whole depth.
    """

    def counted(blocks: int, *special: str) -> tuple[int, int]:
        model = counting.shallow(a.config, kinds[:1], blocks, special)
        return counting.count_vision(model, image.inputs, checkpointing)

    kinds = getattr(a.config.get_text_config(), "layer_types", None) or [None]
    one, two = counted(1), counted(2)
    total = [x + (a.vision.depth - 1) * (y - x) for x, y in zip(one, two, strict=True)]
    for key, blocks in counting.special_blocks(a.config.vision_config).items():
        if number := sum(block < a.vision.depth for block in blocks):
            total = [t + number * (y - x) for t, x, y in zip(total, one, counted(1, key), strict=True)]
    return total[0], total[1]

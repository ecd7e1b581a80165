"""Sizes of a Qwen2.5-VL model: parameters, FLOPs and bytes as closed formulas. docs/plan.md derives and checks them.

T are tokens of a sequence, p patches of an image. A multiplication and an addition are two FLOPs; norms, rotations and
activations count nothing, as in torch's FlopCounterMode.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL = 4  # bytes of a float32: adapters, their gradients and optimizer states, whatever the type of the weights
LARGEST_ASPECT_RATIO = 200
SCORED_AT_ONCE = (4096, 32768)  # tokens and vocabulary of one tile of TRL's log-probabilities

Attention = Literal["sdpa", "eager", "flash_attention_2"]


class PlanError(ValueError):
    """Something cannot be planned: says what, and what to change."""


class Linear(NamedTuple):
    """A linear layer: its name in the model, inputs, outputs, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        """Entries of the matrix."""
        return self.inputs * self.outputs


class Image(NamedTuple):
    """An image as the vision tower sees it: rows and columns of patches, and how many of them make one token."""

    rows: int
    columns: int
    per_token: int

    @property
    def patches(self) -> int:
        """Patches."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.patches // self.per_token


@dataclass(frozen=True)
class Vision:
    """The vision tower: sizes as in config.json."""

    depth: int
    hidden: int
    intermediate: int
    patch: int
    temporal: int
    channels: int
    merge: int
    out: int
    window: int
    full_blocks: int


@dataclass(frozen=True)
class Architecture:
    """A Qwen2.5-VL model: sizes as in config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    positions: int
    vision: Vision

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Sizes from a config.json, as published (flat) or as written by transformers 5 (with a text_config).

        Raises:
            PlanError: the model is of another family.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise PlanError(
                f"model_type {config.get('model_type')} is not known here, only qwen2_5_vl: no tokens, FLOPs and memory"
            )
        text, vision = config.get("text_config", config), config["vision_config"]
        return cls(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
            tied=config["tie_word_embeddings"],
            positions=text["max_position_embeddings"],
            vision=Vision(
                depth=vision["depth"],
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                patch=vision["patch_size"],
                temporal=vision["temporal_patch_size"],
                channels=vision.get("in_channels", vision.get("in_chans", 3)),
                merge=vision["spatial_merge_size"],
                out=vision["out_hidden_size"],
                window=vision["window_size"],
                full_blocks=sum(block < vision["depth"] for block in vision["fullatt_block_indexes"]),
            ),
        )

    # ------------------------------------------------------------------------------------------------ the layers

    @property
    def kv_width(self) -> int:
        """Width of keys (and of values) of one token in one layer."""
        return self.hidden // self.heads * self.kv_heads

    def layer(self, index: int) -> list[Linear]:
        """Linear layers of one layer of the language model."""
        name, h, kv, i = f"model.language_model.layers.{index}", self.hidden, self.kv_width, self.intermediate
        return [
            Linear(f"{name}.self_attn.q_proj", h, h, True),
            Linear(f"{name}.self_attn.k_proj", h, kv, True),
            Linear(f"{name}.self_attn.v_proj", h, kv, True),
            Linear(f"{name}.self_attn.o_proj", h, h, False),
            Linear(f"{name}.mlp.gate_proj", h, i, False),
            Linear(f"{name}.mlp.up_proj", h, i, False),
            Linear(f"{name}.mlp.down_proj", i, h, False),
        ]

    def block(self, index: int) -> list[Linear]:
        """Linear layers of one block of the vision tower."""
        name, v, m = f"model.visual.blocks.{index}", self.vision.hidden, self.vision.intermediate
        return [
            Linear(f"{name}.attn.qkv", v, 3 * v, True),
            Linear(f"{name}.attn.proj", v, v, True),
            Linear(f"{name}.mlp.gate_proj", v, m, True),
            Linear(f"{name}.mlp.up_proj", v, m, True),
            Linear(f"{name}.mlp.down_proj", m, v, True),
        ]

    def merger(self) -> list[Linear]:
        """Linear layers that make tokens of patches."""
        merged = self.vision.hidden * self.vision.merge**2
        name = "model.visual.merger.mlp"
        return [Linear(f"{name}.0", merged, merged, True), Linear(f"{name}.2", merged, self.vision.out, True)]

    def linears(self) -> list[Linear]:
        """Every linear layer of language model and vision tower; the head is none, adapters leave it alone."""
        language = [linear for index in range(self.layers) for linear in self.layer(index)]
        return language + [linear for index in range(self.vision.depth) for linear in self.block(index)] + self.merger()

    @property
    def patch_weights(self) -> int:
        """Weights of the convolution that embeds a patch."""
        return self.vision.channels * self.vision.temporal * self.vision.patch**2 * self.vision.hidden

    # --------------------------------------------------------------------------------------------- the parameters

    def parameters(self) -> int:
        """Parameters, a tied head counted once."""
        linears = sum(linear.weights + linear.bias * linear.outputs for linear in self.linears())
        language_norms = (2 * self.layers + 1) * self.hidden
        vision_norms = (2 * self.vision.depth + 1) * self.vision.hidden
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return linears + language_norms + vision_norms + embedding + self.patch_weights

    def adapted(self, target_modules: str) -> list[Linear]:
        """Linear layers that PEFT adapts: those whose whole name the regular expression matches."""
        return [linear for linear in self.linears() if re.fullmatch(target_modules, linear.name)]

    def adapter_parameters(self, rank: int, target_modules: str) -> int:
        """Parameters of a LoRA adapter: rank x (inputs + outputs) for each adapted layer."""
        return sum(rank * (linear.inputs + linear.outputs) for linear in self.adapted(target_modules))

    # -------------------------------------------------------------------------------------------------- the images

    def image(self, width: int, height: int, min_pixels: int, max_pixels: int) -> Image:
        """What an image of that size becomes: Qwen's resizing to sides of whole tokens, between two areas.

        Raises:
            PlanError: the image is narrower than the processor accepts.
        """
        if max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
            raise PlanError(f"an image of {width} x {height} pixels is narrower than {LARGEST_ASPECT_RATIO}:1")
        factor = self.vision.patch * self.vision.merge
        rows, columns = (round(side / factor) for side in (height, width))
        area = width * height
        if rows * columns * factor**2 > max_pixels:
            scale = math.sqrt(area / max_pixels)
            rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
        elif rows * columns * factor**2 < min_pixels:
            scale = math.sqrt(min_pixels / area)
            rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
        return Image(rows * self.vision.merge, columns * self.vision.merge, self.vision.merge**2)

    # --------------------------------------------------------------------------------------------------- the FLOPs

    def language_flops(self, tokens: float, context: float | None = None) -> float:
        """Forward through all layers; `context` is what each token attends to (default: T, masked ones included)."""
        attention = 4 * self.layers * self.hidden * tokens * (tokens if context is None else context)
        return 2 * self.layers * sum(linear.weights for linear in self.layer(0)) * tokens + attention

    def adapter_flops(self, tokens: float, rank: int, target_modules: str) -> float:
        """Forward through the adapter's own products."""
        return 2 * self.adapter_parameters(rank, target_modules) * tokens

    def head_flops(self, positions: float) -> float:
        """Logits of so many positions."""
        return 2 * self.vocabulary * self.hidden * positions

    def vision_flops(self, image: Image) -> float:
        """Forward of one image through the vision tower."""
        v, p = self.vision, image.patches
        blocks = 2 * p * v.depth * sum(linear.weights for linear in self.block(0))
        merger = 2 * image.tokens * sum(linear.weights for linear in self.merger())
        return 2 * p * self.patch_weights + blocks + merger + self._vision_attention_flops(image)

    def _vision_attention_flops(self, image: Image) -> float:
        """Few blocks see the whole image, the others windows of 112 x 112 pixels, cut at the edge."""
        v = self.vision
        side = v.window // v.patch
        squares = math.prod(n // side * side**2 + (n % side) ** 2 for n in (image.rows, image.columns))
        return 4 * v.hidden * (v.full_blocks * image.patches**2 + (v.depth - v.full_blocks) * squares)

    def update_flops(
        self,
        tokens: float,
        scored: float,
        images: Iterable[Image],
        rank: int,
        target_modules: str,
        checkpointing: bool,
        attention: Attention,
    ) -> float:
        """Forward and backward of one sequence with an adapter on frozen weights.

        Backward has no gradients of frozen weights: one product for each of the forward's, two more for each of the
        adapter's. For the two of attention it has four, and a fused kernel redoes one. The head's forward is redone.
        The first layer's q, k and v pass nothing on to the embedding.

        With checkpointing every layer and block runs once more, up to the last product that something is kept of, and
        gradients also flow through the frozen vision tower, since transformers then makes the outputs of both
        embeddings require them.
        """
        images = list(images)
        backward_of_attention = 2 if attention == "eager" else 2.5
        attended = 4 * self.layers * self.hidden * tokens**2
        language, adapter = self.language_flops(tokens), self.adapter_flops(tokens, rank, target_modules)
        vision, head = sum(self.vision_flops(image) for image in images), self.head_flops(scored)
        forward = language + adapter + vision + head
        backward = language + (backward_of_attention - 1) * attended + 2 * adapter + 2 * head
        if not checkpointing:
            for linear in self.layer(0)[:3]:
                adapted = re.fullmatch(target_modules, linear.name)
                backward -= 2 * tokens * (linear.weights + (rank * linear.inputs if adapted else 0))
            return forward + backward
        v = self.vision
        down = self.layer(0)[-1]
        last = rank * down.outputs if re.fullmatch(target_modules, down.name) else down.weights
        again = language + adapter - 2 * self.layers * last * tokens
        for image in images:
            embedding = 2 * image.patches * self.patch_weights
            merger = 2 * image.tokens * sum(linear.weights for linear in self.merger())
            again += (
                self.vision_flops(image) - embedding - merger - 2 * image.patches * v.depth * v.hidden * v.intermediate
            )
            backward += self.vision_flops(image) - embedding
            backward += (backward_of_attention - 1) * self._vision_attention_flops(image)
        return forward + again + backward

    def shared_update_flops(
        self,
        question: float,
        completion: float,
        scored: float,
        group: int,
        rank: int,
        target_modules: str,
        attention: Attention,
    ) -> float:
        """Forward and backward of one completion whose question passes once for its group, images seen before.

        As `update_flops` of question and completion by themselves, and what the completion attends to in the question:
        two products forward and four, or five, backward.
        """
        settings: Any = (rank, target_modules, False, attention)
        alone = self.update_flops(question, 0, [], *settings) / group
        alone += self.update_flops(completion, scored, [], *settings)
        attended = 4 * self.layers * self.hidden * completion * question
        return alone + attended * (3 if attention == "eager" else 3.5)

    # --------------------------------------------------------------------------------------------------- the bytes

    def kv_bytes(self, dtype: str) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_width * BYTES[dtype]

    def layer_activation_bytes(
        self,
        sequences: float,
        tokens: float,
        dtype: str,
        rank: int,
        target_modules: str,
        attention: Attention,
        padded: bool,
    ) -> float:
        """What one layer of the language model keeps for its backward, its adapted layers included.

        Args:
            sequences: in the batch.
            tokens: T, of each sequence with its padding.
            dtype: type of the weights; in the short ones the layer runs under autocast, as TRL does.
            rank: of the adapter.
            target_modules: which layers it adapts.
            attention: eager keeps the T x T weights of every head.
            padded: with padding, sdpa repeats keys and values for every head and keeps its mask.
        """
        h, d, short = self.hidden, BYTES[dtype], dtype != "float32"
        layer = {linear.name.split(".")[-1]: linear for linear in self.layer(0)}
        adapted = [name for name, linear in layer.items() if re.fullmatch(target_modules, linear.name)]
        if short:  # autocast copies the input of each adapted layer, and the adapter's weights
            inputs = sum(layer[name].inputs for name in adapted)
            copies = d * sum(rank * (layer[name].inputs + layer[name].outputs) for name in adapted)
        else:  # layers with the same input share it
            same = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
            inputs = sum(layer[names[0]].inputs for names in same if not set(names).isdisjoint(adapted))
            copies = 0
        repeated = h if attention == "eager" or (attention == "sdpa" and padded) else self.kv_width
        attended = h + 2 * repeated  # q, k, v
        if attention == "eager":
            weights = self.heads * tokens * (FULL + d * short)
        else:
            attended += 0 if "o_proj" in adapted and not short else h  # the result, unless it is an input counted above
            weights = self.heads * FULL + (tokens * d if attention == "sdpa" and padded else 0)
        norms = 2 * (h + 1) * FULL
        per_token = d * (inputs + attended + 3 * self.intermediate + len(adapted) * rank) + weights + norms
        return sequences * tokens * per_token + copies

    def language_workspace_bytes(self, tokens: float, dtype: str, adapted: bool, attention: Attention) -> float:
        """Most that a forward without gradients holds at once for a sequence, keys and values left out.

        The coefficients were measured: inside the MLP, or with eager attention at its T x T weights.
        """
        if dtype == "float32":
            mlp, rest = 4.0 * (3 + adapted), 17.0
        else:  # the adapter computes in float32
            mlp, rest = 6.0 + 6 * adapted, 8.5 + 4 * adapted
        per_token = mlp * self.intermediate + rest * self.hidden + tokens
        if attention == "eager":
            per_token = max(per_token, (2 * BYTES[dtype] + FULL) * self.heads * tokens + rest * self.hidden)
        return per_token * tokens

    def vision_workspace_bytes(self, image: Image, dtype: str) -> float:
        """Most that the vision tower holds at once for an image, its pixels included; measured coefficients."""
        v, d = self.vision, BYTES[dtype]
        attention, rest = (44, 16) if dtype == "float32" else (38, 10)
        return image.patches * (
            max(attention * v.hidden, 3 * d * v.intermediate + rest * v.hidden) + self.pixel_bytes(dtype)
        )

    def pixel_bytes(self, dtype: str) -> int:
        """Pixels of one patch: in float32 from the processor, and in the type of the weights."""
        v = self.vision
        return v.channels * v.temporal * v.patch**2 * (FULL + (0 if dtype == "float32" else BYTES[dtype]))

    def update_workspace_bytes(self, dtype: str) -> float:
        """Most that a backward holds beside what the forward kept, for a token; measured coefficients, rounded up."""
        mlp, rest = (8, 8) if dtype == "float32" else (6, 12)
        return mlp * self.intermediate + rest * self.hidden

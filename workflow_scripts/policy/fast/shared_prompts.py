"""Forward passes that compute equal inputs once: an image for all rows that show it, a prompt for its whole group.

A GRPO batch repeats every prompt `group_size` times, and the prompt is the longer part of most rows. Under causal
attention, equal prefixes have equal states: the pass computes them once, and the rest of each row attends to them.
A step passes over its images several times, and pairs of one prompt show the same anchor, so the features of a frozen
vision tower are kept for later passes. The head scores completions only, not prompts. Values and gradients are those
of the plain pass, up to the order of sums.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling


def from_first_label(
    model: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook that hands TRL's head only the positions from the first label of any row onwards.

    Without Triton the head scores every position, prompts included, which takes most of a pass over a large
    vocabulary.
    """
    labels = options.get("labels")
    if labels is None or not options.get("fused_lm_head"):
        return None
    labelled = (labels != -100).any(0).nonzero()
    if not len(labelled) or not labelled[0]:
        return None
    first = int(labelled[0])
    return args, options | {"labels": None, "shift_labels": labels[:, first:], "predicting_from": first}


class PatchesByMatrix:
    """Mixin for the vision tower's first layer: a convolution with a kernel as large as a patch is one matrix product.

    PyTorch's 3D convolution takes several times as long.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Embed patches: (patches, values of a patch) to (patches, width)."""
        layer: Any = self
        if type(layer.proj) is not torch.nn.Conv3d:  # adapted
            return super().forward(hidden_states)  # type: ignore[misc]
        kernel = layer.proj.weight.flatten(1)
        return torch.nn.functional.linear(hidden_states.to(kernel.dtype), kernel, layer.proj.bias)


@dataclass(frozen=True)
class EncodedImage:
    """An image with its features."""

    patches: torch.Tensor
    """(patches, values of a patch)."""
    grid: list[int]
    """Number of frames, and of patches vertically and horizontally."""
    features: torch.Tensor
    """(merged patches, width)."""


class SharedPrompts:
    """Mixin for the part of a vision-language model below its head, such as `Qwen2_5_VLModel`."""

    step_images: int = 0
    """Number of images of a training step: passes in training mode keep the features of so many."""
    _kept: tuple[Any, list[EncodedImage]] | None = None
    """State of the frozen tower, and images that it encoded in that state; those of the last pass are the last."""

    def forward(self, *inputs: Any, predicting_from: int | None = None, **options: Any) -> Any:
        """Run the model's own pass with equal inputs computed once.

        With `predicting_from`, the last hidden state, (rows, tokens, width), keeps only the positions that predict the
        tokens from that index on.
        """
        out = self._pass(*inputs, **options)
        if predicting_from is not None:
            out.last_hidden_state = out.last_hidden_state[:, predicting_from - 1 : -1]
        return out

    def _pass(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Encode each image once, and share equal prefixes where the pass covers whole rows without a cache.

        `input_ids`, `attention_mask` and `mm_token_type_ids` are (rows, tokens). `image_grid_thw` is (images, 3), with
        equally many images for each row. `pixel_values` concatenates the patches of all images.
        """
        model: Any = self
        plain: Any = super().forward  # type: ignore[misc]
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "mm_token_type_ids": mm_token_type_ids}
        if (
            input_ids is None
            or attention_mask is None
            or mm_token_type_ids is None
            or pixel_values is None
            or image_grid_thw is None
            or len(image_grid_thw) % len(input_ids)
        ):
            return plain(**rows, pixel_values=pixel_values, image_grid_thw=image_grid_thw, **options)
        pictures = pixel_values.split(image_grid_thw.prod(-1).tolist())
        same = first_equal(pictures, image_grid_thw.tolist())
        once = sorted(set(same))
        encoded = self._encoded([pictures[i] for i in once], image_grid_thw[once])
        feature_of = dict(zip(once, encoded, strict=True))
        images_of = np.asarray(same).reshape(len(input_ids), -1)
        last_image = int(mm_token_type_ids.any(0).nonzero().max())
        shared, first, group = shared_prefix(input_ids, attention_mask, images_of, last_image + 1)
        # Checkpointing works without a cache only. Its property has two names in the two environments.
        checkpointing = model.training and any(
            getattr(part, "gradient_checkpointing", False) for part in model.modules()
        )
        unshared = checkpointing or options.get("use_cache") is not False or options.get("position_ids") is not None
        if unshared or len(first) == len(input_ids):
            with _showing([feature_of[i] for i in same]):
                return plain(**rows, pixel_values=pixel_values, image_grid_thw=image_grid_thw, **options)

        of = torch.from_numpy(group).to(input_ids.device)
        shown = np.arange(len(same)).reshape(images_of.shape)[first].ravel().tolist()
        prefixes = {name: value[first, :shared] for name, value in rows.items() if value is not None}
        positions, _ = model.get_rope_index(image_grid_thw=image_grid_thw[shown], **prefixes)
        cache = DynamicCache(config=model.config)
        options |= {"past_key_values": cache, "use_cache": True}
        with _showing([feature_of[same[i]] for i in shown]):
            # The features above stand in for the patches.
            prompts = plain(
                **prefixes,
                **options | {"position_ids": positions},
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw[shown],
            )
        cache.batch_select_indices(of)
        after = torch.arange(1, input_ids.shape[1] - shared + 1, device=input_ids.device)
        rest = plain(
            input_ids=input_ids[:, shared:],
            attention_mask=attention_mask,
            **options | {"position_ids": positions[..., -1:].index_select(-2, of) + after},
        )
        rest.last_hidden_state = torch.cat([prompts.last_hidden_state.index_select(0, of), rest.last_hidden_state], 1)
        rest.past_key_values = None
        return rest

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: Any = None, **options: Any) -> Any:
        """Features of images given as (patches, values) and (images, 3); within `forward`, those encoded there."""
        features = SHOWN.get()
        if features is None:
            return super().get_image_features(pixel_values, image_grid_thw, **options)  # type: ignore[misc]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def _encoded(self, pictures: list[torch.Tensor], image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Features of different images, (merged patches, width) each; those of a frozen tower have no gradient.

        In training mode only images that are not kept are encoded, because each pass of a step shows a part of its
        images. Otherwise, one unknown image lets all images of the pass be encoded together, and replace the kept ones.

        Args:
            pictures: patches of each image, (patches, values).
            image_grid_thw: (images, 3).
        """
        model: Any = self
        tower = frozen(model.visual, pictures[0])
        state, kept = self._kept or (None, [])  # read once, because another thread may replace it
        if tower is None or state != tower:
            kept = []
        grids = image_grid_thw.tolist()
        shown = [image.patches for image in kept] + pictures
        found = first_equal(shown, [image.grid for image in kept] + grids)[len(kept) :]
        unknown = [i for i, image in enumerate(found) if image >= len(kept)]
        if not unknown:
            return [kept[image].features for image in found]
        if tower is None or not model.training:
            kept, unknown = [], list(range(len(pictures)))
            self._kept = None  # freed before encoding, so that the features of two passes are never in memory together
        plain: Any = super().get_image_features  # type: ignore[misc]
        patches = torch.cat([pictures[i] for i in unknown])
        # Gradient checkpointing makes the tower's inputs require gradients; nothing uses those gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower is None):
            features = plain(patches, image_grid_thw[unknown], return_dict=True).pooler_output
        parts = patches.split(image_grid_thw[unknown].prod(-1).tolist())
        encoded = dict(zip(unknown, map(EncodedImage, parts, [grids[i] for i in unknown], features), strict=True))
        of_pass = [encoded.get(i) or kept[image] for i, image in enumerate(found)]
        if tower is not None:
            earlier = [image for j, image in enumerate(kept) if j not in found]
            self._kept = tower, (earlier + of_pass)[-max(self.step_images, len(of_pass)) :]
        return [image.features for image in of_pass]


# Features that `get_image_features` returns during a pass of this thread.
SHOWN: ContextVar[tuple[torch.Tensor, ...] | None] = ContextVar("SHOWN", default=None)


@contextlib.contextmanager
def _showing(features: list[torch.Tensor]) -> Iterator[None]:
    token = SHOWN.set(tuple(features))
    try:
        yield
    finally:
        SHOWN.reset(token)


def frozen(tower: torch.nn.Module, pixel_values: torch.Tensor) -> tuple[Any, ...] | None:
    """State that features of a frozen vision tower depend on besides the images; None if the tower may change.

    An adapter in the tower changes the features without changing the weights. With FSDP all processes have to pass
    through the tower together, including those whose images are known. A weight is identified by its address and by
    PyTorch's count of writes to it.
    """
    weights = list(tower.parameters())
    if (
        pixel_values.requires_grad
        or torch.is_inference_mode_enabled()
        or any(weight.requires_grad or type(weight) is not torch.nn.Parameter for weight in weights)
        or any(isinstance(module, BaseTunerLayer) for module in tower.modules())
    ):
        return None
    kind = pixel_values.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    states = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
    return pixel_values.device, pixel_values.dtype, autocast, states


def first_equal(pictures: Sequence[torch.Tensor], grids: list[list[int]]) -> list[int]:
    """For each image, (patches, values), the index of the first image with equal pixels and an equal grid."""
    sums = torch.stack([picture.sum(dtype=torch.float32) for picture in pictures]).tolist()
    seen: dict[tuple[float, tuple[int, ...]], list[int]] = {}
    found = []
    for i, (total, grid) in enumerate(zip(sums, grids, strict=True)):
        alike = seen.setdefault((total, tuple(grid)), [])
        equal = next((j for j in alike if torch.equal(pictures[j], pictures[i])), i)
        if equal == i:
            alike.append(i)
        found.append(equal)
    return found


def shared_prefix(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, images_of: NDArray[np.intp], at_least: int
) -> tuple[int, list[int], NDArray[np.intp]]:
    """Prefix length that minimises computed tokens, the first row of each group with equal prefixes, each row's group.

    Rows, (rows, tokens), share a prefix if its tokens, its mask and all images, (rows, images per row), are equal.
    With g groups, a prefix of n tokens and r rows of t tokens, a pass computes g n + r (t - n) tokens instead of r t.
    The prefix has at least `at_least` tokens, and at most all but the last.
    """
    tokens = (2 * input_ids + attention_mask).cpu().numpy()
    order = np.lexsort(np.concatenate([tokens.T[::-1], images_of.T[::-1]]))
    tokens, images = tokens[order], images_of[order]
    differ = np.concatenate([tokens[1:] != tokens[:-1], np.ones((len(tokens) - 1, 1), dtype=bool)], 1)
    common = np.where((images[1:] == images[:-1]).all(1), differ.argmax(1), 0)  # equal tokens of neighbours
    lengths = np.arange(min(at_least, tokens.shape[1] - 1), tokens.shape[1])
    groups = 1 + (common[:, None] < lengths).sum(0)
    shared = int(lengths[(groups * lengths + len(tokens) * (tokens.shape[1] - lengths)).argmin()])
    group = np.empty(len(tokens), dtype=np.intp)
    group[order] = np.concatenate([[0], (common < shared).cumsum()])
    first = np.unique(group, return_index=True)[1]
    return shared, first.tolist(), group

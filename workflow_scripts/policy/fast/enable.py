"""The switch for all faster passes: it swaps classes, not weights, and what is saved has the plain names."""

from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, Qwen2_5_VLModel, Qwen2VLImageProcessor, Qwen2VLModel

from workflow_scripts.policy.fast.output_head import Float32Logits, TransposedLinear
from workflow_scripts.policy.fast.prompt_attention import PROMPT_ONCE
from workflow_scripts.policy.fast.shared_images import ImagesOnce
from workflow_scripts.policy.fast.shared_prompts import PatchesByMatrix, SharedPrompts, from_first_label


def enable_faster_passes(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    sharing: bool = True,
    decoding: bool = True,
    step_images: int = 0,
) -> None:
    """Let a policy that is not adapted yet compute what it computes in less time, equal up to the order of sums.

    Args:
        model: changed in place.
        processor: changed in place.
        sharing: compute equal images and prompts once (Qwen2-VL and Qwen2.5-VL; no effect on other families).
        decoding: compute the output head for a few rows as (W xᵀ)ᵀ on a CPU.
        step_images: number of images of a training step, whose features are kept until the next step.
    """
    if sharing:
        share_prompts(model, step_images)
        process_images_once(processor)
    if decoding:
        transpose_head(model)


def share_prompts(model: PreTrainedModel, step_images: int = 0) -> None:
    """Let a Qwen2-VL or Qwen2.5-VL share prompts; other families, which take images in other ways, do not change."""
    backbone: Any = model.base_model
    if isinstance(model.base_model, Qwen2VLModel | Qwen2_5_VLModel):
        _mix_in(SharedPrompts, backbone)
        backbone.step_images = step_images
        if backbone.language_model.config._attn_implementation == "sdpa":
            backbone.language_model.set_attn_implementation(PROMPT_ONCE)
        _mix_in(PatchesByMatrix, backbone.visual.patch_embed)
        model.register_forward_pre_hook(from_first_label, with_kwargs=True)


def process_images_once(processor: ProcessorMixin) -> None:
    """Let the processor of a Qwen2-VL or Qwen2.5-VL preprocess an image once per call; others do not change."""
    images: Any = processor.image_processor
    if isinstance(images, Qwen2VLImageProcessor):
        _mix_in(ImagesOnce, images)


def return_float32_logits(model: PreTrainedModel) -> None:
    """Let the output head of a model in a shorter type return float32 logits, where it is a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype != torch.float32:
        head.__class__ = Float32Logits


def transpose_head(model: PreTrainedModel) -> None:
    """Let the output head use the transposed product for a few rows, where it is a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = TransposedLinear


def _mix_in(mixin: type, instance: Any) -> None:
    """Put a mixin before an object's class; the new class has the old name, under which the object is saved."""
    plain = type(instance)
    instance.__class__ = type(plain.__name__, (mixin, plain), {})

"""Tiny random models of other families than the bundled one: real classes, real processors, the bundled tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.tiny_qwen import CHAT_TEMPLATE

SMOLVLM_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# Wide: with the usual 0.02 a model this small hardly looks at positions and pictures, and every test would pass.
INITIALIZER_RANGE = 0.2


def tokenizer(extra: list[str]) -> Any:
    """Return the bundled tokenizer with more special tokens."""
    found = AutoTokenizer.from_pretrained(ROOT / "models/tiny-qwen2.5-vl")
    found.add_special_tokens({"additional_special_tokens": extra}, replace_extra_special_tokens=False)
    return found


def text_config(words: Any) -> dict[str, Any]:
    """Return the keys that the language models have in common."""
    return {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
    }


def qwen3_vl() -> tuple[Any, Any]:
    """Return a tiny Qwen3-VL: images scaled to an area, three position axes, features added in several layers."""
    words = tokenizer([])
    token = words.convert_tokens_to_ids
    rotation = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text_config(words) | {"rope_parameters": rotation},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": 64,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(patch_size=14, merge_size=2),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """Return a tiny SmolVLM: images scaled by their longest edge and cut to tiles, one position axis."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles])
    words.eos_token = "<end_of_utterance>"
    config = SmolVLMConfig(
        text_config=text_config(words) | {"model_type": "llama"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "initializer_range": INITIALIZER_RANGE,
        },
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True
        ),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=SMOLVLM_CHAT_TEMPLATE,
    )
    return SmolVLMForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Return a tiny Gemma 3: images of one size that attend both ways, and layers that see a sliding window."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = AutoTokenizer.from_pretrained(ROOT / "models/tiny-qwen2.5-vl", extra_special_tokens=names)
    token = words.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text_config(words)
        | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
        initializer_range=INITIALIZER_RANGE,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=words,
        chat_template=SMOLVLM_CHAT_TEMPLATE.replace("<image>", "<start_of_image>").replace("<end_of_utterance>", ""),
        image_seq_length=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    # Born as zeros, which would show every image alike.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=INITIALIZER_RANGE)
    return model, processor


def internvl() -> tuple[Any, Any]:
    """Return a tiny InternVL: images cut to tiles that are rows of their own, a Qwen2 language model."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = AutoTokenizer.from_pretrained(ROOT / "models/tiny-qwen2.5-vl", extra_special_tokens=names)
    config = InternVLConfig(
        text_config=text_config(words) | {"model_type": "qwen2"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=SMOLVLM_CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>").replace("<end_of_utterance>", ""),
    )
    return InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "internvl": internvl,
}
# What a user sets for each, beside the folder.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"policy": {}, "language_model": "language_model"},
    "smolvlm": {"policy": {"min_pixels": None, "max_pixels": None}, "language_model": "text_model"},
    "gemma3": {"policy": {"min_pixels": None, "max_pixels": None}, "language_model": "language_model"},
    "internvl": {"policy": {"min_pixels": None, "max_pixels": None}, "language_model": "language_model"},
}


def save(family: str, folder: Path) -> Path:
    """Write a family's model, weights as safetensors, and return its folder."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    words = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

"""Loading the policy: model, processor and adapter, from the manifest of the base policy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

from workflow_scripts.policy.prompts import ANSWERS, OPEN_ANSWER
from workflow_scripts.provenance import ROOT
from workflow_scripts.stage_configuration import ModelConfig


class PolicyError(RuntimeError):
    """A policy cannot be used for this task: says why and what to change."""


@dataclass
class Policy:
    """A model that can be asked: weights, processor, the question's template and the tokens of its answers."""

    model: PreTrainedModel
    processor: ProcessorMixin
    template: str
    answers: tuple[int, ...]
    answer_token_ids: list[int]

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the processor."""
        return self.processor.tokenizer


def load_processor(manifest: Path, config: ModelConfig) -> ProcessorMixin:
    """Processor of the base policy with the configured image size, padding on the left."""
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    return AutoProcessor.from_pretrained(base_path(manifest), size=size, padding_side="left", trust_remote_code=False)


def load_model(manifest: Path, config: ModelConfig) -> PreTrainedModel:
    """Base model in evaluation mode, weights from safetensors only.

    Of its own generation_config only the end tokens are kept: how to sample is the configuration's business.
    """
    torch.set_num_threads(config.numeric_threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base_path(manifest), dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
    )
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    loaded: PreTrainedModel = model.to(config.device).eval()
    return loaded


def load_policy(manifest: Path, adapter: Path | None, config: ModelConfig) -> Policy:
    """The base policy, or the one with this LoRA adapter (a folder).

    In float32 the adapter is merged into the weights, which spares its extra products in every step; in shorter types
    merging would round them.
    """
    model: Any = load_model(manifest, config)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        if config.dtype == "float32":
            model = model.merge_and_unload()
    return as_policy(model, load_processor(manifest, config), config)


def as_policy(model: PreTrainedModel, processor: ProcessorMixin, config: ModelConfig) -> Policy:
    """Put the question to a model; checks that its answers can be read from single logits."""
    answers = ANSWERS[config.protocol]
    return Policy(model, processor, config.template, answers, answer_token_ids(processor.tokenizer, answers))


def answer_token_ids(tokenizer: Any, answers: tuple[int, ...]) -> list[int]:
    """Token of each answer.

    Raises:
        PolicyError: an answer is not one token of its own after `<answer>`, so that no single logit stands for it.
    """
    opening = tokenizer.encode(OPEN_ANSWER, add_special_tokens=False)
    ids = []
    for answer in answers:
        with_opening = tokenizer.encode(f"{OPEN_ANSWER}{answer}", add_special_tokens=False)
        if with_opening[:-1] != opening or tokenizer.decode(with_opening[-1:]) != str(answer):
            raise PolicyError(
                f"the tokenizer writes {OPEN_ANSWER}{answer} as {tokenizer.convert_ids_to_tokens(with_opening)}: the "
                "answer must be a single token after the tag; choose a base policy whose digits are single tokens"
            )
        ids.append(with_opening[-1])
    return ids


def base_path(manifest: Path) -> Path:
    """Folder of the base model that a manifest names (relative ones are relative to the repository)."""
    return ROOT / json.loads(manifest.read_text(encoding="utf-8"))["path"]

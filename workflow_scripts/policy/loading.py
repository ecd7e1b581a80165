"""Loading the policy: model, processor and adapter, from the manifest of the base policy."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

from workflow_scripts.policy.manifest import PolicyError, base_path
from workflow_scripts.policy.prompts import ANSWERS, OPEN_ANSWER
from workflow_scripts.stage_configuration import ModelConfig

ANOTHER_BASE = "set policy.source and what belongs to it to a Qwen2.5-VL model with weights as safetensors"


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
    """Processor of the base policy with the configured image size, padding on the left.

    Raises:
        PolicyError: the folder differs from the manifest, or holds no processor that can be loaded.
    """
    folder = base_path(manifest)
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    with _loading(folder, ANOTHER_BASE):
        return AutoProcessor.from_pretrained(folder, size=size, padding_side="left", trust_remote_code=False)


def load_model(manifest: Path, config: ModelConfig) -> PreTrainedModel:
    """Base model in evaluation mode, weights from safetensors only.

    Of its own generation_config only the end tokens are kept: how to sample is the configuration's business.

    Raises:
        PolicyError: the folder differs from the manifest, or holds no model that can be loaded.
    """
    torch.set_num_threads(config.numeric_threads)
    folder = base_path(manifest)
    with _loading(folder, ANOTHER_BASE):
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    loaded: PreTrainedModel = model.to(config.device).eval()
    return loaded


def load_policy(manifest: Path, adapter: Path | None, config: ModelConfig) -> Policy:
    """The base policy, or the one with this LoRA adapter (a folder).

    In float32 the adapter is merged into the weights, which spares its extra products in every step; in shorter types
    merging would round them.

    Raises:
        PolicyError: the base policy or the adapter cannot be loaded.
    """
    model: Any = load_model(manifest, config)
    if adapter is not None:
        if not (adapter / "adapter_model.safetensors").is_file():  # PEFT would go on to a pickle, or to the Hub
            raise PolicyError(f"{adapter} holds no adapter_model.safetensors; train the adapter again")
        with _loading(adapter, "train the adapter again"):
            model = PeftModel.from_pretrained(model, adapter).eval()
        if config.dtype == "float32":
            model = model.merge_and_unload()
    return as_policy(model, load_processor(manifest, config), config)


@contextlib.contextmanager
def _loading(folder: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())  # of a wrong shape in every layer the first few
        raise PolicyError(
            f"{folder} cannot be loaded, and code of its own is not run ({told:.400}); {remedy}"
        ) from error


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

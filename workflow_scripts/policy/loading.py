"""Loading of model, processor and adapter by the manifest of the base policy, and checks that they can be used."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.chat_template import check_chat_template
from workflow_scripts.policy.fast.enable import enable_faster_passes, return_float32_logits
from workflow_scripts.policy.manifest import ADAPTER, PolicyError, base_path
from workflow_scripts.policy.prompts import ANSWERS, OPEN_ANSWER
from workflow_scripts.policy.published_adapter import published_adapter

ANOTHER_BASE = "set policy.source and its keys to a vision-language model with weights as safetensors"
LOADING_ERRORS = (OSError, ValueError, TypeError, ImportError, RuntimeError, LookupError, SafetensorError, UserWarning)
log = logging.getLogger(__name__)

LARGEST_EDGE = 4096  # pixels; processors also use `longest_edge` for an area, which is larger


@dataclass
class Policy:
    """A model that can be asked: weights, processor, template of the question, and token of each answer."""

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
    """Load the processor of the base policy with the configured image size and padding on the left.

    Raises:
        PolicyError: the folder differs from the manifest, or as `read_processor`.
    """
    return read_processor(base_path(manifest), config)


def read_processor(folder: Path, config: ModelConfig) -> ProcessorMixin:
    """Load the processor in a model's folder with the configured image size and padding on the left.

    Raises:
        PolicyError: the folder has no image processor that can be loaded, or it lacks a configured setting.
    """
    with _loading(folder, ANOTHER_BASE):
        processor: Any = AutoProcessor.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise PolicyError(f"{folder} holds no processor that takes images beside text; {ANOTHER_BASE}")
    processor.image_processor = with_image_size(processor.image_processor, folder, config)
    settings, defaults = image_settings(config), getattr(processor, "images_kwargs", {})
    if overridden := defaults.keys() & settings.keys():  # the processor's defaults win over its image processor's
        processor.images_kwargs = defaults | {name: settings[name] for name in overridden}
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # as TRL does
    return processor


def with_image_size(images: Any, folder: Path, config: ModelConfig) -> Any:
    """Return an image processor from a model's folder with the configured image size and settings.

    Raises:
        PolicyError: it lacks one of them.
    """
    if unknown := [name for name in config.image_processor if not hasattr(images, name)]:
        known = sorted(name for name in images.to_dict() if not name.startswith("_"))
        raise PolicyError(
            f"policy.image_processor: {type(images).__name__} of {folder} has no setting {unknown[0]}; it has {known}"
        )
    if config.max_pixels is not None:
        size = dict(images.size or {})
        if size.keys() != {"shortest_edge", "longest_edge"} or size["longest_edge"] <= LARGEST_EDGE:
            raise PolicyError(
                f"{type(images).__name__} of {folder} does not scale images to an area (its own size is {size}); set "
                "policy.min_pixels and policy.max_pixels to null, and the setting it has in policy.image_processor"
            )
    with _loading(folder, "change policy.image_processor"):
        return type(images).from_dict(images.to_dict() | image_settings(config))


def image_settings(config: ModelConfig) -> dict[str, Any]:
    """Translate the configured image size and settings to the image processor's keywords."""
    if config.max_pixels is None:
        return dict(config.image_processor)
    return config.image_processor | {"size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}}


def load_model(manifest: Path, config: ModelConfig) -> PreTrainedModel:
    """Load the base model in evaluation mode, with weights from safetensors only; its logits are float32.

    Only the end tokens of its generation_config are kept, because the configuration decides how to sample.

    Raises:
        PolicyError: the folder differs from the manifest, or holds no model that can be loaded.
    """
    torch.set_num_threads(config.numeric_threads)
    capability = torch.backends.cpu.get_cpu_capability()
    if config.device == "cpu" and config.numeric_instructions == "avx2" and capability != "AVX2":
        log.warning("PyTorch computes with %s instead of AVX2: the last digits differ from published ones", capability)
    folder = base_path(manifest)
    with _loading(folder, ANOTHER_BASE):
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    published = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=published.eos_token_id, pad_token_id=published.pad_token_id)
    loaded: PreTrainedModel = model.to(config.device).eval()
    return_float32_logits(loaded)
    return loaded


def load_policy(manifest: Path, adapter: Path | None, config: ModelConfig) -> Policy:
    """Load the base policy with a LoRA adapter, if there is one, and enable all faster passes.

    The adapter is the one in the given folder, else the published one that the manifest names.

    In float32 the adapter is merged into the weights, which saves its products in every step. In shorter types merging
    would round the weights.

    Raises:
        PolicyError: the base policy or the adapter cannot be loaded.
    """
    model, processor = load_model(manifest, config), load_processor(manifest, config)
    if adapter:
        return ready_policy(model, processor, adapter, config, "train the adapter again")
    remedy = "set policy.hub.adapter to a LoRA adapter of this base policy"
    return ready_policy(model, processor, published_adapter(manifest), config, remedy)


def ready_policy(
    model: Any, processor: ProcessorMixin, adapter: Path | None, config: ModelConfig, remedy: str
) -> Policy:
    """Make a policy of a base model that is loaded, as `load_policy` does; `remedy` helps where the adapter is faulty.

    Raises:
        PolicyError: the adapter cannot be loaded.
    """
    enable_faster_passes(model, processor)
    if adapter is not None:
        if not (adapter / ADAPTER).is_file():  # PEFT would try a pickle, or the Hub
            raise PolicyError(f"{adapter} holds no {ADAPTER}; {remedy}")
        with _loading(adapter, remedy), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # those layers would stay as they are
            model = PeftModel.from_pretrained(model, adapter).eval()
        if config.dtype == "float32":
            model = model.merge_and_unload()
    return as_policy(model, processor, config)


@contextlib.contextmanager
def _loading(folder: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())  # may list every layer; cut below
        raise PolicyError(
            f"{folder} cannot be loaded, and its own code is never run ({told:.400}); {remedy}"
        ) from error


def as_policy(model: PreTrainedModel, processor: ProcessorMixin, config: ModelConfig) -> Policy:
    """Make a policy of a model, after checking that the question is shown as asked and each answer is one token."""
    check_chat_template(processor, config.template, f"prompts.{config.protocol}")
    answers = ANSWERS[config.protocol]
    return Policy(model, processor, config.template, answers, answer_token_ids(processor.tokenizer, answers))


def check_adapted_layers(model: PreTrainedModel, pattern: str) -> None:
    """Check that a regular expression (training.*.lora.target_modules) matches only layers of the language model.

    Raises:
        PolicyError: it matches nothing, or a layer elsewhere, for example in the vision tower.
    """
    names = {module: name for name, module in model.named_modules()}
    language_model = names[model.get_decoder()]
    matched = [name for name in names.values() if re.fullmatch(pattern, name)]
    outside = [name for name in matched if not name.startswith(f"{language_model}.")]
    if not matched or outside:
        found = f"{outside[0]}, which is not in it" if outside else "no layer"
        raise PolicyError(
            f"training.*.lora.target_modules, {pattern}, matches {found}; the language model of this policy is "
            f"{language_model}, such as .*{re.escape(language_model)}.*\\.(q_proj|v_proj)"
        )


def answer_token_ids(tokenizer: Any, answers: tuple[int, ...]) -> list[int]:
    """Token of each answer.

    Raises:
        PolicyError: an answer is not a single token after `<answer>`, so no single logit stands for it.
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

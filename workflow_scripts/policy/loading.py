"""Loading the policy: model, processor and adapter, from the manifest of the base policy."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.fast.output_head import turn_product_of_few_rows
from workflow_scripts.policy.fast.shared_prompts import share_prompts
from workflow_scripts.policy.manifest import PolicyError, base_path
from workflow_scripts.policy.prompts import ANSWERS, OPEN_ANSWER, messages

ANOTHER_BASE = "set policy.source and what belongs to it to a vision-language model with weights as safetensors"
OPEN_THINKING = "<think>"
LARGEST_EDGE = 4096  # pixels; a larger `longest_edge` is no edge but an area: processors use the name for both


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
        PolicyError: the folder differs from the manifest, holds no processor of images that can be loaded, or one
            without the configured settings.
    """
    folder = base_path(manifest)
    with _loading(folder, ANOTHER_BASE):
        processor: Any = AutoProcessor.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise PolicyError(f"{folder} holds no processor that takes images beside text; {ANOTHER_BASE}")
    images = processor.image_processor
    if unknown := [name for name in config.image_processor if not hasattr(images, name)]:
        known = sorted(name for name in images.to_dict() if not name.startswith("_"))
        raise PolicyError(
            f"policy.image_processor: {type(images).__name__} of {folder} has no setting {unknown[0]}; it has {known}"
        )
    settings = image_settings(config)
    if config.max_pixels is not None:
        own = dict(images.size or {})
        if own.keys() != {"shortest_edge", "longest_edge"} or own["longest_edge"] <= LARGEST_EDGE:
            raise PolicyError(
                f"{type(images).__name__} of {folder} does not scale images to an area (its own size is {own}); set "
                "policy.min_pixels and policy.max_pixels to null, and what it has instead in policy.image_processor"
            )
    with _loading(folder, "change policy.image_processor"):
        processor.image_processor = type(images).from_dict(images.to_dict() | settings)
    own_defaults = getattr(processor, "images_kwargs", {})
    if overridden := own_defaults.keys() & settings.keys():  # the processor's defaults win over its image processor's
        processor.images_kwargs = own_defaults | {name: settings[name] for name in overridden}
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # as TRL does
    return processor


def image_settings(config: ModelConfig) -> dict[str, Any]:
    """What the configuration says of the processor's images, in the processor's words."""
    if config.max_pixels is None:
        return dict(config.image_processor)
    return config.image_processor | {"size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}}


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
    share_prompts(model)
    turn_product_of_few_rows(model)
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
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, LookupError, SafetensorError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())  # of a wrong shape in every layer the first few
        raise PolicyError(
            f"{folder} cannot be loaded, and code of its own is not run ({told:.400}); {remedy}"
        ) from error


def as_policy(model: PreTrainedModel, processor: ProcessorMixin, config: ModelConfig) -> Policy:
    """Put the question to a model; checks that it is shown as asked and that its answers are single logits."""
    check_chat_template(processor, config.template)
    answers = ANSWERS[config.protocol]
    return Policy(model, processor, config.template, answers, answer_token_ids(processor.tokenizer, answers))


def check_chat_template(processor: Any, template: str) -> None:
    """Check that the chat template shows texts and images in the order of the question, and leaves the thought open.

    Raises:
        PolicyError: it has none, moves the images (as to the front), or writes the `<think>` that is to be generated.
    """
    prompt = "a prompt"
    remedy = "choose another base policy, or correct chat_template.jinja in a copy of its folder"
    try:
        shown = processor.apply_chat_template(messages(template, prompt), add_generation_prompt=True, tokenize=False)
    except (ValueError, TypeError, TemplateError) as error:
        raise PolicyError(f"the base policy has no chat template that can show an image ({error}); {remedy}") from error
    place = 0
    for number, text in enumerate(template.split("{image}")):
        text = text.replace("{prompt}", prompt).strip()  # as some templates do
        start = shown.find(text, place)
        if start < 0 or (number and text and not shown[place:start].strip()):
            raise PolicyError(
                f"the chat template does not show the images where the question has them: {shown!r}; {remedy}"
            )
        place = start + len(text)
    if OPEN_THINKING in shown[place:]:
        raise PolicyError(f"the chat template opens the thought itself ({shown[place:]!r}); {remedy}")


def check_adapted_layers(model: PreTrainedModel, pattern: str) -> None:
    """Check that a regular expression (training.*.lora.target_modules) picks layers of the language model alone.

    Raises:
        PolicyError: it matches nothing, or a layer elsewhere, as in the vision tower.
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

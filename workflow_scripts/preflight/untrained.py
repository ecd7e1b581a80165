"""The policy that is measured: the bundled one as it is, any other with random weights at its full size.

The time of a step does not depend on the values of the weights. It depends on the lengths of completions, and random
weights rarely end one. A share of the vocabulary therefore ends a completion, such that the mean is the planned one.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from workflow_scripts.configuration.model import Configuration, Track
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.planning.costs import Length
from workflow_scripts.planning.devices import PlanError
from workflow_scripts.planning.tokens import Reader, model_folder, read_policy
from workflow_scripts.policy.fast.enable import return_float32_logits
from workflow_scripts.policy.loading import Policy, load_model, load_processor, read_processor
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.rollouts.vllm_engine import folder_into_vllm, load_into_vllm
from workflow_scripts.training.generation import served_folder

BARE = {1: "{image} {prompt}", 2: "{image} {image} {prompt}"}  # questions whose words are all filled in


class Base(NamedTuple):
    """A base model with its processor, and how it is asked."""

    model: Any
    processor: ProcessorMixin
    config: ModelConfig


@dataclass(frozen=True)
class Source:
    """Makes the base policy of a configuration, as often as it is needed."""

    configuration: Configuration
    reader: Reader
    folder: Path
    """For temporary files."""

    @classmethod
    def of(cls, c: Configuration, folder: Path) -> "Source":
        """Read the configuration of the policy; nothing is downloaded.

        Raises:
            PlanError: the policy is not known, or no processor here can serve it.
        """
        reader = read_policy(c)
        kind = reader.architecture.config.model_type
        if reader.processor is None and kind not in ("qwen2_vl", "qwen2_5_vl"):
            raise PlanError(
                f"the processor of this policy (model_type {kind}) is not here, and the bundled one serves Qwen2-VL "
                "and Qwen2.5-VL only; set policy.hub.path to a folder with the files of the model's repository"
            )
        return cls(c, reader, folder)

    @property
    def random(self) -> bool:
        """Whether the weights are random."""
        return self.configuration.policy.source == "hub"

    @property
    def stands_in(self) -> bool:
        """Whether the bundled processor stands in for the policy's own."""
        return self.random and self.reader.processor is None

    def base(self, track: Track, length: Length | None = None) -> Base:
        """Make the base policy on the configured device.

        Args:
            track: whose question it is asked.
            length: of its completions, for random weights.
        """
        config = ModelConfig.of(self.configuration, track)
        torch.set_num_threads(config.numeric_threads)
        if not self.random:
            manifest = self._bundled()
            return Base(load_model(manifest, config), load_processor(manifest, config), config)
        architecture, processor, config = self._without_weights(config)
        model = random_weights(architecture, config)
        model.generation_config = endings(architecture, processor, length)
        return Base(model, processor, config)

    def served(self, base: Base) -> Path:
        """Fill a folder with this policy for vLLM in training; random weights are written to it."""
        folder = self.folder / "served"
        if not self.random:
            return served_folder(ROOT / self.configuration.policy.bundled, base.model, base.processor, folder)
        base.model.save_pretrained(folder)
        base.processor.save_pretrained(folder)
        return folder

    def in_vllm(self, track: Track, length: Length, adapter: Path | None) -> tuple[Policy, ModelConfig]:
        """Load the policy with an adapter, if there is one, into vLLM for rollouts; it makes random weights itself.

        Args:
            track: whose question it is asked.
            length: of its completions, for random weights.
            adapter: folder of the adapter.
        """
        config, settings = ModelConfig.of(self.configuration, track), self.configuration.rollouts.vllm
        if not self.random:
            return load_into_vllm(self._bundled(), adapter, config, settings), config
        architecture, processor, config = self._without_weights(config)
        folder = self.folder / "without_weights"
        architecture.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[architecture.model_type]]
        for part in (architecture, processor, endings(architecture, processor, length)):
            part.save_pretrained(folder)
        return folder_into_vllm(folder, processor, adapter, config, settings, load_format="dummy"), config

    def _bundled(self) -> Path:
        """Manifest of the bundled policy."""
        manifest, bundled = self.folder / "manifest.json", self.configuration.policy.bundled
        write_json(manifest, {"path": bundled, "files": model_files(ROOT / bundled)})
        return manifest

    def _without_weights(self, config: ModelConfig) -> tuple[Any, Any, ModelConfig]:
        """Architecture and processor of random weights, and how they are asked."""
        c = self.configuration
        folder = ROOT / c.policy.bundled if self.stands_in else model_folder(c)
        assert folder
        architecture = copy.deepcopy(self.reader.architecture.config)
        if self.stands_in:
            bundled = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            architecture = with_tokens_of(architecture, bundled)
            config = config.model_copy(update={"template": BARE[config.template.count("{image}")]})
        return architecture, read_processor(folder, config), config


def with_tokens_of(config: Any, other: dict[str, Any]) -> Any:
    """Return a model's configuration with the special tokens of another config.json, whose processor writes them."""
    config = copy.deepcopy(config)
    for part, given in ((config, other), (config.get_text_config(), other["text_config"])):
        for name, value in given.items():
            if name.endswith("_token_id"):
                setattr(part, name, value)
    return config


def random_weights(architecture: Any, config: ModelConfig) -> Any:
    """Make a model with random weights on the device and in the type that are configured, without a copy in float32."""
    torch.manual_seed(0)
    with torch.device(config.device):
        model: Any = AutoModelForImageTextToText.from_config(
            copy.deepcopy(architecture), dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
    return_float32_logits(model)
    return model.eval()


def endings(architecture: Any, processor: Any, length: Length | None) -> GenerationConfig:
    """Let so many tokens of the vocabulary end a completion that its mean and its budget are those of `length`.

    The image's token ends one, too: it would ask for an image that is not there.
    """
    tokenizer = processor.tokenizer
    ends = [tokenizer.eos_token_id]
    if length:
        special = {*tokenizer.all_special_ids, processor.image_token_id}
        ends += ending_tokens(architecture.get_text_config().vocab_size, length, special)
        ends.append(processor.image_token_id)
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def ending_tokens(vocabulary: int, length: Length, without: set[int]) -> list[int]:
    """Return tokens, evenly spread, of which a random policy draws one at the rate that gives the mean length."""
    count = round(ending_rate(length) * vocabulary)
    spread = (round((i + 0.5) * vocabulary / count) for i in range(count))
    return [token for token in spread if token not in without]


def ending_rate(length: Length) -> float:
    """Return the p for which a completion that ends with probability p at each token has the mean length.

    The mean of min(X, n) with X geometric is (1 - (1 - p)^n) / p for a budget of n tokens; it falls with p.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        mean = (1 - (1 - p) ** length.longest) / p
        low, high = (p, high) if mean > length.mean else (low, p)
    return low

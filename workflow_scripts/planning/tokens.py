"""What the policy makes of texts and images: by its own processor where its files are here, else as an estimate."""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from PIL import Image as Picture
from transformers import AutoImageProcessor

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.architecture import Architecture, Image, architecture_of
from workflow_scripts.planning.counting import image_features, shallow
from workflow_scripts.planning.devices import FACTS, PlanError
from workflow_scripts.policy.loading import read_processor, with_image_size
from workflow_scripts.policy.prompts import messages

AREA = {"shortest_edge": 3136, "longest_edge": 12845056}  # pixels that Qwen2.5-VL's processor accepts, as published
TILES = 4  # along the longest edge of an image that SmolVLM's processor cuts, as published


@dataclass(frozen=True, eq=False)
class Reader:
    """Counts tokens; without `processor` those of a text are estimated, and `images` follows from config.json."""

    architecture: Architecture
    processor: Any
    images: Any

    def text(self, template: str, prompt: str) -> float:
        """Tokens of a question without visual ones."""
        shown = template.count("{image}")
        if self.processor is None:
            return estimated_tokens(template, prompt)
        chat = messages(template, prompt)
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return float(len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - shown)

    def image(self, width: int, height: int) -> Image:
        """What an image of that size in pixels becomes."""
        return _image(self, width, height)


@cache
def _image(reader: Reader, width: int, height: int) -> Image:
    blank = Picture.new("RGB", (width, height), "gray")
    inputs = dict(reader.images([blank], return_tensors="pt"))
    if reader.processor is None:
        config = reader.architecture.config
        kinds = getattr(config.get_text_config(), "layer_types", None) or [None]
        tokens = sum(rows.shape[:-1].numel() for rows in image_features(shallow(config, kinds[:1]), inputs))
    else:
        alone = reader.processor.apply_chat_template(messages("{image}", ""), tokenize=False)
        shown = reader.processor(text=[alone], images=[[blank]])["input_ids"][0]
        tokens = len(shown) - len(reader.processor.tokenizer(alone, add_special_tokens=False)["input_ids"]) + 1
    patches = inputs["pixel_values"].numel() // reader.architecture.vision.values
    return Image(tokens, patches, width * height, inputs)


def estimated_tokens(template: str, prompt: str) -> float:
    """Tokens of a question for Qwen's vocabulary, from its characters."""
    chat, images = FACTS["chat"], template.count("{image}")
    characters = len(template) - len("{image}") * images - len("{prompt}") + len(prompt)
    return float(chat["tokens"] + chat["image_marks"] * images + characters / chat["characters_per_token"])


def read_policy(c: Configuration) -> Reader:
    """Read what is here of the policy, or what is published of it.

    Raises:
        PlanError: it is neither here nor one of the published ones known here, or a file is missing.
        PolicyError: its processor cannot be loaded or has not the configured settings.
    """
    config = ModelConfig.of(c, c.tracks[0])
    folder = model_folder(c)
    if folder is None:
        if c.policy.hub.repository not in FACTS["models"]:
            raise PlanError(
                f"policy.hub.repository {c.policy.hub.repository} is neither on this machine nor known here; known are "
                f"{', '.join(FACTS['models'])}. Plan the one that it was tuned from, as in --config 'policy={{hub: "
                "{repository: Qwen/Qwen2.5-VL-7B-Instruct}}', or set policy.hub.path to a folder with its config.json "
                "and tokenizer"
            )
        published = architecture_of(FACTS["models"][c.policy.hub.repository])
        return Reader(published, None, derived_images(published, Path(c.policy.hub.repository), config))
    path = folder / "config.json"
    if not path.is_file():
        raise PlanError(f"{path} is missing; set policy.hub.path to a folder with the files of the model's repository")
    architecture = architecture_of(json.loads(path.read_text(encoding="utf-8")), str(path))
    names = {file.name for file in folder.iterdir()}
    sizes_images = names & {"preprocessor_config.json", "processor_config.json"}
    if sizes_images and names & {"tokenizer.json", "tokenizer_config.json"}:
        processor: Any = read_processor(folder, config)
        return Reader(architecture, processor, processor.image_processor)
    if sizes_images:
        own = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        return Reader(architecture, None, with_image_size(own, folder, config))
    return Reader(architecture, None, derived_images(architecture, folder, config))


def model_folder(c: Configuration) -> Path | None:
    """Folder of the policy where it is on this machine already: bundled, given, or in the Hub's cache."""
    if c.policy.source != "hub":
        return ROOT / c.policy.bundled  # a cold start makes the same sizes
    if c.policy.hub.path:
        return Path(c.policy.hub.path)
    found = try_to_load_from_cache(c.policy.hub.repository, "config.json", revision=c.policy.hub.revision)
    return Path(found).parent if isinstance(found, str) else None


def derived_images(a: Architecture, folder: Path, config: ModelConfig) -> Any:
    """Image processor of the family with the sizes in config.json, where its own configuration is not here.

    Raises:
        PlanError: config.json does not say how the family scales images.
    """
    vision = a.config.vision_config
    missing = PlanError(
        f"{folder} has no preprocessor_config.json, and config.json (model_type {a.config.model_type}) does not say "
        "how images are scaled; copy it from the model's repository"
    )
    with tempfile.TemporaryDirectory() as temporary:
        a.config.save_pretrained(temporary)
        (Path(temporary) / "preprocessor_config.json").write_text("{}")
        try:
            images = AutoImageProcessor.from_pretrained(temporary, trust_remote_code=False)
        except ValueError as error:
            raise missing from error
    own = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
    known = {name: key for name, key in own.items() if hasattr(images, name) and hasattr(vision, key)}
    settings: dict[str, Any] = {name: getattr(vision, key) for name, key in known.items()}
    edge, size = getattr(vision, "image_size", None), set(dict(images.size or {}))
    edge = edge if isinstance(edge, int) or edge is None else edge[0]
    if size == set(AREA):
        settings["size"] = AREA
    elif edge and size == {"height", "width"}:
        settings["size"] = {"height": edge, "width": edge}
    elif edge and hasattr(images, "max_image_size"):
        settings |= {"max_image_size": {"longest_edge": edge}, "size": {"longest_edge": TILES * edge}}
    else:
        raise missing
    return with_image_size(type(images).from_dict(images.to_dict() | settings), folder, config)

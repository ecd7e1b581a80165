"""FLOPs and kernels of models without weights, on torch's meta device, where tensors have shapes and no values.

FLOPs are those of torch's FlopCounterMode: a multiplication and an addition are two; norms, rotations and activations
count nothing.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from workflow_scripts.planning.devices import PlanError
from workflow_scripts.policy.fast.enable import share_prompts
from workflow_scripts.rollouts.decoding import Decoding

Inputs = Mapping[str, torch.Tensor]  # what an image processor gives to the vision tower


class MetaFirst(TorchDispatchMode):
    """Moves what meets a tensor of the meta device there: sizes of images are real, weights and features are not.

    A condition on values that are not there holds: transformers asks whether masks hide nothing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the meta device if one of its tensors is there."""
        given = (args, kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in tree_leaves(given)):
            given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), given)
            given[1].update(dict.fromkeys(given[1].keys() & {"device"}, torch.device("meta")))
        return func(*given[0], **given[1])


def read_config(values: Mapping[str, Any], source: str) -> Any:
    """Return transformers' configuration of a vision-language model from its config.json.

    Raises:
        PlanError: names `source`, the key and the remedy where it is not that of such a model.
    """
    kind = values.get("model_type")
    remedy = "set policy.hub to a vision-language model that transformers loads with AutoModelForImageTextToText"
    try:
        config = AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise PlanError(
            f"{source}: model_type {kind} is not known here or a key is wrong ({error}); {remedy}"
        ) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise PlanError(f"{source}: model_type {kind} is not known here as a vision-language model; {remedy}")
    if "vision_config" not in values:
        raise PlanError(f"{source} has no key vision_config; copy the whole config.json of the model's repository")
    return config


class KernelCounter(TorchDispatchMode):
    """Counts operations that launch a kernel on a GPU: all but those that only allocate, or look at memory anew."""

    NO_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        returned = [value.alias_info for value in func._schema.returns]
        looks = any(alias is not None and not alias.is_write for alias in returned)
        self.kernels += not looks and func._schema.name not in self.NO_KERNEL
        return func(*args, **(kwargs or {}))


def without_weights(config: Any, attention: str = "eager", dtype: str = "float32") -> Any:
    """Return the whole model on the meta device, frozen."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=getattr(torch, dtype)
        )
    return model.requires_grad_(False)


def shallow(
    config: Any, kinds: Sequence[str | None], blocks: int = 1, special: Collection[str] = (), **loading: str
) -> Any:
    """Return the model with few layers.

    Args:
        config: of the whole model.
        kinds: of the layers of the language model, as in `layer_types`; None where there are none.
        blocks: of the vision tower.
        special: keys of `special_blocks` that name the first block.
        loading: attention and dtype, as of `without_weights`.
    """
    config = copy.deepcopy(config)
    language, vision = config.get_text_config(), config.vision_config
    language.num_hidden_layers = len(kinds)
    if getattr(language, "layer_types", None):
        language.layer_types = list(kinds)
    setattr(vision, depth_key(vision), blocks)
    for key in special_blocks(vision):
        setattr(vision, key, [0] if key in special else [])
    return without_weights(config, **loading)


def depth_key(vision: Any) -> str:
    """Key of the number of blocks of a vision tower."""
    return "depth" if hasattr(vision, "depth") else "num_hidden_layers"


def special_blocks(vision: Any) -> dict[str, list[int]]:
    """Keys that list blocks of a vision tower that do more than the others, or attend to more."""
    return {key: value for key, value in vision.to_dict().items() if key.endswith("_indexes")}


def add_adapter(model: Any, rank: int, target_modules: str) -> Any:
    """Put a LoRA adapter on a model, as training does.

    Raises:
        PlanError: the expression matches no layer.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore", category=FutureWarning):
            return get_peft_model(model, LoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM"))
    except ValueError as error:
        language_model = {module: name for name, module in model.named_modules()}[model.get_decoder()]
        raise PlanError(
            f"training.*.lora.target_modules, {target_modules}, matches no layer; the language model of this policy is "
            f"{language_model}, such as .*{re.escape(language_model)}.*\\.(q_proj|v_proj)"
        ) from error


def count_language(model: Any, tokens: int, trained: bool, checkpointing: bool) -> int:
    """Count a sequence through the layers, without head: forward, and backward where the model is `trained`."""
    _train(model, checkpointing)
    states = torch.empty(1, tokens, model.config.get_text_config().hidden_size, device="meta")
    states.requires_grad_(checkpointing)
    with torch.set_grad_enabled(trained), FlopCounterMode(display=False) as counter, MetaFirst():
        found = model.get_decoder()(inputs_embeds=states, use_cache=False).last_hidden_state
        if trained:
            found.sum().backward()
    return counter.get_total_flops()


def count_kernels(
    config: Any, kinds: Sequence[str | None], rank: int | None, target_modules: str, dtype: str, attention: str
) -> int:
    """Count the kernels of a decoding step of the engine, in a model with few layers, up to the logits.

    Args:
        config: of the whole model.
        kinds: of the layers, as of `shallow`.
        rank: of an adapter beside the weights; None for none.
        target_modules: what the adapter is on.
        dtype: of the weights.
        attention: eager or sdpa; flash_attention_2, which does not run here, launches as many as sdpa.
    """
    model = shallow(config, kinds, attention="eager" if attention == "eager" else "sdpa", dtype=dtype).eval()
    share_prompts(model)
    if rank is not None:
        model = add_adapter(model, rank, target_modules).eval()
    question = torch.ones(2, 8, dtype=torch.long)
    with MetaFirst():
        decoding = Decoding(model, {"input_ids": question, "attention_mask": torch.ones_like(question)}, 2)
        decoding.step([0, 1, 2, 3], [1, 1, 1, 1])  # makes the cache of the rows
        with KernelCounter() as counter:
            decoding.step([0, 1, 2, 3], [1, 1, 1, 1])
    return counter.kernels


def count_vision(model: Any, inputs: Inputs, checkpointing: bool) -> tuple[int, int]:
    """Count an image through the vision tower: its features, with checkpointing their backward too.

    Returns:
        FLOPs of all, and of attention in the forward.
    """
    _train(model, checkpointing)
    with torch.set_grad_enabled(checkpointing), FlopCounterMode(display=False) as counter, MetaFirst():
        features = image_features(model, inputs)
        attended = sum(n for kind, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(kind))
        if features[0].requires_grad:
            torch.stack([feature.sum() for feature in features]).sum().backward()
    return counter.get_total_flops(), attended


def image_features(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    """Return what a vision tower makes of an image: a row for each visual token, in one tensor or several."""
    taken = inspect.signature(model.model.get_image_features).parameters.keys() & inputs.keys()
    with MetaFirst():
        features = model.model.get_image_features(**{name: inputs[name] for name in taken}).pooler_output
    return [features] if isinstance(features, torch.Tensor) else [*features]


def _train(model: Any, checkpointing: bool) -> None:
    """Switch to training mode, with gradient checkpointing as TRL switches it on."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

"""Generation in training: by the decoding loop of the transformers engine, by TRL's own, or by vLLM."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from trl import GRPOTrainer

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.loading import answer_token_ids
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.rollouts.decoding import AnswerReader, sample_completions
from workflow_scripts.training.settings import strategy_of


def check_generation(config: TrainGrpo) -> None:
    """Check that the configured generator is installed.

    Raises:
        PolicyError: vLLM is not in this environment.
    """
    generation = config.training.generation
    if generation.startswith("vllm") and importlib.util.find_spec("vllm") is None:
        raise PolicyError(
            f"training.{config.track}.generation is {generation}, but there is no vLLM in {sys.prefix}; set "
            "vllm_python to the interpreter of an environment with it (docs/vllm.md), or generation to transformers"
        )


def engine_generates(config: TrainGrpo) -> bool:
    """Whether the engine's loop generates. FSDP needs TRL's loop, where all processes run the model together."""
    return config.training.generation == "transformers" and strategy_of(config) != "fsdp"


def engine_completions(config: TrainGrpo, processor: Any, sampling: Sampling) -> Callable[..., dict[str, Any]]:
    """TRL's `rollout_func`: prefills each prompt once for its group, and drops completions that have ended.

    With `reward_signal: expected` it also returns `answer_logprobs` and `answer_position` (None: no answer), which TRL
    adds to the inputs and passes to the rewards by these names.
    """
    expected, tokenizer = config.training.reward_signal == "expected", processor.tokenizer
    answer_ids = answer_token_ids(tokenizer, ANSWERS[config.model.protocol])
    group_size = config.training.group_size
    # A completion with an image's placeholder token would ask for another image in the passes over completions.
    never = [processor.image_token_id]

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Complete chats, each of which TRL repeats `group_size` times."""
        once = prompts[::group_size]
        parts = [[part for message in prompt for part in message["content"]] for prompt in once]
        inputs = processor(
            text=processor.apply_chat_template(once, add_generation_prompt=True, tokenize=False),
            images=[[part["image"] for part in prompt if part["type"] == "image"] for prompt in parts],
            padding=True,
            add_special_tokens=False,  # the chat template has them
            return_tensors="pt",
        )
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.eval()
        reader = AnswerReader(tokenizer, answer_ids, model.device) if expected else None
        with adapter_merged(model, config.model.dtype):
            completions, logprobs = sample_completions(
                model,
                inputs.to(model.device),
                group_size,
                sampling,
                config.training.max_completion_tokens,
                trainer.eos_token_ids,
                never,
                reader,
            )
        model.train()
        unpadded = [
            ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        prompt_ids = [ids for ids in unpadded for _ in range(group_size)]
        ids = [completion.ids for completion in completions]
        returned = {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": logprobs}
        if not expected:
            return returned
        return returned | {
            "answer_logprobs": [completion.answer_logprobs for completion in completions],
            "answer_position": [completion.answer_position for completion in completions],
        }

    return rollout


@contextlib.contextmanager
def adapter_merged(model: Any, dtype: str) -> Iterator[None]:
    """Merge the adapter into the weights for a while; afterwards the weights have the same bits as before.

    As in `load_policy`, only float32 weights are merged, because shorter types would be rounded.
    """
    if dtype != "float32":
        yield
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)


def served_folder(base: Path, model: Any, processor: Any, folder: Path) -> Path:
    """Fill a folder with the base policy for colocated vLLM, which TRL tells neither an image size nor a type.

    It has a processor of the configured image size, and a configuration with the type of the loaded model.
    """
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in base.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder

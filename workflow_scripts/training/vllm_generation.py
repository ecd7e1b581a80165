"""Generation by vLLM in training: what TRL's trainer and its transfer of weights do, where TRL 1.16 does it wrongly."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration


class VllmTrainer(GRPOTrainer):
    """GRPOTrainer that, where vLLM generates, asks it the right questions and leaves the base weights as they are."""

    def __init__(self, **options: Any) -> None:
        """Make the trainer; `options` are those of `GRPOTrainer`."""
        # vLLM would send statistics and, on a CPU, put all jobs on one core.
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        super().__init__(**options)
        if self.use_vllm:
            self.vllm_generation.__class__ = MergedCopies  # TRL's trainer makes it and takes no other
            # A completion with an image's placeholder token would ask for another image in the passes over completions.
            # TRL rules the token out for its own loop only. -100 is the lowest bias that vLLM takes.
            processor: Any = self.processing_class
            self.vllm_generation.generation_kwargs["logit_bias"] = {processor.image_token_id: -100.0}

    # TRL gives colocated vLLM the processor's tokens, which have several per image, and vLLM expands the first of them
    # again. The policy would answer another question than it is trained on (huggingface/trl#6294, open with TRL 1.16).
    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate":
            processor: Any = self.processing_class
            texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            self._questions = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate":
            prompt_ids = self._questions
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)


class MergedCopies(VLLMGeneration):
    """VLLMGeneration that hands vLLM merged copies of the adapted weights, one at a time.

    TRL merges the adapter into the base weights and unmerges it again for every transfer. In bfloat16 both round, so
    the base would drift, and with it the reference of the KL term (huggingface/trl#6688).
    """

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights of the policy with its adapter, under their names in the base model's files.

        The receiver must have read a weight before it asks for the next one, which frees a merged copy.
        """
        model: Any = self.model
        adapted = {
            f"{name}.base_layer.weight": module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        for name, weight in model.named_parameters():
            if model.prefix in name:  # the adapter's own
                continue
            published = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if name not in adapted:
                yield published, weight.data
                continue
            merged = merged_weight(adapted[name])
            yield published, merged
            merged.data = merged.new_empty(0)  # the receiver's variable would keep it while the next one is made


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """W + δ of a LoRA layer: a copy in the shape and type of W, added in float32 and rounded once."""
    weight = layer.get_base_layer().weight
    (adapter,) = layer.active_adapters
    delta: torch.Tensor = layer.get_delta_weight(adapter).float()
    return delta.add_(weight).to(weight.dtype)

"""Attention of rollouts to the prompt that they share: its keys and values are read once for all of its rollouts.

Scores, weights and weighted values are float32 whatever the type of the weights, and the result is rounded once, as in
scaled dot-product attention (SDPA): Qwen2.5 has keys so large that scores in bfloat16 would lose the soft-max. So would
autocast, under which a training decodes: it is off here.
Registered with AttentionInterface of transformers. Passes without `prompts` use SDPA.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workflow_scripts.policy.fast.key_values import compact_rows, compaction_order

PROMPT_ONCE = "prompt_once"


class PromptStates:
    """Keys and values of the prompts in a decoding batch, and the prompt that each row continues."""

    mask: torch.Tensor
    """(prompts, 1, 1, tokens) float32, added to the scores: 0 for a token and the smallest number for padding."""

    def __init__(self, cache: Any, mask: torch.Tensor, rollouts: int) -> None:
        """Take prefilled prompts from `cache`, with `mask` (prompts, tokens); `rollouts` rows continue each of them."""
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.mask = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        self._prompt_of = [prompt for prompt in range(len(mask)) for _ in range(rollouts)]
        self._assign_slots()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop prompts without a row."""
        self._prompt_of = [self._prompt_of[row] for row in rows]
        prompts = compaction_order(sorted(set(self._prompt_of)))
        if len(prompts) < len(self.mask):
            index = torch.tensor(prompts, device=self.mask.device)
            tokens = self.mask.shape[-1]
            self._layers = [
                (compact_rows(keys, index, tokens), compact_rows(values, index, tokens))
                for keys, values in self._layers
            ]
            self.mask = self.mask[index]
            number = {prompt: new for new, prompt in enumerate(prompts)}
            self._prompt_of = [number[prompt] for prompt in self._prompt_of]
        self._assign_slots()

    def _assign_slots(self) -> None:
        """Assign each row a slot within its prompt; all prompts have equally many slots."""
        taken = [0] * len(self.mask)
        order = []
        for prompt in self._prompt_of:
            order.append(taken[prompt])
            taken[prompt] += 1
        self._slots = max(taken)
        self._slot_of = torch.tensor(
            [prompt * self._slots + slot for prompt, slot in zip(self._prompt_of, order, strict=True)],
            device=self.mask.device,
        )

    def attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend to the prompt and to the row's own tokens.

        Args:
            layer: index of the layer.
            query: (rows, key heads, query heads per key head, width) float32, scaled.
            keys: keys of the row's own tokens, (rows, key heads, tokens, width).
            values: values of the row's own tokens, same shape.

        Returns:
            Attention output, float32 in the shape of `query`.
        """
        prompt_keys, prompt_values, keys, values = (states.float() for states in (*self._layers[layer], keys, values))
        to_prompt = self._by_row(self._by_prompt(query) @ prompt_keys.transpose(-1, -2) + self.mask, query.shape[2])
        to_own = query @ keys.transpose(-1, -2)
        weights = torch.cat([to_prompt, to_own], -1).softmax(-1)
        tokens = prompt_keys.shape[-2]
        of_prompt = self._by_row(self._by_prompt(weights[..., :tokens]) @ prompt_values, query.shape[2])
        return of_prompt + weights[..., tokens:] @ values

    def _by_prompt(self, states: torch.Tensor) -> torch.Tensor:
        """Group (rows, key heads, heads, n) as (prompts, key heads, slots times heads, n); empty slots are 0."""
        prompts, (_, key_heads, heads, n) = len(self.mask), states.shape
        grouped = states.new_zeros(prompts * self._slots, key_heads, heads, n)
        grouped[self._slot_of] = states
        return grouped.view(prompts, self._slots, key_heads, heads, n).transpose(1, 2).flatten(2, 3)

    def _by_row(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """Undo `_by_prompt`."""
        return states.unflatten(2, (self._slots, heads)).transpose(1, 2).flatten(0, 1)[self._slot_of]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prompts: PromptStates | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers; with `prompts`, `query` is (rows, heads, 1, width): one new token a row."""
    if prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows, _, _, width = query.shape
    scaled = query.float() * (width**-0.5 if scaling is None else scaling)
    kind = query.device.type
    # A count on the meta device has no autocast to switch off.
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        attended = prompts.attend(module.layer_idx, scaled.view(rows, key.shape[1], -1, width), key, value)
    return attended.reshape(rows, 1, -1, width).to(query.dtype), None


AttentionInterface.register(PROMPT_ONCE, attention)
AttentionMaskInterface.register(PROMPT_ONCE, sdpa_mask)

"""Attention of rollouts to the prompt that they share: its keys and values are read once for all rollouts of a prompt.

Registered with transformers' AttentionInterface; in all other passes it is the model's scaled dot product attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workflow_scripts.policy.fast.key_values import closed_up, moved_up

PROMPT_ONCE = "prompt_once"


class PromptStates:
    """Keys and values of the prompts that are being decoded from, and which prompt each row goes on from."""

    mask: torch.Tensor
    """(prompts, 1, 1, tokens), 0 for a token of the prompt and the least number for padding."""

    def __init__(self, cache: Any, mask: torch.Tensor, rollouts: int) -> None:
        """The states of prefilled prompts, whose attention mask is (prompts, tokens), each for `rollouts` rows."""
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        least = torch.finfo(self._layers[0][0].dtype).min
        self.mask = torch.where(mask.bool(), 0.0, least).to(self._layers[0][0].dtype)[:, None, None]
        self._prompt_of = [prompt for prompt in range(len(mask)) for _ in range(rollouts)]
        self._place()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; prompts without a row leave."""
        self._prompt_of = [self._prompt_of[row] for row in rows]
        prompts = closed_up(sorted(set(self._prompt_of)))
        if len(prompts) < len(self.mask):
            index = torch.tensor(prompts, device=self.mask.device)
            tokens = self.mask.shape[-1]
            self._layers = [
                (moved_up(keys, index, tokens), moved_up(values, index, tokens)) for keys, values in self._layers
            ]
            self.mask = self.mask[index]
            number = {prompt: place for place, prompt in enumerate(prompts)}
            self._prompt_of = [number[prompt] for prompt in self._prompt_of]
        self._place()

    def _place(self) -> None:
        """Give each row a place among those of its prompt, as many for each."""
        taken = [0] * len(self.mask)
        order = []
        for prompt in self._prompt_of:
            order.append(taken[prompt])
            taken[prompt] += 1
        self._places = max(taken)
        self._place_of = torch.tensor(
            [prompt * self._places + place for prompt, place in zip(self._prompt_of, order, strict=True)],
            device=self.mask.device,
        )

    def attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention to the prompt and to the row's own tokens.

        Args:
            layer: number of the layer.
            query: (rows, key heads, heads of a key head, width), scaled.
            keys: of the row's own tokens, (rows, key heads, tokens, width).
            values: likewise.

        Returns:
            A tensor of the shape of `query`.
        """
        prompt_keys, prompt_values = self._layers[layer]
        to_prompt = self._by_row(self._by_prompt(query) @ prompt_keys.transpose(-1, -2) + self.mask, query.shape[2])
        to_own = query @ keys.transpose(-1, -2)
        weights = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        tokens = prompt_keys.shape[-2]
        of_prompt = self._by_row(self._by_prompt(weights[..., :tokens]) @ prompt_values, query.shape[2])
        return of_prompt + weights[..., tokens:] @ values

    def _by_prompt(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, key heads, heads, n) as (prompts, key heads, places times heads, n); places without a row are 0."""
        prompts, (_, key_heads, heads, n) = len(self.mask), states.shape
        placed = states.new_zeros(prompts * self._places, key_heads, heads, n)
        placed[self._place_of] = states
        return placed.view(prompts, self._places, key_heads, heads, n).transpose(1, 2).flatten(2, 3)

    def _by_row(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """The inverse."""
        return states.unflatten(2, (self._places, heads)).transpose(1, 2).flatten(0, 1)[self._place_of]


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
    """An attention function of transformers: `query` is (rows, heads, 1, width) with prompts, as of one new token."""
    if prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows, _, _, width = query.shape
    scaled = query * (width**-0.5 if scaling is None else scaling)
    attended = prompts.attend(module.layer_idx, scaled.view(rows, key.shape[1], -1, width), key, value)
    return attended.reshape(rows, 1, -1, width), None


AttentionInterface.register(PROMPT_ONCE, attention)
AttentionMaskInterface.register(PROMPT_ONCE, sdpa_mask)

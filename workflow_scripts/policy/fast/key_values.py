"""A key-value cache that decoding can extend and compact without copying all of it."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens for which a new buffer has room beyond its content


class RoomyLayer(DynamicLayer):
    """Cache layer with room for further tokens: it writes a new token where the plain layer copies all earlier ones.

    `keys` and `values` are views of the buffers, of shape (rows, heads, tokens so far, head width).
    """

    def __init__(self) -> None:
        """Start without buffers; the second update allocates them."""
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens, (rows, heads, tokens, width), and return those of all tokens."""
        before = self.get_seq_length()
        if not before:
            return super().update(key_states, value_states, *args, **kwargs)
        after = before + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < after:
            self._buffers = [_with_room(states, after + ROOM) for states in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = states
        self.keys, self.values = (buffer[:, :, :after] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._buffers = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; only rows that change their place are copied."""
        if not self._buffers:
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        self._buffers = [compact_rows(buffer, indices, length) for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _with_room(states: Any, length: int) -> torch.Tensor:
    """Copy states into a buffer for `length` tokens."""
    rows, heads, tokens, width = states.shape
    buffer = states.new_empty(rows, heads, length, width)
    buffer[:, :, :tokens] = states
    return buffer


def roomy_cache(config: Any) -> DynamicCache:
    """Make a model's cache; layers that forget tokens, such as those with a sliding window, stay plain."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def compaction_order(keep: Sequence[int]) -> list[int]:
    """Order the surviving rows so that the fewest are copied: the last ones fill the gaps that finished rows leave."""
    kept = set(keep)
    movers = iter(row for row in keep if row >= len(keep))
    return [row if row in kept else next(movers) for row in range(len(keep))]


def compact_rows(buffer: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Move these rows of a buffer, (rows, heads, tokens, width), to its front in this order; return a view of them."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    buffer[moved, :, :tokens] = buffer[rows[moved], :, :tokens]
    return buffer[: len(rows)]

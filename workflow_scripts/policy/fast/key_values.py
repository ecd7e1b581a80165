"""Keys and values of tokens that are kept while more are decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens of a new store beyond what is in it


class RoomyLayer(DynamicLayer):
    """Layer of a cache with room for tokens to come: a new one is written where the plain layer copies all before it.

    `keys` and `values` are views of the store, of shape (rows, heads, tokens so far, width of a head).
    """

    def __init__(self) -> None:
        """Room is made when it is needed first."""
        super().__init__()
        self._stores: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens, (rows, heads, tokens, width), and return those of all."""
        before = self.get_seq_length()
        if not before:
            return super().update(key_states, value_states, *args, **kwargs)
        after = before + key_states.shape[-2]
        if not self._stores or self._stores[0].shape[-2] < after:
            self._stores = [_with_room(states, after + ROOM) for states in (self.keys, self.values)]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, before:after] = states
        self.keys, self.values = (store[:, :, :after] for store in self._stores)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._stores = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; only those that change their place are copied."""
        if not self._stores:
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        self._stores = [moved_up(store, indices, length) for store in self._stores]
        self.keys, self.values = (store[:, :, :length] for store in self._stores)


def _with_room(states: Any, length: int) -> torch.Tensor:
    """Copy of the states in a tensor for `length` tokens."""
    rows, heads, tokens, width = states.shape
    store = states.new_empty(rows, heads, length, width)
    store[:, :, :tokens] = states
    return store


def roomy_cache(config: Any) -> DynamicCache:
    """Cache of a model; layers that forget, as of a sliding window, stay what they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def closed_up(keep: Sequence[int]) -> list[int]:
    """Rows to keep, in the order that moves the fewest: the last of them take the places of those that leave."""
    kept = set(keep)
    movers = iter(row for row in keep if row >= len(keep))
    return [row if row in kept else next(movers) for row in range(len(keep))]


def moved_up(store: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """The store, (rows, heads, tokens, width), with these rows alone; it is changed where one takes another place."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    store[moved, :, :tokens] = store[rows[moved], :, :tokens]
    return store[: len(rows)]

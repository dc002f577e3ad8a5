"""The cache of a group: prompts prefilled once, room for what is decoded reserved once."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def cache_keyword(model: nn.Module) -> str:
    """What the model's forward calls its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


class RoomyLayer(DynamicLayer):
    """A full-attention cache layer, repeated for the group, with room for the tokens to come."""

    def __init__(self, layer: DynamicLayer, repeats: int, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.key_room = self._reserve(layer.keys, repeats, room)
        self.value_room = self._reserve(layer.values, repeats, room)
        self._view(layer.keys.shape[2])

    @staticmethod
    def _reserve(states: Tensor, repeats: int, room: int) -> Tensor:
        rows, heads, length, width = states.shape
        out = states.new_empty(rows, repeats, heads, length + room, width)
        out[:, :, :, :length] = states[:, None]
        return out.flatten(0, 1)

    def _view(self, length: int) -> None:
        self.keys, self.values = self.key_room[:, :, :length], self.value_room[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.key_room[:, :, start:end] = key_states
        self.value_room[:, :, start:end] = value_states
        self._view(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.keys.shape[2]
        self.key_room, self.value_room = self.key_room[beam_idx], self.value_room[beam_idx]
        self._view(length)


def expand_cache(cache: DynamicCache, rows: Tensor, repeats: int, room: int) -> None:
    """Repeat `rows`, all of a prefilled cache, for the group, with room for `room` tokens where layers hold them all.

    They are repeated by `reorder_cache`, which layers with the states of a linear attention have, too.
    """
    every = rows.repeat_interleave(repeats)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = RoomyLayer(layer, repeats, room)
        elif repeats > 1:
            layer.reorder_cache(every)


def holds_keys(cache: DynamicCache) -> bool:
    """Whether a prefilled cache has keys to attend to, or only states, which are past the padding already."""
    return any(getattr(layer, "keys", None) is not None for layer in cache.layers)

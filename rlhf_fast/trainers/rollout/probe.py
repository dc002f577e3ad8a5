"""What a model's cache can be trusted with, seen from short prompts: not every state lies where a cache can move it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

TOLERANCE = 0.1  # of how far off the numbers are when the padding is read, or the rows are not moved


class Abilities(NamedTuple):
    pads: bool = True  # prompts padded on the left give the same numbers
    moves: bool = True  # rows of the cache can be repeated and left out


def abilities(
    prefill: Callable[[Sequence[Sequence[int]], bool], tuple[DynamicCache, Any]],
    decode: Callable[[DynamicCache, Any, Tensor, int], Tensor],
    config: Any,
    pad_id: int,
) -> Abilities:
    """By a look, where all layers are attention; else by two prompts, alone, padded, and with their rows moved.

    Args:
        prefill: prompts, and whether their padding is masked -> the cache, and what `decode` needs beside it.
        decode: these, and which rows of the prompts the cache now holds (B,), a token -> the logits after it (B, V).
    """
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers):
        return Abilities()
    order = torch.randperm(config.get_text_config().vocab_size, generator=torch.Generator().manual_seed(0))[:10]
    tokens = order[order != pad_id].tolist()  # whose embedding may be zero
    short, long, other, last = tokens[:2], tokens[2:5], tokens[5:8], tokens[8]

    def logits(prompts: Sequence[Sequence[int]], masked: bool = True, rows: Sequence[int] | None = None) -> Tensor:
        cache, rest = prefill(prompts, masked)
        kept = torch.arange(len(prompts)) if rows is None else torch.tensor(rows)
        if rows is not None:
            cache.reorder_cache(kept)
        return decode(cache, rest, kept, last).float()

    def same(got: Tensor, want: Tensor, wrong: Tensor) -> bool:
        return bool((got - want).norm() < TOLERANCE * (wrong - want).norm())

    alone = logits([short])
    pads = same(logits([long, short])[1:], alone, logits([long, short], masked=False)[1:])
    first, second = logits([long]), logits([other])
    try:
        repeated, dropped = logits([long, other], rows=[1, 1, 0]), logits([long, other], rows=[1])
    except (AttributeError, NotImplementedError, RuntimeError):
        return Abilities(pads, moves=False)
    want, wrong = torch.cat([second, second, first]), torch.cat([first, first, second])
    return Abilities(pads, same(repeated, want, wrong) and same(dropped, second, first))

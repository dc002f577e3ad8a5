"""Examples to batches, padded or packed (padding-free).

    padded: input_ids, attention_mask, target_ids (B, T)
    packed: input_ids, position_ids, target_ids (1, N), cu_seqlens (B + 1,) int32; no attention_mask

target_ids[b, t] = input_ids[b, t + 1] where that token is scored, else -100: aligned with the hidden states, and never
across a boundary. Packed position ids start again at 0 with each sequence, from which transformers makes its
block-diagonal mask (SDPA) or variable lengths (flash-attn); `packing.check_packing` finds models that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Example = Mapping[str, Any]  # "input_ids" and "scored", (T,) each


class Collator:
    """Batches of {"input_ids", "scored"}. Padding goes to the right and is told by length, never by id.

    Args:
        multiple_of: pad to a multiple of so many tokens.
        packing: one row without padding instead.
    """

    def __init__(self, pad_token_id: int, *, multiple_of: int = 1, packing: bool = False):
        if packing and multiple_of != 1:
            raise ValueError(f"packing leaves no padding: multiple_of must be 1, got {multiple_of}")
        self.pad_token_id = int(pad_token_id)
        self.multiple_of = multiple_of
        self.packing = packing

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return self.batch(unrolled(examples))

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Sequences to one batch, in their order."""
        return pack(examples) if self.packing else pad(examples, self.pad_token_id, self.multiple_of)


class PairCollator(Collator):
    """Batches of {"chosen", "rejected", "margin"?}: 2b sequences, chosen, rejected, chosen, ...; margin (b,) fp32.

    Both sequences of a pair stand next to each other, as the fused preference losses need them.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples = unrolled(examples)
        batch = self.batch([e[side] for e in examples for side in ("chosen", "rejected")])
        margins = [e.get("margin") for e in examples]
        if any(m is not None for m in margins):
            batch["margin"] = torch.tensor([0.0 if m is None else m for m in margins], dtype=torch.float32)
        return batch


class KTOCollator(Collator):
    """Batches of {"input_ids", "scored", "label"}: as `Collator`, and label (b,) bool."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples = unrolled(examples)
        return self.batch(examples) | {"label": torch.tensor([bool(e["label"]) for e in examples])}


def unrolled(items: Sequence[Any]) -> list[Any]:
    """Items that are lists of examples, as those of a `PackedDataset`, unrolled."""
    return [example for item in items for example in (item if isinstance(item, list) else [item])]


def pad(examples: Sequence[Example], pad_token_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """Right-padded rows: input_ids, attention_mask, target_ids (B, T) int64."""
    lengths = [len(e["input_ids"]) for e in examples]
    width = -(-max(lengths) // multiple_of) * multiple_of
    ids = np.full((len(examples), width), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(examples), width), dtype=np.int64)
    target = np.full((len(examples), width), -100, dtype=np.int64)
    for b, (example, n) in enumerate(zip(examples, lengths, strict=True)):
        ids[b, :n] = example["input_ids"]
        mask[b, :n] = 1
        target[b, :n] = targets(example)
    return {name: torch.from_numpy(a) for name, a in zip(_PADDED, (ids, mask, target), strict=True)}


def pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One row without padding: input_ids, position_ids, target_ids (1, N) int64 and cu_seqlens (B + 1,) int32."""
    lengths = np.array([len(e["input_ids"]) for e in examples], dtype=np.int64)
    ends = np.cumsum(lengths)
    ids = np.concatenate([np.asarray(e["input_ids"], dtype=np.int64) for e in examples])
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    target = np.concatenate([targets(e) for e in examples])
    batch = {name: torch.from_numpy(a[None]) for name, a in zip(_PACKED, (ids, positions, target), strict=True)}
    return batch | {"cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))}


_PADDED = ("input_ids", "attention_mask", "target_ids")
_PACKED = ("input_ids", "position_ids", "target_ids")


def targets(example: Example) -> np.ndarray:
    """(T,) int64: the next token where it is scored, else -100."""
    ids, scored = np.asarray(example["input_ids"], dtype=np.int64), np.asarray(example["scored"], dtype=bool)
    out = np.full(len(ids), -100, dtype=np.int64)
    out[:-1] = np.where(scored[1:], ids[1:], -100)
    return out


def first_scored(scored: np.ndarray) -> int:
    """Length of what comes before the first scored token."""
    return int(np.argmax(scored)) if np.any(scored) else len(scored)

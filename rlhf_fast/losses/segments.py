"""Sums and means over the sequences of a flat batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Tokens (n,) of `count` sequences. `valid` (n,) is 1 for tokens that count, 0 for the others."""

    ids: Tensor  # (n,) int64
    count: int
    valid: Tensor  # (n,) float

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, valid: Tensor) -> Segments:
        """Segments of the whole batch."""
        count = cu_seqlens.shape[0] - 1
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        ids = torch.arange(count, device=valid.device)
        ids = torch.repeat_interleave(ids, lengths.to(valid.device), output_size=valid.shape[0])
        return cls(ids, count, valid)

    def sum(self, values: Tensor) -> Tensor:
        """(n,) -> (count,): sum over the valid tokens of each sequence; differentiable."""
        zeros = values.new_zeros(self.count)
        return zeros.index_add(0, self.ids, values * self.valid.to(values.dtype))

    def lengths(self) -> Tensor:
        """(count,): valid tokens of each sequence, at least 1."""
        return self.valid.new_zeros(self.count).index_add(0, self.ids, self.valid).clamp(min=1)

    def mean(self, values: Tensor) -> Tensor:
        """(n,) -> (count,): mean over the valid tokens; 0 for a sequence without any."""
        return self.sum(values) / self.lengths().to(values.dtype)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """(count,) -> (n,): each token gets its sequence's value."""
        return per_sequence.index_select(0, self.ids)

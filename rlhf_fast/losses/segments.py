"""Sums and means over the sequences of a flat batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.policy import segment_counts


class Segments:
    """Tokens (n,) of `count` sequences: what belongs to which, and sums over the tokens that count.

    Made from `ids` (n,), or from `offsets` (count+1,), or from the `length` of every sequence; and from `valid` (n,)
    float, 1 for tokens that count, or `mask` (n,) bool. What is missing is formed when it is first asked for.
    """

    def __init__(
        self,
        ids: Tensor | None,
        count: int,
        valid: Tensor | None,
        *,
        offsets: Tensor | None = None,
        length: int | None = None,
        mask: Tensor | None = None,
        bad: Tensor | None = None,
    ):
        self._ids, self.count, self.valid = ids, count, valid
        self.offsets, self.length, self.mask = offsets, length, mask
        self.bad = bad  # () bool: the batch came with other offsets, which no one could use
        self._tokens: Tensor | None = None

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, valid: Tensor) -> Segments:
        """Segments of the whole batch."""
        offsets = cu_seqlens.to(device=valid.device, dtype=torch.int64)
        return cls(None, cu_seqlens.shape[0] - 1, valid, offsets=offsets)

    @property
    def ids(self) -> Tensor:
        """(n,) int64: the sequence of each token."""
        if self._ids is None:
            order = torch.arange(self.count, device=self.valid.device)
            repeats = self.offsets.diff() if self.length is None else self.length
            self._ids = order.repeat_interleave(repeats, output_size=self.valid.shape[0])
        return self._ids

    def sum(self, values: Tensor) -> Tensor:
        """(n,) -> (count,): sum over the valid tokens of each sequence; differentiable."""
        values = values * self.valid.to(values.dtype)
        if self.length is not None:
            return values.reshape(self.count, self.length).sum(1)
        # In fp64: index_add adds one after the other, which costs digits of a sequence of thousands.
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.ids, values.double()).to(values.dtype)

    def lengths(self) -> Tensor:
        """(count,) float64: valid tokens of each sequence, at least 1."""
        return self.tokens().clamp(min=1).double()

    def tokens(self) -> Tensor:
        """(count,) int64: valid tokens of each sequence."""
        if self._tokens is None:
            if self.mask is not None:
                self._tokens = segment_counts(self.mask, self.offsets, self.count, self.length or 0)
            else:
                self._tokens = self.valid.new_zeros(self.count).index_add(0, self.ids, self.valid).long()
        return self._tokens

    def bounds(self) -> tuple[Tensor | None, int]:
        """(count+1,) int64 offsets, or None and the length of every sequence."""
        if self.offsets is None and self.length is None:
            sizes = torch.bincount(self.ids, minlength=self.count)
            self.offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return self.offsets, self.length or 0

    def mean(self, values: Tensor) -> Tensor:
        """(n,) -> (count,): mean over the valid tokens; 0 for a sequence without any."""
        return self.sum(values) / self.lengths().to(values.dtype)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """(count,) -> (n,): each token gets its sequence's value."""
        if self.length is not None:
            return per_sequence[:, None].expand(self.count, self.length).reshape(-1)
        return per_sequence.index_select(0, self.ids)

"""Logits that stay from the forward to the backward, so that their rows cost three products and not four. On the CPU.

They lie in blocks of columns. The forward makes a block by one product and reads it while it is in the cache; the
backward turns it into its own gradient in place, takes two products from it and hands its memory back. So the weight
gradient, which has the head's size, comes into being as the logits go, and the peak is one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._head import ROW_MULTIPLE, Wanted, compaction, row_weights, tile_dtype, weight_grad_dtype, work_dtype
from rlhf_fast.ops._memory import discard, empty
from rlhf_fast.ops._rows import RowStats, Transform, join_stats, row_dlogits, row_stats, stat_dtype

KEEP = 256 << 20
"""Bytes of logits that one call keeps for its backward when the caller does not choose."""

BLOCK = 32 << 20
"""Bytes of a block of columns: a product, the pass over it and the next product meet in the cache."""


def kept_rows(count: int, vocab: int, dtype: torch.dtype, device: torch.device, budget: int | None) -> int:
    """How many of `count` rows fit in `budget` bytes."""
    tile = tile_dtype(dtype, device)
    if budget is None:
        budget = KEEP if tile.itemsize == dtype.itemsize else KEEP * 13 // 16  # gradients half as wide take less over
    rows = budget // (vocab * tile.itemsize)
    return count if rows >= count else rows - rows % ROW_MULTIPLE


class KeptGrads(NamedTuple):
    """Gradients of the kept rows: hidden (k, D) of those named by `order` (None: all), weight (V, D), bias (V,)."""

    order: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Kept:
    """The rows `place` of a call: n rows of logits, in blocks of columns of one buffer."""

    def __init__(self, place: slice | Tensor, first: int, rows: int, vocab: int, dtype: torch.dtype, tf: Transform):
        """`first` is the lowest row; `dtype` that of hidden and weight."""
        cpu = torch.device("cpu")
        self.place, self.first, self.rows, self.vocab, self.tf = place, first, rows, vocab, tf
        self.work, self.wide, self.acc = work_dtype(dtype, cpu), tile_dtype(dtype, cpu), stat_dtype(dtype)
        # a narrow product is rounded when it is handed back: one block, so that no sum of roundings arises
        width = max(1, BLOCK // (rows * self.wide.itemsize)) if self.wide == self.acc else vocab
        self.width = -(-vocab // -(-vocab // width))

    def buffer(self) -> Tensor:
        """Memory for all blocks, not touched yet."""
        return empty((self.rows * self.vocab,), self.wide, torch.device("cpu"))

    def _blocks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(columns, logits (n, c)) of each block."""
        for start in range(0, self.vocab, self.width):
            stop = min(start + self.width, self.vocab)
            yield slice(start, stop), buffer[self.rows * start : self.rows * stop].view(self.rows, stop - start)

    def _local(self, target: Tensor, columns: slice) -> Tensor:
        """The targets' columns in a block, -1 where they lie in another."""
        return torch.where((target >= columns.start) & (target < columns.stop), target - columns.start, -1)

    def fill(self, buffer: Tensor, h: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Make the logits of h (n, D), a block at a time. First product."""
        h = h.to(self.work)
        for columns, z in self._blocks(buffer):
            yield columns, torch.mm(h, weight[columns].to(self.work).t(), out=z)

    def stats(
        self, buffer: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, entropy: bool
    ) -> RowStats:
        """Fill the buffer and return the statistics of its rows. target (n,)."""
        parts, ends = [], []
        for columns, z in self.fill(buffer, h, weight):
            b = None if bias is None else bias[columns].to(self.acc).contiguous()
            part = row_stats(z, self._local(target, columns).clamp_(min=0), b, self.tf, entropy=entropy)
            parts.append(torch.stack([x for x in part if x is not None]))
            ends.append(columns.stop)
        if len(parts) == 1:
            return part
        return join_stats(torch.stack(parts), target, ends, entropy=entropy)

    def gradients(
        self,
        buffer: Tensor,  # filled; its contents are lost
        h: Tensor,  # (n, D)
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,  # (n,)
        stats: RowStats,
        upstream: tuple[Tensor, Tensor | None, Tensor | None],  # of logprob, entropy and lse, (n,)
        want: Wanted,
        *,
        last: bool,  # no other rows add to the weight gradient: it is handed over in its final dtype
    ) -> KeptGrads:
        """Second and third product over the rows whose gradient is not exactly zero."""
        live, a, b = row_weights(stats, *upstream)
        order, count = compaction(live)
        if count == 0:
            return KeptGrads(torch.arange(0), None, None, None)
        h = (h if order is None else h[order]).to(self.work)
        handed = weight_grad_dtype(weight.dtype, weight.device) if last or self.wide != self.acc else self.acc
        dh = torch.empty((count, h.shape[1]), dtype=self.work) if want.hidden else None
        dw = empty(weight.shape, handed, weight.device) if want.weight else None
        db = weight.new_empty(self.vocab, dtype=self.acc) if want.bias else None
        for columns, z in self._blocks(buffer):
            block_bias = None if bias is None else bias[columns].to(self.acc).contiguous()
            dz = z[:count]
            row_dlogits(z, dz, order, self._local(target, columns), block_bias, self.tf, stats, upstream[0], a, b)
            if dh is not None and columns.start == 0:
                torch.mm(dz, weight[columns].to(self.work), out=dh)
            elif dh is not None:
                dh.addmm_(dz, weight[columns].to(self.work))
            if dw is not None and handed == self.work:
                torch.mm(dz.t(), h, out=dw[columns])
            elif dw is not None:
                dw[columns] = torch.mm(dz.t(), h)
            if db is not None:
                db[columns] = dz.sum(0, dtype=self.acc)
            discard(buffer[: self.rows * columns.stop])
        return KeptGrads(order, dh, dw, db)

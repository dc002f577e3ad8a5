"""What `linear_divergence` computes, tile by tile: two products, divergence, gradient in place, two more products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._divergence_rows import RowKl, Side, divergence_dlogits, row_divergence
from rlhf_fast.ops._head import Head, Wanted, power_of_two, tile_rows
from rlhf_fast.ops._rows import Transform, row_stats, stat_dtype

Rows = Tensor | slice


class Call(NamedTuple):
    """Everything of a call that is not a tensor."""

    kind: str
    ref_share: float
    tf: Transform
    ref_tf: Transform
    chunk_size: int | None
    memory_budget: int | None


class Operands(NamedTuple):
    """One head: hidden (N, D), weight (V, D), bias (V,) or None, and the gradients wanted from it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    want: Wanted = Wanted(False, False, False)


STATS = 6
"""Rows of the saved statistics: max and log-sum of the policy, of the reference, and the two sums of `RowKl`."""


def result_dtype(hidden: Tensor, ref_hidden: Tensor) -> torch.dtype:
    """fp32, or fp64 if one of the heads is."""
    return torch.promote_types(stat_dtype(hidden.dtype), stat_dtype(ref_hidden.dtype))


class Pair:
    """The products of one call: two heads over the same rows, each with a tile buffer of its own."""

    def __init__(self, own: Operands, ref: Operands, keep: Tensor | None, call: Call):
        """`keep` (N,) bool names the rows that exist for this call; the others reach no product. One host sync."""
        self.own, self.ref, self.call = own, ref, call
        n, vocab, device = own.hidden.shape[0], own.weight.shape[0], own.hidden.device
        live = None if keep is None else keep.nonzero().squeeze(1)
        self.live = None if live is None or live.shape[0] == n else live
        self.count = n if self.live is None else self.live.shape[0]
        budget = call.memory_budget and max(1, call.memory_budget // 2)  # one half for each tile
        sizes = (tile_rows(self.count, vocab, x.hidden.dtype, device, call.chunk_size, budget) for x in (own, ref))
        self.step = min(sizes)
        self.head = Head(*own[:3], call.tf, self.step, own.want)
        self.ref_head = Head(*ref[:3], call.ref_tf, self.step, ref.want)

    def tiles(self) -> Iterator[Rows]:
        """The kept rows, `step` at a time."""
        for start in range(0, self.count, self.step):
            stop = min(start + self.step, self.count)
            yield slice(start, stop) if self.live is None else self.live[start:stop]

    def sides(self, rows: Rows, known: Tensor | None = None) -> tuple[Side, Side]:
        """Both tiles of logits (two products) and their statistics: read off them, or `known` (STATS, N)."""
        out = []
        for i, (head, operands) in enumerate(((self.head, self.own), (self.ref_head, self.ref))):
            z = head.logits(operands.hidden[rows])
            if known is None:
                target = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
                row_max, log_sum = row_stats(z, target, head.bias, head.tf, entropy=False)[1:3]
            else:
                row_max, log_sum = known[2 * i, rows], known[2 * i + 1, rows]
            out.append(Side(z, head.bias, head.tf, row_max, log_sum))
        return out[0], out[1]

    def kl(self, own: Side, ref: Side) -> RowKl:
        """The divergence sums of a tile."""
        return row_divergence(own, ref, kind=self.call.kind, ref_share=self.call.ref_share)

    def backward(self, own: Side, ref: Side, kl: RowKl, grad: Tensor, rows: Rows) -> None:
        """Overwrite the tiles with grad (n,) times their gradient; two products for each head that trains."""
        heads = ((self.head, self.own, own), (self.ref_head, self.ref, ref))
        scale = None
        if any(head.rescale and head.want.any for head, *_ in heads):
            scale = power_of_two(grad)  # gradients of a mean over many tokens lie below fp16's range
            grad = grad * scale
        dz = [head.narrow(side.logits) if head.want.any else None for head, _, side in heads]
        divergence_dlogits(own, ref, kl, grad, *dz, kind=self.call.kind, ref_share=self.call.ref_share)
        for (head, operands, _), d in zip(heads, dz, strict=True):
            if d is not None:
                head.rows_backward += d.shape[0]
                head.products(d, operands.hidden[rows], rows, None, scale)

    def grads(self) -> list[Tensor]:
        """Gradients of hidden, weight, bias of both heads as accumulated; of no elements where not wanted."""
        out = []
        for head in (self.head, self.ref_head):
            for grad, want in zip(head.grads(), head.want, strict=False):
                out.append(grad if want else head.dbias.new_empty(0))
        return out


def forward(own: Operands, ref: Operands, keep: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Divergence (N,) and the statistics (STATS, N) that the backward needs. Two products."""
    dtype, n = result_dtype(own.hidden, ref.hidden), own.hidden.shape[0]
    divergence, stats = own.hidden.new_zeros(n, dtype=dtype), own.hidden.new_zeros((STATS, n), dtype=dtype)
    with torch.autocast(own.hidden.device.type, enabled=False):
        pair = Pair(own, ref, keep, call)
        for rows in pair.tiles():
            sides = pair.sides(rows)
            kl = pair.kl(*sides)
            divergence[rows] = kl.value(call.kind, call.ref_share)
            values = (sides[0].row_max, sides[0].log_sum, sides[1].row_max, sides[1].log_sum, *kl)
            for i, value in enumerate(values):
                if value is not None:
                    stats[i, rows] = value.to(dtype)
    return divergence, stats


def backward(
    own: Operands, ref: Operands, keep: Tensor | None, stats: Tensor, grad: Tensor, call: Call
) -> list[Tensor]:
    """The six gradients for upstream `grad` (N,). Rows where it is 0 are not recomputed."""
    live = grad != 0 if keep is None else keep & (grad != 0)
    with torch.autocast(own.hidden.device.type, enabled=False):
        pair = Pair(own, ref, live, call)
        for rows in pair.tiles():
            kl = RowKl(stats[4, rows], stats[5, rows])
            pair.backward(*pair.sides(rows, stats), kl, grad[rows], rows)
    return pair.grads()


def fused(
    own: Operands, ref: Operands, keep: Tensor | None, weights: Tensor, call: Call
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(sum of weights times divergence (), divergence (N,), the six gradients): nothing is recomputed."""
    dtype, n = result_dtype(own.hidden, ref.hidden), own.hidden.shape[0]
    divergence, loss = own.hidden.new_zeros(n, dtype=dtype), own.hidden.new_zeros((), dtype=dtype)
    with torch.autocast(own.hidden.device.type, enabled=False):
        pair = Pair(own, ref, keep, call)
        for rows in pair.tiles():
            sides, w = pair.sides(rows), weights[rows]
            kl = pair.kl(*sides)
            value = kl.value(call.kind, call.ref_share)
            divergence[rows] = value
            loss += (w * value).sum()
            if own.want.any or ref.want.any:
                pair.backward(*sides, kl, w, rows)
    return loss, divergence, pair.grads()

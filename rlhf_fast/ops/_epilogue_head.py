"""A head whose tile holds exponentials, written by the product's epilogue, rather than logits: no pass over it.

    E = exp(s - c),  c = s_target by a product of two vectors;   L = log sum_j E_j;   logprob = (s_target - c) - L
    dz = k (E' ),   k = -dlogprob exp(-L) ds/dz,   E'_target = exp(L) expm1(logprob),  E'_j = E_j elsewhere
    dhidden = k * (E' @ weight),   dweight = E'^T @ (k * hidden)

Never run on a GPU yet; RLHF_FAST_HEAD=epilogue turns it on. docs/kernels.md says what it should cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _backend
from rlhf_fast.ops import _epilogue
from rlhf_fast.ops._head import BUDGET, Head, Lora, Wanted, compaction, tile_dtype, work_dtype
from rlhf_fast.ops._rows import RowStats, Transform

LARGEST_SUM = 1e30
"""A row whose exponentials sum to more (the target's log-probability is below -69) sends its tile to the ordinary road,
as do NaN and infinity."""

MOVE_ROWS = 256


def serves(hidden: Tensor, weight: Tensor, tf: Transform, want: Wanted, lora: Lora | None, entropy: bool) -> bool:
    """Whether the gradient can be had by this road: one factor per row, and exponentials that do not overflow."""
    wide_enough = hidden.dtype == torch.bfloat16 or not hidden.is_cuda  # the interpreter keeps E in fp32
    return want.any and not entropy and lora is None and tf.softcap is None and wide_enough and (
        _epilogue.applies(hidden, weight)
    )  # fmt: skip


def tile_budget(hidden: Tensor, budget: int | None) -> int:
    """Bytes of a tile of logits with as many rows as exponentials fit in `budget`."""
    kind, dtype = hidden.device, hidden.dtype
    return (budget or BUDGET[kind.type]) * tile_dtype(dtype, kind).itemsize // work_dtype(dtype, kind).itemsize


class EpilogueHead(Head):
    """`Head` for gradients of log-probabilities alone."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tf: Transform, rows: int, want: Wanted):
        super().__init__(hidden, weight, bias, tf, 0, want)
        vocab = weight.shape[0]
        self.exps = weight.new_empty((rows, -(-vocab // 16) * 16), dtype=self.work)[:, :vocab]  # TMA writes it
        self.made = False  # whether the tile holds what `logits` was asked for
        self.ordinary: Tensor | None = None  # the tile's logits, where exponentials overflow

    def logits(self, h: Tensor) -> Tensor:
        """The tile, which `stats` fills: the shift needs the targets."""
        self.rows_forward += h.shape[0]
        self.h, self.made, self.ordinary = h, False, None
        return self.exps[: h.shape[0]]

    def stats(self, z: Tensor, target: Tensor, *, entropy: bool) -> RowStats:
        """logprob, c and L of the tile's rows. One host sync."""
        h = self.h if _epilogue.aligned(self.h) else self.h.clone(memory_format=torch.contiguous_format)
        self.made = True
        pre = self.tf.scale * self.tf.inv_temperature
        with _backend.on_device(h):
            shift = (h.float() * self.given[target].float()).sum(-1)
            shift = pre * (shift if self.bias is None else shift + self.bias[target])
            total, picked = _epilogue.exponentials(h, self.given, target, self.bias, shift, pre, z)
        if bool((total < LARGEST_SUM).all()):
            log_sum = total.log()
            return RowStats(((picked - shift) - log_sum).clamp(max=0), shift, log_sum, None)
        self.tile = self.exps.new_empty(z.shape[0], self.tile.stride(0), dtype=self.wide)[:, : z.shape[1]]
        self.ordinary = super().logits(self.h)
        self.rows_forward -= z.shape[0]
        return super().stats(self.ordinary, target, entropy=entropy)

    def backward(
        self,
        z: Tensor,
        h: Tensor,
        rows: Tensor | slice,
        target: Tensor,
        stats: RowStats,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        dlse: Tensor | None = None,
    ) -> None:
        """Second and third product over the rows whose gradient is not exactly zero."""
        if not self.made:
            stats = self.stats(z, target, entropy=False)
        if self.ordinary is not None:
            super().backward(self.ordinary, h, rows, target, stats, dlogprob, dentropy, dlse)
            self.ordinary, self.tile = None, self.tile.new_empty(0, self.tile.stride(0))[:, : z.shape[1]]
            return
        order, kept = compaction(dlogprob != 0)
        if kept == 0:
            return
        self.rows_backward += kept
        z.scatter_(1, target.unsqueeze(1), (stats.log_sum.exp() * stats.logprob.expm1()).to(z.dtype).unsqueeze(1))
        k = (-dlogprob * (-stats.log_sum).exp() * (self.tf.scale * self.tf.inv_temperature)).unsqueeze(1)
        e = z[:kept]
        if order is not None:
            h, k = h[order], k[order]
            for start in range(0, kept, MOVE_ROWS):  # sources are in place, or lie beyond `kept`
                part = order[start : start + MOVE_ROWS]
                e[start : start + MOVE_ROWS] = z[part]
        if self.want.hidden:
            dh = (self._mm(e, self.weight, self.acc) * k).to(self.dhidden.dtype)
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=z.device)
            self.dhidden.index_copy_(0, rows if order is None else rows[order], dh)
        if self.want.weight:
            self._add_weight(e, (k * h).to(self.work), None)
        if self.want.bias:
            self.dbias.add_(self._mm(e.t(), k.to(self.work), self.acc).squeeze(1))

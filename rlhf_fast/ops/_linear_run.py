"""What `linear_logprob` computes: tile by tile product and statistics; in the backward the product again (but for the
rows whose logits were kept), gradient in place, two more products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops import _epilogue
from rlhf_fast.ops._head import Head, Lora, Wanted, tile_rows
from rlhf_fast.ops._kept import Kept, kept_rows
from rlhf_fast.ops._rows import RowStats, Transform, row_token_stats, stat_dtype


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D), bias (V,), LoRA's a (r, D) and b (V, r)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Call(NamedTuple):
    """Everything of a call that is not a tensor."""

    tf: Transform
    ignore_index: int
    chunk_size: int | None
    memory_budget: int | None
    lora_scaling: float = 1.0


class Outputs(NamedTuple):
    """Each (N,); entropy and the last three of no elements where not asked for."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    row_max: Tensor
    log_sum: Tensor
    log_sum_sq: Tensor
    mean_logit: Tensor
    is_top1: Tensor

    @classmethod
    def zeros(cls, hidden: Tensor, entropy: bool, token_stats: bool) -> Outputs:
        """Outputs of the rows of `hidden`, all zero."""
        n, dtype, extra = hidden.shape[0], stat_dtype(hidden.dtype), hidden.shape[0] if token_stats else 0
        sizes = (n, n if entropy else 0, n, n, n, extra, extra)
        return cls(*(hidden.new_zeros(s, dtype=dtype) for s in sizes), hidden.new_zeros(extra, dtype=torch.bool))

    def write(self, rows: slice | Tensor, stats: RowStats) -> None:
        """Fill in the given rows."""
        self.logprob[rows], self.row_max[rows], self.log_sum[rows] = stats[:3]
        self.lse[rows] = stats.row_max + stats.log_sum
        if stats.entropy is not None:
            self.entropy[rows] = stats.entropy


def scored_rows(target: Tensor, ignore_index: int, vocab: int) -> Tensor | None:
    """Rows (n,) int64 whose target counts, None when all do; raises on a target outside the vocabulary."""
    mask = target != ignore_index
    _checks.check_target_range("target", target, mask, vocab)
    rows = mask.nonzero().squeeze(1)
    return None if rows.shape[0] == target.shape[0] else rows


def _head(inputs: Inputs, call: Call, rows: int, want: Wanted) -> Head:
    lora = None if inputs.lora_a is None else Lora(inputs.lora_a, inputs.lora_b, call.lora_scaling)
    return Head(*inputs[:3], call.tf, rows, want, lora)


def forward(
    inputs: Inputs, target: Tensor, call: Call, *, entropy: bool, token_stats: bool = False, keep: bool = False
) -> tuple[Outputs, Kept | None, Tensor | None]:
    """The outputs; with `keep`, also the rows whose logits were kept, and the logits themselves.

    The last rows are kept: the tiles before them have gone when their buffer fills.
    """
    hidden, weight, *_ = inputs
    out = Outputs.zeros(hidden, entropy, token_stats)
    live = scored_rows(target, call.ignore_index, weight.shape[0])
    count = hidden.shape[0] if live is None else live.shape[0]
    sizes = (weight.shape[0], hidden.dtype, hidden.device)
    held = kept_rows(count, *sizes, call.memory_budget) if keep else 0
    rest = count - held
    with torch.autocast(hidden.device.type, enabled=False):
        if rest and not token_stats and inputs.lora_a is None and _epilogue.applies(hidden, weight):
            step = min(rest, _epilogue.rows_per_launch(weight.shape[0], hidden.device, call.memory_budget))
            for start in range(0, rest, step):
                stop = min(start + step, rest)
                rows = slice(start, stop) if live is None else live[start:stop]
                args = (hidden[rows], *inputs[1:3], target[rows].long(), call.tf)
                out.write(rows, _epilogue.stats(*args, entropy=entropy))
        elif rest:
            step = tile_rows(rest, *sizes, call.chunk_size, call.memory_budget)
            head = _head(inputs, call, step, Wanted(False, False, False))
            for start in range(0, rest, step):
                stop = min(start + step, rest)
                rows = slice(start, stop) if live is None else live[start:stop]
                z, t = head.logits(hidden[rows]), target[rows].long()
                stats = head.stats(z, t, entropy=entropy)
                out.write(rows, stats)
                if token_stats:
                    for values, value in zip(out[5:], row_token_stats(z, t, head.bias, call.tf, stats), strict=True):
                        values[rows] = value
            del head, z
        if not held:
            return out, None, None
        place = slice(rest, count) if live is None else live[rest:]
        kept = Kept(place, rest if live is None else int(place[0]), held, weight.shape[0], hidden.dtype, call.tf)
        logits = kept.buffer()
        out.write(place, kept.stats(logits, hidden[place], *inputs[1:3], target[place].long(), entropy=entropy))
    return out, kept, logits


class Saved(NamedTuple):
    """Of the forward, (N,) each: what the backward needs to know of a row."""

    entropy: Tensor  # or (0,)
    row_max: Tensor
    log_sum: Tensor


def backward(
    inputs: Inputs,
    target: Tensor,
    saved: Saved,
    upstream: tuple[Tensor, Tensor, Tensor],  # of logprob, entropy and lse
    call: Call,
    want: Wanted,
    kept: Kept | None = None,
    logits: Tensor | None = None,  # those of `kept`, overwritten; None: they are made again
) -> tuple[Tensor, ...]:
    """Gradients of the five inputs in their dtypes; of no elements where not wanted."""
    hidden, weight, bias, *_ = inputs
    dlogprob, dentropy, dlse = upstream
    has_entropy = saved.entropy.numel() > 0
    live = (target != call.ignore_index) & ((dlogprob != 0) | (dlse != 0) | (dentropy != 0 if has_entropy else False))
    if kept is not None:
        live[kept.first :] = False
    live = live.nonzero().squeeze(1)
    count = live.shape[0]
    step = tile_rows(count, weight.shape[0], hidden.dtype, hidden.device, call.chunk_size, call.memory_budget)

    def parts(rows: slice | Tensor) -> tuple[RowStats, tuple[Tensor, Tensor | None, Tensor]]:
        """Statistics and upstream gradients of some rows."""
        h = saved.entropy[rows] if has_entropy else None
        stats = RowStats(dlogprob[rows], saved.row_max[rows], saved.log_sum[rows], h)
        return stats, (dlogprob[rows], dentropy[rows] if has_entropy else None, dlse[rows])

    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(inputs, call, step, want)
        if kept is not None:
            h = hidden[kept.place]
            if logits is None:
                logits = kept.buffer()
                for _ in kept.fill(logits, h, weight):
                    pass
            grads = kept.gradients(logits, h, weight, bias, target[kept.place].long(), *parts(kept.place), want,
                                   last=count == 0)  # fmt: skip
            head.start(kept.place, *grads)
        for start in range(0, count, step):
            rows = live[start : start + step]
            if count == hidden.shape[0]:
                rows = slice(start, min(start + step, count))
            h = hidden[rows]
            stats, grads = parts(rows)
            head.backward(head.logits(h), h, rows, target[rows].long(), stats, *grads)
    out = (*head.grads(), *head.lora_grads())
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(out, inputs, strict=True))

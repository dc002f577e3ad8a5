"""Row passes over a tile of logits: statistics of each row, and its gradient in place.

    x = (z + bias) * scale;  y = softcap tanh(x / softcap);  s = y * inv_temperature
    m = max s;  L = log sum exp(s - m);  logprob = (s_target - m) - L;  H = L - sum exp(s - m)(s - m) / exp(L)
    dz = ds/dz * (d_target [j == target] + p (a + b ((s - m) - L))),   p = exp((s - m) - L)

m and L are kept apart: their sum rounds at the size of the logits, 1e-3 when these are near 1e4.
Triton and C++ carry the same two functions; the torch versions here serve every device and float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend

_BLOCK_ROWS = 64  # of the torch passes that widen a tile


class Transform(NamedTuple):
    """From raw logits to the logits of the softmax: scale, then softcap, then temperature."""

    scale: float = 1.0
    softcap: float | None = None
    inv_temperature: float = 1.0


class RowStats(NamedTuple):
    """Per-row statistics (n,) in fp32 (fp64 for fp64 logits). Rows with target < 0 hold zeros."""

    logprob: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launcher(logits: Tensor):
    """The module that carries this tensor's row passes."""
    kind = _backend.backend(logits.device, "row_pass")
    if kind == "torch" or logits.dtype == torch.float64:
        return None
    if kind == "triton":
        from rlhf_fast.kernels import row_pass

        return row_pass
    return _backend


def row_stats(logits: Tensor, target: Tensor, bias: Tensor | None, tf: Transform, *, entropy: bool) -> RowStats:
    """Statistics of each row in one read. logits (n, V), target (n,) int64, bias (V,) fp32."""
    n, dtype = logits.shape[0], stat_dtype(logits.dtype)
    out = RowStats(
        *(torch.empty(n, dtype=dtype, device=logits.device) for _ in range(3)),
        torch.empty(n, dtype=dtype, device=logits.device) if entropy else None,
    )
    if n == 0:
        return out
    launcher = _launcher(logits)
    if launcher is None:
        _torch_stats(logits, target, bias, tf, out)
    else:
        with _backend.on_device(logits):
            launcher.row_stats(logits, *_contiguous(target, bias), **tf._asdict(), **out._asdict())
    return out


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Kernels read vectors by address alone: a strided one would pass for another."""
    return [None if t is None else t.contiguous() for t in tensors]


def join_stats(parts: Tensor, target: Tensor, ends: list[int], *, entropy: bool) -> RowStats:
    """Statistics of whole rows from those of blocks of columns.

        w_r = exp(L_r + m_r - m - L),   m = max m_r,   L = log sum_r exp(L_r + m_r - m)
        logprob = logprob_r + log w_r  with r the target's block,   H = sum_r w_r (H_r - log w_r)

    Differences only: nothing here rounds at the size of the logits. parts (R, 3 or 4, n): logprob (of any column where
    the target lies in another block), m, L and entropy. target (n,); ends (R,): where each block's columns stop.
    """
    logprob, row_max, log_sum, *rest = parts.unbind(1)
    top = row_max.amax(0)
    share = log_sum + (row_max - top.masked_fill(top == -torch.inf, 0))  # -inf: the block has no mass
    z = share.exp().sum(0)
    total = z.log().masked_fill(z == 0, 0)  # a row of -inf alone, as in the row passes
    log_w = share - total
    owner = torch.bucketize(target, torch.tensor(ends[:-1], device=target.device), right=True).unsqueeze(0)
    own = lambda x: x.gather(0, owner).squeeze(0)  # noqa: E731
    picked = torch.where((own(row_max) == -torch.inf) & (top > -torch.inf), -torch.inf, own(logprob) + own(log_w))
    if not entropy:
        return RowStats(picked, top, total, None)
    w = log_w.exp()
    h = torch.where(w == 0, 0, w * (rest[0] - log_w)).sum(0)
    return RowStats(picked, top, total, h.masked_fill(top == -torch.inf, torch.nan))


def row_token_stats(
    logits: Tensor, target: Tensor, bias: Tensor | None, tf: Transform, stats: RowStats
) -> tuple[Tensor, Tensor, Tensor]:
    """(log sum_j p_j^2, mean_j s_j, whether the target is the first argmax), each (n,); rows of target < 0 hold 0.

    sum_j p_j^2 = sum_j exp(2 (s_j - m)) / exp(2 L): the statistics of the same row at twice the inverse temperature.
    """
    scored = target >= 0
    twice = tf._replace(inv_temperature=2 * tf.inv_temperature)
    log_sum_sq = row_stats(logits, target, bias, twice, entropy=False).log_sum - 2 * stats.log_sum
    mean, top = torch.zeros_like(stats.log_sum), torch.zeros_like(target)
    for start in range(0, logits.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        if bias is None and tf.softcap is None:  # a positive factor changes neither the order nor the mean's shape
            s = logits[rows]
            mean[rows] = s.sum(-1, dtype=mean.dtype) * (tf.scale * tf.inv_temperature / s.shape[1])
            top[rows] = s.argmax(-1) if tf.scale > 0 else s.argmin(-1)
        else:
            s, _ = _shaped(logits[rows], bias, tf)
            mean[rows], top[rows] = s.mean(-1), s.argmax(-1)
    return log_sum_sq.masked_fill(~scored, 0), mean.masked_fill(~scored, 0), (top == target) & scored


def row_dlogits(
    logits: Tensor,  # (n, V)
    out: Tensor,  # (K, V); may share the storage of `logits`, row for row
    order: Tensor | None,  # (K,) source row of each row of `out`
    target: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    tf: Transform,
    stats: RowStats,
    d_target: Tensor,  # (n,)
    a: Tensor,  # (n,)
    b: Tensor | None,  # (n,)
) -> None:
    """Write the gradient with respect to the raw logits of the rows named by `order`."""
    if out.numel() == 0:  # no row, or the empty shard of a vocabulary
        return
    launcher = _launcher(logits)
    vectors = dict(row_max=stats.row_max, log_sum=stats.log_sum, d_target=d_target, a=a, b=b)
    args = dict(zip(vectors, _contiguous(*vectors.values()), strict=True))  # upstream may be expanded
    if launcher is None:
        _torch_dlogits(logits, out, order, target, bias, tf, **args)
    else:
        with _backend.on_device(logits):
            launcher.row_dlogits(logits, out, order, *_contiguous(target, bias), **tf._asdict(), **args)


def _shaped(logits: Tensor, bias: Tensor | None, tf: Transform) -> tuple[Tensor, Tensor | None]:
    """(s, tanh(x / softcap) or None) in the statistics' dtype."""
    x = logits.to(stat_dtype(logits.dtype))
    x = (x if bias is None else x + bias) * tf.scale
    if tf.softcap is None:
        return x * tf.inv_temperature, None
    t = torch.tanh(x / tf.softcap)
    return t * tf.softcap * tf.inv_temperature, t


def _torch_stats(logits: Tensor, target: Tensor, bias: Tensor | None, tf: Transform, out: RowStats) -> None:
    scored = target >= 0
    s, _ = _shaped(logits.masked_fill(~scored.unsqueeze(-1), 0), bias, tf)
    m = s.amax(-1)
    picked = s.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    d = s.sub_(m.masked_fill(m == -torch.inf, 0).unsqueeze(-1))
    e = d.exp()
    z = e.sum(-1)
    log_sum = z.log().masked_fill(z == 0, 0)  # a row of -inf alone: lse = -inf, logprob = NaN
    values = [(picked - m) - log_sum, m, log_sum]
    if out.entropy is not None:
        values.append(log_sum - torch.where(e == 0, e, e * d).sum(-1) / z)
    for dst, value in zip(out, values, strict=False):
        dst.copy_(value.masked_fill(~scored, 0))


def _torch_dlogits(logits, out, order, target, bias, tf: Transform, *, row_max, log_sum, d_target, a, b) -> None:
    rows = torch.arange(out.shape[0], device=logits.device) if order is None else order
    live = (d_target[rows] != 0) | (a[rows] != 0)
    if b is not None:
        live |= b[rows] != 0
    live = live.unsqueeze(-1)
    s, t = _shaped(logits[rows].masked_fill(~live, 0), bias, tf)
    log_p = (s - row_max[rows].unsqueeze(-1)) - log_sum[rows].unsqueeze(-1)
    p = log_p.exp()
    factor = a[rows].unsqueeze(-1)
    if b is not None:
        factor = factor + b[rows].unsqueeze(-1) * log_p.masked_fill(p == 0, 0)
    grad = torch.where(p == 0, p, p * factor)
    tgt = target[rows]
    hit = torch.where(tgt >= 0, d_target[rows], torch.zeros_like(d_target[rows]))
    grad.scatter_add_(-1, tgt.clamp(min=0).unsqueeze(-1), hit.unsqueeze(-1))
    if t is not None:
        grad = grad * (1 - t * t)
    grad = grad * (tf.scale * tf.inv_temperature)
    out.copy_(grad.masked_fill(~live, 0))

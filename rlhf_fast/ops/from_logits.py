"""`logprob_from_logits`: log-probabilities of targets from logits that exist. One read forward; one read, one write
backward. `entropy_from_logits`: the same pass without targets."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._eager import WAITS
from rlhf_fast.ops._memory import empty
from rlhf_fast.ops._rows import RowStats, Transform, row_dlogits, row_stats, stat_dtype
from rlhf_fast.ops.linear import check_scoring, check_transform
from rlhf_fast.types import LogProb


def logprob_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
) -> LogProb:
    """Log-probabilities of `target` under softmax(logits), with entropy and log-sum-exp, in one read of the logits.

        s = softcap(logits * logit_scale) / temperature;   logprob = s_target - lse(s),   entropy = -sum_j p_j log p_j

    Equivalent to `reference.logprob_from_logits`, without materialising a log-softmax (N, V).

    Args:
        logits: (N, V) or (..., V) float. Differentiable; never written.
        target: (N,) or (...) int64 or int32, already aligned to `logits`; or (..., K): K targets for each row, whose
            log-probabilities come from the same pass.
        temperature, logit_scale, softcap, ignore_index, entropy: as in `linear_logprob`.
    Returns: LogProb(logprob, entropy or None, lse), fp32 (fp64 for fp64 logits): logprob of the shape of `target`,
        the others of logits' leading shape. All differentiable; the gradient has the logits' dtype.
    Raises: ValueError naming the tensor, expected and actual shape, dtype or device; naming row and value of a target
        outside [0, V).
    Source: the definition, with the maximum taken out as it is read: Milakov & Gimelshein 2018, "Online normalizer
        calculation for softmax", algorithm 3.
    Notes: statistics in fp32 (fp64); the backward writes the logits' gradient and nothing else of their size. Ignored
        rows are not read (NaN there does no harm) and give 0. Rows holding -inf are fine as long as one logit is
        finite. Second derivatives raise.
    Example:
        >>> logits = torch.randn(2, 3, 11)
        >>> logprob_from_logits(logits, torch.zeros(2, 3, dtype=torch.long), temperature=0.7).logprob.shape
        torch.Size([2, 3])
    """
    _check_logits(logits)
    _checks.check_no_tangent("logprob_from_logits", logits=logits)
    _checks.check_tensor("target", target)
    lead, several = logits.shape[:-1], target.dim() == logits.dim()
    if not several:
        _checks.check_target("target", target, lead, "logits' leading shape")
    else:
        _checks.check_target("target", target, (*lead, target.shape[-1]), "logits' leading shape and K, (..., K)")
    _checks.check_same_device(logits=logits, target=target)
    check_scoring(ignore_index, entropy)
    tf = check_transform(temperature, logit_scale, softcap)
    rows = logits.reshape(-1, logits.shape[-1])
    flat = target.reshape(rows.shape[0], target.shape[-1]) if several else target.reshape(-1)
    logprob, h, lse, _, _ = _logits_logprob(rows, flat, *tf, ignore_index, entropy)
    return LogProb(logprob.reshape(target.shape), h.reshape(lead) if entropy else None, lse.reshape(lead))


def entropy_from_logits(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Entropy of softmax(logits), (...) for logits (..., V), fp32 (fp64 for fp64 logits), in one read.

        entropy = -sum_j p_j log p_j,   p = softmax(softcap(logits * logit_scale) / temperature)

    Args: as in `logprob_from_logits`. Differentiable.
    Raises: ValueError naming the tensor, expected and actual shape or dtype.
    Source: Shannon 1948.
    Notes: statistics, memory and rows holding -inf as in `logprob_from_logits`; 0 log 0 is 0.
    Example:
        >>> entropy_from_logits(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])
    """
    _check_logits(logits)
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return logprob_from_logits(logits, target, entropy=True, **options).entropy


def _check_logits(logits: Tensor) -> None:
    _checks.check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V > 0, got {_checks.shape_str(logits.shape)}")


def _rows(logits: Tensor) -> Tensor:
    """Rows whose last dim is contiguous: what the row passes read."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _row_targets(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(row target (N,), -1 where nothing of the row counts; scored, shape of target). Of K targets: the first."""
    scored = target != ignore_index
    if target.dim() == 1:
        return target.long().masked_fill(~scored, -1), scored
    return torch.where(scored.any(-1), 0, -1), scored


def _gather(logits: Tensor, target: Tensor, scored: Tensor, tf: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """(index, s, ds/dz) of K targets for each row, each (N, K)."""
    index = target.long().masked_fill(~scored, 0)
    x = logits.gather(-1, index).to(stat_dtype(logits.dtype)) * tf.scale
    if tf.softcap is None:
        return index, x * tf.inv_temperature, torch.full_like(x, tf.scale * tf.inv_temperature)
    t = torch.tanh(x / tf.softcap)
    return index, t * tf.softcap * tf.inv_temperature, (1 - t * t) * (tf.scale * tf.inv_temperature)


@torch.library.custom_op("rlhf_fast::logprob_from_logits", mutates_args=(), tags=WAITS)
def _logits_logprob(
    logits: Tensor,
    target: Tensor,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob (N,) or (N, K), entropy or empty, lse, row max, log-sum), each (N,)."""
    rows, scored = _row_targets(target, ignore_index)
    _checks.check_target_range("target", target, scored, logits.shape[1])
    tf = Transform(scale, softcap, inv_temperature)
    stats = row_stats(_rows(logits), rows, None, tf, entropy=entropy)
    logprob = stats.logprob
    if target.dim() == 2:
        _, s, _ = _gather(logits, target, scored, tf)
        logprob = ((s - stats.row_max.unsqueeze(-1)) - stats.log_sum.unsqueeze(-1)).masked_fill_(~scored, 0)
    h = logits.new_empty(0, dtype=stat_dtype(logits.dtype)) if stats.entropy is None else stats.entropy
    return logprob, h, stats.row_max + stats.log_sum, stats.row_max, stats.log_sum


@_logits_logprob.register_fake
def _(logits, target, scale, softcap, inv_temperature, ignore_index, entropy):
    n, dtype = logits.shape[0], stat_dtype(logits.dtype)
    sizes = (target.shape, n if entropy else 0, n, n, n)
    return tuple(logits.new_empty(size, dtype=dtype) for size in sizes)


@torch.library.custom_op("rlhf_fast::logprob_from_logits_backward", mutates_args=())
def _logits_logprob_backward(
    logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
) -> Tensor:
    """Gradient of the logits (N, V), in their dtype."""
    rows, scored = _row_targets(target, ignore_index)
    tf = Transform(scale, softcap, inv_temperature)
    several = target.dim() == 2
    dlogprob = dlogprob.masked_fill(~scored, 0)
    d_row = dlogprob.sum(-1) if several else dlogprob
    a, b = dlse.masked_fill(rows < 0, 0) - d_row, None
    if entropy.numel() > 0:
        dentropy = dentropy.masked_fill(rows < 0, 0)
        a, b = a - dentropy * entropy, -dentropy
    out = empty(logits.shape, logits.dtype, logits.device)
    stats = RowStats(row_max, row_max, log_sum, None)
    d_target = torch.zeros_like(a) if several else dlogprob
    row_dlogits(_rows(logits), out, None, rows, None, tf, stats, d_target, a, b)
    if several:  # the K targets' own terms, on top of the row's
        index, _, jacobian = _gather(logits, target, scored, tf)
        out.scatter_add_(-1, index, (dlogprob * jacobian).masked_fill_(~scored, 0).to(out.dtype))
    return out


@_logits_logprob_backward.register_fake
def _(logits, *args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output):
    logits, target, *scalars = inputs
    _, entropy, _, row_max, log_sum = output
    ctx.scalars = scalars[:4]
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(logits, target, entropy, row_max, log_sum)


def _backward(ctx, dlogprob, dentropy, dlse, _max, _sum):
    grad = _logits_logprob_backward(*ctx.saved_tensors, dlogprob, dentropy, dlse, *ctx.scalars)
    return grad, *(None,) * 6


_logits_logprob.register_autograd(_backward, setup_context=_save)

"""`logprob_from_logits`: log-probabilities of targets from logits that exist. One read forward; one read, one write
backward. `entropy_from_logits`: the same pass without targets."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._memory import empty
from rlhf_fast.ops._rows import RowStats, Transform, row_dlogits, row_stats, stat_dtype
from rlhf_fast.ops.linear import check_transform
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
        target: (N,) or (...) int64 or int32, already aligned to `logits`.
        temperature, logit_scale, softcap, ignore_index, entropy: as in `linear_logprob`.
    Returns: LogProb(logprob, entropy or None, lse), each of the shape of `target`, fp32 (fp64 for fp64 logits). All
        differentiable; the gradient has the logits' dtype.
    Raises: ValueError naming the tensor, expected and actual shape, dtype or device; naming row and value of a target
        outside [0, V).
    Notes: ignored rows are not read (NaN there does no harm) and give 0. Rows holding -inf are fine as long as one
        logit is finite. Second derivatives raise.
    Example:
        >>> logits = torch.randn(2, 3, 11)
        >>> logprob_from_logits(logits, torch.zeros(2, 3, dtype=torch.long), temperature=0.7).logprob.shape
        torch.Size([2, 3])
    """
    _check_logits(logits)
    _checks.check_target("target", target, logits.shape[:-1], "logits' leading shape")
    _checks.check_same_device(logits=logits, target=target)
    tf = check_transform(temperature, logit_scale, softcap)
    flat = logits.reshape(-1, logits.shape[-1])
    logprob, h, lse, _, _ = _logits_logprob(flat, target.reshape(-1), *tf, ignore_index, entropy)
    shape = target.shape
    return LogProb(logprob.reshape(shape), h.reshape(shape) if entropy else None, lse.reshape(shape))


def entropy_from_logits(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Entropy of softmax(logits), (...) for logits (..., V), fp32 (fp64 for fp64 logits), in one read.

        entropy = -sum_j p_j log p_j,   p = softmax(softcap(logits * logit_scale) / temperature)

    Args: as in `logprob_from_logits`. Differentiable.
    Raises: ValueError naming the tensor, expected and actual shape or dtype.
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


@torch.library.custom_op("rlhf_fast::logprob_from_logits", mutates_args=())
def _logits_logprob(
    logits: Tensor,
    target: Tensor,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, lse, row max, log-sum), each (N,)."""
    scored = target != ignore_index
    _checks.check_target_range("target", target, scored, logits.shape[1])
    rows = target.long().masked_fill(~scored, -1)
    stats = row_stats(_rows(logits), rows, None, Transform(scale, softcap, inv_temperature), entropy=entropy)
    h = logits.new_empty(0, dtype=stat_dtype(logits.dtype)) if stats.entropy is None else stats.entropy
    return stats.logprob, h, stats.row_max + stats.log_sum, stats.row_max, stats.log_sum


@_logits_logprob.register_fake
def _(logits, target, scale, softcap, inv_temperature, ignore_index, entropy):
    n, dtype = logits.shape[0], stat_dtype(logits.dtype)
    sizes = (n, n if entropy else 0, n, n, n)
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
    scored = target != ignore_index
    dlogprob, dlse = (g.masked_fill(~scored, 0) for g in (dlogprob, dlse))
    a, b = dlse - dlogprob, None
    if entropy.numel() > 0:
        dentropy = dentropy.masked_fill(~scored, 0)
        a, b = a - dentropy * entropy, -dentropy
    out = empty(logits.shape, logits.dtype, logits.device)
    tf = Transform(scale, softcap, inv_temperature)
    stats = RowStats(dlogprob, row_max, log_sum, None)
    rows = target.long().masked_fill(~scored, -1)
    row_dlogits(_rows(logits), out, None, rows, None, tf, stats, dlogprob, a, b)
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

"""The loss of a value function."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._sequences import Layout, layout, work_dtype
from rlhf_fast.types import ValueLoss

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length")


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    clip: float | None = 0.2,
    kind: str = "mse",
    huber_delta: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """PPO's loss of the value function, with values kept within `clip` of what they were at the rollout.

        l_t = max(h(V_t - R_t), h(V'_t - R_t)),   V' = clip(V, old - clip, old + clip),   h(e) = e^2 / 2, or Huber's

    Equivalent to `reference.value_loss`.

    Args:
        values: (N,) or (B, T) float. Differentiable.
        old_values: the same shape, the values at the rollout. Constant. None: no clipping.
        returns: the same shape. Constant.
        clip: half-width of the interval; None: no clipping.
        kind: "mse" or "huber" (quadratic within huber_delta, linear beyond).
        mask: bool, True = counts. What lies elsewhere is not used.
        cu_seqlens: (B+1,) int with (N,); needed by the "seq_" aggregations of a packed batch.
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (token sum over B max_length).
        normalizer: the global count that divides: tokens for token_mean, sequences otherwise. None: this batch's.
    Returns: ValueLoss(loss (), metrics) in fp32 (fp64 for fp64 values). metrics: clip_fraction, value_mean,
        return_mean, error (mean of |V - R|), each a mean over the tokens that count.
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: Schulman et al. 2017's code; the factor 1/2 is verl's and TRL's. No further coefficient.
    Notes: where the clipped branch is the larger, V' is a constant and the gradient is 0. All masked: loss 0 and zero
        gradients, and the graph still reaches `values`.
    Example:
        >>> value_loss(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)).loss
        tensor(0.5000)
    """
    _checks.check_float("values", values)
    place = layout("values", values, cu_seqlens, mask)
    for name, tensor in {"old_values": old_values, "returns": returns}.items():
        if tensor is not None or name == "returns":
            _checks.check_float(name, tensor)
            _checks.check_shape(name, tensor, values.shape, "values' shape ")
    _checks.check_same_device(values=values, old_values=old_values, returns=returns)
    _checks.check_choice("kind", kind, ("mse", "huber"))
    _checks.check_choice("aggregation", aggregation, AGGREGATIONS)
    if normalizer is not None:
        _checks.check_scalar("normalizer", normalizer, positive=True)
    if clip is not None:
        _checks.check_positive("clip", clip)
    _checks.check_positive("huber_delta", huber_delta)
    dtype = work_dtype(values)

    def counted(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype).reshape(-1)
        return tensor if place.mask is None else tensor.masked_fill(~place.mask, 0.0)

    v, r = counted(values), counted(returns.detach())
    loss = _penalty(v - r, kind, huber_delta)
    clipped = torch.zeros_like(v)
    if clip is not None and old_values is not None:
        old = counted(old_values.detach())
        # The second branch is larger only where V was clipped, and there it does not depend on V.
        bounded = _penalty(v.detach().clamp(old - clip, old + clip) - r, kind, huber_delta)
        clipped = (bounded > loss.detach()).to(dtype)
        loss = torch.where(bounded > loss.detach(), bounded, loss)
    weight = _aggregation_weight(place, aggregation, max_length, normalizer, v)
    share = _aggregation_weight(place, "token_mean", None, None, v.detach())
    metrics = {
        "clip_fraction": (share * clipped).sum(),
        "value_mean": (share * v.detach()).sum(),
        "return_mean": (share * r).sum(),
        "error": (share * (v.detach() - r).abs()).sum(),
    }
    return ValueLoss((weight * loss).sum(), metrics)


def _penalty(error: Tensor, kind: str, delta: float) -> Tensor:
    if kind == "mse":
        return 0.5 * error.square()
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def _aggregation_weight(
    place: Layout, aggregation: str, max_length: int | None, normalizer: float | Tensor | None, like: Tensor
) -> Tensor:
    """(N,) weights w: loss = sum_t w_t l_t."""
    valid = torch.ones_like(like) if place.mask is None else place.mask.to(like.dtype)
    if aggregation == "token_mean":
        return valid / (valid.sum().clamp(min=1) if normalizer is None else normalizer)
    if normalizer is None:
        normalizer = max(place.batch, 1)
    if aggregation == "seq_mean_token_mean":
        segment = place.segment_ids(like.device)
        lengths = like.new_zeros(place.batch).index_add(0, segment, valid).clamp(min=1)
        return valid / (lengths[segment] * normalizer)
    if aggregation == "seq_mean_token_sum":
        return valid / normalizer
    if max_length is None:
        raise ValueError("max_length must be > 0 for aggregation fixed_length, got None")
    return valid / (_checks.check_int("max_length", max_length, least=1) * normalizer)

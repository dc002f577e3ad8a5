"""The loss of a value function."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_policy, _checks
from rlhf_fast.ops._eager import handed_over, last_walk, plain
from rlhf_fast.ops._memory import huge
from rlhf_fast.ops._sequences import Layout, layout, work_dtype
from rlhf_fast.ops.policy import segment_counts
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
    if aggregation == "fixed_length" and max_length is None:
        raise ValueError("max_length must be > 0 for aggregation fixed_length, got None")
    if max_length is not None:
        _checks.check_int("max_length", max_length, least=1)
    width = clip if clip is not None and old_values is not None else None
    delta = huber_delta if kind == "huber" else math.inf
    call = _Call(old_values, returns, place, width, delta, aggregation, max_length, normalizer)
    in_one_pass = values.is_cpu and work_dtype(values) == torch.float32 and plain(values)
    if in_one_pass and _backend.backend("cpu", "policy_loss") == "cpp":
        loss, sums = _ValuePass.apply(values, call)
        _, clipped, value, target, error, _ = (sums / sums[5].clamp(min=1)).unbind()
        metrics = {"clip_fraction": clipped, "value_mean": value, "return_mean": target, "error": error}
        return ValueLoss(loss, metrics)
    return _composed(values, call)


class _Call(NamedTuple):
    """What a call brings beside the values. clip None: no clipping. delta inf: squares everywhere."""

    old_values: Tensor | None
    returns: Tensor
    place: Layout
    clip: float | None
    delta: float
    aggregation: str
    max_length: int | None
    normalizer: float | Tensor | None


class _ValuePass(torch.autograd.Function):
    """Loss, gradient and sums by the C++ kernel, in eager mode. Where the gradient itself is differentiated, torch
    forms it."""

    @staticmethod
    def forward(ctx, values: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        flat = [None if t is None else t.detach().float().reshape(-1).contiguous()
                for t in (values, call.old_values if call.clip is not None else None, call.returns)]  # fmt: skip
        place = call.place
        weight = _weight(call, _counts(place, values.device)).float().reshape(-1)
        ctx.dvalues, sums = huge(torch.empty(values.numel())), torch.empty(6)
        _backend_policy.value_clip(
            *flat, place.mask, weight, place.offsets, place.batch, place.length,
            clip=call.clip or 0.0, delta=call.delta, dvalues=ctx.dvalues, sums=sums,
        )  # fmt: skip
        ctx.call = call
        ctx.save_for_backward(values)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (values,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.autograd.grad(_composed(values, ctx.call).loss, values, grad, create_graph=True)[0], None
        stored = ctx.dvalues
        if last_walk(grad):
            ctx.dvalues = None
            stored = handed_over(grad, stored)
        else:
            stored = grad * stored
        return stored.reshape(values.shape).to(values.dtype), None


def _composed(values: Tensor, call: _Call) -> ValueLoss:
    """The same in torch."""
    dtype, place = work_dtype(values), call.place

    def counted(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype).reshape(-1)
        return tensor if place.mask is None else tensor.masked_fill(~place.mask, 0.0)

    v, r = counted(values), counted(call.returns.detach())
    loss = _penalty(v - r, call.delta)
    clipped = torch.zeros_like(v)
    if call.clip is not None:
        old = counted(call.old_values.detach())
        # The second branch is larger only where V was clipped, and there it does not depend on V.
        bounded = _penalty(v.detach().clamp(old - call.clip, old + call.clip) - r, call.delta)
        clipped = (bounded > loss.detach()).to(dtype)
        loss = torch.where(bounded > loss.detach(), bounded, loss)
    counts = _counts(place, v.device)
    factor = _weight(call, counts).to(dtype)
    if factor.dim():
        factor = factor[place.segment_ids(v.device)]
    valid = torch.ones_like(v) if place.mask is None else place.mask.to(dtype)
    share = valid / counts.sum().clamp(min=1)
    metrics = {
        "clip_fraction": (share * clipped).sum(),
        "value_mean": (share * v.detach()).sum(),
        "return_mean": (share * r).sum(),
        "error": (share * (v.detach() - r).abs()).sum(),
    }
    return ValueLoss((valid * factor * loss).sum(), metrics)


def _penalty(error: Tensor, delta: float) -> Tensor:
    if delta == math.inf:
        return 0.5 * error.square()
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def _counts(place: Layout, device: torch.device) -> Tensor:
    """(B,) int64: the tokens of each sequence that count."""
    if place.mask is not None:
        return segment_counts(place.mask, place.offsets, place.batch, place.length)
    if place.offsets is not None:
        return place.offsets.diff()
    return torch.full((place.batch,), place.length, dtype=torch.int64, device=device)


def _weight(call: _Call, counts: Tensor) -> Tensor:
    """() or (B,) float64: the weight of a token that counts, or of those of each sequence."""
    normalizer = call.normalizer
    if normalizer is None:
        normalizer = counts.sum().clamp(min=1) if call.aggregation == "token_mean" else max(call.place.batch, 1)
    elif isinstance(normalizer, Tensor):
        normalizer = normalizer.double()
    if call.aggregation == "fixed_length":
        normalizer = call.max_length * normalizer
    if call.aggregation == "seq_mean_token_mean":
        return 1.0 / (counts.clamp(min=1).double() * normalizer)
    return torch.ones((), dtype=torch.float64, device=counts.device) / normalizer

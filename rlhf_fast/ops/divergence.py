"""`linear_divergence`: exact divergence of two heads over the whole vocabulary, without either logits tensor.

Per token: two products forward; the backward recomputes them and adds two for each head that trains. With weights the
loss is known, its gradient is formed in the forward pass, and nothing is recomputed: four products when the reference
is frozen. Masked rows and rows of weight 0 reach no product.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops import _divergence_run as _run
from rlhf_fast.ops._divergence_rows import KINDS
from rlhf_fast.ops._divergence_run import Call, Operands
from rlhf_fast.ops._eager import WAITS
from rlhf_fast.ops._head import Wanted, hidden_grad_dtype, wanted, weight_grad_dtype
from rlhf_fast.ops._rows import Transform, stat_dtype
from rlhf_fast.ops.fused import scaled
from rlhf_fast.ops.linear import check_chunk, check_transform
from rlhf_fast.types import DivergenceLoss

Kind = Literal["forward", "reverse", "jsd"]


@overload
def linear_divergence(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, weights: None = None, **options: Any
) -> Tensor: ...
@overload
def linear_divergence(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, weights: Tensor, **options: Any
) -> DivergenceLoss: ...
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    kind: Kind = "reverse",
    ref_share: float = 0.5,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_options: dict[str, float | None] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor | DivergenceLoss:
    """Divergence of each token's distribution from the reference's, exact over the vocabulary.

        p = softmax(softcap(z * logit_scale) / temperature),   z = hidden @ weight.T + bias;   q likewise of ref_*
        forward: KL(q || p)      reverse: KL(p || q)
        jsd:     a KL(q || M) + (1 - a) KL(p || M),   M = a q + (1 - a) p,   a = ref_share

    Equivalent to `reference.linear_divergence`, without materialising the logits (N, V) of either head.

    Args:
        hidden: (N, D) or (..., D) float: the policy's (the student's). Differentiable.
        weight: (V, D), dtype of `hidden`. Differentiable; frozen, it costs no product.
        ref_hidden: (N, D') or (..., D'): the reference's (the teacher's), D' and dtype free. Differentiable; without
            requires_grad, as a reference usually is, it costs one product in all.
        ref_weight: (V, D'), dtype of `ref_hidden`. Differentiable: detach a weight shared with the policy.
        kind: "reverse" is the KL penalty of RLHF, "forward" that of distillation, "jsd" lies between.
        ref_share: a, the reference's share of the mixture, 0 < a < 1; used by "jsd" alone. It is the `beta` of TRL and
            Liger, which read 0 as our "forward" and 1 as "reverse"; the limits of the formula itself are 0.
        weights: (N,) or (...) float, constant. Given, the result is the weighted sum, whose gradient is formed here:
            put masks and normalisers in. Rows of weight 0 reach no product, and their divergence is given as 0.
        mask: (N,) or (...), True (not 0) = counts. Rows that do not count have divergence 0 and reach no product.
        bias, ref_bias: (V,) or None. Differentiable.
        temperature: > 0. The last step: after scale and softcap.
        logit_scale, softcap: as in `linear_logprob`.
        ref_options: what differs for the reference, any of temperature, logit_scale, softcap. None: nothing does.
        chunk_size: rows of one tile of logits. None: from `memory_budget`.
        memory_budget: bytes of both tiles. None: 256 MiB on the CPU, 2 GiB on a GPU.
    Returns: without weights the divergence (N,) or (...), fp32 (fp64 for fp64 inputs), differentiable. With weights
        DivergenceLoss(loss (), divergence): `loss` is differentiable and honours any upstream scalar, `divergence` is
        constant.
    Raises: ValueError naming the tensor, expected and actual shape, dtype or device.
    Source: generalised JSD: Agarwal et al. 2024, "On-Policy Distillation of Language Models", equation 1.
    Notes: products: 2 forward and 2 + 2 backward per token, 2 + 2 in all with weights; 2 more for a reference that
        trains. fp32 statistics; terms are never negative, so divergences near 0 keep their digits, and equal heads give
        exactly 0 and no gradient. A token that only one side rules out (-inf) makes the KL of the other to it infinite,
        with a gradient that need not be finite; ruled out by both, it does not exist. Second derivatives raise.
    Example:
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
        >>> ref_hidden, ref_weight = torch.randn(5, 6), torch.randn(11, 6)
        >>> linear_divergence(hidden, weight, ref_hidden, ref_weight).shape
        torch.Size([5])
        >>> weights = torch.full((5,), 1 / 5)
        >>> linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="jsd", weights=weights).loss.backward()
    """
    _checks.check_choice("kind", kind, KINDS)
    share = _checks.check_positive("ref_share", ref_share)
    if share >= 1:
        raise ValueError(f'ref_share must lie between 0 and 1 (its ends are "forward" and "reverse"), got {ref_share}')
    own = _check_operands("", hidden, weight, bias)
    ref = _check_operands("ref_", ref_hidden, ref_weight, ref_bias)
    lead = hidden.shape[:-1]
    _check_pair(own, ref, lead, weights, mask)
    tensors = dict(hidden=hidden, weight=weight, bias=bias)
    tensors |= dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    _checks.check_no_tangent("linear_divergence", **tensors)
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    tf, ref_tf = check_transform(**options), check_transform(**options | _check_options(ref_options))
    scalars = (kind, share, *tf, *ref_tf, *check_chunk(chunk_size, memory_budget))
    tensors = [*own[:3], *map(_checks.savable, ref[:3])]
    for i in (0, 3):
        tensors[i] = tensors[i].reshape(-1, tensors[i].shape[-1])
    keep = None if mask is None else mask.reshape(-1).bool()
    if weights is None:
        return _linear_divergence(*tensors, keep, *scalars)[0].reshape(lead)
    nonzero = weights.reshape(-1) != 0
    keep = nonzero if keep is None else keep & nonzero
    flat = weights.reshape(-1).to(_run.result_dtype(own.hidden, ref.hidden))
    want = [*wanted(*own[:3])[:3], *wanted(*ref[:3])[:3]]
    loss, divergence, *_ = _linear_divergence_loss(*tensors, keep, flat, *scalars, want)
    return DivergenceLoss(loss, divergence.reshape(lead))


def _check_operands(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    """Validate one head's tensors and cast them to autocast's dtype where that is on."""
    h, w, b = (prefix + name for name in ("hidden", "weight", "bias"))
    _checks.check_float(h, hidden)
    _checks.check_float(w, weight)
    if hidden.dim() < 1 or weight.dim() != 2:
        got = f"{_checks.shape_str(hidden.shape)} and {_checks.shape_str(weight.shape)}"
        raise ValueError(f"{h} must be (..., D) and {w} (V, D), got {got}")
    if weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{w} must be (V, D) with V > 0 and D={hidden.shape[-1]} as in {h} {_checks.shape_str(hidden.shape)}, "
            f"got {_checks.shape_str(weight.shape)}"
        )
    if bias is not None:
        _checks.check_float(b, bias)
        _checks.check_shape(b, bias, weight.shape[:1], "(V,)")
    _checks.check_same_device(**{h: hidden, w: weight, b: bias})
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
    _checks.check_same_dtype(**{h: hidden, w: weight})
    return Operands(hidden, weight, bias)


def _check_pair(own: Operands, ref: Operands, lead: torch.Size, weights: Tensor | None, mask: Tensor | None) -> None:
    """Validate what the heads share, and the per-token tensors."""
    if ref.hidden.shape[:-1] != lead:
        want = _checks.shape_str((*lead, "D'"))
        raise ValueError(f"ref_hidden must be {want} as hidden, got {_checks.shape_str(ref.hidden.shape)}")
    if ref.weight.shape[0] != own.weight.shape[0]:
        raise ValueError(
            f"ref_weight must have weight's V={own.weight.shape[0]} rows, got {_checks.shape_str(ref.weight.shape)}"
        )
    if weights is not None:
        _checks.check_float("weights", weights)
        _checks.check_shape("weights", weights, lead, "hidden's leading shape")
        if weights.requires_grad and torch.is_grad_enabled():
            raise ValueError("weights requires grad, but the fused sum differentiates the heads alone: detach it")
    if mask is not None:
        _checks.check_mask("mask", mask, lead, "hidden's leading shape")
    _checks.check_same_device(hidden=own.hidden, ref_hidden=ref.hidden, weights=weights, mask=mask)


def _check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """Refuse a name that `ref_options` does not have."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"ref_options must be a dict, got {type(options).__name__}")
    names = ("temperature", "logit_scale", "softcap")
    for key in options:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0)
            raise ValueError(f"ref_options knows {', '.join(names)}, got {key!r}: did you mean {near[0]!r}?")
    return options


def _call(kind, ref_share, scale, softcap, inv_t, ref_scale, ref_softcap, ref_inv_t, chunk_size, memory_budget) -> Call:
    tf, ref_tf = Transform(scale, softcap, inv_t), Transform(ref_scale, ref_softcap, ref_inv_t)
    return Call(kind, ref_share, tf, ref_tf, chunk_size, memory_budget)


@torch.library.custom_op("rlhf_fast::linear_divergence", mutates_args=(), tags=WAITS)
def _linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    keep: Tensor | None,
    kind: str,
    ref_share: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ref_scale: float,
    ref_softcap: float | None,
    ref_inv_temperature: float,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """(divergence (N,), statistics (STATS, N))."""
    transforms = (scale, softcap, inv_temperature, ref_scale, ref_softcap, ref_inv_temperature)
    call = _call(kind, ref_share, *transforms, chunk_size, memory_budget)
    return _run.forward(Operands(hidden, weight, bias), Operands(ref_hidden, ref_weight, ref_bias), keep, call)


@_linear_divergence.register_fake
def _(hidden, weight, bias, ref_hidden, *args):
    n, dtype = hidden.shape[0], _run.result_dtype(hidden, ref_hidden)
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty((_run.STATS, n), dtype=dtype)


@torch.library.custom_op("rlhf_fast::linear_divergence_backward", mutates_args=(), tags=WAITS)
def _linear_divergence_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    keep: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    kind: str,
    ref_share: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ref_scale: float,
    ref_softcap: float | None,
    ref_inv_temperature: float,
    chunk_size: int | None,
    memory_budget: int | None,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors in their dtypes; empty where not wanted."""
    transforms = (scale, softcap, inv_temperature, ref_scale, ref_softcap, ref_inv_temperature)
    call = _call(kind, ref_share, *transforms, chunk_size, memory_budget)
    own = Operands(hidden, weight, bias, Wanted(*want[:3]))
    ref = Operands(ref_hidden, ref_weight, ref_bias, Wanted(*want[3:]))
    grads = _run.backward(own, ref, keep, stats, grad, call)
    return tuple(g.to(dtype) for g, dtype in zip(grads, _dtypes([*own[:3], *ref[:3]]), strict=True))


def _dtypes(tensors: list[Tensor | None]) -> list[torch.dtype]:
    """The dtypes of the six gradients; that of the weight for a bias that does not exist."""
    return [(tensors[i // 3 * 3] if x is None else x).dtype for i, x in enumerate(tensors)]


@_linear_divergence_backward.register_fake
def _(*args):
    tensors, want = list(args[:6]), args[-1]
    shapes = [x.shape if x is not None and w else (0,) for x, w in zip(tensors, want, strict=True)]
    return tuple(tensors[0].new_empty(s, dtype=d) for s, d in zip(shapes, _dtypes(tensors), strict=True))


def _save(ctx, inputs, output):
    ctx.scalars = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(*inputs[:7], output[1])


def _backward(ctx, grad, _stats):
    want = [bool(w) for w in ctx.needs_input_grad[:6]]
    grads = _linear_divergence_backward(*ctx.saved_tensors, grad, *ctx.scalars, want)
    return (*(g if w else None for g, w in zip(grads, want, strict=True)), *(None,) * 11)


_linear_divergence.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("rlhf_fast::linear_divergence_loss", mutates_args=(), tags=WAITS)
def _linear_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    keep: Tensor,
    weights: Tensor,
    kind: str,
    ref_share: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ref_scale: float,
    ref_softcap: float | None,
    ref_inv_temperature: float,
    chunk_size: int | None,
    memory_budget: int | None,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), divergence (N,), the six unscaled gradients or empty)."""
    transforms = (scale, softcap, inv_temperature, ref_scale, ref_softcap, ref_inv_temperature)
    call = _call(kind, ref_share, *transforms, chunk_size, memory_budget)
    own = Operands(hidden, weight, bias, Wanted(*want[:3]))
    ref = Operands(ref_hidden, ref_weight, ref_bias, Wanted(*want[3:]))
    loss, divergence, grads = _run.fused(own, ref, keep, weights, call)
    return loss, divergence, *grads


@_linear_divergence_loss.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *args):
    want, dtype = args[-1], _run.result_dtype(hidden, ref_hidden)
    grads = []
    for i, (h, w) in enumerate(((hidden, weight), (ref_hidden, ref_weight))):
        acc = stat_dtype(w.dtype)
        dtypes = (hidden_grad_dtype(h.dtype, h.device), weight_grad_dtype(w.dtype, w.device), acc)
        shapes = (h.shape, w.shape, w.shape[:1])
        for s, d, on in zip(shapes, dtypes, want[3 * i : 3 * i + 3], strict=True):
            grads.append(h.new_empty(s if on else (0,), dtype=d if on else acc))
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype), *grads


def _save_loss(ctx, inputs, output):
    ctx.want, ctx.dtypes = inputs[-1], _dtypes(list(inputs[:6]))
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


@torch.autograd.function.once_differentiable
def _backward_loss(ctx, dloss, *_):
    # A compiler traces with tensors of its own, whose value may not be looked at.
    scale = scaled if type(dloss) is Tensor else lambda grad, factor, dtype: (grad * factor).to(dtype)
    grads = zip(ctx.saved_tensors, ctx.want, ctx.dtypes, strict=True)
    return (*(scale(g, dloss, dtype) if w else None for g, w, dtype in grads), *(None,) * 13)


_linear_divergence_loss.register_autograd(_backward_loss, setup_context=_save_loss)

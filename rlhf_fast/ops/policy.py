"""Policy losses as one fused op: loss, gradients and metrics in a single pass over (N,).

    r = exp(logprob - old_logprob)
    l = max(-min(r, delta) A, -clip(r, 1 - clip_low, 1 + clip_high) A),   at most dual_clip |A| where A < 0
    loss = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef u_t H_t

w, v, u are weights that the caller made (aggregation, corrections and masks, entropy). A, w and u may be one number per
token, per sequence, or for all: nothing of the batch's size has to be formed for what is constant along a sequence.
In eager mode on the CPU the pass takes other formulas for l_t as well (`Form`).
The formulas are those of `reference.policy_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_policy, _checks
from rlhf_fast.ops._eager import handed_over, last_walk, plain
from rlhf_fast.ops._memory import huge
from rlhf_fast.ops._policy_terms import SUMS, ClipTerms, Form, stat_dtype
from rlhf_fast.ops._policy_torch import blocked_torch_clip, ratio_range, torch_clip

__all__ = [
    "SUMS",
    "ClipResult",
    "ClipTerms",
    "Form",
    "clip_loss",
    "ratio_range",
    "segment_counts",
    "spread_numbers",
    "takes_forms",
]


class ClipResult(NamedTuple):
    """loss () differentiable; sums (12,) in the order of SUMS; dlogprob (n,); dentropy (n,) or None."""

    loss: Tensor
    sums: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None


def takes_forms(logprob: Tensor, entropy: Tensor | None) -> bool:
    """Whether `clip_loss` takes every form for such a log-probability: eager, on the CPU, not in fp64."""
    return (
        logprob.is_cpu
        and logprob.dtype != torch.float64
        and plain(logprob, entropy)
        and _backend.backend("cpu", "policy_loss") == "cpp"
    )


def clip_loss(
    logprob: Tensor,  # (n,) float, differentiable
    old_logprob: Tensor | None,  # (n,); None: logprob itself, detached
    advantages: Tensor,  # (n,), (S,) or (1,)
    weight: Tensor,  # (n,), (S,) or (1,); 0: the row is not there, whatever it holds
    terms: ClipTerms,
    *,
    policy_weight: Tensor | None = None,  # (n,)
    ref_logprob: Tensor | None = None,  # (n,), needed when beta != 0
    entropy: Tensor | None = None,  # (n,), differentiable when entropy_coef != 0
    entropy_weight: Tensor | None = None,  # (n,), (S,) or (1,), needed when entropy_coef != 0
    mask: Tensor | None = None,  # (n,) bool; False: the row is not there either
    offsets: Tensor | None = None,  # (S+1,) int64: where what is (S,) belongs; or sequences of `length`
    length: int = 0,
    form: Form | None = None,  # another formula, where `takes_forms`; None: the clip family's
    held: Tensor | None = None,  # (n,), for the form "kl_cov"
) -> ClipResult:
    """The op on prepared vectors. Trusts its caller, `losses.PolicyLoss`, for shapes."""
    _checks.check_no_tangent("policy_loss", logprob=logprob, entropy=entropy)
    rest = (old_logprob, advantages, weight, policy_weight, ref_logprob)
    if form is not None or plain(logprob, entropy):
        call = ClipCall(*rest, entropy_weight, terms, mask, offsets, length, form, held)
        if torch.is_grad_enabled() and (logprob.requires_grad or (entropy is not None and entropy.requires_grad)):
            return ClipResult(*_Clip.apply(logprob, entropy, call))
        sums, *gradients = _run(logprob, entropy, call)
        return ClipResult(sums[0].clone(), sums, *gradients)
    loss, sums, dlogprob, dentropy = torch.ops.rlhf_fast.policy_clip(
        logprob, *rest, entropy, entropy_weight, *terms, mask, offsets, length
    )
    return ClipResult(loss, sums, dlogprob, dentropy if dentropy.numel() == logprob.numel() else None)


class ClipCall(NamedTuple):
    """The constants of a call."""

    old_logprob: Tensor | None
    advantages: Tensor
    weight: Tensor
    policy_weight: Tensor | None
    ref_logprob: Tensor | None
    entropy_weight: Tensor | None
    terms: ClipTerms
    mask: Tensor | None
    offsets: Tensor | None
    length: int
    form: Form | None = None
    held: Tensor | None = None


def _run(logprob: Tensor, entropy: Tensor | None, call: ClipCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sums (12,), dlogprob (n,), dentropy (n,) or None) from the backend of the hour."""
    backend = _backend.backend(logprob.device, "policy_loss")
    if logprob.dtype == torch.float64:
        backend = "torch"
    if backend == "cpp":
        return _cpp_clip(logprob, entropy, call)
    place = (logprob.numel(), call.offsets, call.length)
    advantages, weight, entropy_weight = (
        spread_numbers(t, *place) for t in (call.advantages, call.weight, call.entropy_weight)
    )
    if call.mask is not None:
        weight = torch.where(call.mask, weight, 0.0)
    forward = _triton_clip if backend == "triton" else torch_clip
    if forward is torch_clip and logprob.device.type == "cpu":
        forward = blocked_torch_clip
    vectors = (logprob, call.old_logprob, advantages, weight, call.policy_weight, call.ref_logprob)
    return forward(*vectors, entropy, entropy_weight, call.terms)


# ---- eager -------------------------------------------------------------------------------------------------


class _Clip(torch.autograd.Function):
    """What the op does, without the dispatcher: of some twenty arguments it takes longer than the pass of a few
    thousand tokens."""

    @staticmethod
    def forward(ctx, logprob: Tensor, entropy: Tensor | None, call: ClipCall):
        sums, dlogprob, dentropy = _run(logprob, entropy, call)
        ctx.save_for_backward(logprob, entropy if dentropy is not None else None)
        ctx.stored = dlogprob.detach(), None if dentropy is None else dentropy.detach()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums, dlogprob, *(() if dentropy is None else (dentropy,)))
        return sums[0].clone(), sums, dlogprob, dentropy

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_):
        if grad_loss is None:
            return None, None, None
        return *_gradients(ctx, grad_loss, *ctx.needs_input_grad[:2]), None


# ---- the op ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "rlhf_fast::policy_clip",
    mutates_args=(),
    schema=(
        "(Tensor logprob, Tensor? old_logprob, Tensor advantages, Tensor weight, Tensor? policy_weight, "
        "Tensor? ref_logprob, Tensor? entropy, Tensor? entropy_weight, float clip_low, float clip_high, "
        "float? delta, float? dual_clip, float beta, str kl_estimator, str kl_gradient, bool kl_correction, "
        "float entropy_coef, Tensor? mask=None, Tensor? offsets=None, SymInt length=0) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def policy_clip(logprob, *args):
    args += (None, None, 0)[len(args) - 16 :]  # trailing defaults do not arrive
    old, advantages, weight, policy_weight, ref, entropy, entropy_weight = args[:7]
    place = args[16:]
    call = ClipCall(old, advantages, weight, policy_weight, ref, entropy_weight, ClipTerms(*args[7:16]), *place)
    sums, dlogprob, dentropy = _run(logprob, entropy, call)
    if dentropy is None:
        dentropy = dlogprob.new_empty(0)
    return sums[0].clone(), sums, dlogprob, dentropy


@policy_clip.register_fake
def _(logprob, *args):
    entropy, entropy_coef = args[5], args[15]
    dlogprob = torch.empty_like(logprob, dtype=stat_dtype(logprob), memory_format=torch.contiguous_format)
    dentropy = torch.empty_like(dlogprob) if _has_dentropy(entropy, entropy_coef) else dlogprob.new_empty(0)
    return dlogprob.new_empty(()), dlogprob.new_empty(len(SUMS)), dlogprob, dentropy


def _setup_context(ctx, inputs, output):
    logprob, entropy = inputs[0], inputs[6]
    _, _, dlogprob, dentropy = output
    has_dentropy = _has_dentropy(entropy, inputs[16])
    ctx.inputs = len(inputs)
    ctx.save_for_backward(logprob, entropy if has_dentropy else None)
    # Not among the saved tensors: `_upstream` may write to them.
    ctx.stored = dlogprob.detach(), dentropy.detach() if has_dentropy else None


def _backward(ctx, grad_loss, *_):
    grads = [None] * ctx.inputs
    grads[0], grads[6] = _gradients(ctx, grad_loss, ctx.needs_input_grad[0], ctx.needs_input_grad[6])
    return tuple(grads)


def _gradients(ctx, grad_loss: Tensor, by_logprob: bool, by_entropy: bool) -> tuple[Tensor | None, Tensor | None]:
    logprob, entropy = ctx.saved_tensors  # raises if the graph is gone
    dlogprob, dentropy = ctx.stored
    last = last_walk(grad_loss)
    if last:
        ctx.stored = None
    return (
        _upstream(grad_loss, dlogprob, logprob, last) if by_logprob else None,
        _upstream(grad_loss, dentropy, entropy, last) if entropy is not None and by_entropy else None,
    )


def _upstream(grad: Tensor, stored: Tensor, like: Tensor, last: bool) -> Tensor:
    """grad * stored; in the same memory if nobody will ask again: fresh pages cost more than the pass itself."""
    if not last:
        return torch.ops.rlhf_fast.policy_clip_scale(grad, stored, like)
    return handed_over(grad, stored).to(like.dtype)


policy_clip.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "rlhf_fast::policy_clip_scale",
    mutates_args=(),
    schema="(Tensor grad, Tensor stored, Tensor like) -> Tensor",
)
def policy_clip_scale(grad, stored, like):
    return (grad * stored).to(like.dtype)


@policy_clip_scale.register_fake
def _(grad, stored, like):
    return torch.empty_like(stored, dtype=like.dtype)


def _no_second_derivative(ctx, *_):
    # Without this the stored gradient would pass for a constant, and its derivative for 0.
    raise RuntimeError("policy_loss has no second derivative; use rlhf_fast.reference.policy_loss for one")


policy_clip_scale.register_autograd(_no_second_derivative)


def _has_dentropy(entropy: Tensor | None, entropy_coef: float) -> bool:
    return entropy is not None and entropy_coef != 0.0


def segment_counts(mask: Tensor, offsets: Tensor | None, segments: int, length: int) -> Tensor:
    """(segments,) int64: the True entries of mask (N,) in each sequence, cut by offsets or each `length` long."""
    count = _segment_counts if plain(mask, offsets) else torch.ops.rlhf_fast.segment_counts
    return count(mask, offsets, segments, length)


def _segment_counts(mask: Tensor, offsets: Tensor | None, segments: int, length: int) -> Tensor:
    if _backend.backend(mask.device, "policy_loss") == "cpp":
        out = torch.empty(segments, dtype=torch.int64)
        _backend_policy.segment_counts(mask, offsets, segments, length, out)
        return out
    if offsets is None:
        return mask.reshape(segments, length).sum(1)
    until = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    return until[offsets[1:]] - until[offsets[:-1]]


_segment_counts_op = torch.library.custom_op("rlhf_fast::segment_counts", _segment_counts, mutates_args=())


@_segment_counts_op.register_fake
def _(mask, offsets, segments, length):
    return torch.empty(segments, dtype=torch.int64, device=mask.device)


# ---- backends ----------------------------------------------------------------------------------------------


def spread_numbers(tensor: Tensor | None, n: int, offsets: Tensor | None, length: int) -> Tensor | None:
    """(n,) from one number per token, per sequence or for all."""
    if tensor is None or tensor.numel() == n:
        return tensor
    if tensor.numel() == 1:
        return tensor.expand(n)
    repeats = length if offsets is None else offsets.diff()
    return tensor.repeat_interleave(repeats, output_size=n)


def _cpp_clip(logprob: Tensor, entropy: Tensor | None, call: ClipCall):
    n, terms, length = logprob.numel(), call.terms, call.length
    segments = n // max(length, 1) if call.offsets is None else call.offsets.numel() - 1
    dlogprob = huge(torch.empty(n))
    dentropy = huge(torch.empty(n)) if _has_dentropy(entropy, terms.entropy_coef) else None
    sums = torch.empty(len(SUMS))
    form = call.form or Form(low=1 - terms.clip_low, high=1 + terms.clip_high)
    _backend_policy.policy_clip(
        _ready(logprob), _ready(call.old_logprob), _ready(call.advantages), _ready(call.weight), call.mask,
        _ready(call.policy_weight), _ready(call.ref_logprob) if terms.beta != 0.0 else None, _ready(entropy),
        _ready(call.entropy_weight) if dentropy is not None else None, call.offsets, segments, length,
        form=form.name, level=form.level, low=form.low, high=form.high, first=form.first, second=form.second,
        held=_ready(call.held), delta=terms.delta, dual_clip=terms.dual_clip, beta=terms.beta,
        kl_estimator=terms.kl_estimator, kl_gradient=terms.kl_gradient, kl_correction=terms.kl_correction,
        entropy_coef=terms.entropy_coef, dlogprob=dlogprob, dentropy=dentropy, sums=sums,
    )  # fmt: skip
    return sums, dlogprob, dentropy


def _ready(tensor: Tensor | None) -> Tensor | None:
    """What the pass reads: fp32 without gaps."""
    return None if tensor is None else tensor.float().contiguous()


def _triton_clip(
    logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight, terms: ClipTerms
):
    from rlhf_fast.kernels.policy import policy_clip_fwd

    vectors = (logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight)
    with _backend.on_device(logprob):
        return policy_clip_fwd(*(None if t is None else t.contiguous() for t in vectors), **terms._asdict())

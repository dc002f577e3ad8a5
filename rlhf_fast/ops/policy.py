"""The clipped policy-gradient family as one fused op: loss, gradients and metrics in a single pass over (N,).

    r = exp(logprob - old_logprob)
    l = max(-min(r, delta) A, -clip(r, 1 - clip_low, 1 + clip_high) A),   at most dual_clip |A| where A < 0
    loss = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef u_t H_t

w, v, u are weights that the caller made (aggregation, corrections and masks, entropy). A, w and u may be one number per
token, per sequence, or for all: nothing of the batch's size has to be formed for what is constant along a sequence.
The formulas are those of `reference.policy_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_policy, _checks
from rlhf_fast.ops._memory import huge
from rlhf_fast.ops._policy_terms import SUMS, ClipTerms, stat_dtype
from rlhf_fast.ops._policy_torch import blocked_torch_clip, ratio_range, torch_clip

__all__ = ["SUMS", "ClipResult", "ClipTerms", "clip_loss", "ratio_range", "segment_counts"]


class ClipResult(NamedTuple):
    """loss () differentiable; sums (12,) in the order of SUMS; dlogprob (n,); dentropy (n,) or None."""

    loss: Tensor
    sums: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None


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
) -> ClipResult:
    """The op on prepared vectors. Trusts its caller, `losses.PolicyLoss`, for shapes."""
    _checks.check_no_tangent("policy_loss", logprob=logprob, entropy=entropy)
    loss, sums, dlogprob, dentropy = torch.ops.rlhf_fast.policy_clip(
        logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight,
        terms.clip_low, terms.clip_high, terms.delta, terms.dual_clip,
        terms.beta, terms.kl_estimator, terms.kl_gradient, terms.kl_correction, terms.entropy_coef,
        mask, offsets, length,
    )  # fmt: skip
    return ClipResult(loss, sums, dlogprob, dentropy if dentropy.numel() == logprob.numel() else None)


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
    tensors, terms, (mask, offsets, length) = args[:7], ClipTerms(*args[7:16]), args[16:]
    backend = _backend.backend(logprob.device, "policy_loss")
    if logprob.dtype == torch.float64:
        backend = "torch"
    if backend == "cpp":
        sums, dlogprob, dentropy = _cpp_clip(logprob, *tensors, terms, mask, offsets, length)
    else:
        old, advantages, weight, policy_weight, ref, entropy, entropy_weight = tensors
        place = (logprob.numel(), offsets, length)
        advantages, weight, entropy_weight = (_each(t, *place) for t in (advantages, weight, entropy_weight))
        if mask is not None:
            weight = torch.where(mask, weight, 0.0)
        forward = _triton_clip if backend == "triton" else torch_clip
        if forward is torch_clip and logprob.device.type == "cpu":
            forward = blocked_torch_clip
        vectors = (logprob, old, advantages, weight, policy_weight, ref, entropy, entropy_weight)
        sums, dlogprob, dentropy = forward(*vectors, terms)
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
    logprob, entropy = ctx.saved_tensors  # raises if the graph is gone
    dlogprob, dentropy = ctx.stored
    last = type(grad_loss) is Tensor and not (torch.is_grad_enabled() or _keeps_graph())
    if last:
        ctx.stored = None
    grads = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        grads[0] = _upstream(grad_loss, dlogprob, logprob, last)
    if entropy is not None and ctx.needs_input_grad[6]:
        grads[6] = _upstream(grad_loss, dentropy, entropy, last)
    return tuple(grads)


def _keeps_graph() -> bool:
    """Whether the backward pass under way leaves the graph for another one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _upstream(grad: Tensor, stored: Tensor, like: Tensor, last: bool) -> Tensor:
    """grad * stored; in the same memory if nobody will ask again: fresh pages cost more than the pass itself."""
    if not last:
        return torch.ops.rlhf_fast.policy_clip_scale(grad, stored, like)
    if grad.is_cuda or grad.item() != 1.0:
        stored.mul_(grad)
    return stored.to(like.dtype)


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


@torch.library.custom_op("rlhf_fast::segment_counts", mutates_args=())
def segment_counts(mask: Tensor, offsets: Tensor | None, segments: int, length: int) -> Tensor:
    """(segments,) int64: the True entries of mask (N,) in each sequence, cut by offsets or each `length` long."""
    if _backend.backend(mask.device, "policy_loss") == "cpp":
        out = torch.empty(segments, dtype=torch.int64)
        _backend_policy.segment_counts(mask, offsets, segments, length, out)
        return out
    if offsets is None:
        return mask.reshape(segments, length).sum(1)
    until = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    return until[offsets[1:]] - until[offsets[:-1]]


@segment_counts.register_fake
def _(mask, offsets, segments, length):
    return torch.empty(segments, dtype=torch.int64, device=mask.device)


# ---- backends ----------------------------------------------------------------------------------------------


def _each(tensor: Tensor | None, n: int, offsets: Tensor | None, length: int) -> Tensor | None:
    """(n,) from one number per token, per sequence or for all."""
    if tensor is None or tensor.numel() == n:
        return tensor
    if tensor.numel() == 1:
        return tensor.expand(n)
    repeats = length if offsets is None else offsets.diff()
    return tensor.repeat_interleave(repeats, output_size=n)


def _cpp_clip(
    logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight,
    terms: ClipTerms, mask, offsets, length: int,
):  # fmt: skip
    def ready(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().float().contiguous()

    n = logprob.numel()
    segments = n // max(length, 1) if offsets is None else offsets.numel() - 1
    dlogprob = huge(torch.empty(n))
    dentropy = huge(torch.empty(n)) if _has_dentropy(entropy, terms.entropy_coef) else None
    sums = torch.empty(len(SUMS))
    _backend_policy.policy_clip(
        ready(logprob), ready(old_logprob), ready(advantages), ready(weight), mask, ready(policy_weight),
        ready(ref_logprob) if terms.beta != 0.0 else None, ready(entropy),
        ready(entropy_weight) if dentropy is not None else None, offsets, segments, length,
        **terms._asdict(), dlogprob=dlogprob, dentropy=dentropy, sums=sums,
    )  # fmt: skip
    return sums, dlogprob, dentropy


def _triton_clip(
    logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight, terms: ClipTerms
):
    from rlhf_fast.kernels.policy import policy_clip_fwd

    vectors = (logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight)
    with _backend.on_device(logprob):
        return policy_clip_fwd(*(None if t is None else t.contiguous() for t in vectors), **terms._asdict())

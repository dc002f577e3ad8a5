"""The clipped policy-gradient family as one fused op: loss, gradients and metrics in a single pass over (N,).

    r = exp(logprob - old_logprob)
    l = max(-min(r, delta) A, -clip(r, 1 - clip_low, 1 + clip_high) A),   at most dual_clip |A| where A < 0
    loss = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef u_t H_t

w, v, u are per-token weights that the caller made (aggregation, corrections and masks, entropy): the op knows no
sequences. The formulas are those of `reference.policy_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend
from rlhf_fast.ops.kl import ESTIMATORS, MAX_LOG_RATIO, kl_slope

# What the op's second output holds. Entries 2 to 9 are plain sums over the rows with weight != 0.
SUMS = (
    "loss",
    "policy_loss",
    "clip_low",  # r < 1 - clip_low and A < 0
    "clip_high",  # r > 1 + clip_high and A > 0
    "clip_far",  # delta or dual_clip took effect
    "ratio",
    "approx_kl",  # k3 of KL(old || new)
    "kl",
    "entropy",
    "count",
    "ratio_max",
    "ratio_min",
)


CPU_BLOCK = 1 << 16  # rows; a vector of them is 256 KiB


class ClipTerms(NamedTuple):
    """The numbers of the clip family. None: that term does not exist."""

    clip_low: float
    clip_high: float
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "k3"
    kl_correction: bool = False
    entropy_coef: float = 0.0


class ClipResult(NamedTuple):
    """loss () differentiable; sums (12,) in the order of SUMS; dlogprob (n,); dentropy (n,) or None."""

    loss: Tensor
    sums: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None


def clip_loss(
    logprob: Tensor,  # (n,) float, differentiable
    old_logprob: Tensor | None,  # (n,); None: logprob itself, detached
    advantages: Tensor,  # (n,)
    weight: Tensor,  # (n,); 0: the row is not there, whatever it holds
    terms: ClipTerms,
    *,
    policy_weight: Tensor | None = None,  # (n,)
    ref_logprob: Tensor | None = None,  # (n,), needed when beta != 0
    entropy: Tensor | None = None,  # (n,), differentiable when entropy_coef != 0
    entropy_weight: Tensor | None = None,  # (n,), needed when entropy_coef != 0
) -> ClipResult:
    """The op on prepared vectors. Trusts its caller, `losses.PolicyLoss`, for shapes."""
    loss, sums, dlogprob, dentropy = torch.ops.rlhf_fast.policy_clip(
        logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight,
        terms.clip_low, terms.clip_high, terms.delta, terms.dual_clip,
        terms.beta, terms.kl_estimator, terms.kl_gradient, terms.kl_correction, terms.entropy_coef,
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
        "float entropy_coef) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def policy_clip(logprob, *args):
    (
        *tensors,
        clip_low,
        clip_high,
        delta,
        dual_clip,
        beta,
        kl_estimator,
        kl_gradient,
        correct,
        entropy_coef,
    ) = args
    terms = ClipTerms(clip_low, clip_high, delta, dual_clip, beta, kl_estimator, kl_gradient, correct, entropy_coef)
    forward = _blocked_torch_clip if logprob.device.type == "cpu" else _torch_clip
    if _backend.backend(logprob.device, "policy_loss") == "triton" and logprob.dtype != torch.float64:
        forward = _triton_clip
    sums, dlogprob, dentropy = forward(logprob, *tensors, terms)
    if dentropy is None:
        dentropy = dlogprob.new_empty(0)
    return sums[0].clone(), sums, dlogprob, dentropy


@policy_clip.register_fake
def _(logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight, *args):
    dtype = _stat_dtype(logprob)
    dlogprob = torch.empty_like(logprob, dtype=dtype, memory_format=torch.contiguous_format)
    dentropy = torch.empty_like(dlogprob) if _has_dentropy(entropy, args[-1]) else dlogprob.new_empty(0)
    return dlogprob.new_empty(()), dlogprob.new_empty(len(SUMS)), dlogprob, dentropy


def _setup_context(ctx, inputs, output):
    logprob, entropy = inputs[0], inputs[6]
    _, _, dlogprob, dentropy = output
    ctx.has_dentropy = _has_dentropy(entropy, inputs[-1])
    ctx.save_for_backward(dlogprob, dentropy, logprob, entropy if ctx.has_dentropy else None)


def _backward(ctx, grad_loss, *_):
    dlogprob, dentropy, logprob, entropy = ctx.saved_tensors
    grads = [None] * 17
    if ctx.needs_input_grad[0]:
        grads[0] = torch.ops.rlhf_fast.policy_clip_scale(grad_loss, dlogprob, logprob)
    if ctx.has_dentropy and ctx.needs_input_grad[6]:
        grads[6] = torch.ops.rlhf_fast.policy_clip_scale(grad_loss, dentropy, entropy)
    return tuple(grads)


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


def _stat_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _has_dentropy(entropy: Tensor | None, entropy_coef: float) -> bool:
    return entropy is not None and entropy_coef != 0.0


# ---- backends ----------------------------------------------------------------------------------------------


def _triton_clip(
    logprob,
    old_logprob,
    advantages,
    weight,
    policy_weight,
    ref_logprob,
    entropy,
    entropy_weight,
    terms: ClipTerms,
):
    from rlhf_fast.kernels.policy import policy_clip_fwd

    return policy_clip_fwd(
        *(None if t is None else t.contiguous() for t in (logprob, old_logprob, advantages, weight)),
        *(None if t is None else t.contiguous() for t in (policy_weight, ref_logprob, entropy, entropy_weight)),
        **terms._asdict(),
    )


def _blocked_torch_clip(
    logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight, terms: ClipTerms
):
    """`_torch_clip` by blocks whose temporaries stay in a CPU's cache."""
    tensors = (logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight)
    n = logprob.numel()
    if n <= CPU_BLOCK:
        return _torch_clip(*tensors, terms)
    parts = [
        _torch_clip(*(None if t is None else t[i : i + CPU_BLOCK] for t in tensors), terms)
        for i in range(0, n, CPU_BLOCK)
    ]
    each = torch.stack([sums for sums, _, _ in parts])
    sums = each.sum(0)
    some = each[:, SUMS.index("count")] > 0  # a block without a valid row has no extremes
    for name, fill, pick in (("ratio_max", -torch.inf, torch.amax), ("ratio_min", torch.inf, torch.amin)):
        i = SUMS.index(name)
        sums[i] = torch.where(some.any(), pick(torch.where(some, each[:, i], fill), 0), 1.0)
    dentropy = None if parts[0][2] is None else torch.cat([d for _, _, d in parts])
    return sums, torch.cat([d for _, d, _ in parts]), dentropy


def _torch_clip(
    logprob,
    old_logprob,
    advantages,
    weight,
    policy_weight,
    ref_logprob,
    entropy,
    entropy_weight,
    terms: ClipTerms,
):
    """The same in torch: (sums (12,), dlogprob (n,), dentropy (n,) | None)."""
    dtype = _stat_dtype(logprob)
    valid = weight != 0
    zero = torch.zeros((), dtype=dtype, device=logprob.device)

    def clean(tensor: Tensor) -> Tensor:
        return torch.where(valid, tensor.to(dtype), zero)

    logprob, advantages, weight = clean(logprob), clean(advantages), weight.to(dtype)
    log_ratio = torch.zeros_like(logprob) if old_logprob is None else logprob - clean(old_logprob)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = bounded.exp()
    dratio = torch.where(bounded == log_ratio, ratio, zero)  # d ratio / d logprob
    loss, slope, far = _clipped(ratio, dratio, advantages, terms)
    low = (ratio < 1 - terms.clip_low) & (advantages < 0)
    high = (ratio > 1 + terms.clip_high) & (advantages > 0)
    if policy_weight is not None:
        policy_weight = clean(policy_weight)
        loss, slope = loss * policy_weight, slope * policy_weight
    policy_sum = torch.dot(weight, loss)
    kl, kl_sum = zero, zero
    if terms.beta != 0.0:
        delta = logprob - clean(ref_logprob)
        kl, dkl = ESTIMATORS[terms.kl_estimator](delta), kl_slope(delta, terms.kl_gradient)
        term = kl
        if terms.kl_correction:
            term, dkl = kl * ratio, dkl * ratio + kl * dratio
        kl_sum = terms.beta * torch.dot(weight, term)
        slope = slope + terms.beta * dkl
    entropy_sum, entropy_bonus, dentropy = zero, zero, None
    if entropy is not None:
        entropy = clean(entropy)
        entropy_sum = entropy.sum()
        if terms.entropy_coef != 0.0:
            dentropy = -terms.entropy_coef * clean(entropy_weight)
            entropy_bonus = torch.dot(dentropy, entropy)
    sums = [policy_sum + kl_sum + entropy_bonus, policy_sum, low.sum(), high.sum(), (far & valid).sum()]
    sums += [
        torch.where(valid, ratio, zero).sum(),
        (torch.expm1(bounded) - bounded).sum(),
        kl.sum(),
        entropy_sum,
    ]
    sums += [valid.sum(), *ratio_range(ratio, valid)]
    return torch.stack([s.to(dtype) for s in sums]), weight * slope, dentropy


def _clipped(ratio: Tensor, dratio: Tensor, advantages: Tensor, terms: ClipTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivative by logprob, and where delta or the dual clip took effect; each (n,)."""
    low, high = 1 - terms.clip_low, 1 + terms.clip_high
    open_ratio = ratio if terms.delta is None else ratio.clamp(max=terms.delta)
    open_loss = -open_ratio * advantages
    clip_loss_ = -ratio.clamp(low, high) * advantages
    loss = torch.maximum(open_loss, clip_loss_)
    # The clipped branch wins strictly only where the ratio left the range, save for a delta inside of it.
    moves = torch.where(open_loss >= clip_loss_, ratio == open_ratio, (ratio >= low) & (ratio <= high))
    far = (ratio != open_ratio) & (advantages < 0)
    if terms.dual_clip is not None:
        cap = -terms.dual_clip * advantages
        capped = (advantages < 0) & (loss > cap)
        loss, moves, far = torch.where(capped, cap, loss), moves & ~capped, far | capped
    return loss, torch.where(moves, -advantages * dratio, 0.0), far


def ratio_range(ratio: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest ratio over the valid rows; 1 where there is none."""
    if ratio.numel() == 0:
        return ratio.new_ones(()), ratio.new_ones(())
    some = valid.any()
    largest = torch.where(valid, ratio, -torch.inf).amax()
    smallest = torch.where(valid, ratio, torch.inf).amin()
    return torch.where(some, largest, 1.0), torch.where(some, smallest, 1.0)

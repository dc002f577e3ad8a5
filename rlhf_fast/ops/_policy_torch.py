"""The clip family in torch: what the fused kernels do, as whole-vector expressions. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._policy_terms import SUMS, ClipTerms, stat_dtype
from rlhf_fast.ops.kl import ESTIMATORS, MAX_LOG_RATIO, kl_slope

CPU_BLOCK = 1 << 16  # rows; a vector of them is 256 KiB


def blocked_torch_clip(
    logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight, terms: ClipTerms
):
    """`torch_clip` by blocks whose temporaries stay in a CPU's cache."""
    tensors = (logprob, old_logprob, advantages, weight, policy_weight, ref_logprob, entropy, entropy_weight)
    n = logprob.numel()
    if n <= CPU_BLOCK:
        return torch_clip(*tensors, terms)
    parts = [
        torch_clip(*(None if t is None else t[i : i + CPU_BLOCK] for t in tensors), terms)
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


def torch_clip(
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
    dtype = stat_dtype(logprob)
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

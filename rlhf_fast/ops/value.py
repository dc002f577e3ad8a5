"""What PPO needs around its losses: `gae`, `discounted_returns`, `shape_rewards`, `masked_whiten`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops import _scans
from rlhf_fast.ops._sequences import Layout, flat, layout, work_dtype
from rlhf_fast.ops.kl import check_estimator, kl_estimate
from rlhf_fast.types import Gae, ShapedRewards

MASK_MODES = ("carry", "zero")


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Gae:
    """Generalised advantage estimates and the returns that a value function is trained towards.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    Equivalent to `reference.gae`, as one scan over affine maps (csrc/common/affine_scan.h), without a loop over T.

    Args:
        rewards: (N,) with cu_seqlens, or (B, T), float. Constant.
        values: the same shape. Constant: no gradient flows through advantages or returns.
        gamma, lam: in [0, 1]. lam = 1 gives returns that are sums of rewards, untouched by the values.
        cu_seqlens: (B+1,) int32 or int64: where the sequences of a packed batch begin and end.
        mask: bool of the shape of rewards: True = a token of the policy. Rewards and values elsewhere are not used
            (they may be NaN) and get 0.
        mask_mode: what a masked token between two counted ones (a tool's answer) does.
            "carry": it does not exist; t + 1 above is the next token that counts.
            "zero": it is a step of time with r = V = 0. Masked tokens before the first and after the last counted one
            lie outside the sequence in either mode.
        terminated: (B,) bool. True: the sequence ended, nothing follows. False: it was cut off, `bootstrap` follows.
        bootstrap: (B,) float: V after the last token that counts. None: 0. Not read where terminated.
    Returns: Gae(advantages, returns) of the shape of rewards, fp32 (fp64 for fp64 rewards).
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16. "carry" is verl's treatment of observation tokens, "zero"
        OpenRLHF's; both write non-zero advantages at masked positions, which are 0 here.
    Notes: fp64 accumulation. On the GPU cu_seqlens is not validated (that would wait for the device); offsets that do
        not rise from 0 to N give wrong numbers, never a wrong access.
    Example:
        >>> rewards, values = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]), torch.zeros(5)
        >>> gae(rewards, values, lam=1.0, cu_seqlens=torch.tensor([0, 3, 5])).returns
        tensor([1., 1., 1., 2., 2.])
    """
    place = place_of("rewards", rewards, cu_seqlens, mask, mask_mode)
    _checks.check_float("values", values)
    _checks.check_shape("values", values, rewards.shape, "rewards' shape ")
    _checks.check_same_device(rewards=rewards, values=values)
    check_unit("gamma", gamma)
    check_unit("lam", lam)
    dtype = torch.promote_types(work_dtype(rewards), work_dtype(values))
    advantages, returns = _scans.gae(
        flat(rewards, dtype), flat(values, dtype), place.offsets, place.batch, place.length, place.mask,
        start_values(place, rewards, terminated, bootstrap, dtype), float(gamma), float(lam), mask_mode == "carry",
    )  # fmt: skip
    return Gae(advantages.reshape(rewards.shape), returns.reshape(rewards.shape))


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Discounted sum of the rewards from each token to the end of its sequence.

        G_t = r_t + gamma G_{t+1}

    Equivalent to `reference.discounted_returns`; the scan of `gae` with lam = 1 and no values.

    Args: as in `gae`. bootstrap is G after the last token that counts.
    Returns: the shape of rewards, fp32 (fp64 for fp64 rewards). Constant.
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: Sutton & Barto 2018, eq. 3.9.
    Notes: accumulation, and what stands under the mask, as in `gae`; all masked: 0.
    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 4.0]]), gamma=0.5)
        tensor([[1., 2., 4.]])
    """
    place = place_of("rewards", rewards, cu_seqlens, mask, mask_mode)
    check_unit("gamma", gamma)
    dtype = work_dtype(rewards)
    returns = _scans.discounted_returns(
        flat(rewards, dtype), place.offsets, place.batch, place.length, place.mask,
        start_values(place, rewards, terminated, bootstrap, dtype), float(gamma), mask_mode == "carry",
    )  # fmt: skip
    return returns.reshape(rewards.shape)


def shape_rewards(
    scores: Tensor,
    logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> ShapedRewards:
    """Per-token rewards of PPO: the score on the last trainable token, less a KL penalty on every one.

        r_t = -kl_coef clip(kl_t, -kl_clip, kl_clip) + [t is the sequence's last with mask] clip(score)

    Equivalent to `reference.shape_rewards`.

    Args:
        scores: (B,) float: one per sequence; or one per token, (N,) or (B, T), each added where it stands (N = B: one
            per sequence). Constant.
        logprob, ref_logprob: (N,) with cu_seqlens, or (B, T): the policy's and the reference's log-probabilities of the
            tokens. Without both there is no KL term and `mask` gives the shape.
        kl_coef: weight of the KL. kl_estimator: "k1", "abs", "k2" or "k3" (see `kl_estimate`); k1 is the usual one.
        kl_clip: bound of |kl_t|; score_clip: bound of |score|. None: none.
        cu_seqlens: (B+1,) int; mask: bool, True = a token of the policy. What lies elsewhere is not used.
    Returns: ShapedRewards(rewards, kl), fp32 (fp64 for fp64 scores), 0 where masked. `kl` is unclipped, for a KL
        controller and for the log. Constants.
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022.
    Notes: a sequence without a token that counts has nowhere to put its score: it is lost.
    Example:
        >>> shape_rewards(torch.tensor([2.0]), mask=torch.tensor([[True, True, False]])).rewards
        tensor([[0., 2., 0.]])
    """
    _checks.check_float("scores", scores)
    if (logprob is None) != (ref_logprob is None):
        raise ValueError("logprob and ref_logprob must be given together or not at all")
    like = logprob if logprob is not None else mask
    if like is None:
        raise ValueError("mask must be given when there is no logprob: it says where the tokens lie")
    if logprob is not None:
        _checks.check_float("logprob", logprob)
        _checks.check_float("ref_logprob", ref_logprob)
        _checks.check_shape("ref_logprob", ref_logprob, logprob.shape, "logprob's shape ")
    _checks.check_tensor("mask", like)  # logprob has been through check_float
    place = layout("logprob" if logprob is not None else "mask", like, cu_seqlens, mask)
    dense = check_scores(scores, place, like)
    _checks.check_same_device(scores=scores, logprob=like, ref_logprob=ref_logprob)
    check_estimator("kl_estimator", kl_estimator)
    for name, bound in {"kl_clip": kl_clip, "score_clip": score_clip}.items():
        if bound is not None:
            _checks.check_positive(name, bound)
    kl_coef = _checks.check_number("kl_coef", kl_coef)

    dtype, device = work_dtype(scores), like.device
    rewards = torch.zeros(place.tokens, dtype=dtype, device=device)
    kl = torch.zeros_like(rewards)
    if logprob is not None:
        kl = kl_estimate(flat(logprob, dtype), flat(ref_logprob, dtype), estimator=kl_estimator, mask=place.mask)
        rewards = -kl_coef * (kl if kl_clip is None else kl.clamp(-kl_clip, kl_clip))
    score = scores.detach().to(dtype)
    score = score if score_clip is None else score.clamp(-score_clip, score_clip)
    if dense:
        score = score.reshape(-1)
        rewards = rewards + (score if place.mask is None else score.masked_fill(~place.mask, 0))
        return ShapedRewards(rewards.reshape(like.shape), kl.reshape(like.shape))
    last = _last_position(place, device)
    # Sequences without a token that counts write into the extra slot, which is cut off again.
    rewards = torch.cat([rewards, rewards.new_zeros(1)])
    rewards = rewards.index_add(0, last, score)[:-1]
    return ShapedRewards(rewards.reshape(like.shape), kl.reshape(like.shape))


def check_scores(scores: Tensor, place: Layout, like: Tensor) -> bool:
    """Whether there is a score for every token; raise unless scores is (B,) or of the shape of `like`."""
    if scores.shape == like.shape and tuple(scores.shape) != (place.batch,):
        return True
    if scores.dim() > 1:
        _checks.check_shape("scores", scores, like.shape, "(B,), or for every token ")
    _checks.check_shape("scores", scores, (place.batch,), "(B,)" if like.dim() > 1 else "(N,) or (B,)")
    return False


def _last_position(place: Layout, device: torch.device) -> Tensor:
    """(B,): the position of each sequence's last token that counts; N where there is none."""
    if place.mask is not None:
        ends = place.ends(device)
        return torch.where(ends > 0, ends - 1, place.tokens)
    if place.offsets is None:
        ends = place.ends(device)
        return ends - 1 if place.length > 0 else torch.full_like(ends, place.tokens)
    ends = place.offsets[1:]
    return torch.where(ends > place.offsets[:-1], ends - 1, place.tokens)


def masked_whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Values with mean 0 and variance 1 over the tokens that count.

        y = (x - mean) / sqrt(var + eps)  [+ mean unless shift_mean]

    Equivalent to `reference.masked_whiten`: two passes, fp64 statistics.

    Args:
        values: any shape, float. Differentiable (without process_group).
        mask: bool of the same shape, True = counts. What lies elsewhere is not used and becomes 0.
        shift_mean: False keeps the mean and changes the variance only.
        unbiased: variance over n - 1 (True) or n.
        eps: added to the variance, > 0.
        process_group: mean and variance over all ranks of the group. Every rank must call, an empty one too.
            `torch.distributed.group.WORLD` for all.
    Returns: the shape of values, fp32 (fp64 for fp64 values).
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: the whitening of TRL's and verl's PPO (unbiased, eps 1e-8 under the root). They raise for fewer than two
        tokens; here one token, or any number of equal ones, gives exactly 0 (the mean unless shift_mean), none an empty
        or zero result.
    Notes: the same bits on any number of threads. Two all_reduce calls of two numbers with a process group.
    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]), unbiased=False)
        tensor([-1.,  1.,  0.])
    """
    _checks.check_float("values", values)
    _checks.check_positive("eps", eps)
    for name, flag in {"shift_mean": shift_mean, "unbiased": unbiased}.items():
        _checks.check_flag(name, flag)
    _checks.check_no_tangent("masked_whiten", values=values)
    if mask is not None:
        _checks.check_mask("mask", mask, values.shape, "values' shape ")
        _checks.check_same_device(values=values, mask=mask)
        mask = mask.bool().reshape(-1).contiguous()
    dtype, ddof = work_dtype(values), int(unbiased)
    if values.requires_grad and torch.is_grad_enabled():
        if process_group is not None:
            raise ValueError("values must not require grad with process_group: pass values.detach()")
        return _whiten_autograd(values.reshape(-1).to(dtype), mask, shift_mean, ddof, eps).reshape(values.shape)
    x = flat(values, dtype)
    statistics = _scans.moments(x, mask)
    if process_group is not None:
        statistics = _global_moments(statistics, process_group)
    return _scans.whiten(x, mask, statistics, shift_mean, ddof, float(eps)).reshape(values.shape)


def _whiten_autograd(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float) -> Tensor:
    """The same in differentiable torch; second derivatives too."""
    dtype = x.dtype
    if x.numel() == 0:
        return x * 1.0
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = counted.sum()
    # Any constant may be taken off first; with the smallest element, equal ones deviate by exactly 0.
    pivot = x.detach().masked_fill(~counted, torch.inf).amin().double()
    pivot = torch.where(count > 0, pivot, torch.zeros_like(pivot))
    distance = (x.masked_fill(~counted, 0.0).double() - pivot).masked_fill(~counted, 0.0)
    mean = distance.sum() / count.clamp(min=1)
    centred = (distance - mean).masked_fill(~counted, 0.0)
    variance = centred.square().sum() / (count - ddof).clamp(min=1)
    out = centred / (variance + eps).sqrt()
    out = out if shift_mean else (out + (pivot + mean)).masked_fill(~counted, 0.0)
    return out.to(dtype)


def _global_moments(statistics: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """Moments over all ranks: the global mean first, then deviations from it."""
    count, mean, m2 = statistics
    first = torch.stack([count, count * mean])
    dist.all_reduce(first, group=process_group)
    global_mean = first[1] / first[0].clamp(min=1)
    second = m2 + count * (mean - global_mean).square()
    dist.all_reduce(second, group=process_group)
    return torch.stack([first[0], global_mean, second])


# ---- checks, shared with `ops.ppo` ----


def place_of(name: str, tensor: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mask_mode: str) -> Layout:
    """How `tensor` lies, checked."""
    _checks.check_float(name, tensor)
    _checks.check_choice("mask_mode", mask_mode, MASK_MODES)
    return layout(name, tensor, cu_seqlens, mask)


def start_values(
    place: Layout, like: Tensor, terminated: Tensor | None, bootstrap: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """(B,) values after the end, 0 where terminated; None for zeros."""
    if bootstrap is None:
        if terminated is not None:
            raise ValueError("bootstrap must be given with terminated: the value that follows where it is False")
        return None
    _checks.check_float("bootstrap", bootstrap)
    _checks.check_shape("bootstrap", bootstrap, (place.batch,), "(B,)")
    _checks.check_same_device(rewards=like, bootstrap=bootstrap, terminated=terminated)
    start = flat(bootstrap, dtype)
    if terminated is None:
        return start
    _checks.check_mask("terminated", terminated, (place.batch,), "(B,)")
    return start.masked_fill(terminated.bool(), 0.0)


def check_unit(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {_checks.short(value)}")

"""What PPO needs beside the policy: advantages in time, shaped rewards, whitening, the value loss.

Written token by token; `rlhf_fast/ops/value.py` says the same as scans.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.reference.policy import kl_estimate
from rlhf_fast.types import Gae, PpoAdvantages, ShapedRewards, ValueLoss


def sequences(shape: torch.Size, cu_seqlens: Tensor | None, mask: Tensor | None) -> Iterator[tuple[range, list[int]]]:
    """For each sequence its span of the flat layout and the positions in it that count."""
    counts = None if mask is None else mask.reshape(-1).tolist()
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
    elif len(shape) == 2:
        offsets = [b * shape[1] for b in range(shape[0] + 1)]
    else:
        offsets = [0, shape[0]]
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        span = range(begin, end)
        yield span, [t for t in span if counts is None or counts[t]]


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
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t;  returns R_t = A_t + V_t.

    carry: t + 1 is the next token that counts. zero: it is the next token, with r = V = 0 where it does not count.
    After the last token that counts V is `bootstrap` where not `terminated`, else 0, and A is 0.
    """
    shape, rewards, values = rewards.shape, rewards.reshape(-1), values.reshape(-1)
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    zero = rewards.new_zeros(())
    for b, (_, counted) in enumerate(sequences(shape, cu_seqlens, mask)):
        if not counted:
            continue
        next_value, running = zero, zero
        if bootstrap is not None and not (terminated is not None and terminated[b]):
            next_value = bootstrap[b].to(rewards.dtype)
        steps = counted if mask_mode == "carry" else range(counted[0], counted[-1] + 1)
        there = set(counted)
        for t in reversed(steps):
            reward, value = (rewards[t], values[t]) if t in there else (zero, zero)
            running = reward + gamma * next_value - value + gamma * lam * running
            next_value = value
            if t in there:
                advantages[t], returns[t] = running, running + value
    return Gae(advantages.reshape(shape), returns.reshape(shape))


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
    """G_t = r_t + gamma G_{t+1}; masked tokens and the end as in `gae`."""
    shape, rewards = rewards.shape, rewards.reshape(-1)
    returns = torch.zeros_like(rewards)
    for b, (_, counted) in enumerate(sequences(shape, cu_seqlens, mask)):
        if not counted:
            continue
        running = rewards.new_zeros(())
        if bootstrap is not None and not (terminated is not None and terminated[b]):
            running = bootstrap[b].to(rewards.dtype)
        there = set(counted)
        for t in reversed(counted if mask_mode == "carry" else range(counted[0], counted[-1] + 1)):
            running = gamma * running
            if t in there:
                running = rewards[t] + running
                returns[t] = running
    return returns.reshape(shape)


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
    """r_t = -kl_coef kl_t, plus the sequence's score on its last token that counts, or each token's own score."""
    like = logprob if logprob is not None else mask
    batch = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dense = tuple(scores.shape) != (batch,)
    rewards, kl = scores.new_zeros(like.numel()), scores.new_zeros(like.numel())
    for b, (_, counted) in enumerate(sequences(like.shape, cu_seqlens, mask)):
        for t in counted:
            if ref_logprob is not None:
                pair = logprob.reshape(-1)[t], ref_logprob.reshape(-1)[t]
                kl[t] = kl_estimate(*pair, estimator=kl_estimator)
                clipped = kl[t] if kl_clip is None else kl[t].clamp(-kl_clip, kl_clip)
                rewards[t] = -kl_coef * clipped
            if dense:
                score = scores.reshape(-1)[t]
                rewards[t] += score if score_clip is None else score.clamp(-score_clip, score_clip)
        if counted and not dense:
            score = scores[b] if score_clip is None else scores[b].clamp(-score_clip, score_clip)
            rewards[counted[-1]] += score
    return ShapedRewards(rewards.reshape(like.shape), kl.reshape(like.shape))


def masked_whiten(
    values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(var + eps), plus the mean again unless `shift_mean`; 0 where masked.

    var = 0 when there are too few values for it.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    x = values[mask]
    if x.numel() == 0:
        return torch.zeros_like(values)
    mean = x.mean()
    freedom = x.numel() - int(unbiased)
    var = (x - mean).square().sum() / freedom if freedom > 0 else x.sum() * 0
    out = (x - mean) / (var + eps).sqrt()
    if not shift_mean:
        out = out + mean
    return torch.zeros_like(values).masked_scatter(mask, out)


def ppo_advantages(
    scores: Tensor,
    values: Tensor,
    logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
) -> PpoAdvantages:
    """shape_rewards, then gae, then masked_whiten of the advantages."""
    where = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rewards, kl = shape_rewards(
        scores, logprob, ref_logprob, kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clip=kl_clip,
        score_clip=score_clip, cu_seqlens=cu_seqlens, mask=where,
    )  # fmt: skip
    advantages, returns = gae(
        rewards, values, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, mask=mask, mask_mode=mask_mode,
        terminated=terminated, bootstrap=bootstrap,
    )  # fmt: skip
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return PpoAdvantages(advantages, returns, rewards, None if logprob is None else kl)


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
    """l_t = max(h(V_t - R_t), h(clip(V_t, old - clip, old + clip) - R_t)), h(e) = e^2 / 2 or Huber's; aggregated."""
    shape = values.shape
    values, returns = values.reshape(-1), returns.reshape(-1).to(values.dtype)
    old = None if old_values is None else old_values.reshape(-1).to(values.dtype)

    def penalty(error: Tensor) -> Tensor:
        square = 0.5 * error.square()
        if kind == "mse":
            return square
        return torch.where(error.abs() <= huber_delta, square, huber_delta * (error.abs() - 0.5 * huber_delta))

    spans = [counted for _, counted in sequences(shape, cu_seqlens, mask)]
    sums, clipped = [], 0
    for counted in spans:
        v, r = values[counted], returns[counted]
        l = penalty(v - r)
        if clip is not None and old is not None:
            o = old[counted]
            other = penalty(torch.maximum(torch.minimum(v, o + clip), o - clip) - r)
            clipped += int((other > l).sum())
            l = torch.maximum(l, other)
        sums.append(l.sum())
    tokens = sum(len(c) for c in spans)
    lengths = values.new_tensor([max(len(c), 1) for c in spans])
    per_sequence = torch.stack(sums) if sums else values.new_zeros(0)
    if aggregation == "token_mean":
        total, count = per_sequence.sum(), tokens
    elif aggregation == "seq_mean_token_mean":
        total, count = (per_sequence / lengths).sum(), len(spans)
    elif aggregation == "seq_mean_token_sum":
        total, count = per_sequence.sum(), len(spans)
    else:
        total, count = per_sequence.sum() / max_length, len(spans)
    loss = total / (max(count, 1) if normalizer is None else normalizer)
    return ValueLoss(loss, {"clip_fraction": values.new_tensor(clipped / max(tokens, 1))})

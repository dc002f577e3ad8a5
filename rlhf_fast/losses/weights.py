"""Per-token weights that a policy loss is made of, formed once from the whole batch.

Aggregation is linear in the tokens: with weights from global counts, a loss is `sum_t w_t l_t`, which may be cut into
chunks and micro-batches anywhere and still adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.losses.segments import Segments
from rlhf_fast.ops._eager import plain
from rlhf_fast.ops.kl import MAX_LOG_RATIO

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length")
CORRECTIONS = tuple(f"{level}_{how}" for level in ("token", "sequence", "geometric") for how in ("truncate", "mask"))
MIN_LOG_WEIGHT = -18.420680743952367  # log(1e-8): what stands for log(0) in a product of weights


def aggregation_factor(
    aggregation: str,
    tokens: Tensor | int,  # () how many count
    segments: Segments | None,
    normalizer: Tensor | float | None,
    max_length: int | None,
) -> Tensor:
    """Weight of a token that counts, () or, where it depends on the sequence, (S,): loss = sum_t w_t l_t.

    `normalizer` counts tokens for token_mean, sequences for the others.
    """
    if normalizer is None:
        normalizer = tokens if aggregation == "token_mean" else max(segments.count, 1)
    if aggregation == "seq_mean_token_mean":
        return 1 / (segments.lengths() * normalizer)
    return 1 / (max_length * normalizer if aggregation == "fixed_length" else normalizer)


def rollout_correction(
    mode: str,
    low: float | None,
    high: float | None,
    log_ratio: Tensor,  # (N,) trainer - rollout, 0 where masked or unknown
    valid: Tensor,  # (N,) float
    segments: Segments | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Importance weights pi_trainer / pi_rollout, bounded: (weight (N,), log-weight (N,), metrics).

    The log-weights are per token in such a way that their sum over a sequence is the log of its whole weight.
    """
    level, how = mode.rsplit("_", 1)
    share = valid  # how much one token counts: 1, or 1 / length where the weight is its sequence's
    if level != "token":
        pooled = segments.sum(log_ratio) if level == "sequence" else segments.mean(log_ratio)
        log_ratio = segments.spread(pooled)
        share = valid / segments.spread(segments.lengths().to(valid.dtype))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = 0.0 if low is None else low, float("inf") if high is None else high
    outside = (ratio < low) | (ratio > high)
    weight = ratio.clamp(low, high) if how == "truncate" else torch.where(outside, 0.0, ratio)
    total, units = (share * weight).sum(), share.sum()
    outside_fraction = (valid * outside).sum() / valid.sum().clamp(min=1)
    tiny = torch.finfo(weight.dtype).tiny
    metrics = {
        "rollout_ess": total.square() / (units * (share * weight.square()).sum()).clamp(min=tiny),
        "rollout_dropped": outside_fraction if how == "mask" else torch.zeros_like(total),
        "rollout_truncated": outside_fraction if how == "truncate" else torch.zeros_like(total),
        "rollout_ratio_mean": (share * ratio).sum() / units.clamp(min=1),
    }
    return weight, log_weight_share(weight, share), metrics


def log_weight_share(weight: Tensor, share: Tensor) -> Tensor:
    """(N,) parts of the log of each sequence's weight; `share`: how much a token counts, 1, or 1 / length where the
    weight is its sequence's."""
    return weight.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO) * share


def masked_quantile(values: Tensor, valid: Tensor, q: float) -> Tensor:
    """The q-quantile (linear interpolation) of the valid values, without a host sync; 0 when there is none."""
    if values.numel() == 0:
        return values.new_zeros(())
    kept = valid != 0
    ordered = torch.where(kept, values, -torch.inf).sort().values  # the valid ones come last
    count = kept.sum()
    last = values.numel() - 1
    position = (values.numel() - count) + q * (count - 1).clamp(min=0).double()
    below = position.floor().long().clamp(max=last)
    above = position.ceil().long().clamp(max=last)
    low, high = ordered.index_select(0, torch.stack([below, above])).unbind()
    middle = torch.where(below == above, low, torch.lerp(low, high, (position - below).to(values.dtype)))
    return torch.where(count > 0, middle, 0.0)


def largest(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """(N,) bool: the `count` () eligible tokens of the largest scores, the first among equals; no sync on a GPU."""
    if scores.is_cpu and plain(scores, eligible, count):
        return _largest_on_cpu(scores, eligible, int(count))
    order = torch.where(eligible, scores, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (rank < count) & eligible


def _largest_on_cpu(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The same where a count is at hand: those above the last one that is taken, and as many of its equals as are left.
    A sort of all tokens takes ten times as long."""
    scores = torch.where(eligible, scores, -torch.inf)
    count = min(count, scores.numel())
    if count == 0:
        return torch.zeros_like(eligible)
    last = scores.topk(count, sorted=False).values.amin()
    taken = scores > last
    equal = (scores == last).nonzero().flatten()
    taken[equal[: count - int(taken.sum())]] = True
    return taken & eligible


def covariance(advantages: Tensor, logprob: Tensor, valid: Tensor) -> Tensor:
    """(N,): each token's term of the covariance of advantage and log-probability over the batch."""
    count = valid.sum().clamp(min=1)
    centred = advantages - (advantages * valid).sum() / count
    return centred * (logprob - (logprob * valid).sum() / count)

"""Advantages of groups of answers to one prompt: the formulas, one group at a time.

Notation: r rewards of the rows of a group that have one (finite), n how many they are, s their std.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.types import GroupAdvantages


def group_rows(rows: int, group_size: int | None, group_ids: Tensor | None) -> list[list[int]]:
    """The rows of each group, in order of first appearance; without size and ids the batch is one group."""
    if group_size is not None:
        return [list(range(i, i + group_size)) for i in range(0, rows, group_size)]
    groups: dict[int, list[int]] = {}
    for row in range(rows):
        groups.setdefault(0 if group_ids is None else int(group_ids[row]), []).append(row)
    return list(groups.values())


def mean_std(r: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and std of r (n,), two passes; the std of equal values, or of too few, is exactly 0."""
    if len(r) == 0:
        return r.new_zeros(()), r.new_zeros(())
    if bool((r == r[0]).all()):
        return r[0], r.new_zeros(())
    mean = r.mean()
    if len(r) <= ddof:
        return mean, r.new_zeros(())
    return mean, ((r - mean).square().sum() / (len(r) - ddof)).sqrt()


def subtract_baseline(r: Tensor, baseline: str, batch_mean: Tensor, lengths: Tensor | None) -> Tensor:
    """r minus the baseline of each row, (n,), for one group."""
    n = len(r)
    if baseline == "none":
        return r
    if baseline == "batch":
        return r - batch_mean
    if bool((r == r[0]).all()):
        return torch.zeros_like(r)
    if baseline == "mean":
        return r - r.mean()
    if baseline == "loo":  # the mean of the others
        return r - (r.sum() - r) / (n - 1)
    if baseline == "opo":  # sum_j l_j r_j / sum_j l_j
        return r - (lengths * r).sum() / lengths.sum()
    if baseline == "best_other":  # what the best of n would lose without this row
        others = torch.stack([torch.cat([r[:i], r[i + 1 :]]).max() for i in range(n)])
        return r.max() - torch.minimum(others, r.max())
    raise ValueError(f"unknown baseline {baseline!r}")


def pass_at_k(r: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Advantage of each row (n,) and std () of the reward of k draws without repetition: 1 if one of them passes."""
    n, failed = len(r), int((r <= 0).sum())
    k = min(k, n)
    missed = math.comb(failed, k) / math.comb(n, k)
    without = math.comb(failed - 1, k - 1) / math.comb(n - 1, k - 1) if failed else 0.0
    advantages = torch.where(r > 0, torch.full_like(r, missed), torch.full_like(r, missed - without))
    return advantages, r.new_tensor(math.sqrt(missed * (1 - missed)))


def combine_rewards(rewards: Tensor, weights: Tensor | None, groups: list[list[int]], centred: bool) -> Tensor:
    """(B, K) -> (B,): weighted sum of the components that a row has; NaN when it has none.

    Within a group a sum that varies by rounding alone, 4 (n + K) eps of its largest terms, is constant: 0 where the
    components are centred, else its largest value.
    """
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights.to(rewards.dtype)
    has = torch.isfinite(rewards)
    parts = torch.where(has, rewards * weights, torch.zeros_like(rewards))
    total, size = torch.where(has.any(1), parts.sum(1), torch.full_like(parts[:, 0], math.nan)), parts.abs().sum(1)
    for rows in groups:
        have = [i for i in rows if has[i].any()]
        if not have:
            continue
        noise = 4 * (len(have) + len(weights)) * torch.finfo(rewards.dtype).eps * size[have].max()
        if total[have].max() - total[have].min() <= noise:
            total[have] = 0.0 if centred else total[have].max()
    return total


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    baseline: str | Tensor = "mean",
    ddof: int = 1,
    eps: float = 1e-4,
    weights: Tensor | None = None,
    combine: str = "sum_then_normalize",
    lengths: Tensor | None = None,
    zero_std: str = "keep",
    k: int | None = None,
) -> GroupAdvantages:
    """A_i = (r_i - baseline_i) / (std + eps) over the finite rewards of each group."""
    groups = group_rows(len(rewards), group_size, group_ids)
    if rewards.dim() == 2 and combine == "normalize_then_sum":
        columns = []
        for column in rewards.unbind(1):
            normal = torch.full_like(column, math.nan)
            for rows in groups:
                have = [i for i in rows if math.isfinite(column[i])]
                mean, std = mean_std(column[have], ddof)
                normal[have] = (column[have] - mean) / (std + eps if std > 0 else 1.0)
            columns.append(normal)
        rewards = combine_rewards(torch.stack(columns, 1), weights, groups, centred=True)
        baseline, scale = "none", "batch" if scale != "none" else "none"  # centred: the batch's mean is 0
    elif rewards.dim() == 2:
        rewards = combine_rewards(rewards, weights, groups, centred=False)

    valid = torch.isfinite(rewards)
    if isinstance(baseline, Tensor):
        valid = valid & torch.isfinite(baseline)
    batch_mean, batch_std = mean_std(rewards[torch.isfinite(rewards)], ddof)
    advantages, mean, std, spread = (torch.zeros_like(rewards) for _ in range(4))
    count = torch.zeros(len(rewards), dtype=torch.int64)
    for rows in groups:
        have = [i for i in rows if math.isfinite(rewards[i])]
        r = rewards[have]
        mean[rows], std[rows] = mean_std(r, ddof)
        spread[rows] = std[rows]
        count[rows] = len(have)
        if not have:
            continue
        if isinstance(baseline, Tensor):
            advantages[have] = r - baseline[have].to(r.dtype)
        elif baseline == "pass_at_k":
            advantages[have], spread[rows] = pass_at_k(r, k)
        else:
            l = None if lengths is None else lengths[have].to(r.dtype)
            advantages[have] = subtract_baseline(r, baseline, batch_mean, l)
    if scale == "centered":
        batch_std = mean_std(advantages[valid], ddof)[1]
    if scale != "none":
        denominator = {"group": spread, "mean": mean.clamp(min=0)}.get(scale, batch_std.expand_as(std))
        scaled = advantages / (denominator + eps)
        advantages = torch.where(denominator == 0, torch.zeros_like(scaled), scaled)
    if zero_std == "mask":
        valid = valid & (spread != 0)
    advantages = torch.where(valid, advantages, torch.zeros_like(advantages))
    invalid = (~torch.isfinite(rewards)).sum()
    return GroupAdvantages(advantages, mean, std, count, spread == 0, valid, invalid)

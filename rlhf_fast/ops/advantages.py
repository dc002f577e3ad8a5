"""Advantages of groups of answers to one prompt: GRPO and its relatives, as choices of baseline and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_scans, _checks
from rlhf_fast.ops import _scans
from rlhf_fast.ops._eager import plain
from rlhf_fast.ops._sequences import work_dtype
from rlhf_fast.types import GroupAdvantages

BASELINES = ("mean", "loo", "opo", "best_other", "pass_at_k", "batch", "none")
SCALES = ("group", "batch", "centered", "mean", "none")
COMBINES = ("sum_then_normalize", "normalize_then_sum")

# The named estimators, as options of `group_advantages`.
ESTIMATORS: dict[str, dict[str, object]] = {
    "grpo": {"baseline": "mean", "scale": "group"},
    "dr_grpo": {"baseline": "mean", "scale": "none"},
    "rloo": {"baseline": "loo", "scale": "none"},
    "reinforce_plus_plus": {"baseline": "batch", "scale": "batch"},
    "reinforce_plus_plus_baseline": {"baseline": "mean", "scale": "centered"},
    "opo": {"baseline": "opo", "scale": "none"},  # and lengths
    "pass_at_k": {"baseline": "best_other", "scale": "group"},
    "pass_at_k_training": {"baseline": "pass_at_k", "scale": "group", "eps": 0.0},  # and k
    "remax": {"scale": "none"},  # and baseline, the rewards of the greedy answers
    "maxrl": {"baseline": "mean", "scale": "mean"},
}


def advantage_options(name: str) -> dict[str, object]:
    """Options of `group_advantages` for a named estimator.

    grpo (arXiv:2402.03300), dr_grpo (2503.20783), rloo (2402.14740), reinforce_plus_plus and its group-baseline form
    (2501.03262), opo (2505.23585; needs `lengths`), maxrl (2602.02710; rewards 0 or 1), pass_at_k (2503.19595: k is
    the group's size, any rewards), pass_at_k_training (2508.10751; any `k`, passed or not), remax (2310.10505; needs
    `baseline`, the rewards of the greedy answers).

    Args:
        name: one of these.
    Returns: a dict of keyword arguments.
    Raises: ValueError naming the known ones.
    Source: the papers above, each its own.
    Notes: the dict is the caller's to change; what it leaves out is `group_advantages`' default.
    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0]), group_size=3, **advantage_options("rloo")).advantages
        tensor([ 1.0000, -0.5000, -0.5000])
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    return dict(ESTIMATORS[name])


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
    """Advantage of each answer over the other answers to its prompt.

        A_i = (r_i - b_i) / (s + eps)

    Equivalent to `reference.group_advantages`, for all groups at once.

    Args:
        rewards: (B,) float, or (B, K): K reward functions. Constant.
        group_size: rows i G to (i + 1) G - 1 are a group. group_ids: (B,) int, the group of each row: any numbers, in
            any order. Neither: the whole batch is one group.
        scale: s. "group": std of the group's rewards. "batch": std of the batch's rewards. "centered": std of r - b
            over the batch. "mean": mean of the group's rewards; a group whose mean is not > 0 gets 0. "none": no
            division.
        baseline: b. "mean" of the group; "loo": mean of the others in it; "opo": its mean weighted by `lengths`;
            "best_other": only the group's single best row gets an advantage, its lead over the second; "pass_at_k": see
            k; "batch": mean of the batch; "none": 0; or a (B,) tensor (ReMax).
        ddof: 1 for the unbiased std, 0 for the biased one. eps: added to s.
        weights: (K,) of the reward functions; None: ones. A row whose function k gave NaN counts the others only.
        combine: "sum_then_normalize": the weighted sum is the reward. "normalize_then_sum": each function is first
            normalised within its groups, (r - mean) / (std + eps), and the weighted sum then over the batch
            (unless scale is "none"). Then baseline must be "mean" and scale "group" or "none".
        lengths: (B,) tokens of each answer, for baseline "opo".
        zero_std: "keep", or "mask": rows of groups whose std is 0 become invalid (DAPO's dynamic sampling).
        k: for baseline "pass_at_k": the reward is that of k answers drawn from the group, 1 if one of them passes (its
            reward is > 0). A row's advantage is the mean over the draws it is in, less the mean P over all draws, and
            s their std sqrt(P (1 - P)), whatever ddof; in closed form, with f of n answers failing,
            P = 1 - C(f, k) / C(n, k),   A = 1 - P if it passes, else 1 - P - C(f - 1, k - 1) / C(n - 1, k - 1).
            scale must be "group" or "none". k = 1 is baseline "mean" with ddof 0. A group of fewer than k counts as k.
            Groups with P = 1 or 0 are those with zero_std.
    Returns: GroupAdvantages(advantages, mean, std, count, zero_std, valid, num_invalid), fp32 (fp64 for fp64 rewards).
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: see `advantage_options`; "pass_at_k" is the analytic estimator of Chen et al. (arXiv:2508.10751); Walder
        and Karkhanis (2505.15201) weight by the same binomials without subtracting P. normalize_then_sum is GDPO's
        (2601.05242). Defaults are TRL 1.16's (unbiased std + 1e-4); verl has 1e-6.
    Notes: a reward that is not finite leaves its group: advantage 0, valid False, counted in num_invalid. A group of
        one gets exactly 0 with a baseline of its own (verl gives the raw reward), and so does any row whose s is 0,
        however small the rewards: statistics are two-pass, in fp64, and a weighted sum that varies within its group by
        no more than fp64's rounding is constant. reinforce_plus_plus normalises over sequences; for
        verl's normalisation over tokens broadcast the rewards and call `masked_whiten`. Over several ranks: gather the
        rewards first.
    Example:
        >>> group_advantages(torch.tensor([0.0, 2.0, 5.0, 5.0]), group_size=2, eps=0.0).advantages
        tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    _check_options(rewards, scale, baseline, ddof, eps, weights, combine, lengths, zero_std, k)
    _check_groups(rewards, group_size, group_ids)
    r = rewards.detach().double()
    dtype = work_dtype(rewards)
    if r.dim() == 2:
        groups, centred = _groups(rewards, group_size, group_ids), combine == "normalize_then_sum"
        if centred:  # in every group, so over the batch too: its mean is 0
            r = torch.stack([_normalized(column, groups, ddof, eps) for column in r.unbind(1)], 1)
            baseline, scale = "none", "none" if scale == "none" else "batch"
        r = _weighted_sum(r, weights, groups, centred)

    by = baseline if isinstance(baseline, str) else "given"
    ranked = by in ("best_other", "pass_at_k")
    if not ranked and r.is_cpu and plain(r, group_ids) and _backend.backend("cpu", "group_advantages") == "cpp":
        options = dict(scale=scale, ddof=ddof, eps=float(eps), drop_equal=zero_std == "mask")
        return _in_one_pass(r, group_size, group_ids, baseline, lengths, dtype, options)
    groups = _groups(rewards, group_size, group_ids)
    finite = torch.isfinite(r)
    stats = _scans.group_stats(r, groups.order, groups.offsets)
    count, mean, std = stats[0][groups.index], stats[1][groups.index], _std(stats, ddof)[groups.index]
    batch = _scans.group_stats(r, None, _whole(r))[:, 0] if "batch" in (scale, by) else None
    spread = std  # what scale "group" divides by
    b = baseline.detach().double() if isinstance(baseline, Tensor) else None
    valid = finite if b is None else finite & torch.isfinite(b)
    r = r.where(valid, 0.0)
    if b is not None:
        advantages = r - b.where(valid, 0.0)
    elif baseline == "pass_at_k":
        advantages, spread = _pass_at_k(r, finite, groups, count, k)
    else:
        advantages = _subtract(r, baseline, finite, groups, count, mean, batch, lengths)
    advantages = advantages.where(valid, 0.0)

    if scale != "none":
        if scale in ("group", "mean"):
            denominator = spread if scale == "group" else mean.clamp(min=0)
        elif scale == "batch":
            denominator = _std(batch, ddof).expand_as(std)
        else:
            centred = advantages.where(valid, torch.nan)
            denominator = _std(_scans.group_stats(centred, None, _whole(centred))[:, 0], ddof).expand_as(std)
        none = denominator == 0
        advantages = (advantages / (denominator + eps).masked_fill(none, 1.0)).masked_fill(none, 0.0)
    degenerate = spread == 0
    if zero_std == "mask":
        valid = valid & ~degenerate
        advantages = advantages.where(valid, 0.0)
    return GroupAdvantages(
        advantages.to(dtype), mean.to(dtype), std.to(dtype), count.long(), degenerate, valid, (~finite).sum()
    )


def _in_one_pass(
    r: Tensor,  # (B,) f64
    group_size: int | None,
    group_ids: Tensor | None,
    baseline: str | Tensor,
    lengths: Tensor | None,
    dtype: torch.dtype,
    options: dict[str, object],
) -> GroupAdvantages:
    """All of it by the C++ kernel: what takes the CPU long here is the calls, not the numbers."""
    ids, order = (None, None) if group_ids is None else group_ids.long().sort(stable=True)
    given, name = None, baseline
    if isinstance(baseline, Tensor):
        given, name = baseline.detach().double().contiguous(), "given"
    elif baseline == "opo":
        given = lengths.detach().double().contiguous()
    numbers = [torch.empty(r.numel(), dtype=dtype) for _ in range(3)]
    count, invalid = torch.empty(r.numel(), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    flags = [torch.empty(r.numel(), dtype=torch.bool) for _ in range(2)]
    _backend_scans.group_advantages(
        r.contiguous(), order, ids, group_size or max(r.numel(), 1), given, baseline=name, numbers=numbers,
        count=count, flags=flags, invalid=invalid, **options,
    )  # fmt: skip
    return GroupAdvantages(*numbers, count, *flags, invalid)


class _Groups:
    """index (B,): group of each row, 0..G-1. order (B,): rows listed by group, None if they lie so. offsets (G+1,)."""

    def __init__(self, index: Tensor, order: Tensor | None, offsets: Tensor):
        self.index, self.order, self.offsets = index, order, offsets

    def sum(self, values: Tensor) -> Tensor:
        """(B,) -> (B,): each row gets its group's sum."""
        total = values.new_zeros(self.offsets.numel() - 1).index_add(0, self.index, values)
        return total[self.index]

    def max(self, values: Tensor) -> Tensor:
        """(B,) -> (B,): each row gets its group's maximum."""
        start = values.new_full((self.offsets.numel() - 1,), -torch.inf)
        return start.scatter_reduce(0, self.index, values, "amax")[self.index]


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    rows = rewards.shape[0]
    if group_size is not None:
        if group_ids is not None:
            raise ValueError("group_size and group_ids must not be given together")
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or rows % group_size:
            got = _checks.short(group_size)
            raise ValueError(f"group_size must be an int >= 1 that divides B={rows}, got {got}")
    if group_ids is not None:
        _checks.check_shape("group_ids", group_ids, (rows,), "(B,)")
        if group_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"group_ids must be int64 or int32, got {group_ids.dtype}")
        _checks.check_same_device(rewards=rewards, group_ids=group_ids)


def _groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> _Groups:
    rows, device = rewards.shape[0], rewards.device
    positions = torch.arange(rows, device=device)
    if group_size is not None:
        return _Groups(positions // group_size, None, torch.arange(0, rows + 1, group_size, device=device))
    if group_ids is None:
        return _Groups(torch.zeros_like(positions), None, _whole(rewards))
    # Sorted, and as many groups as rows (empty ones last): no shape depends on the data, nothing waits for the device.
    ids, order = group_ids.sort(stable=True)
    rank = torch.zeros_like(positions)
    rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    index = torch.empty_like(rank).scatter(0, order, rank)
    return _Groups(index, order, torch.searchsorted(rank, torch.arange(rows + 1, device=device)))


def _whole(rewards: Tensor) -> Tensor:
    return torch.arange(2, device=rewards.device) * rewards.shape[0]


def _std(stats: Tensor, ddof: int) -> Tensor:
    """(G,) from (3, G): 0 where there are too few rows for it."""
    freedom = stats[0] - ddof
    return torch.where(freedom > 0, stats[2] / freedom.clamp(min=1), 0.0).sqrt()


def _subtract(
    r: Tensor,  # (B,), 0 where not finite
    baseline: str,
    finite: Tensor,
    groups: _Groups,
    count: Tensor,
    mean: Tensor,
    batch: Tensor | None,  # (3,): statistics of the batch, for baseline "batch"
    lengths: Tensor | None,
) -> Tensor:
    """(B,) r minus its baseline. All but "none" and "batch" are exactly 0 where a group's rewards are equal."""
    if baseline == "none":
        return r
    if baseline == "batch":
        return r - batch[1]
    centred = (r - mean).where(finite, 0.0)
    if baseline == "mean":
        return centred
    if baseline == "loo":  # r - (n mean - r) / (n - 1)
        return centred * (count / (count - 1).clamp(min=1))
    if baseline == "opo":
        l = lengths.detach().double().where(finite, 0.0)
        return centred - groups.sum(l * centred) / groups.sum(l).clamp(min=torch.finfo(torch.float64).tiny)
    ranked = r.where(finite, -torch.inf)
    best = groups.max(ranked)
    leads = (ranked == best) & finite
    second = groups.max(ranked.masked_fill(leads, -torch.inf))
    alone = leads & (groups.sum(leads.double()) == 1) & (count > 1)
    return torch.where(alone, r - second.where(alone, 0.0), 0.0)


def _pass_at_k(r: Tensor, finite: Tensor, groups: _Groups, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B,) advantage by draws of k, and (B,) the std of a draw's reward.

    With Q = C(f - 1, k - 1) / C(n - 1, k - 1) the closed form is Q f / n for a row that passes, -Q (n - f) / n for one
    that fails, and 1 - P = Q f / n.
    """
    passes = (r > 0) & finite
    passed = groups.sum(passes.double())
    failed = count - passed
    others = torch.ones_like(r)
    for j in range(1, k):  # past the group's size nothing is left to draw
        others = torch.where(count > j, others * (failed - j).clamp(min=0) / (count - j).clamp(min=1), others)
    missed, given_up = (others * x / count.clamp(min=1) for x in (failed, passed))  # exactly 1 where all fail
    advantages = torch.where(passes, missed, -given_up).where(finite, 0.0)
    return advantages, (missed * (1 - missed)).clamp(min=0).sqrt()


def _normalized(column: Tensor, groups: _Groups, ddof: int, eps: float) -> Tensor:
    """(B,) rewards of one function, normalised within their groups; NaN where there is none."""
    stats = _scans.group_stats(column, groups.order, groups.offsets)
    std = _std(stats, ddof)[groups.index]
    normal = ((column - stats[1][groups.index]) / (std + eps).masked_fill(std == 0, 1.0)).masked_fill(std == 0, 0.0)
    return normal.where(torch.isfinite(column), torch.nan)


def _weighted_sum(rewards: Tensor, weights: Tensor | None, groups: _Groups, centred: bool) -> Tensor:
    """(B, K) -> (B,): over the components a row has; NaN where it has none.

    A sum that varies within its group by rounding alone is the same in all of it, and 0 where the components are
    centred: divided by its std, noise would be a verdict.
    """
    finite = torch.isfinite(rewards)
    weighted = (rewards if weights is None else rewards * weights.detach().double()).where(finite, 0.0)
    some = finite.any(1)
    total, size = weighted.sum(1).where(some, -torch.inf), weighted.abs().sum(1)
    highest, lowest = groups.max(total), -groups.max((-total).where(some, -torch.inf))
    terms = groups.sum(some.double()) + rewards.shape[1]
    noise = 4 * torch.finfo(torch.float64).eps * terms * groups.max(size)
    constant = highest - lowest <= noise
    level = torch.zeros_like(highest) if centred else highest
    return torch.where(constant, level, total).where(some, torch.nan)


def _check_options(
    rewards: Tensor,
    scale: str,
    baseline: str | Tensor,
    ddof: int,
    eps: float,
    weights: Tensor | None,
    combine: str,
    lengths: Tensor | None,
    zero_std: str,
    k: int | None,
) -> None:
    _checks.check_float("rewards", rewards)
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards must be (B,) or (B, K), got {_checks.shape_str(rewards.shape)}")
    choices = {"scale": (scale, SCALES), "combine": (combine, COMBINES), "zero_std": (zero_std, ("keep", "mask"))}
    if not isinstance(baseline, Tensor):
        choices["baseline"] = (baseline, BASELINES)
    for name, (value, allowed) in choices.items():
        _checks.check_choice(name, value, allowed)
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {_checks.short(ddof)}")
    _checks.check_number("eps", eps, least=0)
    rows = rewards.shape[:1]
    if isinstance(baseline, Tensor):
        _checks.check_float("baseline", baseline)
        _checks.check_shape("baseline", baseline, rows, "(B,)")
    if isinstance(baseline, str) and baseline == "pass_at_k":
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < 2**63:
            raise ValueError(f"k must be an int >= 1 with baseline pass_at_k, got {_checks.short(k)}")
        if scale not in ("group", "none"):
            raise ValueError(f"scale must be group or none with baseline pass_at_k, got {scale!r}")
    elif k is not None:
        raise ValueError(f"k goes with baseline pass_at_k, got k={k!r}")
    if weights is not None:
        if rewards.dim() != 2:
            raise ValueError(f"weights go with rewards (B, K), got rewards {_checks.shape_str(rewards.shape)}")
        _checks.check_float("weights", weights)
        _checks.check_shape("weights", weights, rewards.shape[1:], "(K,)")
    if isinstance(baseline, str) and baseline == "opo":
        if lengths is None:
            raise ValueError("lengths must be given with baseline opo")
        _checks.check_shape("lengths", lengths, rows, "(B,)")
        if lengths.dtype not in _checks.SCALAR_DTYPES:
            raise ValueError(f"lengths must be integers or a usual float dtype, got {lengths.dtype}")
    if rewards.dim() == 2 and combine == "normalize_then_sum":
        if isinstance(baseline, Tensor) or baseline != "mean" or scale not in ("group", "none"):
            raise ValueError("combine normalize_then_sum needs baseline mean and scale group or none")
    elif combine == "normalize_then_sum":
        raise ValueError(f"combine normalize_then_sum needs rewards (B, K), got {_checks.shape_str(rewards.shape)}")
    tensors = {"baseline": baseline if isinstance(baseline, Tensor) else None, "weights": weights, "lengths": lengths}
    _checks.check_same_device(rewards=rewards, **tensors)

"""From scores to advantages, one for every token: outcome rewards over the whole completion, process rewards from the
step on that earned them.

    A_t = A + sum_f w_f sum_{j: step j of f ends at or after t} (r_j - mean(r)) / (std(r) + eps)

A is the group's advantage of the outcome (`group_advantages`); mean and std of a process reward are over all steps of
all completions of the group.

Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2 (outcome supervision) and 4.1.3 (process supervision).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.advantages import group_advantages
from rlhf_fast.ops.value import discounted_returns
from rlhf_fast.trainers.rewards import Scores
from rlhf_fast.types import GroupAdvantages


class Credit(NamedTuple):
    advantages: Tensor  # (N,) fp32; NaN along a completion without a usable reward
    zero_std: Tensor  # (B,) bool: nothing ranks the completions of the row's group


def credit(
    scores: Scores,
    lengths: Tensor,  # (B,) int64: tokens of each completion
    group_size: int,
    weights: Tensor,  # (F,) of the reward functions
    options: Mapping[str, Any],  # of group_advantages
    *,
    baseline: Tensor | None = None,  # (B,), instead of the options' (ReMax)
    gather: Any = lambda tensor: tensor,  # over the processes, each with whole groups
    process: int = 0,
) -> Credit:
    """Advantages of this process's completions; statistics of the batch are over all processes."""
    rewards, options = _outcomes(scores, group_size, weights, options)
    if baseline is not None:
        options["baseline"] = gather(baseline)
    if options.get("baseline") == "opo":
        options["lengths"] = gather(lengths)
    result = group_advantages(gather(rewards), **options)
    mine = slice(process * len(lengths), (process + 1) * len(lengths))
    unusable = scores.total.isnan()
    advantages = result.advantages[mine].masked_fill(unusable, math.nan).repeat_interleave(lengths)
    zero_std = result.zero_std[mine]
    if scores.steps is not None:
        steps, cu_seqlens = scores.steps, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        scale = "none" if options.get("scale") == "none" else "group"
        normal = _normalised(scores, group_size, scale)
        value = normal.advantages * weights[steps.function]
        earned = torch.zeros(int(cu_seqlens[-1])).index_add(0, cu_seqlens[steps.row] + steps.token, value)
        advantages = advantages + discounted_returns(earned, gamma=1.0, cu_seqlens=cu_seqlens.int())
        zero_std = zero_std & ~_ranked(scores, normal, group_size, weights).repeat_interleave(group_size)
    return Credit(advantages, zero_std)


def informative(
    scores: Scores, group_size: int, weights: Tensor, options: Mapping[str, Any], *, greedy: bool = False
) -> Tensor:
    """(groups,) bool: the group can have an advantage, by the arguments of `credit`.

    With a baseline of the group's own, something has to rank its completions. Equal rewards may also differ from what
    does not depend on the group: the batch's mean, zero, or the reward of a greedy completion (`greedy`).
    """
    rewards, options = _outcomes(scores, group_size, weights, options)
    baseline = "greedy" if greedy else options.get("baseline", "mean")
    elsewhere = baseline in ("greedy", "batch", "none")
    if elsewhere and options.get("scale") in ("batch", "centered"):
        options["scale"] = "none"  # one divisor for all groups
    if baseline in ("greedy", "batch"):  # not known yet: some number that is not the reward
        options["baseline"] = (rewards <= 0).to(rewards)
    if options.get("baseline") == "opo":  # no lengths make equal rewards differ
        options["lengths"] = torch.ones(len(rewards))
    result = group_advantages(rewards, **options)
    ranked = (result.advantages != 0 if elsewhere else ~result.zero_std).view(-1, group_size).any(1)
    if scores.steps is not None:
        ranked = ranked | _ranked(scores, _normalised(scores, group_size, "group"), group_size, weights)
    return ranked


def _outcomes(
    scores: Scores, group_size: int, weights: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Outcome rewards, (B,) or one column a function (B, F), and the keywords of `group_advantages` for them."""
    options = dict(options, group_size=group_size)
    if options.get("combine") != "normalize_then_sum":
        return scores.outcome, options
    absent = scores.total.isnan()[:, None].expand_as(scores.each)
    if scores.steps is not None:  # process rewards count by their steps
        absent = absent.index_fill(1, scores.steps.function.unique(), True)
    return scores.each.masked_fill(absent, math.nan), options | {"weights": weights}


def _normalised(scores: Scores, group_size: int, scale: str) -> GroupAdvantages:
    """(r - mean) / std of each step over all steps that its function gave in the group."""
    steps, groups = scores.steps, len(scores.total) // group_size
    values = steps.value.masked_fill(scores.total.isnan()[steps.row], math.nan)
    ids = steps.function * groups + steps.row // group_size
    return group_advantages(values, group_ids=ids, scale=scale, baseline="mean")


def _ranked(scores: Scores, normal: GroupAdvantages, group_size: int, weights: Tensor) -> Tensor:
    """(groups,) bool: its steps differ."""
    ranked, steps = torch.zeros(len(scores.total) // group_size, dtype=torch.bool), scores.steps
    differ = ~normal.zero_std & (weights[steps.function] != 0)
    return ranked.index_fill(0, steps.row[differ] // group_size, True)

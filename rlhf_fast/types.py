"""Named results of the public operations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Metrics = dict[str, Tensor]


class LogProb(NamedTuple):
    """Log-probabilities of given targets; every tensor has the shape of `target`, fp32."""

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor


class TokenLogProb(NamedTuple):
    """`LogProb` and, as constants of the shape of `target`: log sum_j p_j^2, mean_j s_j (fp32), and whether the
    target is the likeliest token, the first among equals (bool)."""

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor
    log_sum_sq: Tensor
    mean_logit: Tensor
    is_top1: Tensor


class FusedLoss(NamedTuple):
    """A loss whose gradient with respect to the hidden states and the head already exists.

    `loss` is () and differentiable; `logprob` and `entropy` have the shape of `target` and are constants.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: Metrics


class DivergenceLoss(NamedTuple):
    """A weighted sum () of per-token divergences, differentiable, and the divergences themselves, constants in fp32."""

    loss: Tensor
    divergence: Tensor


class LossGrad(NamedTuple):
    """A chunk's loss (), its gradients (n,) and its metrics (sums over the chunk)."""

    loss: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None
    metrics: Metrics


class Gae(NamedTuple):
    """Advantages and value targets (returns = advantages + values), of the shape of `rewards`; 0 where masked."""

    advantages: Tensor
    returns: Tensor


class ShapedRewards(NamedTuple):
    """Per-token rewards and the KL estimates they were shaped with (unclipped, unscaled); 0 where masked."""

    rewards: Tensor
    kl: Tensor


class PpoAdvantages(NamedTuple):
    """What PPO trains on, of the shape of `values`; 0 where masked. `kl` is None without log-probabilities."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor | None


class ValueLoss(NamedTuple):
    """A value loss () and its metrics."""

    loss: Tensor
    metrics: Metrics


class LossMetrics(NamedTuple):
    """A loss () and its metrics."""

    loss: Tensor
    metrics: Metrics


class GroupAdvantages(NamedTuple):
    """Per-sequence advantages; every tensor (B,) but the last.

    `mean`, `std` and `count` are those of the row's group over its finite rewards; `zero_std` marks groups that cannot
    rank their rows; `valid` marks the rows that should count in a loss. Rows that are not valid have advantage 0.
    `num_invalid` () counts rows without a finite reward.
    """

    advantages: Tensor
    mean: Tensor
    std: Tensor
    count: Tensor
    zero_std: Tensor
    valid: Tensor
    num_invalid: Tensor

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


class FusedLoss(NamedTuple):
    """A loss whose gradient with respect to the hidden states and the head already exists.

    `loss` is () and differentiable; `logprob` and `entropy` have the shape of `target` and are constants.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: Metrics


class LossGrad(NamedTuple):
    """A chunk's loss (), its gradients (n,) and its metrics (sums over the chunk)."""

    loss: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None
    metrics: Metrics

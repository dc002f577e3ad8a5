"""The loss of supervised fine-tuning, as a ready-made `loss_fn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.fused import ReadyMade
from rlhf_fast.types import LossGrad


class NLL(ReadyMade):
    """Mean negative log-likelihood of the scored tokens.

        L = -sum_t logprob_t / normalizer

    Args:
        normalizer: what the sum is divided by: a number or a () tensor, such as the scored tokens of all
            micro-batches on all ranks. None: the scored tokens of this call. Less than 1 counts as 1, so that a
            batch with nothing to score has loss 0.
    Example:
        >>> hidden, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([1, 2, -100, 4, 0])
        >>> from rlhf_fast import fused_linear_loss
        >>> loss = fused_linear_loss(hidden, weight, target, NLL()).loss
    """

    needs_entropy = False
    needs_segments = False

    def __init__(self, normalizer: float | Tensor | None = None):
        self.normalizer = normalizer
        self._register()

    def prepare(self, batch: dict[str, Any], mask: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Fix the normaliser before the first chunk."""
        count = mask.sum() if self.normalizer is None else self.normalizer
        count = torch.as_tensor(count, dtype=torch.float32, device=mask.device)
        if count.dim() != 0:
            raise ValueError(f"normalizer must be a number or a () tensor, got shape {tuple(count.shape)}")
        return {**batch, "normalizer": count.clamp(min=1.0)}

    def __call__(self, logprob: Tensor, entropy: Tensor | None, batch: dict[str, Any]) -> tuple[Tensor, dict]:
        nll = -logprob.sum()
        return nll / batch["normalizer"], {"nll": nll.detach()}

    def gradient(self, logprob: Tensor, entropy: Tensor | None, batch: dict[str, Any]) -> LossGrad:
        """The loss and its gradient in closed form: -1 / normalizer for every token."""
        loss, metrics = self(logprob, entropy, batch)
        dlogprob = (-1.0 / batch["normalizer"]).to(logprob.dtype).expand_as(logprob)
        return LossGrad(loss, dlogprob, None, metrics)

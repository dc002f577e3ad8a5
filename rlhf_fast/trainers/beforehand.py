"""What is known of a minibatch before its updates, by forwards without a gradient.

The reference's log-probabilities, the policy's own, and the entropy above which tokens count.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_fast.trainers.experience import IGNORE, MicroBatch, MiniBatch
from rlhf_fast.trainers.models.policy import Reference
from rlhf_fast.trainers.sharding import autocast


def logprob_of(model: nn.Module, micro: MicroBatch, temperature: float, *, entropy: bool = False) -> Any:
    """`LogProb` of a micro-batch's targets."""
    return model(**micro.inputs, target_ids=micro.target_ids, temperature=temperature, entropy=entropy)


@torch.no_grad()
def with_reference(
    minibatch: MiniBatch, reference: Reference, temperature: float, accelerator: Accelerator
) -> MiniBatch:
    with reference.active() as model, autocast(accelerator, model):
        micros = [m._replace(ref_logprob=logprob_of(model, m, temperature).logprob) for m in minibatch.micros]
    return minibatch._replace(micros=micros)


@torch.no_grad()
def with_old(minibatch: MiniBatch, policy: nn.Module, temperature: float) -> MiniBatch:
    """old_logprob becomes the policy's; what the sampler recorded stays as "rollout_logprob" beside "old_entropy"."""
    micros = []
    for micro in minibatch.micros:
        out = logprob_of(policy, micro, temperature, entropy=True)
        kept = {"rollout_logprob": micro.old_logprob, "old_entropy": out.entropy}
        micros.append(micro._replace(old_logprob=out.logprob, extra={**micro.extra, **kept}))
    return minibatch._replace(micros=micros)


def with_entropy_threshold(minibatch: MiniBatch, quantile: float, accelerator: Accelerator) -> MiniBatch:
    """The entropy above which lies the share `quantile` of the minibatch's tokens, on all processes, and how many do.

    Source: Wang et al. 2025, "Beyond the 80/20 Rule" (arXiv:2506.01939), equation 7.
    """
    entropy = [m.extra["old_entropy"][m.target_ids != IGNORE] for m in minibatch.micros]
    entropy = torch.cat(entropy) if entropy else torch.empty(0, device=accelerator.device)
    entropy = _pooled(entropy, accelerator)
    threshold = float(entropy.quantile(1 - quantile)) if len(entropy) else 0.0
    selected = max(int((entropy >= threshold).sum()), 1)
    return minibatch._replace(entropy_threshold=threshold, selected_tokens=selected)


def _pooled(values: Tensor, accelerator: Accelerator) -> Tensor:
    """(n,) of this process -> those of all, however many each has."""
    if accelerator.num_processes == 1:
        return values
    every = accelerator.gather(accelerator.pad_across_processes(values, pad_index=math.nan))
    return every[~every.isnan()]

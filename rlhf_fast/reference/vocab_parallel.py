"""A head spread over ranks is the head of all shards, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.reference.logprob import linear_logprob
from rlhf_fast.types import LogProb


def vocab_parallel_logprob(
    hidden: Tensor,  # (..., D)
    shards: Sequence[Tensor],  # (V_r, D) of every rank
    target: Tensor,  # (...), ids in the whole vocabulary
    *,
    bias: Sequence[Tensor] | None = None,  # (V_r,) of every rank
    **options: object,
) -> LogProb:
    """`linear_logprob` of the whole head."""
    whole = None if bias is None else torch.cat(list(bias))
    return linear_logprob(hidden, torch.cat(list(shards)), target, bias=whole, **options)

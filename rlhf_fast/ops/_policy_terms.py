"""What the backends of the clip op share: the order of its sums and the numbers it is called with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What the op's second output holds. Entries 2 to 9 are plain sums over the rows with weight != 0.
SUMS = (
    "loss",
    "policy_loss",
    "clip_low",  # r < 1 - clip_low and A < 0
    "clip_high",  # r > 1 + clip_high and A > 0
    "clip_far",  # delta or dual_clip took effect
    "ratio",
    "approx_kl",  # k3 of KL(old || new)
    "kl",
    "entropy",
    "count",
    "ratio_max",
    "ratio_min",
)


class ClipTerms(NamedTuple):
    """The numbers of the clip family. None: that term does not exist."""

    clip_low: float
    clip_high: float
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "k3"
    kl_correction: bool = False
    entropy_coef: float = 0.0


class Form(NamedTuple):
    """Which formula of csrc/cpu/policy_forms.h, at whose ratio, and its numbers."""

    name: str = "clip"
    level: str = "token"  # or "sequence", "sequence_token", for clip alone
    low: float = 0.0  # what the ratio is clipped to; geo_mean: its logarithm; dppo_tv: how far down and up
    high: float = 0.0
    first: float = 0.0
    second: float = 0.0


def stat_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 statistics and gradients for everything but fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

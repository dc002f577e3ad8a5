"""Mean and variance of a stream, over all processes: what scores are normalised by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class RunningStats:
    """Count, mean and sum of squared deviations of everything seen so far.

        n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n

    Source: Welford 1962; the merge of batches is Chan et al. 1979, eq. 2.1. Kept in Python floats (fp64).

    Example:
        >>> stats = RunningStats()
        >>> stats.update(torch.tensor([1.0, 3.0, float("nan")]))
        >>> stats.mean, stats.variance
        (2.0, 1.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    @property
    def variance(self) -> float:
        """Over n; 0 for fewer than two values."""
        return self.m2 / self.count if self.count > 1 else 0.0

    def update(self, values: Tensor, accelerator: Any = None) -> None:
        """Take the finite values in. With an accelerator those of every process, the same on all; all must call."""
        moments = batch_moments(values)
        if accelerator is not None and accelerator.num_processes > 1:
            # accelerate's tensors travel in the backend's dtypes; fp64 is one of them on CPU and CUDA
            every = accelerator.gather(moments[None].to(accelerator.device)).cpu()
        else:
            every = moments[None]
        for count, mean, m2 in every.tolist():
            self._merge(count, mean, m2)

    def normalize(self, values: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + 1e-8); NaN stays NaN."""
        return (values - self.mean) / math.sqrt(self.variance + 1e-8)

    def _merge(self, count: float, mean: float, m2: float) -> None:
        if count == 0:
            return
        total, gap = self.count + count, mean - self.mean
        self.mean += gap * count / total
        self.m2 += m2 + gap * gap * self.count * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


def batch_moments(values: Tensor) -> Tensor:
    """(3,) fp64 on the CPU: count, mean and sum of squared deviations of the finite values."""
    kept = values.detach().double().flatten().cpu()
    kept = kept[kept.isfinite()]
    mean = kept.mean() if len(kept) else kept.new_zeros(())
    return torch.stack([kept.new_tensor(len(kept)), mean, (kept - mean).square().sum()])

"""Metrics: values over the steps of a logging window, sums over micro-batches and ranks; extremes by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops._fused_run import merge_metrics


class Meters:
    """Values by name: averaged over a window, extremes for names in _max and _min."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = defaultdict(list)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Keep values; tensors are read when they are asked for."""
        for name, value in metrics.items():
            self.values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def reduced(self) -> dict[str, float]:
        """What a log row would say of the values so far."""
        return {name: _reduced(name, values) for name, values in self.values.items()}

    def clear(self) -> None:
        self.values.clear()

    def state_dict(self) -> dict[str, list[float]]:
        return {name: [float(v) for v in values] for name, values in self.values.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.values.update(state)


def _reduced(name: str, values: list[Any]) -> float:
    numbers = [float(v) for v in values]
    if name.endswith("_max"):
        return max(numbers)
    if name.endswith("_min"):
        return min(numbers)
    return sum(numbers) / len(numbers)


class Sums:
    """Named 0-d tensors added up in fp64 on their device, extremes for names in _max and _min."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, new: Mapping[str, Tensor]) -> None:
        merge_metrics(self.values, {name: value.detach().double() for name, value in new.items()})

    def reduced(self, accelerator: Any, divisor: int = 1) -> dict[str, Tensor]:
        """Over all ranks, in one exchange; sums divided by `divisor`."""
        if not self.values:
            return {}
        names, stacked = list(self.values), torch.stack([v.to(accelerator.device) for v in self.values.values()])
        if accelerator.num_processes > 1:
            ranks = accelerator.gather(stacked[None])
            kinds = {"_max": ranks.amax(0), "_min": ranks.amin(0)}
            stacked = torch.stack([kinds.get(name[-4:], ranks.sum(0))[i] for i, name in enumerate(names)])
        scale = max(divisor, 1)
        return {n: v if n[-4:] in ("_max", "_min") else v / scale for n, v in zip(names, stacked, strict=True)}

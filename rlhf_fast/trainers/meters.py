"""Values recorded over the steps of a logging window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


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

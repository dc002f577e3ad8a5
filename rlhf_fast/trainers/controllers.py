"""What steers PPO's coefficients in a run: annealing schedules, and the controller that holds the KL at a target."""

from __future__ import annotations

import math
from collections.abc import Callable

KINDS: dict[str, Callable[[float], float]] = {  # progress in [0, 1] -> how much of the way to the final value
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


def anneal(start: float, end: float, kind: str, progress: float) -> float:
    """The value at `progress` in [0, 1] on the way from start to end; outside of [0, 1] the nearest end's.

        constant: start     linear: start + (end - start) p     cosine: start + (end - start) (1 - cos(pi p)) / 2

    Raises: ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a schedule must be one of {', '.join(KINDS)}, got {kind!r}")
    return start + (end - start) * KINDS[kind](min(max(progress, 0.0), 1.0))


class AnnealedKL:
    """A coefficient that follows a schedule over the run; constant: the fixed coefficient."""

    def __init__(self, coef: float, end: float = 0.0, kind: str = "constant"):
        self.start, self.end, self.kind = coef, end, kind
        self.value = anneal(coef, end, kind, 0.0)

    def update(self, kl: float, sequences: int, progress: float) -> None:
        """After a rollout: `progress` is the share of the run that is done."""
        self.value = anneal(self.start, self.end, self.kind, progress)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class AdaptiveKL:
    """A coefficient that rises while the KL is above its target and falls while it is below.

        e = clip(KL / target - 1, -0.2, 0.2),   coef <- coef (1 + e sequences / horizon)

    KL is in nats per sequence: the sum over its tokens, averaged over the rollout's sequences.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    CLIP = 0.2

    def __init__(self, coef: float, target: float, horizon: float):
        for name, number in {"coef": coef, "target": target, "horizon": horizon}.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {number}")
        self.value, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, sequences: int, progress: float) -> None:
        """After a rollout of `sequences` sequences, on all processes. A KL that is not finite changes nothing."""
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -self.CLIP), self.CLIP)
        self.value *= max(1 + error * sequences / self.horizon, 0.5)  # a rollout may be longer than the horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]

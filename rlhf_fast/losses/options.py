"""Options that all policy losses share: their defaults and what makes them wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_fast.losses.registry import Variant
from rlhf_fast.losses.weights import AGGREGATIONS, CORRECTIONS
from rlhf_fast.ops.kl import check_estimator

if TYPE_CHECKING:
    from rlhf_fast.losses.policy import PolicyLoss

IMPORTANCE_LEVELS = ("token", "sequence", "sequence_token")

DEFAULTS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": None,
    "delta": None,
    "dual_clip": None,
    "beta": 0.0,
    "kl_estimator": "k3",
    "kl_gradient": None,
    "kl_correction": False,
    "entropy_coef": 0.0,
    "aggregation": None,
    "importance_level": "token",
    "max_length": None,
    "normalizer": None,
    "entropy_normalizer": None,
    "top_entropy": None,
    "off_policy_threshold": None,
    "correction": None,
    "correction_min": None,
    "correction_max": 3.0,
}


def own_high(found: Variant, options: Mapping[str, Any]) -> bool:
    """Whether clip_high stands on its own: given, or the kind's clip_high has a meaning without clip_low."""
    return options.get("clip_high") is not None or "clip_low" not in found.defaults


def check_options(o: PolicyLoss) -> None:
    """Raise on an option that cannot be, naming it, what was expected and what came."""

    def choice(name: str, allowed: tuple[str, ...], optional: bool = False) -> None:
        value = getattr(o, name)
        if value not in allowed and not (optional and value is None):
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    choice("aggregation", AGGREGATIONS)
    choice("importance_level", IMPORTANCE_LEVELS)
    choice("correction", CORRECTIONS, optional=True)
    check_estimator("kl_estimator", o.kl_estimator)
    if o.kl_gradient is not None:
        check_estimator("kl_gradient", o.kl_gradient)
    if o.aggregation == "fixed_length" and (o.max_length is None or o.max_length <= 0):
        raise ValueError(f"max_length must be > 0 for aggregation 'fixed_length', got {o.max_length}")
    for name in ("clip_low", "clip_high"):
        if not getattr(o, name) >= 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(o, name)}")
    if o.delta is not None and not o.delta > 0:
        raise ValueError(f"delta must be > 0, got {o.delta}")
    if o.dual_clip is not None and not o.dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, got {o.dual_clip}")
    if o.top_entropy is not None and not 0 <= o.top_entropy <= 1:
        raise ValueError(f"top_entropy must be in [0, 1], got {o.top_entropy}")
    if o.correction_min is not None and not o.correction_min < o.correction_max:
        raise ValueError(f"correction_min must be < correction_max={o.correction_max}, got {o.correction_min}")

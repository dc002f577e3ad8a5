"""Options that all policy losses share: their defaults and what makes them wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_fast import _checks
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
        if not (optional and getattr(o, name) is None):
            _checks.check_choice(name, getattr(o, name), allowed)

    def number(name: str, ok: Callable[[float], bool], expected: str, optional: bool = True) -> None:
        value = getattr(o, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number {expected}, got {_checks.short(value)}")
        if (isinstance(value, int) and abs(value) >= 2**63) or not ok(value):
            raise ValueError(f"{name} must be {expected}, got {_checks.short(value)}")

    choice("aggregation", AGGREGATIONS)
    choice("importance_level", IMPORTANCE_LEVELS)
    choice("correction", CORRECTIONS, optional=True)
    check_estimator("kl_estimator", o.kl_estimator)
    if o.kl_gradient is not None:
        check_estimator("kl_gradient", o.kl_gradient)
    if o.aggregation == "fixed_length" and o.max_length is None:
        raise ValueError("max_length must be > 0 for aggregation 'fixed_length', got None")
    number("max_length", lambda x: x > 0, "> 0")
    for name in ("clip_low", "clip_high"):
        number(name, lambda x: x >= 0, ">= 0", optional=False)
    number("delta", lambda x: x > 0, "> 0")
    number("dual_clip", lambda x: x > 1, "> 1")
    number("top_entropy", lambda x: 0 <= x <= 1, "in [0, 1]")
    for name in ("beta", "entropy_coef"):
        number(name, math.isfinite, "finite", optional=False)
    number("off_policy_threshold", lambda x: x == x, "a number")
    number("correction_max", lambda x: x > 0, "> 0")
    limit = math.inf if o.correction_max is None else o.correction_max
    number("correction_min", lambda x: x < limit, f"< correction_max={o.correction_max}")
    _checks.check_flag("kl_correction", o.kl_correction)
    for name in ("normalizer", "entropy_normalizer"):
        if getattr(o, name) is not None:
            _checks.check_scalar(name, getattr(o, name), positive=True)
    for name, value in o.params.items():
        _checks.check_number(name, value)

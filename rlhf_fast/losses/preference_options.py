"""The options of a preference loss: the mix of kinds, and what is sound together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_fast import _checks
from rlhf_fast.losses.preference_kinds import F_DIVERGENCES, pair_variant
from rlhf_fast.losses.registry import unknown

if TYPE_CHECKING:
    from rlhf_fast.losses.preference import PreferenceLoss


def mix(kind: Any, weights: Sequence[float] | None, rpo_alpha: float | None) -> tuple[tuple[str, float], ...]:
    """((name, weight), ...) of whatever names the losses."""
    if isinstance(kind, Mapping):
        if weights is not None:
            raise ValueError(f"loss_weights goes with a list of kinds, got it beside the dict {dict(kind)}")
        names, weights = list(kind), list(kind.values())
    else:
        if not isinstance(kind, (str, Sequence)):
            raise TypeError(f"kind must be a name, a list of names or a dict of weights, got {type(kind).__name__}")
        names = [kind] if isinstance(kind, str) else list(kind)
        if weights is not None and not isinstance(weights, Sequence):
            raise TypeError(f"loss_weights must be a list of numbers, got {type(weights).__name__}")
        weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must have one number per kind, {len(names)}, got {len(weights)}")
    if rpo_alpha is not None:
        names, weights = [*names, "sft"], [*weights, rpo_alpha]
    for name in names:
        pair_variant(name)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"kind must name at least one loss, each once (rpo_alpha is an 'sft' term), got {names}")
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight != weight:
            raise ValueError(f"the weight of {name!r} must be a number, got {weight!r}")
    return tuple(zip(names, (float(w) for w in weights), strict=True))


def check_options(o: PreferenceLoss) -> None:
    _checks.check_positive("beta", o.beta)
    names = [name for name, _ in o.kinds]
    if not isinstance(o.f_divergence, str) or o.f_divergence not in F_DIVERGENCES:
        raise ValueError(unknown("f_divergence", o.f_divergence, F_DIVERGENCES))
    unsound = [v.name for v in o.variants if not v.difference]
    if o.f_divergence != "reverse_kl" and unsound:
        raise ValueError(
            f"f_divergence={o.f_divergence!r} holds for losses of the score difference alone, got {unsound[0]!r}"
        )
    e = o.label_smoothing
    for name, value in {"label_smoothing": e, "ld_alpha": o.ld_alpha, "f_alpha": o.f_alpha}.items():
        optional = name != "label_smoothing"
        if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number, got {_checks.short(value)}")
    for flag in ("reference_free", "average_logprob"):
        _checks.check_flag(flag, getattr(o, flag))
    if not 0 <= e <= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5], got {e}")
    if e != 0 and not any(v.smoothing for v in o.variants):
        raise ValueError(f"label_smoothing must be 0 for {', '.join(names)}, which does not use it, got {e}")
    if "robust" in names and e >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5) for 'robust', got {e}")
    if "exo_pair" in names and e <= 0:
        raise ValueError(f"label_smoothing must be > 0 for 'exo_pair' (the paper: 1e-3), got {e}")
    if o.ld_alpha is not None and not 0 <= o.ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {o.ld_alpha}")
    if o.weighting is not None and o.weighting != "wpo":
        raise ValueError(f"weighting must be None or 'wpo', got {o.weighting!r}")
    if o.weighting is not None and o.needs_batch:
        raise ValueError(f"weighting must be None for {', '.join(names)}: sorting parts pairs from their weights")
    average = o.params.get("sft_average", "token")
    if average not in ("token", "sequence"):
        raise ValueError(f"sft_average must be 'token' or 'sequence', got {average!r}")
    if "discopop_tau" in o.params:
        _checks.check_positive("discopop_tau", o.params["discopop_tau"])

"""Names of the policy losses: what a variant is, how it is registered, how a wrong name is answered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast._checks import short
from rlhf_fast.ops.policy import Form

if TYPE_CHECKING:
    from rlhf_fast.losses.policy import PolicyLoss
    from rlhf_fast.losses.segments import Segments


class PolicyTerms(NamedTuple):
    """What a policy-loss function sees: scored tokens (n,) of whole sequences where the variant asks for them.

    `log_ratio` and `ratio` are at the importance level of the options (one value per token, equal along a sequence at
    level "sequence"), clamped at +-20 in the log; `token_log_ratio` is logprob - old_logprob itself.
    """

    logprob: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    token_log_ratio: Tensor
    segments: Segments | None
    batch: Mapping[str, Tensor]


PolicyFunction = Callable[[PolicyTerms, "PolicyLoss"], Any]


class Variant(NamedTuple):
    """A registered policy loss.

    `fused`: it is the clip family's formula, so at token level the fused op may stand in for `function`. `form`: of the
    options, the same formula in the eager CPU pass, for other kinds at token level. `segments`: it needs whole
    sequences. `absorbs_correction`: it takes the rollout correction as a log-weight in `batch["log_correction"]`
    instead of as a factor. `prepare`: more per-token tensors from the whole batch.
    """

    name: str
    function: PolicyFunction
    defaults: dict[str, Any]
    params: dict[str, float]
    fused: bool
    segments: bool
    absorbs_correction: bool
    prepare: Callable[..., dict[str, Tensor]] | None
    form: Callable[[PolicyLoss], Form] | None


_VARIANTS: dict[str, Variant] = {}


def register_policy_loss(
    name: str,
    *,
    params: Mapping[str, float] | None = None,
    fused: bool = False,
    segments: bool = False,
    absorbs_correction: bool = False,
    prepare: Callable[..., dict[str, Tensor]] | None = None,
    form: Callable[[PolicyLoss], Form] | None = None,
    **defaults: Any,
) -> Callable[[PolicyFunction], PolicyFunction]:
    """Decorator: make a function of (terms, options) a policy loss called `name`.

    The function returns the loss of each token (n,), before aggregation; or (loss, indicators) with a dict of (n,)
    tensors that become metrics, averaged over tokens. KL, entropy, masks, corrections and aggregation are composed
    around it, and its gradient comes from autograd over these small vectors.

    Args:
        name: for `PolicyLoss(name)` and `policy_loss(kind=name)`. Taken names are an error.
        params: the function's own numbers and their defaults, read as `options.params["..."]`.
        fused, segments, absorbs_correction, prepare, form: see `Variant`.
        defaults: defaults of PolicyLoss's options for this kind (aggregation="token_mean", clip_high=0.28, ...).
    Example:
        >>> @register_policy_loss("squared_ratio", aggregation="token_mean")
        ... def squared_ratio(terms, options):
        ...     return -terms.advantages * terms.ratio + 0.5 * (terms.ratio - 1).square()
    """

    def register(function: PolicyFunction) -> PolicyFunction:
        if name in _VARIANTS:
            raise ValueError(f"policy loss {name!r} is already registered")
        own = dict(params or {})
        _VARIANTS[name] = Variant(name, function, defaults, own, fused, segments, absorbs_correction, prepare, form)
        return function

    return register


def policy_loss_kinds() -> list[str]:
    """The registered names."""
    return sorted(_VARIANTS)


def variant(name: str) -> Variant:
    """The variant called `name`; ValueError naming the nearest one."""
    if not isinstance(name, str) or name not in _VARIANTS:
        raise ValueError(unknown("policy loss", name, _VARIANTS))
    return _VARIANTS[name]


def made_once(cls: type, kind: Any, options: Mapping[str, Any], variant_of: Callable[[str], Any]) -> Any:
    """cls(kind, **options): the one that an earlier call made, where the options are plain values."""
    plain = type(kind) is str and all(v is None or type(v) in (int, float, str, bool) for v in options.values())
    if not plain or torch.compiler.is_compiling():
        return cls(kind, **options)
    return _made(cls, kind, variant_of(kind).function, **options)


@lru_cache(maxsize=64, typed=True)
def _made(cls: type, kind: str, function: Callable, /, **options: Any) -> Any:  # function: names may change
    return cls(kind, **options)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message about an unknown name: the nearest known one first."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown {what} {short(name)}{hint} Known: {', '.join(known)}"
        if hint
        else (f"unknown {what} {short(name)}; known: {', '.join(known)}")
    )

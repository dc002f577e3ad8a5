"""What a policy loss does once with the whole batch: checks, and per-token weights from global counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses.registry import unknown, variant
from rlhf_fast.losses.segments import Segments
from rlhf_fast.losses.weights import aggregation_factor, log_weight_share, masked_quantile, rollout_correction
from rlhf_fast.ops._sequences import bounded
from rlhf_fast.ops.kl import keep
from rlhf_fast.ops.policy import spread_numbers

if TYPE_CHECKING:
    from rlhf_fast.losses.policy import PolicyLoss

PER_TOKEN = ("old_logprob", "ref_logprob", "rollout_logprob", "old_entropy", "logprob", "noise")
NUMBERS = ("normalizer", "entropy_normalizer", "num_tokens", "entropy_threshold")
EITHER = ("advantages", "importance_weight")  # one per token, or one per sequence
KEYS = (*PER_TOKEN, *NUMBERS, *EITHER)


def prepare_batch(
    o: PolicyLoss,
    batch: Mapping[str, Any],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    length: int | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """The batch that chunks are cut from: see `PolicyLoss.prepare`.

    `length`: of every sequence, instead of cu_seqlens. `whole`: the loss takes this batch in one call, never in chunks;
    what is constant along a sequence then need not be spread over its tokens.
    """
    for name in batch:
        if name not in KEYS:
            raise ValueError(unknown("batch key", name, KEYS))
    if batch.get("advantages") is None:
        raise ValueError("batch must hold 'advantages', (N,) or one per sequence")
    _checks.check_float("advantages", batch["advantages"])
    n = _count(batch, mask, cu_seqlens)
    device = batch["advantages"].device
    mask = None if mask is None else mask.reshape(-1).bool().contiguous()
    given = {name: _per_token(name, batch[name], n) for name in PER_TOKEN if batch.get(name) is not None}
    either = {name: batch[name] for name in EITHER if batch.get(name) is not None}
    known = [t for name, t in given.items() if name != "noise"] + [*either.values()]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in known) else torch.float32
    segments = _segments(cu_seqlens, length, n, mask, device)
    if segments is None and (
        o.needs_segments or o.aggregation == "seq_mean_token_mean" or _correction_level(o) != "token"
    ):
        raise ValueError(f"cu_seqlens must be given with (N,) input for policy loss {o.kind!r}: it needs sequences")
    numbers = {name: batch[name] for name in NUMBERS if batch.get(name) is not None}
    for name, value in numbers.items():
        _checks.check_scalar(name, value, positive=name != "entropy_threshold")
        numbers[name] = _exact(value)
    normalizer = numbers.get("normalizer", _exact(o.normalizer))
    if o.aggregation in ("seq_mean_token_sum", "fixed_length") and segments is None and normalizer is None:
        raise ValueError(f"cu_seqlens or normalizer must be given with (N,) input for {o.aggregation!r}")
    either = {name: _per_token_or_sequence(name, t, segments, n).to(dtype) for name, t in either.items()}
    advantages, importance = either["advantages"], either.get("importance_weight")
    if importance is not None and o.correction is not None:
        raise ValueError(f"importance_weight takes the place of a correction, got correction={o.correction!r} too")
    compact = whole and o.takes_whole and importance is None and device.type == "cpu"
    compact = compact and (segments is None or segments.count != n)
    if not compact:
        given = {name: tensor if mask is None else keep(tensor, mask) for name, tensor in given.items()}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    tokens = _count_tokens(n, mask, segments, device)
    factor = aggregation_factor(o.aggregation, tokens, segments, normalizer, o.max_length)
    factor = torch.as_tensor(factor, dtype=dtype, device=device)
    if segments is not None and segments.bad is not None:
        factor = factor.masked_fill(segments.bad, torch.nan)
    num_tokens = numbers.get("num_tokens", normalizer if o.aggregation == "token_mean" else None)
    num_tokens = tokens if num_tokens is None else num_tokens
    out: dict[str, Any] = {"inv_tokens": torch.as_tensor(1 / num_tokens, dtype=dtype, device=device)}
    valid = None
    if compact:
        out.update(advantages=advantages, weight=factor.reshape(-1), mask=mask)
        out.update(offsets=None if segments is None else segments.offsets, length=length or 0)
    else:
        valid = torch.ones(n, dtype=dtype, device=device) if mask is None else mask.to(dtype)
        if segments is not None:
            segments.valid = valid
        advantages = advantages if advantages.numel() == n else segments.spread(advantages)
        out["advantages"] = advantages if mask is None else keep(advantages, mask)
        out["weight"] = valid * (factor if factor.dim() == 0 else segments.spread(factor))
    if o.needs_segments:
        out.update({"segments": segments} if whole else {"segment_ids": segments.ids, "num_segments": segments.count})
    _add_logprobs(o, out, given)
    if not compact:
        _add_policy_weight(o, out, given, importance, valid, segments)
    _add_entropy(o, out, given, numbers, normalizer, valid, tokens)
    return out


def by_token(batch: Mapping[str, Any], n: int) -> Mapping[str, Any]:
    """The batch with one number per token, masked, where it has them per sequence (see `prepare_batch`)."""
    if "mask" not in batch:
        return batch
    weight, mask = batch["weight"], batch["mask"]
    valid = torch.ones(n, dtype=weight.dtype, device=weight.device) if mask is None else mask.to(weight.dtype)
    if batch.get("segments") is not None:
        batch["segments"].valid = valid
    spread = lambda t: spread_numbers(t, n, batch["offsets"], batch["length"])  # noqa: E731
    out = {**batch, "weight": spread(weight) * valid, "advantages": keep(spread(batch["advantages"]), valid)}
    if "entropy_weight" in batch:
        out["entropy_weight"] = spread(batch["entropy_weight"]) * valid
    return out


def _segments(
    cu_seqlens: Tensor | None, length: int | None, n: int, mask: Tensor | None, device: torch.device
) -> Segments | None:
    """The sequences of the batch; None where nothing says them. Whoever needs `valid` sets it."""
    if mask is None and (cu_seqlens is not None or length is not None):
        mask = torch.ones((), dtype=torch.bool, device=device).expand(n).contiguous()
    if length is not None:
        return Segments(None, n // max(length, 1), None, length=length, mask=mask)
    if cu_seqlens is None:
        return None
    if torch.compiler.is_compiling():
        pass
    elif cu_seqlens.is_cuda and device.type == "cuda":  # a look at the numbers would wait for the device
        _checks.check_offsets("cu_seqlens", cu_seqlens, n)
        offsets, bad = bounded(cu_seqlens.to(device=device, dtype=torch.int64), n)
        return Segments(None, cu_seqlens.shape[0] - 1, None, offsets=offsets, mask=mask, bad=bad)
    else:
        _checks.check_cu_seqlens("cu_seqlens", cu_seqlens, n)
    offsets = cu_seqlens.to(device=device, dtype=torch.int64).contiguous()
    return Segments(None, cu_seqlens.shape[0] - 1, None, offsets=offsets, mask=mask)


def _count_tokens(n: int, mask: Tensor | None, segments: Segments | None, device: torch.device) -> Tensor:
    """() float64: the tokens that count, at least 1."""
    if mask is None:
        return torch.full((), max(n, 1), dtype=torch.float64, device=device)
    return (mask.sum() if segments is None else segments.tokens().sum()).clamp(min=1).double()


def _count(batch: Mapping[str, Any], mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """N, from whatever says it."""
    if mask is not None:
        return mask.numel()
    for name in PER_TOKEN:
        if batch.get(name) is not None:
            return batch[name].numel()
    return batch["advantages"].numel() if cu_seqlens is None else int(cu_seqlens[-1])


def _exact(number: Tensor | float | None) -> Tensor | float | None:
    """A count given as a tensor in float64: its reciprocal is formed before it meets the weights' dtype."""
    return number.double() if isinstance(number, Tensor) else number


def _per_token(name: str, value: Any, n: int) -> Tensor:
    """A constant (N,) tensor."""
    _checks.check_float(name, value)
    if value.numel() != n:
        raise ValueError(f"{name} must be (N,)=({n},), got {_checks.shape_str(value.shape)}")
    return value.detach().reshape(-1)


def _per_token_or_sequence(name: str, value: Any, segments: Segments | None, n: int) -> Tensor:
    """(N,) or one per sequence, (S,)."""
    _checks.check_float(name, value)
    value = value.detach().reshape(-1)
    if value.numel() == n or (segments is not None and value.numel() == segments.count):
        return value
    per_sequence = "" if segments is None else f" or (S,)=({segments.count},)"
    raise ValueError(f"{name} must be (N,)=({n},){per_sequence}, got {_checks.shape_str(value.shape)}")


def _add_logprobs(o: PolicyLoss, out: dict[str, Any], given: Mapping[str, Tensor]) -> None:
    if "old_logprob" in given:
        out["old_logprob"] = given["old_logprob"]
    if o.beta != 0:
        if "ref_logprob" not in given:
            raise ValueError(f"ref_logprob must be given for beta={o.beta}, got None")
        out["ref_logprob"] = given["ref_logprob"]
    behavior = given.get("rollout_logprob", given.get("old_logprob"))
    if o.off_policy_threshold is not None and behavior is not None:
        out["behavior_logprob"] = behavior


def _add_policy_weight(
    o: PolicyLoss,
    out: dict[str, Any],
    given: Mapping[str, Tensor],
    importance: Tensor | None,
    valid: Tensor,
    segments: Segments | None,
) -> None:
    """Factors of the policy term: the rollout correction, and what the kind itself selects."""
    found = variant(o.kind)
    if importance is not None:
        share = valid
        if importance.numel() != valid.numel():
            importance, share = segments.spread(importance), valid / segments.spread(segments.lengths().to(valid.dtype))
        importance = keep(importance, valid)
        if found.absorbs_correction:
            out["log_correction"] = log_weight_share(importance, share)
        else:
            _multiply(out, "policy_weight", importance)
    old, now = given.get("old_logprob"), given.get("logprob", given.get("old_logprob"))
    if o.correction is not None:
        trainer = old if old is not None else now
        if trainer is None or "rollout_logprob" not in given:
            missing = "rollout_logprob" if trainer is not None else "old_logprob"
            raise ValueError(f"{missing} must be given for correction={o.correction!r}, got None")
        gap = (trainer - given["rollout_logprob"]).nan_to_num(nan=0.0)
        weight, log_weight, metrics = rollout_correction(
            o.correction, o.correction_min, o.correction_max, gap, valid, segments
        )
        if found.absorbs_correction:
            out["log_correction"] = log_weight
        else:
            _multiply(out, "policy_weight", weight)
        out.update({f"metric/{name}": value for name, value in metrics.items()})
    if found.prepare is not None:
        if now is None:
            raise ValueError(f"old_logprob must be given for policy loss {o.kind!r}, got None")
        noise = {"noise": given["noise"]} if "noise" in given else {}
        extra = found.prepare(o, noise, out["advantages"], now, old, valid)
        if "policy_weight" in extra:
            _multiply(out, "policy_weight", extra.pop("policy_weight"))
        out.update(extra)


def _add_entropy(
    o: PolicyLoss,
    out: dict[str, Any],
    given: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    normalizer: Tensor | float | None,
    valid: Tensor | None,
    tokens: Tensor,
) -> None:
    """The mask of top_entropy and the weights of the entropy bonus."""
    selected = valid
    if o.top_entropy is not None:
        threshold = numbers.get("entropy_threshold")
        if "old_entropy" in given:
            if threshold is None:
                threshold = masked_quantile(given["old_entropy"], valid, 1 - o.top_entropy)
            selected = valid * (given["old_entropy"] >= threshold)
            _multiply(out, "policy_weight", selected)
        elif threshold is not None:
            out["entropy_threshold"] = torch.as_tensor(threshold, dtype=valid.dtype, device=valid.device)
        else:
            raise ValueError("top_entropy needs old_entropy (N,) or a number entropy_threshold in the batch, got None")
    if o.entropy_coef == 0:
        return
    count = numbers.get("entropy_normalizer", _exact(o.entropy_normalizer))
    if count is None:
        if o.top_entropy is None and o.aggregation == "token_mean":
            count = normalizer
        elif normalizer is not None or "entropy_threshold" in out:
            raise ValueError(
                "entropy_normalizer, the count of tokens behind the entropy bonus, must be given "
                f"with a normalizer of {o.aggregation!r} or an entropy_threshold, got None"
            )
    if selected is None:  # the op masks: one number for all tokens
        count = tokens if count is None else count
        out["entropy_weight"] = torch.as_tensor(1 / count, dtype=out["weight"].dtype, device=tokens.device).reshape(1)
        return
    count = selected.double().sum().clamp(min=1) if count is None else count
    out["entropy_weight"] = selected * torch.as_tensor(1 / count, dtype=selected.dtype, device=selected.device)


def _multiply(out: dict[str, Any], name: str, factor: Tensor) -> None:
    out[name] = out[name] * factor if name in out else factor


def _correction_level(o: PolicyLoss) -> str:
    return "token" if o.correction is None else o.correction.rsplit("_", 1)[0]

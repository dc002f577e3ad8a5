"""Flat batches of pairs: layout, checks, and the sums over tokens that preference losses are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses.registry import unknown
from rlhf_fast.losses.segments import Segments
from rlhf_fast.ops.kl import keep

if TYPE_CHECKING:
    from rlhf_fast.losses.preference import PreferenceLoss

KEYS = (
    *("is_chosen", "ref_logprob", "ref_chosen", "ref_rejected", "pair_weight", "log_sum_sq"),
    *("normalizer", "chosen_tokens", "bco_delta"),
)


class PairSegments(NamedTuple):
    """Offsets of the pairs (P+1,), and which tokens are of chosen sequences (N,) bool."""

    segments: Tensor
    is_chosen: Tensor


def pair_segments(cu_seqlens: Tensor, total: int) -> PairSegments:
    """Segments and `is_chosen` for sequences in the order chosen, rejected, chosen, rejected, ...

    Args:
        cu_seqlens: (2P+1,) int, offsets of the sequences.
        total: N, the number of tokens, cu_seqlens[-1]; given so that nothing waits for the device.
    Example:
        >>> pair_segments(torch.tensor([0, 3, 5, 6, 9]), 9).segments
        tensor([0, 5, 9])
    """
    _checks.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() % 2 != 1:
        raise ValueError(f"cu_seqlens must be (2P+1,), got {_checks.shape_str(cu_seqlens.shape)}")
    odd = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device) % 2 == 0
    return PairSegments(cu_seqlens[::2], torch.repeat_interleave(odd, cu_seqlens.diff().long(), output_size=total))


def check_two(name: str, pair: object) -> None:
    """Raise unless `pair` is a tuple or list of two."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        got = len(pair) if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise ValueError(f"{name} must be two tensors, of chosen and rejected, got {got}")


def check_pair_weight(o: PreferenceLoss, pair_weight: Tensor | None) -> None:
    """Raise where sorting would part pairs from their weights."""
    if pair_weight is not None and o.needs_batch:
        raise ValueError("pair_weight must be absent for losses that sort over the batch (aot, aot_unpaired)")


class FlatPairs(NamedTuple):
    """Padded pairs as one flat batch."""

    logprob: Tensor  # (N,)
    mask: Tensor  # (N,) bool
    segments: Tensor  # (B+1,)
    batch: dict[str, Any]


def flatten_pairs(
    chosen: Tensor,  # (B, T)
    rejected: Tensor,  # (B, T')
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    mask: tuple[Tensor, Tensor] | None,
    log_sum_sq: tuple[Tensor, Tensor] | None,
) -> FlatPairs:
    """Each pair's row of both tensors side by side."""
    shapes = {"chosen": chosen.shape, "rejected": rejected.shape}

    def joined(name: str, pair: tuple[Tensor, Tensor]) -> Tensor:
        check_two(name, pair)
        for (side, shape), tensor in zip(shapes.items(), pair, strict=True):
            _checks.check_shape(f"{name} of {side}", tensor, shape, "(B, T)")
            _checks.check_same_device(chosen=chosen, **{f"{name} of {side}": tensor})
            if tensor.dtype not in _checks.MASK_DTYPES or (name != "mask" and not tensor.is_floating_point()):
                raise ValueError(
                    f"{name} of {side} must be a usual float dtype{', or bool' * (name == 'mask')}, got {tensor.dtype}"
                )
        return torch.cat(pair, dim=1).reshape(-1)

    rows, width = chosen.shape[0], chosen.shape[1] + rejected.shape[1]
    dtype = torch.float64 if torch.float64 in (chosen.dtype, rejected.dtype) else torch.float32
    device = chosen.device
    batch: dict[str, Any] = {"is_chosen": (torch.arange(width, device=device) < chosen.shape[1]).repeat(rows)}
    if ref_chosen is not None and ref_chosen.dim() == 2:
        batch["ref_logprob"] = joined("the reference", (ref_chosen, ref_rejected))
    elif ref_chosen is not None:
        batch.update(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if log_sum_sq is not None:
        batch["log_sum_sq"] = joined("log_sum_sq", log_sum_sq)
    kept = torch.ones(rows * width, dtype=torch.bool, device=device) if mask is None else joined("mask", mask).bool()
    logprob = torch.cat([chosen.to(dtype), rejected.to(dtype)], dim=1).reshape(-1)
    return FlatPairs(logprob, kept, torch.arange(rows + 1, device=device) * width, batch)


def prepare_pairs(
    o: PreferenceLoss, batch: Mapping[str, Any], mask: Tensor | None, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    """The batch that chunks are cut from: see `PreferenceLoss.prepare`."""
    given = {name: value for name, value in batch.items() if value is not None}
    for name in given:
        if name not in KEYS:
            raise ValueError(unknown("batch key", name, KEYS))
    if cu_seqlens is None:
        raise ValueError("segments must be given, the (P+1,) offsets of the pairs, got None")
    if "is_chosen" not in given:
        raise ValueError("batch must hold 'is_chosen' (N,) bool: which tokens are of chosen sequences")
    is_chosen = given["is_chosen"]
    _checks.check_tensor("is_chosen", is_chosen)
    n, pairs, device = is_chosen.numel(), cu_seqlens.shape[0] - 1, is_chosen.device
    if is_chosen.dtype != torch.bool or is_chosen.dim() != 1:
        raise ValueError(f"is_chosen must be (N,) bool, got {_checks.shape_str(is_chosen.shape)} {is_chosen.dtype}")
    if mask is None:
        mask = torch.ones(n, dtype=torch.bool, device=device)
    _checks.check_shape("is_chosen", is_chosen, mask.shape, "(N,)")
    if not torch.compiler.is_compiling():
        _checks.check_cu_seqlens("segments", cu_seqlens, n)
    for name, shape, dims in (
        *((name, (n,), "(N,)") for name in ("ref_logprob", "log_sum_sq")),
        *((name, (pairs,), "(P,)") for name in ("ref_chosen", "ref_rejected", "pair_weight")),
    ):
        if name in given:
            _checks.check_float(name, given[name])
            _checks.check_shape(name, given[name], shape, dims)
            _checks.check_same_device(is_chosen=is_chosen, **{name: given[name]})
    segments = Segments.from_cu_seqlens(cu_seqlens.to(device), mask)
    out: dict[str, Any] = {"is_chosen": is_chosen, "valid": mask, "segment_ids": segments.ids, "num_segments": pairs}
    chosen_length, rejected_length = _split_sum(mask.long(), out)
    valid = (chosen_length > 0) & (rejected_length > 0)
    check_pair_weight(o, given.get("pair_weight"))
    if "pair_weight" in given:
        valid = valid & (given["pair_weight"] != 0)
        out["pair_weight"] = given["pair_weight"].detach()
    out.update(valid_pair=valid, chosen_length=chosen_length.clamp(min=1), rejected_length=rejected_length.clamp(min=1))
    if o.ld_alpha is not None:
        shortest = torch.minimum(chosen_length, rejected_length)
        out["tail"] = _positions(out, cu_seqlens) > shortest.index_select(0, segments.ids)
    if o.weighting is not None and "log_sum_sq" in given:
        out["log_sum_sq"] = given["log_sum_sq"].detach()
    _add_reference(o, out, given)
    own = {"normalizer": valid.sum(), "chosen_tokens": (chosen_length * valid).sum()}
    for name, count in own.items():
        out[name] = number(name, given[name], device) if name in given else count.clamp(min=1)
    if "bco_delta" in given:
        out["bco_delta"] = number("bco_delta", given["bco_delta"], device)
    return out


def _add_reference(o: PreferenceLoss, out: dict[str, Any], given: Mapping[str, Any]) -> None:
    """The reference's sums per sequence."""
    if o.reference_free:
        return
    if "ref_logprob" in given:
        ref = given["ref_logprob"].detach()
        ref = ref if ref.dtype == torch.float64 else ref.float()
        out["ref_chosen"], out["ref_rejected"] = token_sums(o, ref, out)[:2]
    elif "ref_chosen" in given and "ref_rejected" in given:
        out.update(ref_chosen=given["ref_chosen"].detach(), ref_rejected=given["ref_rejected"].detach())
    elif o.needs_reference:
        raise ValueError(
            f"batch must hold 'ref_logprob' (N,), or 'ref_chosen' and 'ref_rejected' (P,), for kind {o.kinds[0][0]!r}"
        )


def token_sums(o: PreferenceLoss, values: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P,) sums over the tokens of chosen and rejected, desensitised by ld_alpha; and both without that."""
    raw = _split_sum(values, batch)
    if "tail" not in batch:
        return *raw, *raw
    return *_split_sum(torch.where(batch["tail"], o.ld_alpha * values, values), batch), *raw


def _split_sum(values: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(n,) -> twice (P,): sums over the valid chosen and rejected tokens of each pair."""
    slot = 2 * batch["segment_ids"] + (~batch["is_chosen"]).long()
    zeros = values.new_zeros(2 * batch["num_segments"])
    sums = zeros.index_add(0, slot, keep(values, batch["valid"]))
    return sums[0::2], sums[1::2]


def _positions(batch: Mapping[str, Any], cu_seqlens: Tensor) -> Tensor:
    """(N,): 1, 2, ... for the valid tokens of each sequence, chosen and rejected counted apart."""
    starts = cu_seqlens[:-1].long()

    def rank(counted: Tensor) -> Tensor:
        before = torch.nn.functional.pad(counted.long().cumsum(0), (1, 0))
        return before[1:] - before[starts].index_select(0, batch["segment_ids"])

    is_chosen, valid = batch["is_chosen"], batch["valid"]
    return torch.where(is_chosen, rank(is_chosen & valid), rank(~is_chosen & valid))


def number(name: str, value: Any, device: torch.device) -> Tensor:
    """A 0-d tensor, so that no chunk and no compiled graph depends on the number."""
    _checks.check_scalar(
        name, value, positive=name in ("normalizer", "chosen_tokens"), measured=name in ("kl", "bco_delta")
    )
    dtype = torch.float64 if isinstance(value, float) else None
    value = torch.as_tensor(value, device=device, dtype=dtype)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {_checks.shape_str(value.shape)}")
    return value.detach()

"""From a padded batch and its mask to the flat layout, and back; targets that are aligned once and for all.

The ops' native layout is flat: per-token tensors (N,) with `cu_seqlens` (B+1,) int32, as in flash-attention's varlen
calls. What is left of a padded batch is where its tokens lie:

    flat = pack(mask)
    ids = flat.take(input_ids)                                     # (B, T) -> (N,)
    target = next_tokens(ids, flat.cu_seqlens, scored=flat.take(completion_mask))
    hidden = trunk(ids[None], position_ids=flat.position_ids[None]).last_hidden_state[0]
    out = fused_linear_loss(hidden, weight, target, PolicyLoss("dapo"), batch=..., segments=flat.cu_seqlens)
    logprob = flat.put(out.logprob)                                # (N,) -> (B, T)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks


class Flat(NamedTuple):
    """Where the N tokens of a padded batch (B, T) lie."""

    cu_seqlens: Tensor  # (B+1,) int32
    slots: Tensor  # (N,) int64, into the flattened (B, T)
    shape: tuple[int, int]  # B, T

    @property
    def position_ids(self) -> Tensor:
        """(N,) int64: the place of each token within its sequence."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        return torch.arange(len(self.slots), device=self.slots.device) - starts.repeat_interleave(lengths)

    def take(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...). Differentiable; what stands at padding, NaN too, has no part in it.

        Raises: ValueError naming both shapes where the first two dimensions are not the mask's.
        """
        _checks.check_tensor("padded", padded)
        if tuple(padded.shape[:2]) != self.shape:
            want, got = _checks.shape_str(self.shape)[:-1], _checks.shape_str(padded.shape)
            raise ValueError(f"padded must be (B, T, ...)={want}, ...), got {got}")
        return padded.flatten(0, 1)[self.slots]

    def put(self, flat: Tensor, fill: float = 0) -> Tensor:
        """(N, ...) -> (B, T, ...), `fill` at padding. Differentiable.

        Raises: ValueError where the first dimension is not N.
        """
        _checks.check_tensor("flat", flat)
        if flat.dim() < 1 or flat.shape[0] != len(self.slots):
            raise ValueError(f"flat must be (N, ...) with N={len(self.slots)}, got {_checks.shape_str(flat.shape)}")
        rows, columns = self.shape
        out = flat.new_full((rows * columns, *flat.shape[1:]), fill)
        return out.index_put((self.slots,), flat).unflatten(0, self.shape)


def pack(mask: Tensor) -> Flat:
    """The flat layout of the tokens that count, row by row in their order; masked ones inside a row are left out.

    Args:
        mask: (B, T) bool, or numbers of which 0 is false. True = a token, wherever the padding is.
    Raises: ValueError naming shape or dtype of a mask that is none.
    Notes: one host synchronisation on a GPU, to learn N.
    Example:
        >>> flat = pack(torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]))
        >>> flat.cu_seqlens.tolist(), flat.position_ids.tolist()
        ([0, 2, 4, 4], [0, 1, 0, 1])
        >>> flat.take(torch.tensor([[5, 6, 0], [0, 7, 8], [0, 0, 0]])).tolist()
        [5, 6, 7, 8]
    """
    _checks.check_tensor("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), got {_checks.shape_str(mask.shape)}")
    _checks.check_mask("mask", mask, mask.shape, "(B, T)")
    mask = mask.bool()
    return Flat(cu_seqlens(mask.sum(1)), mask.flatten().nonzero().squeeze(1), tuple(mask.shape))


def cu_seqlens(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B+1,) int32: where each sequence begins, and the end.

    Raises: ValueError on a shape, a dtype or (on the CPU) a length that is none.
    Example:
        >>> cu_seqlens(torch.tensor([3, 0, 2])).tolist()
        [0, 3, 3, 5]
    """
    _checks.check_tensor("lengths", lengths)
    if lengths.dim() != 1 or lengths.dtype not in _checks.INTEGER_DTYPES:
        raise ValueError(f"lengths must be (B,) integers, got {_checks.shape_str(lengths.shape)} {lengths.dtype}")
    if lengths.device.type == "cpu" and bool((lengths < 0).any()):
        row = int((lengths < 0).nonzero()[0])
        raise ValueError(f"lengths must not be negative, got {int(lengths[row])} in row {row}")
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def next_tokens(
    ids: Tensor, cu_seqlens: Tensor | None = None, *, scored: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Targets aligned to the hidden states: what position i predicts, the token at i + 1 of the same sequence.

    The last position of a sequence predicts nothing. This is the only shift there is: the ops never shift.

    Args:
        ids: (N,) with cu_seqlens, or (B, T), integers.
        cu_seqlens: (B+1,) int32 or int64: ends of the sequences of flat ids.
        scored: of the shape of `ids`. True = this *token* counts (a completion's, not a prompt's or padding):
            the position before it is the one that is scored. The first token of a sequence has none and is left
            out; behind padding on the left, which looks like a token here, it must not be among them.
        ignore_index: what stands where nothing is predicted.
    Returns: int64, of the shape of `ids`.
    Raises: ValueError naming the tensor, expected and actual shape or dtype.
    Example:
        >>> next_tokens(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 3, 5])).tolist()
        [6, 7, -100, 9, -100]
        >>> next_tokens(torch.tensor([[5, 6, 7]]), scored=torch.tensor([[False, False, True]])).tolist()
        [[-100, 7, -100]]
    """
    _checks.check_tensor("ids", ids)
    if ids.dtype not in _checks.INTEGER_DTYPES:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    wanted, what = (2, "(B, T), or (N,) with cu_seqlens") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
    if ids.dim() != wanted:
        raise ValueError(f"ids must be {what}, got {_checks.shape_str(ids.shape)}")
    kept = ids.long()
    if scored is not None:
        _checks.check_mask("scored", scored, ids.shape, "ids' shape")
        kept = kept.masked_fill(~scored.bool(), ignore_index)
    target = torch.nn.functional.pad(kept[..., 1:], (0, min(1, ids.shape[-1])), value=ignore_index)
    if cu_seqlens is None:
        return target
    _checks.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        _checks.check_cu_seqlens("cu_seqlens", cu_seqlens, ids.shape[0])
    ends = cu_seqlens[1:].to(target.device).long() - 1
    # An empty sequence at the very start has no last position; elsewhere its end is that of the sequence before it.
    return target.index_fill(0, ends[ends >= 0], ignore_index)

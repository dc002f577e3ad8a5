"""How a batch of sequences lies in memory: packed (N,) with cu_seqlens, or padded (B, T); either with a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks


class Layout(NamedTuple):
    """`batch` sequences over N = `tokens` flat positions, cut by `offsets` or each `length` long."""

    offsets: Tensor | None  # (B+1,) int64
    batch: int
    length: int
    tokens: int
    mask: Tensor | None  # (N,) bool, contiguous

    def segment_ids(self, device: torch.device) -> Tensor:
        """(N,) int64: the sequence of each position."""
        positions = torch.arange(self.tokens, device=device)
        if self.offsets is None:
            return positions // max(self.length, 1)
        inner = self.offsets[1:-1].contiguous()
        return torch.searchsorted(inner, positions, right=True)

    def ends(self, device: torch.device) -> Tensor:
        """(B,) int64: one past the last position that counts; 0 for a sequence without any."""
        if self.mask is None:
            if self.offsets is not None:
                return self.offsets[1:]
            return torch.arange(1, self.batch + 1, device=device) * self.length
        after = torch.where(self.mask, torch.arange(1, self.tokens + 1, device=device), 0)
        zeros = torch.zeros(self.batch, dtype=torch.int64, device=device)
        return zeros.scatter_reduce(0, self.segment_ids(device), after, "amax")


def layout(name: str, tensor: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Layout:
    """The layout of `tensor`, checked but for the values of `cu_seqlens` (see `check_on_host`)."""
    if mask is not None:
        _checks.check_mask("mask", mask, tensor.shape, f"{name}'s shape")
        _checks.check_same_device(**{name: tensor, "mask": mask})
        mask = mask.bool().reshape(-1).contiguous()
    if cu_seqlens is None:
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name} must be (B, T), or (N,) with cu_seqlens, got {_checks.shape_str(tensor.shape)}")
        batch, length = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
        return Layout(None, batch, length, tensor.numel(), mask)
    _checks.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.is_meta != tensor.is_meta:
        raise ValueError(f"cu_seqlens must be on {name}'s device {tensor.device} or the CPU, got {cu_seqlens.device}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be (N,) with cu_seqlens, got {_checks.shape_str(tensor.shape)}")
    _checks.check_offsets("cu_seqlens", cu_seqlens, tensor.numel(), "(B+1,)")
    offsets = cu_seqlens.to(device=tensor.device, dtype=torch.int64).contiguous()
    if not torch.compiler.is_compiling():
        check_on_host(offsets, tensor.numel())
    return Layout(offsets, offsets.numel() - 1, 0, tensor.numel(), mask)


def check_on_host(offsets: Tensor, tokens: int) -> None:
    """Raise unless host-side offsets rise from 0 to `tokens`. On a GPU that would be a sync: kernels stay in bounds."""
    if offsets.device.type == "cpu":
        _checks.check_cu_seqlens("cu_seqlens", offsets, tokens)


def bounded(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Offsets (B+1,) int64 that rise from 0 to `tokens`, and whether the given ones did not, () bool: without a wait,
    for code that would leave the memory with others."""
    held = offsets.clamp(0, tokens).cummax(0).values
    held[:1].fill_(0)
    held[-1:].fill_(tokens)
    return held, (held != offsets).any()


def work_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 statistics and outputs for everything but fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as a constant contiguous (N,) in `dtype`."""
    return tensor.detach().to(dtype).reshape(-1).contiguous()

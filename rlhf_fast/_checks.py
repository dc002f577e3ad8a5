"""Argument checks shared by the public operations: every message names the tensor, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_str(shape: Sequence[int]) -> str:
    """`(4, 128)` for any sequence of sizes, symbolic ones included."""
    return "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a tensor of a supported floating dtype."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], dims: str) -> None:
    """Raise unless `tensor.shape == expected`; `dims` is how the shape is written in the docs, `(B, T)`."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be {dims}={shape_str(expected)}, got {shape_str(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors live on the first one's device."""
    first, device = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} must be on {first}'s device {device}, got {tensor.device}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors have the first one's dtype."""
    first, dtype = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if dtype is None:
            first, dtype = name, tensor.dtype
        elif tensor.dtype != dtype:
            raise ValueError(f"{name} must have {first}'s dtype {dtype}, got {tensor.dtype}")


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float; raise a ValueError unless it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return float(value)


def check_finite(name: str, value: float) -> float:
    """Return `value` as a float; raise unless it is a finite, non-zero number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number other than 0, got {value}")
    return float(value)


def check_target(name: str, target: Tensor, expected: Sequence[int], dims: str) -> None:
    """Raise unless `target` holds integers in the given shape."""
    check_shape(name, target, expected, dims)
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {target.dtype}")


def check_target_range(name: str, target: Tensor, mask: Tensor, size: int) -> None:
    """Raise on the first scored target outside [0, size), naming its row and value. One host sync.

    target, mask: (N,) or (N, K). `mask` is True where the target counts.
    """
    bad = mask & ((target < 0) | (target >= size))
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        place = ", ".join(map(str, where))
        raise ValueError(f"{name}[{place}] = {int(target[where])} is outside the vocabulary [0, {size})")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Return the offsets as a list; raise unless they rise from 0 to `total`. One host sync."""
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be (S+1,) int32 or int64, got {shape_str(cu_seqlens.shape)} {cu_seqlens.dtype}")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"{name} must run from 0 to N={total}, got {offsets[0]}..{offsets[-1]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"{name} must not fall, got {name}[{i}] = {offsets[i]} after {offsets[i - 1]}")
    return offsets

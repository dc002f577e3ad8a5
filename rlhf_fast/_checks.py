"""Argument checks shared by the public operations: every message names the tensor, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASK_DTYPES = (torch.bool, *INTEGER_DTYPES, *FLOAT_DTYPES)
SCALAR_DTYPES = (*FLOAT_DTYPES, *INTEGER_DTYPES)


def shape_str(shape: Sequence[int]) -> str:
    """`(4, 128)` for any sequence of sizes, symbolic ones included."""
    return "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor with one number in memory for each element (neither sparse nor mkldnn's)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


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


def alike(first: object, *others: object) -> bool:
    """Whether all are dense tensors of supported floating dtypes, of one shape and on one device; None may be among
    the others. Where it holds, the single checks have nothing to say."""
    if not isinstance(first, Tensor):
        return False
    shape, device = first.shape, first.device
    return all(
        t is None
        or (
            isinstance(t, Tensor)
            and t.dtype in FLOAT_DTYPES
            and t.shape == shape
            and t.device == device
            and t.layout is torch.strided
        )
        for t in (first, *others)
    )


def check_no_tangent(op: str, **tensors: Tensor | None) -> None:
    """Raise where a tensor carries a tangent: torch's custom ops would drop it, and pass for a derivative of 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode derivative, and {name} carries a tangent; use the function of that name in "
                "rlhf_fast.reference for one"
            )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors live on the first one's device."""
    first, device = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
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


def check_mask(name: str, mask: Tensor, expected: Sequence[int], dims: str) -> None:
    """Raise unless `mask` is of the given shape and holds truth values, or numbers of which 0 is false."""
    check_shape(name, mask, expected, dims)
    if mask.dtype not in MASK_DTYPES:
        raise ValueError(f"{name} must be bool, integers or a usual float dtype, got {mask.dtype}")


def check_number(name: str, value: float, *, least: float = -math.inf, most: float = math.inf) -> float:
    """Return `value` as a float; raise unless it is a finite number in [least, most]."""
    number = _real(name, value)
    if not (least <= number <= most and -math.inf < number < math.inf):
        bounds = [f">= {least:g}"] * (least > -math.inf) + [f"<= {most:g}"] * (most < math.inf)
        raise ValueError(f"{name} must be a finite number{' ' * bool(bounds)}{' and '.join(bounds)}, got {value}")
    return number


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float; raise unless it is a finite number > 0."""
    number = _real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return number


def check_finite(name: str, value: float) -> float:
    """Return `value` as a float; raise unless it is a finite, non-zero number."""
    number = _real(name, value)
    if number == 0 or not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be a finite number other than 0, got {value}")
    return number


def check_int(name: str, value: int, *, least: int = -(2**63)) -> int:
    """Return `value`; raise unless it is an integer >= `least` that 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not least <= value < 2**63:
        bound = f" >= {least}" if least > -(2**63) else ""
        raise ValueError(f"{name} must be a 64-bit integer{bound}, got {short(value)}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Return `value`; raise a TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise unless `value` is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {short(value)}")


def check_scalar(name: str, value: Tensor | float, *, positive: bool = False, measured: bool = False) -> None:
    """Raise unless `value` is a finite number (above 0 where `positive`), or a 0-d tensor, whose value nobody reads.

    measured: it comes from the data, as a KL does, and may be NaN or infinite: what follows is a step that is skipped.
    """
    if not isinstance(value, Tensor):
        if not (measured and isinstance(value, float)):
            check_positive(name, value) if positive else check_number(name, value)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} must be a number that 64 bits hold, got {short(value)}")
        return
    check_tensor(name, value)
    if value.is_meta:
        raise ValueError(f"{name} must hold a number, got a tensor on the meta device")
    if value.numel() != 1 or value.dtype not in SCALAR_DTYPES:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {shape_str(value.shape)} {value.dtype}")


def _real(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got an integer beyond the floats") from None


def short(value: object) -> str:
    """`repr` for a message: on one line, of bounded length."""
    if isinstance(value, Tensor):
        return f"a tensor {shape_str(value.shape)} {value.dtype}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "an integer of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_target(name: str, target: Tensor, expected: Sequence[int], dims: str) -> None:
    """Raise unless `target` holds integers in the given shape."""
    check_shape(name, target, expected, dims)
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {target.dtype}")


def savable(tensor: Tensor | None) -> Tensor | None:
    """A tensor that autograd may keep for the backward: one made in inference mode is copied outside of it."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    if torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def check_target_range(name: str, target: Tensor, mask: Tensor, size: int) -> None:
    """Raise on the first scored target outside [0, size), naming its row and value. One host sync.

    target, mask: (N,) or (N, K). `mask` is True where the target counts.
    """
    bad = mask & ((target < 0) | (target >= size))
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        place = ", ".join(map(str, where))
        raise ValueError(f"{name}[{place}] = {int(target[where])} is outside the vocabulary [0, {size})")


def check_offsets(name: str, cu_seqlens: Tensor, total: int, dims: str = "(S+1,)") -> None:
    """Raise unless these can be offsets into `total` tokens, whatever their values."""
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be {dims} int32 or int64, got {shape_str(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.numel() == 1 and total:
        raise ValueError(f"{name} must run from 0 to N={total}, got a single offset: no sequence")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Return the offsets as a list; raise unless they rise from 0 to `total`. One host sync."""
    check_offsets(name, cu_seqlens, total)
    if cu_seqlens.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"{name} must run from 0 to N={total}, got {offsets[0]}..{offsets[-1]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"{name} must not fall, got {name}[{i}] = {offsets[i]} after {offsets[i - 1]}")
    return offsets

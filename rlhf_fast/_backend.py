"""Which implementation an op takes, and the only door to the compiled modules `_C` (CPU) and `_cuda`.

Both modules take raw pointers and sizes, so everything that must hold for the memory to be safe is
checked here, once, right before the pointers leave Python.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch  # first: `_C` then finds torch's OpenMP runtime already loaded and shares its thread pool
from torch import Tensor

BACKENDS = ("torch", "cpp", "triton", "cuda")
HEAD_ROADS = ("tiles", "epilogue")

# For each family of ops: the backends it has on each device, best first. torch is always there.
_ROWS = {"cpu": ("cpp", "torch", "triton"), "cuda": ("triton", "torch")}
_SCANS = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")}
_ELEMENTWISE = {"cpu": ("cpp", "torch", "triton"), "cuda": ("triton", "torch")}
OPS = {
    "row_pass": _ROWS,
    "divergence": _ROWS,
    "gae": _SCANS,
    "discounted_returns": _SCANS,
    "ppo_advantages": _SCANS,
    "group_advantages": _SCANS,
    "masked_whiten": _SCANS,
    "policy_loss": _ELEMENTWISE,
}
_TORCH_ONLY = {"cpu": ("torch",), "cuda": ("torch",)}

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_override = threading.local()


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason why it is not there."""
    try:
        return importlib.import_module(f"rlhf_fast.{name}"), ""
    except ModuleNotFoundError as error:
        if error.name != f"rlhf_fast.{name}":
            return None, str(error)
        return None, "not built in this installation"
    except ImportError as error:  # built, but a library it needs is missing
        return None, str(error)


def cpp_module() -> ModuleType:
    """The CPU extension `rlhf_fast._C`. RuntimeError when this installation has none."""
    module, reason = _load("_C")
    if module is None:
        raise RuntimeError(f"rlhf_fast._C, the C++ extension, is unavailable: {reason}")
    return module


def cuda_module() -> ModuleType:
    """The CUDA extension `rlhf_fast._cuda`. RuntimeError when this installation has none."""
    module, reason = _load("_cuda")
    if module is None:
        raise RuntimeError(f"rlhf_fast._cuda, the CUDA extension, is unavailable: {reason}")
    return module


def cpp_available() -> bool:
    """Whether the C++ extension can be imported."""
    module, _ = _load("_C")
    return module is not None and hasattr(module, "row_stats")


def cuda_available() -> bool:
    """Whether our CUDA extension can be imported (not: whether a GPU is there)."""
    return _load("_cuda")[0] is not None


@cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def unavailable_reason(name: str) -> str:
    """Why `_C` or `_cuda` is missing; "" when it is there."""
    reason = _load(name)[1]
    if reason and name == "_cuda" and (state := getattr(_load("_C")[0], "cuda_state", "")):
        return f"{reason}: {state}"
    return reason


def requested_backend() -> str | None:
    """The backend asked for by `use_backend`, else by RLHF_FAST_BACKEND, else None."""
    name = getattr(_override, "name", None) or os.environ.get("RLHF_FAST_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"RLHF_FAST_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def head_road() -> str:
    """How a head is computed on a GPU, from RLHF_FAST_HEAD: "tiles" (the default) or "epilogue"."""
    name = os.environ.get("RLHF_FAST_HEAD") or HEAD_ROADS[0]
    if name not in HEAD_ROADS:
        raise ValueError(f"RLHF_FAST_HEAD must be one of {', '.join(HEAD_ROADS)}, got {name!r}")
    return name


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one: Triton and CUDA launch there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend in this thread, for every op that has it; the others keep their own choice.

    Note that autograd runs the backward of CUDA tensors in threads of its own, which do not see this;
    RLHF_FAST_BACKEND holds for all threads.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    previous = getattr(_override, "name", None)
    _override.name = name
    try:
        yield
    finally:
        _override.name = previous


def backend(device: torch.device | str, op: str) -> str:
    """The backend that `op` takes for tensors on `device`: "torch", "cpp", "triton" or "cuda".

    A requested backend that the op has, but that cannot run here, is a RuntimeError, never a fallback.
    """
    kind = torch.device(device).type
    choices = OPS.get(op, _TORCH_ONLY)
    here = choices.get(kind, ("torch",))
    wanted = requested_backend()
    if wanted is not None and any(wanted in names for names in choices.values()):
        if wanted not in here:
            raise RuntimeError(f"backend {wanted!r} of {op} does not run on {kind} tensors")
        _require(wanted, kind)
        return wanted
    if "cpp" in here and cpp_available():
        return "cpp"
    if "cuda" in here and cuda_available():
        return "cuda"
    if "triton" in here and kind == "cuda" and triton_available():
        return "triton"
    return "torch"


def _require(name: str, kind: str) -> None:
    if name == "cpp":
        cpp_module()
    elif name == "cuda":
        cuda_module()
    elif name == "triton":
        if not triton_available():
            raise RuntimeError("backend 'triton' was requested, but triton cannot be imported")
        if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "backend 'triton' runs on CPU tensors in its interpreter only: set TRITON_INTERPRET=1 "
                "before rlhf_fast is imported"
            )


# ---- row passes over raw logits (n, V) on the CPU ---------------------------------------------------------


def row_stats(
    logits: Tensor,  # (n, V) f32, bf16 or f16, last dim contiguous
    target: Tensor | None,  # (n,) int64; < 0: the row is not read and all its results are 0
    bias: Tensor | None,  # (V,) f32
    *,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    logprob: Tensor | None,  # (n,) f32, written
    row_max: Tensor,  # (n,) f32, written
    log_sum: Tensor,  # (n,) f32, written
    entropy: Tensor | None,  # (n,) f32, written
) -> None:
    """Log-probability of the target, maximum, log-sum and entropy of each row, in one pass over memory."""
    n, v = _matrix("logits", logits)
    outputs = {"logprob": logprob, "row_max": row_max, "log_sum": log_sum, "entropy": entropy}
    for name, tensor in outputs.items():
        _vector(name, tensor, n, torch.float32)
    _vector("target", target, n, torch.int64)
    _vector("bias", bias, v, torch.float32)
    if target is None and logprob is not None:
        raise ValueError("logprob was asked for without a target")
    cpp_module().row_stats(
        logits.data_ptr(), _DTYPE_CODES[logits.dtype], n, v, logits.stride(0), pointer(target), pointer(bias),
        scale, softcap or 0.0, inv_temperature,
        pointer(logprob), row_max.data_ptr(), log_sum.data_ptr(), pointer(entropy), num_threads(),
    )  # fmt: skip


def row_dlogits(
    logits: Tensor,  # (n, V) f32, bf16 or f16, last dim contiguous
    out: Tensor,  # (K, V), written; may share the rows of `logits`, as wide as they are or narrower
    order: Tensor | None,  # (K,) int64: the row of `logits` that goes to each row of `out`; None: the same
    target: Tensor | None,  # (n,) int64
    bias: Tensor | None,  # (V,) f32
    *,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    row_max: Tensor,  # (n,) f32, from row_stats
    log_sum: Tensor,  # (n,) f32, from row_stats
    d_target: Tensor,  # (n,) f32: the weight of the target's own logit
    a: Tensor,  # (n,) f32: the weight of p
    b: Tensor | None,  # (n,) f32: the weight of p log p
) -> None:
    """Gradient by the raw logits, `jac (d_target [j == target] + p (a + b log p))`, row by row."""
    n, v = _matrix("logits", logits)
    k, v_out = _matrix("out", out)
    if v_out != v or (order is None and k > n):
        raise ValueError(f"out must be (K, {v}) with K <= {n} unless ordered, got {tuple(out.shape)}")
    _vector("order", order, k, torch.int64)
    _vector("target", target, n, torch.int64)
    _vector("bias", bias, v, torch.float32)
    inputs = {"row_max": row_max, "log_sum": log_sum, "d_target": d_target, "a": a, "b": b}
    for name, tensor in inputs.items():
        _vector(name, tensor, n, torch.float32)
    cpp_module().row_dlogits(
        logits.data_ptr(), _DTYPE_CODES[logits.dtype], logits.stride(0),
        out.data_ptr(), _DTYPE_CODES[out.dtype], out.stride(0), k, v,
        pointer(order), pointer(target), pointer(bias), scale, softcap or 0.0, inv_temperature,
        row_max.data_ptr(), log_sum.data_ptr(), d_target.data_ptr(), a.data_ptr(), pointer(b), num_threads(),
    )  # fmt: skip


def num_threads() -> int:
    """Threads for a CPU kernel: as many as torch uses, changing with `torch.set_num_threads`."""
    return torch.get_num_threads()


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    if tensor is None:
        return 0
    if tensor.is_neg():
        raise ValueError("a view with the negative bit cannot be read in place: resolve_neg() it first")
    return tensor.data_ptr()


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dtype not in _DTYPE_CODES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16 here, got {tensor.dtype}")
    if tensor.dim() != 2 or tensor.device.type != "cpu" or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} must be a CPU matrix with a contiguous last dimension, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.shape[0], tensor.shape[1]


def _vector(name: str, tensor: Tensor | None, length: int, dtype: torch.dtype) -> None:
    if tensor is None:
        return
    good = tensor.dtype == dtype and tensor.shape == (length,) and tensor.device.type == "cpu"
    if not good or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous ({length},) {dtype} CPU tensor, got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )

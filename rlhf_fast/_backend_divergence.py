"""Tensor-level door to the divergence passes of the CPU extension, with the signatures of the Triton launchers.

As in `_backend`, what must hold for the memory to be safe is checked here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast._backend import _DTYPE_CODES, _matrix, _vector, cpp_module, num_threads, pointer

Form = tuple[float, "float | None", float]
"""scale, softcap, inv_temperature."""


def row_divergence(
    logits: Tensor,  # (n, V) f32, bf16 or f16, last dim contiguous
    ref_logits: Tensor,  # (n, V), dtype of its own
    bias: Tensor | None,  # (V,) f32
    ref_bias: Tensor | None,  # (V,) f32
    *,
    kind: int,  # 0 forward, 1 reverse, 2 jsd
    ref_share: float,
    form: Form,
    ref_form: Form,
    row_max: Tensor,  # (n,) f32, as all below; from row_stats
    log_sum: Tensor,
    ref_max: Tensor,
    ref_sum: Tensor,
    own_kl: Tensor | None,  # written: KL(p || q or M)
    ref_kl: Tensor | None,  # written: KL(q || p or M)
) -> None:
    """The divergence sums of each row."""
    own = (logits, bias, form, row_max, log_sum, own_kl, None)
    ref = (ref_logits, ref_bias, ref_form, ref_max, ref_sum, ref_kl, None)
    if (kind != 0 and own_kl is None) or (kind != 1 and ref_kl is None):
        raise ValueError(f"kind {kind} writes sums that were not given")
    cpp_module().row_divergence(*_pair(own, ref), kind, ref_share, 0, num_threads())


def divergence_dlogits(
    logits: Tensor,
    ref_logits: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    *,
    kind: int,
    ref_share: float,
    form: Form,
    ref_form: Form,
    row_max: Tensor,
    log_sum: Tensor,
    ref_max: Tensor,
    ref_sum: Tensor,
    own_kl: Tensor | None,  # from row_divergence
    ref_kl: Tensor | None,
    grad: Tensor,  # (n,) f32
    out: Tensor | None,  # (n, V), written; may share the rows of `logits`, as wide as they are or narrower
    ref_out: Tensor | None,  # (n, V), written; likewise of `ref_logits`
) -> None:
    """grad times the gradient of each row's divergence by the raw logits of either side."""
    own = (logits, bias, form, row_max, log_sum, own_kl, out)
    ref = (ref_logits, ref_bias, ref_form, ref_max, ref_sum, ref_kl, ref_out)
    if (out is not None and kind != 0 and own_kl is None) or (ref_out is not None and kind != 1 and ref_kl is None):
        raise ValueError(f"kind {kind} needs sums that were not given")
    _vector("grad", grad, logits.shape[0], torch.float32)
    cpp_module().divergence_dlogits(*_pair(own, ref), kind, ref_share, pointer(grad), num_threads())


def _pair(own: tuple, ref: tuple) -> tuple[tuple, tuple, int, int]:
    """Both sides as the extension takes them, and n, V."""
    n, v = _matrix("logits", own[0])
    if _matrix("ref_logits", ref[0]) != (n, v):
        raise ValueError(f"ref_logits must be (n, V)=({n}, {v}), got {tuple(ref[0].shape)}")
    return _side("", n, v, *own), _side("ref_", n, v, *ref), n, v


def _side(prefix, n, v, logits, bias, form: Form, row_max, log_sum, kl, out) -> tuple:
    _vector(prefix + "bias", bias, v, torch.float32)
    for name, tensor in (("row_max", row_max), ("log_sum", log_sum), ("kl", kl)):
        _vector(prefix + name, tensor, n, torch.float32)
    written = (0, 0, 0)
    if out is not None:
        if _matrix(prefix + "out", out) != (n, v):
            raise ValueError(f"{prefix}out must be (n, V)=({n}, {v}), got {tuple(out.shape)}")
        written = (out.data_ptr(), _DTYPE_CODES[out.dtype], out.stride(0))
    scale, softcap, inv_temperature = form
    numbers = (scale, softcap or 0.0, inv_temperature)
    pointers = (row_max.data_ptr(), log_sum.data_ptr(), pointer(kl))
    return logits.data_ptr(), _DTYPE_CODES[logits.dtype], logits.stride(0), pointer(bias), *numbers, *pointers, *written

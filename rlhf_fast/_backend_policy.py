"""Tensor-level door to the policy pass of the compiled module. As in `_backend`, the memory is checked here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast._backend import cpp_module, num_threads, pointer

KL_CODES = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
FORMS = {  # as PolicyForm in csrc/cpu/policy.h
    name: i for i, name in enumerate(("clip", "vanilla", "cispo", "sapo", "kl_cov", "dro", "dppo_tv", "geo_mean"))
}
LEVELS = {"token": 0, "sequence": 1, "sequence_token": 2}


def policy_clip(
    logprob: Tensor,  # (n,) f32, as every float tensor here
    old_logprob: Tensor | None,  # (n,)
    advantages: Tensor,  # (n,), (segments,) or (1,)
    weight: Tensor,  # the same
    mask: Tensor | None,  # (n,) bool
    policy_weight: Tensor | None,  # (n,)
    ref_logprob: Tensor | None,  # (n,)
    entropy: Tensor | None,  # (n,)
    entropy_weight: Tensor | None,  # (n,), (segments,) or (1,)
    offsets: Tensor | None,  # (segments+1,) int64; None: `segments` sequences of `length`
    segments: int,
    length: int,
    *,
    form: str,
    level: str,
    low: float,
    high: float,
    first: float,
    second: float,
    held: Tensor | None,  # (n,), for form "kl_cov"
    delta: float | None,
    dual_clip: float | None,
    beta: float,
    kl_estimator: str,
    kl_gradient: str,
    kl_correction: bool,
    entropy_coef: float,
    dlogprob: Tensor,  # (n,), written
    dentropy: Tensor | None,  # (n,), written
    sums: Tensor,  # (12,), written
) -> None:
    """Sums, dloss/dlogprob and dloss/dentropy of a policy loss in one pass."""
    n = logprob.numel()
    _check_each(n, torch.float32, logprob=logprob, old_logprob=old_logprob, policy_weight=policy_weight, held=held,
                ref_logprob=ref_logprob, entropy=entropy, dlogprob=dlogprob, dentropy=dentropy)  # fmt: skip
    per_sequence = form == "geo_mean" or level != "token"
    for name, tensor in (("advantages", advantages), ("weight", weight), ("entropy_weight", entropy_weight)):
        if tensor is not None and not _good(tensor, n, torch.float32):
            _check(name, tensor, (n,), (segments,), (1,))
            per_sequence |= tensor.numel() not in (1, n)
    _check_each(n, torch.bool, mask=mask)
    _check_each(12, torch.float32, sums=sums)
    if per_sequence:
        _check("offsets", offsets, (segments + 1,), dtype=torch.int64)
        if offsets is None and segments * length != n:
            raise ValueError(f"logprob must hold {segments} sequences of {length}, got {n} tokens")
        if offsets is not None and (int(offsets[0]) != 0 or int(offsets[-1]) != n):
            raise ValueError(f"offsets must run from 0 to {n}, got {int(offsets[0])}..{int(offsets[-1])}")
    if (dentropy is not None) > (entropy is not None and entropy_weight is not None):
        raise ValueError("dentropy was asked for without entropy and entropy_weight")
    if (form == "kl_cov") != (held is not None):
        raise ValueError(
            f"held must be given for form 'kl_cov' alone, got it {'without' if held is None else 'beside'}"
        )
    count = 0 if entropy_weight is None else entropy_weight.numel()
    cpp_module().policy_clip(
        n, FORMS[form], LEVELS[level], pointer(logprob), pointer(old_logprob), pointer(advantages),
        advantages.numel(), pointer(weight), weight.numel(), pointer(mask), pointer(policy_weight),
        pointer(ref_logprob), pointer(entropy), pointer(entropy_weight), count,
        pointer(offsets) if per_sequence else 0, segments, length,
        low, high, math.inf if delta is None else delta, math.inf if dual_clip is None else dual_clip, beta,
        KL_CODES[kl_estimator], KL_CODES[kl_gradient], kl_correction, entropy_coef, first, second, pointer(held),
        pointer(dlogprob), pointer(dentropy), pointer(sums), num_threads(),
    )  # fmt: skip


def kl_terms(
    logprob: Tensor,  # (n,) f32, as every float tensor here
    ref_logprob: Tensor,  # (n,)
    mask: Tensor | None,  # (n,) bool
    *,
    estimator: str,
    gradient: str,
    value: Tensor,  # (n,), written
    slope: Tensor | None,  # (n,), written
) -> None:
    """Estimates of the KL and their slopes by logprob; 0 where masked."""
    n = logprob.numel()
    _check_each(n, torch.float32, logprob=logprob, ref_logprob=ref_logprob, value=value, slope=slope)
    _check_each(n, torch.bool, mask=mask)
    cpp_module().kl_terms(
        n, pointer(logprob), pointer(ref_logprob), pointer(mask), KL_CODES[estimator], KL_CODES[gradient],
        pointer(value), pointer(slope), num_threads(),
    )  # fmt: skip


def value_clip(
    values: Tensor,  # (n,) f32, as every float tensor here
    old_values: Tensor | None,  # (n,)
    returns: Tensor,  # (n,)
    mask: Tensor | None,  # (n,) bool
    weight: Tensor,  # (segments,), or (1,) for all tokens
    offsets: Tensor | None,  # (segments+1,) int64; None: `segments` sequences of `length`
    segments: int,
    length: int,
    *,
    clip: float,
    delta: float,  # inf: no Huber
    dvalues: Tensor,  # (n,), written
    sums: Tensor,  # (6,), written: loss, clipped, value, return, |value - return|, count
) -> None:
    """Sums and dloss/dvalues of the value loss in one pass."""
    n = values.numel()
    floats = dict(values=values, old_values=old_values, returns=returns, dvalues=dvalues)
    _check_each(n, torch.float32, **floats)
    _check_each(n, torch.bool, mask=mask)
    _check_each(6, torch.float32, sums=sums)
    _check("weight", weight, (segments,), (1,))
    per_sequence = weight.numel() == segments and segments > 1
    if per_sequence:
        _check("offsets", offsets, (segments + 1,), dtype=torch.int64)
        if offsets is None and segments * length != n:
            raise ValueError(f"values must hold {segments} sequences of {length}, got {n} tokens")
        if offsets is not None and (int(offsets[0]) != 0 or int(offsets[-1]) != n):
            raise ValueError(f"offsets must run from 0 to {n}, got {int(offsets[0])}..{int(offsets[-1])}")
    cpp_module().value_clip(
        n, pointer(values), pointer(old_values), pointer(returns), pointer(mask), pointer(weight), pointer(offsets),
        segments if per_sequence else 0, length, clip, delta, pointer(dvalues), pointer(sums), num_threads(),
    )  # fmt: skip


def segment_counts(mask: Tensor, offsets: Tensor | None, segments: int, length: int, out: Tensor) -> None:
    """How many tokens of each sequence the mask (n,) bool counts, into out (segments,) int64.

    `offsets` (segments+1,) int64 must rise from 0 to n; None: sequences of `length`.
    """
    n = mask.numel()
    _check("mask", mask, (n,), dtype=torch.bool)
    _check("offsets", offsets, (segments + 1,), dtype=torch.int64)
    _check("out", out, (segments,), dtype=torch.int64)
    if offsets is None and segments * length != n:
        raise ValueError(f"mask must hold {segments} sequences of {length}, got {n} tokens")
    cpp_module().segment_counts(pointer(mask), pointer(offsets), segments, length, pointer(out), num_threads())


def _good(tensor: Tensor, n: int, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.shape == (n,) and tensor.is_cpu and tensor.is_contiguous()


def _check_each(n: int, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not _good(tensor, n, dtype):
            _check(name, tensor, (n,), dtype=dtype)


def _check(name: str, tensor: Tensor | None, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    if tensor is None:
        return
    good = tensor.dtype == dtype and tuple(tensor.shape) in shapes and tensor.device.type == "cpu"
    if not good or not tensor.is_contiguous():
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(
            f"{name} must be a contiguous {expected} {dtype} CPU tensor, got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )

"""Tensor-level door to the scans of the compiled modules: GAE, moments, whitening, group statistics.

Every function takes flat contiguous tensors of one device and calls `_C` or `_cuda` accordingly. As in `_backend`,
what must hold for the memory to be safe is checked here. A call on the GPU runs on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from rlhf_fast._backend import cpp_module, cuda_module, num_threads, pointer
from rlhf_fast._backend_policy import KL_CODES


def gae(
    rewards: Tensor,  # (N,) f32
    values: Tensor | None,  # (N,) f32; None: zeros
    mask: Tensor | None,  # (N,) bool
    offsets: Tensor | None,  # (B+1,) int64; None: sequences of `length` tokens
    length: int,
    batch: int,
    bootstrap: Tensor | None,  # (B,) f32
    ends: Tensor | None,  # (B,) int64: one past the last token that counts; read on the GPU alone
    *,
    gamma: float,
    lam: float,
    carry: bool,
    advantages: Tensor | None,  # (N,) f32, written
    returns: Tensor | None,  # (N,) f32, written
) -> None:
    """Advantages and returns of a packed batch, sequences apart."""
    n, device = rewards.numel(), rewards.device
    for name, tensor in {"rewards": rewards, "values": values, "advantages": advantages, "returns": returns}.items():
        _check(name, tensor, (n,), torch.float32, device)
    _check("mask", mask, (n,), torch.bool, device)
    _check("offsets", offsets, (batch + 1,), torch.int64, device)
    _check("bootstrap", bootstrap, (batch,), torch.float32, device)
    _check("ends", ends, (batch,), torch.int64, device)
    if offsets is None and batch * length != n:
        raise ValueError(f"rewards must hold {batch} sequences of {length}, got {n} tokens")
    pointers = (pointer(rewards), pointer(values), pointer(mask), pointer(offsets))
    if device.type == "cpu":
        cpp_module().gae(
            *pointers, batch, length, gamma, lam, carry, pointer(bootstrap), pointer(advantages), pointer(returns),
            num_threads(),
        )  # fmt: skip
        return
    workspace = torch.empty(cuda_module().gae_workspace_bytes(n), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        cuda_module().gae(
            *pointers, n, batch, length, gamma, lam, carry, pointer(bootstrap), pointer(ends), pointer(advantages),
            pointer(returns), pointer(workspace), _stream(device),
        )  # fmt: skip


def ppo_advantages(
    values: Tensor,  # (N,) f32
    mask: Tensor | None,  # (N,) bool
    offsets: Tensor | None,  # (B+1,) int64; None: sequences of `length` tokens
    length: int,
    batch: int,
    bootstrap: Tensor | None,  # (B,) f32
    ends: Tensor | None,  # (B,) int64, as in `gae`; on the GPU needed with a mask wherever there are scores
    scores: Tensor | None,  # (B,) f32; None: `rewards` is read, not written
    logprob: Tensor | None,  # (N,) f32
    ref_logprob: Tensor | None,  # (N,) f32
    *,
    gamma: float,
    lam: float,
    carry: bool,
    kl_coef: float,
    kl_estimator: str,
    kl_clip: float | None,
    score_clip: float | None,
    whiten: bool,
    eps: float,
    rewards: Tensor,  # (N,) f32, written where there are scores
    kl: Tensor | None,  # (N,) f32, written
    advantages: Tensor,  # (N,) f32, written
    returns: Tensor,  # (N,) f32, written
) -> None:
    """Shaped rewards, advantages, returns, and the whitening of the advantages: one pass, and one to whiten."""
    n, device = values.numel(), values.device
    floats = {"rewards": rewards, "values": values, "logprob": logprob, "ref_logprob": ref_logprob, "kl": kl}
    for name, tensor in {**floats, "advantages": advantages, "returns": returns}.items():
        _check(name, tensor, (n,), torch.float32, device)
    _check("mask", mask, (n,), torch.bool, device)
    _check("offsets", offsets, (batch + 1,), torch.int64, device)
    _check("bootstrap", bootstrap, (batch,), torch.float32, device)
    _check("scores", scores, (batch,), torch.float32, device)
    _check("ends", ends, (batch,), torch.int64, device)
    if offsets is None and batch * length != n:
        raise ValueError(f"values must hold {batch} sequences of {length}, got {n} tokens")
    if (logprob is None) != (ref_logprob is None) or (logprob is None) != (kl is None):
        raise ValueError("logprob, ref_logprob and kl must be given together or not at all")
    shaping = (pointer(scores), pointer(logprob), pointer(ref_logprob), kl_coef, kl_clip or inf, score_clip or inf)
    shaping += (KL_CODES[kl_estimator],)
    if device.type == "cpu":
        cpp_module().ppo_advantages(
            pointer(rewards), pointer(values), pointer(mask), pointer(offsets), batch, length, gamma, lam, carry,
            pointer(bootstrap), pointer(advantages), pointer(returns), *shaping, pointer(kl), whiten, eps,
            num_threads(),
        )  # fmt: skip
        return
    if scores is not None and mask is not None and ends is None:
        raise ValueError("ends must be given with scores and a mask: they say which token takes the score")
    workspace = torch.empty(cuda_module().gae_workspace_bytes(n), dtype=torch.uint8, device=device)
    statistics = torch.empty(3, dtype=torch.float64, device=device) if whiten else None
    with torch.cuda.device(device):
        cuda_module().ppo_advantages(
            pointer(rewards), pointer(values), pointer(mask), pointer(offsets), n, batch, length, gamma, lam, carry,
            pointer(bootstrap), pointer(ends), pointer(advantages), pointer(returns), *shaping, pointer(rewards),
            pointer(kl), pointer(statistics), eps, pointer(workspace), _stream(device),
        )  # fmt: skip


def moments(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """count, mean and sum of squared deviations of the counted elements of x (N,) f32 into out (3,) f64."""
    _check("x", x, x.shape, torch.float32, x.device)
    _check("mask", mask, x.shape, torch.bool, x.device)
    _check("out", out, (3,), torch.float64, x.device)
    if x.device.type == "cpu":
        cpp_module().moments(pointer(x), pointer(mask), x.numel(), pointer(out), num_threads())
        return
    workspace = torch.empty(cuda_module().moments_workspace_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    with torch.cuda.device(x.device):
        cuda_module().moments(pointer(x), pointer(mask), x.numel(), pointer(workspace), pointer(out), _stream(x.device))


def whiten(
    x: Tensor, mask: Tensor | None, statistics: Tensor, *, shift_mean: bool, ddof: int, eps: float, out: Tensor
) -> None:
    """(x - mean) / sqrt(var + eps), plus the mean unless `shift_mean`, 0 where masked; statistics (3,) f64."""
    _check("x", x, x.shape, torch.float32, x.device)
    _check("mask", mask, x.shape, torch.bool, x.device)
    _check("out", out, x.shape, torch.float32, x.device)
    _check("statistics", statistics, (3,), torch.float64, x.device)
    arguments = (pointer(x), pointer(mask), x.numel(), pointer(statistics), shift_mean, ddof, eps, pointer(out))
    if x.device.type == "cpu":
        cpp_module().whiten(*arguments, num_threads())
        return
    with torch.cuda.device(x.device):
        cuda_module().whiten(*arguments, _stream(x.device))


def group_stats(values: Tensor, order: Tensor | None, offsets: Tensor, out: Tensor) -> None:
    """count, mean, m2 (3, G) f64 of the finite values (B,) f64 of each group; `order` (B,) lists rows by group.

    `order` must be a permutation and `offsets` (G+1,) must rise from 0 to B.
    """
    groups = offsets.numel() - 1
    _check("values", values, values.shape, torch.float64, values.device)
    _check("order", order, values.shape, torch.int64, values.device)
    _check("offsets", offsets, (groups + 1,), torch.int64, values.device)
    _check("out", out, (3, groups), torch.float64, values.device)
    arguments = (pointer(values), pointer(order), pointer(offsets), groups, pointer(out))
    if values.device.type == "cpu":
        cpp_module().group_stats(*arguments, num_threads())
        return
    with torch.cuda.device(values.device):
        cuda_module().group_stats(*arguments, _stream(values.device))


BASELINES = {  # as Baseline and Scale in csrc/cpu/groups.h
    name: i for i, name in enumerate(("none", "given", "mean", "loo", "opo", "batch"))
}
SCALES = {name: i for i, name in enumerate(("none", "group", "batch", "centered", "mean"))}


def group_advantages(
    rewards: Tensor,  # (B,) f64, as `given`
    order: Tensor | None,  # (B,) int64, a permutation: rows listed by group; None: they lie so
    ids: Tensor | None,  # (B,) int64: the group of each listed row; None: groups of `size`
    size: int,
    given: Tensor | None,  # (B,): the baseline "given", the weights of "opo"
    *,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    drop_equal: bool,
    numbers: Sequence[Tensor],  # advantages, mean, std: (B,) f32 or f64, written
    count: Tensor,  # (B,) int64, written
    flags: Sequence[Tensor],  # equal, valid: (B,) bool, written
    invalid: Tensor,  # () int64, written
) -> None:
    """Advantages of groups and their statistics, on the CPU."""
    n, device, dtype = (rewards.numel(),), rewards.device, numbers[0].dtype
    for name, tensor, kind in (
        ("rewards", rewards, torch.float64), ("given", given, torch.float64), ("order", order, torch.int64),
        ("ids", ids, torch.int64), ("count", count, torch.int64), *(("numbers", t, dtype) for t in numbers),
        *(("flags", t, torch.bool) for t in flags),
    ):  # fmt: skip
        _check(name, tensor, n, kind, device)
    _check("invalid", invalid, (), torch.int64, device)
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards must be on the CPU and numbers float32 or float64, got {device} and {dtype}")
    if (given is not None) != (baseline in ("given", "opo")) or (ids is None and size < 1):
        raise ValueError("given goes with the baselines 'given' and 'opo'; size must be >= 1 without ids")
    name = "group_advantages_f32" if dtype == torch.float32 else "group_advantages_f64"
    getattr(cpp_module(), name)(
        n[0], pointer(rewards), pointer(order), pointer(ids), size, pointer(given), BASELINES[baseline], SCALES[scale],
        ddof, eps, drop_equal, *map(pointer, numbers), pointer(count), *map(pointer, flags), pointer(invalid),
        num_threads(),
    )  # fmt: skip


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is None:
        return
    good = tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape) and tensor.device == device
    if not good or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {tuple(shape)} {dtype} tensor on {device}, got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )

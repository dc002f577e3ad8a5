"""The scans and statistics as torch.library ops over flat tensors, and their vectorised torch versions.

The torch versions run in log2(N) passes over whole tensors (the maps of csrc/common/affine_scan.h, composed by
doubling): no Python loop over time. They serve fp64, and devices without the compiled module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_scans
from rlhf_fast.ops._memory import huge
from rlhf_fast.ops._sequences import Layout, check_on_host


def native(tensor: Tensor, op: str) -> bool:
    """Whether a compiled kernel takes `op` for this tensor. fp64 always goes to torch."""
    return _backend.backend(tensor.device, op) in ("cpp", "cuda") and tensor.dtype == torch.float32


@torch.library.custom_op("rlhf_fast::gae", mutates_args=())
def gae(
    rewards: Tensor,  # (N,) f32 or f64
    values: Tensor,  # (N,), the same dtype
    offsets: Tensor | None,  # (B+1,) int64; None: sequences of `length`
    batch: int,
    length: int,
    mask: Tensor | None,  # (N,) bool
    bootstrap: Tensor | None,  # (B,), 0 where terminated
    gamma: float,
    lam: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (N,)."""
    place = Layout(offsets, batch, length, rewards.numel(), mask)
    advantages, returns = huge(torch.empty_like(rewards)), huge(torch.empty_like(rewards))
    _scan("gae", rewards, values, place, bootstrap, gamma, lam, carry, advantages, returns)
    return advantages, returns


@gae.register_fake
def _(rewards, values, offsets, batch, length, mask, bootstrap, gamma, lam, carry):
    return torch.empty_like(rewards), torch.empty_like(rewards)


@torch.library.custom_op("rlhf_fast::discounted_returns", mutates_args=())
def discounted_returns(
    rewards: Tensor,
    offsets: Tensor | None,
    batch: int,
    length: int,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    carry: bool,
) -> Tensor:
    """(N,): GAE's returns with lam = 1 and no values."""
    place = Layout(offsets, batch, length, rewards.numel(), mask)
    returns = huge(torch.empty_like(rewards))
    _scan("discounted_returns", rewards, None, place, bootstrap, gamma, 1.0, carry, None, returns)
    return returns


@discounted_returns.register_fake
def _(rewards, offsets, batch, length, mask, bootstrap, gamma, carry):
    return torch.empty_like(rewards)


def _scan(
    op: str,
    rewards: Tensor,
    values: Tensor | None,
    place: Layout,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
    advantages: Tensor | None,  # written
    returns: Tensor,  # written
) -> None:
    if place.offsets is not None:
        check_on_host(place.offsets, place.tokens)
    if place.tokens == 0:
        return
    if not native(rewards, op):
        to_go = _torch_scan(rewards, values, place, bootstrap, gamma, lam, carry)
        returns.copy_(to_go)
        if advantages is not None:
            advantages.copy_(to_go - values if place.mask is None else (to_go - values).where(place.mask, 0.0))
        return
    trailing = place.mask is not None and not carry and rewards.device.type != "cpu"
    _backend_scans.gae(
        rewards, values, place.mask, place.offsets, place.length, place.batch, bootstrap,
        place.ends(rewards.device) if trailing else None,
        gamma=gamma, lam=lam, carry=carry, advantages=advantages, returns=returns,
    )  # fmt: skip


def ppo_advantages(
    values: Tensor,
    scores: Tensor,
    logprob: Tensor | None,
    ref_logprob: Tensor | None,
    place: Layout,
    bootstrap: Tensor | None,
    **options,
) -> None:
    """The compiled kernels of `ops.ppo`; outputs and numbers among the options."""
    trailing = place.mask is not None and values.device.type != "cpu"
    _backend_scans.ppo_advantages(
        values, place.mask, place.offsets, place.length, place.batch, bootstrap,
        place.ends(values.device) if trailing else None, scores, logprob, ref_logprob, **options,
    )  # fmt: skip


def _torch_scan(
    rewards: Tensor,
    values: Tensor | None,
    place: Layout,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
) -> Tensor:
    """Returns r_t + s_{t+1} (N,) f64, 0 where masked. Notation: csrc/common/affine_scan.h."""
    device = rewards.device
    rewards = rewards.double()  # powers of gamma lam by squaring would lose digits in fp32
    segment = place.segment_ids(device)
    ends = (place._replace(mask=None) if carry else place).ends(device)
    last = torch.arange(place.tokens, device=device) == ends[segment] - 1
    start = rewards.new_zeros(()) if bootstrap is None else gamma * bootstrap.double()[segment]
    slope = torch.full_like(rewards, gamma * lam)
    offset = gamma * lam * rewards
    if values is not None:
        offset = offset + gamma * (1.0 - lam) * values.double()
    if place.mask is not None:
        slope = slope.masked_fill(~place.mask, 1.0 if carry else gamma * lam)
        offset = offset.masked_fill(~place.mask, 0.0)
    offset = torch.where(last, slope * start + offset, offset)
    slope = slope.masked_fill(last, 0.0)
    longest = place.length if place.offsets is None else place.tokens
    step = 1
    while step < longest:  # map t becomes the composition of maps t .. t + 2 step - 1
        # A constant map does not look at its argument, which may be the NaN of the next sequence.
        composed = torch.where(slope[:-step] == 0, 0.0, slope[:-step] * offset[step:]) + offset[:-step]
        offset = torch.cat([composed, offset[-step:]])
        slope = torch.cat([slope[:-step] * slope[step:], slope[-step:]])
        step *= 2
    after = torch.cat([offset[1:], offset.new_zeros(1)])
    to_go = rewards + torch.where(last, start, after)
    return to_go if place.mask is None else to_go.masked_fill(~place.mask, 0.0)


@torch.library.custom_op("rlhf_fast::moments", mutates_args=())
def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) f64: count, mean, sum of squared deviations of the counted elements of x (N,)."""
    out = torch.empty(3, dtype=torch.float64, device=x.device)
    if native(x, "masked_whiten"):
        _backend_scans.moments(x, mask, out)
        return out
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return _torch_moments(x, counted)


@moments.register_fake
def _(x, mask):
    return torch.empty(3, dtype=torch.float64, device=x.device)


def _torch_moments(x: Tensor, counted: Tensor) -> Tensor:
    count = counted.sum().double()
    if x.numel() == 0:
        return torch.stack([count, torch.zeros_like(count), torch.zeros_like(count)])
    x = x.double()
    # Measured from the smallest element, equal elements deviate by exactly 0.
    pivot = x.masked_fill(~counted, torch.inf).amin()
    pivot = torch.where(count > 0, pivot, torch.zeros_like(pivot))
    distance = (x - pivot).masked_fill(~counted, 0.0)
    mean = distance.sum() / count.clamp(min=1)
    m2 = (distance - mean).masked_fill(~counted, 0.0).square().sum()
    return torch.stack([count, pivot + mean, m2])


@torch.library.custom_op("rlhf_fast::whiten", mutates_args=())
def whiten(x: Tensor, mask: Tensor | None, statistics: Tensor, shift_mean: bool, ddof: int, eps: float) -> Tensor:
    """(N,): x whitened with statistics (3,) as `moments` gives them; 0 where masked."""
    if native(x, "masked_whiten"):
        out = huge(torch.empty_like(x))
        _backend_scans.whiten(x, mask, statistics, shift_mean=shift_mean, ddof=ddof, eps=eps, out=out)
        return out
    count, mean, m2 = statistics
    variance = torch.where(count > ddof, m2 / (count - ddof).clamp(min=1), torch.zeros_like(m2))
    out = (x.double() - mean) / (variance + eps).sqrt()
    out = (out if shift_mean else out + mean).to(x.dtype)
    return out if mask is None else out.masked_fill(~mask, 0.0)


@whiten.register_fake
def _(x, mask, statistics, shift_mean, ddof, eps):
    return torch.empty_like(x)


@torch.library.custom_op("rlhf_fast::group_stats", mutates_args=())
def group_stats(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """(3, G) f64: count, mean, m2 of the finite values (B,) f64 of each group.

    order (B,): rows listed group by group (None: they lie so); offsets (G+1,) cuts that list.
    """
    groups = offsets.numel() - 1
    if _backend.backend(values.device, "group_advantages") != "torch":
        out = torch.empty(3, groups, dtype=torch.float64, device=values.device)
        _backend_scans.group_stats(values.contiguous(), order, offsets, out)
        return out
    listed = values if order is None else values[order]
    segment = torch.searchsorted(
        offsets[1:-1].contiguous(), torch.arange(len(listed), device=values.device), right=True
    )
    finite = torch.isfinite(listed)
    zeros = values.new_zeros(groups)
    count = zeros.index_add(0, segment, finite.double())
    pivot = zeros.fill_(torch.inf).scatter_reduce(0, segment, listed.masked_fill(~finite, torch.inf), "amin")
    pivot = pivot.masked_fill(count == 0, 0.0)
    distance = (listed - pivot[segment]).masked_fill(~finite, 0.0)
    mean = torch.zeros_like(count).index_add(0, segment, distance) / count.clamp(min=1)
    deviation = (distance - mean[segment]).masked_fill(~finite, 0.0)
    m2 = torch.zeros_like(count).index_add(0, segment, deviation.square())
    return torch.stack([count, pivot + mean, m2])


@group_stats.register_fake
def _(values, order, offsets):
    return torch.empty(3, offsets.numel() - 1, dtype=torch.float64, device=values.device)

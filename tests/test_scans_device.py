"""The scans and statistics on the device that is there: the CUDA kernels on a GPU, the C++ ones otherwise.

What a few tokens cannot show: many tiles of 4096 tokens, look-back over more than a warp of them, slices that start at
any address, streams and CUDA graphs. The truth is torch's fp64 scan, which test_value.py judges.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_value import assert_budget

from rlhf_fast import gae, group_advantages, masked_whiten, policy_loss, ppo_advantages
from rlhf_fast._backend import use_backend
from rlhf_fast.ops import _scans

LENGTHS = {
    "short": [3, 0, 1, 17, 4096, 4095, 4097, 0, 5],
    "one": [200_000],  # 49 tiles, none of which knows its state by itself
    "mixed": [70_000, 1, 0, 150_000, 12, 9000],
}


def batch(lengths, device, seed=0):
    """rewards, values, cu_seqlens, mask, terminated, bootstrap; the long vectors start at odd addresses."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    draw = lambda size: torch.randn(size + 1, generator=g).to(device)[1:]  # noqa: E731
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    mask = (torch.rand(n + 3, generator=g) >= 0.3).to(device)[3:]
    terminated = (torch.rand(len(lengths), generator=g) < 0.5).to(device)
    return draw(n), draw(n), cu, mask, terminated, draw(len(lengths))


def exact(fn, *args, **options):
    """`fn` in fp64 torch on the CPU, and the same in fp32: what fp32 may be off by."""
    out = []
    for dtype in (torch.float64, torch.float32):
        host = lambda x, d=dtype: x.cpu().to(d) if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
        move = lambda x, h=host: h(x.cpu() if torch.is_tensor(x) else x)  # noqa: E731
        with use_backend("torch"):
            out.append(fn(*map(move, args), **{k: move(v) for k, v in options.items()}))
    return out


@pytest.mark.parametrize("mode", ["none", "carry", "zero"])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gae(lengths, factors, mode, device):
    rewards, values, cu, mask, terminated, bootstrap = batch(lengths, device)
    options = dict(gamma=factors[0], lam=factors[1], cu_seqlens=cu, terminated=terminated, bootstrap=bootstrap)
    if mode != "none":
        options |= dict(mask=mask, mask_mode=mode)
        rewards, values = (x.masked_fill(~mask, torch.nan) for x in (rewards, values))
    ours = gae(rewards, values, **options)
    again = gae(rewards, values, **options)
    truth, naive = exact(gae, rewards, values, **options)
    for a, b, right, rough in zip(ours, again, truth, naive, strict=True):
        assert torch.equal(a, b)
        assert_budget(a.cpu(), right, rough)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 5), (40, 4097), (2, 90_000)], ids=str)
def test_ppo_advantages(rows, length, whiten, device):
    """Padded: everything past a sequence's end is NaN; one sequence has no token at all."""
    rewards, values, _, mask, terminated, bootstrap = batch([length] * rows, device, seed=1)
    mask = mask.view(rows, length) & (torch.arange(length, device=device) < length - 1)
    mask[1] = False
    logprob, values = (x.view(rows, length).masked_fill(~mask, torch.nan) for x in (rewards, values))
    args = (bootstrap * 3, values, logprob, logprob - 0.1)
    options = dict(gamma=0.99, mask=mask, terminated=terminated, bootstrap=bootstrap, kl_estimator="k3", whiten=whiten)
    ours, again = ppo_advantages(*args, **options), ppo_advantages(*args, **options)
    truth, naive = exact(ppo_advantages, *args, **options)
    for a, b, right, rough in zip(ours, again, truth, naive, strict=True):
        assert torch.equal(a, b)
        assert_budget(a.cpu(), right, rough)


@pytest.mark.parametrize("n", [0, 1, 2, 2049, 3_000_000])
def test_whitening(n, device):
    """3M are more than one round of every block."""
    x = torch.randn(n + 1, generator=torch.Generator().manual_seed(0)).to(device)[1:] * 3 + 100
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[::3] = n < 3
    x = x.masked_fill(~mask, math.nan)
    for options in (dict(), dict(shift_mean=False, unbiased=False)):
        ours, again = masked_whiten(x, mask, **options), masked_whiten(x, mask, **options)
        assert torch.equal(ours, again)
        assert_budget(ours.cpu(), *exact(masked_whiten, x, mask, **options))
    count, mean, m2 = _scans.moments(x, mask).tolist()
    chosen = x[mask].cpu().double()
    assert count == len(chosen)
    assert math.isclose(mean, chosen.mean().item() if n else 0.0, rel_tol=1e-12)
    assert math.isclose(m2, (chosen - chosen.mean()).square().sum().item() if n else 0.0, rel_tol=1e-9)


def test_the_batch_as_one_group(device):
    """Baseline and scale of the whole batch: one group of 70,001 rewards."""
    rewards = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).to(device) + 1000
    rewards[17] = math.nan
    for options in (dict(baseline="batch", scale="batch"), dict(group_size=1, baseline="none", scale="centered"), {}):
        ours, again = group_advantages(rewards, **options), group_advantages(rewards, **options)
        assert torch.equal(ours.advantages, again.advantages)
        truth, naive = (x.advantages for x in exact(group_advantages, rewards, **options))
        assert_budget(ours.advantages.cpu(), truth, naive)
        assert ours.num_invalid == 1


@pytest.mark.parametrize("by", ["size", "ids"])
def test_groups(by, device):
    """Groups of one size or of any, in any order; NaN leaves its group intact, equal rewards give exactly 0."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(8 * 700, generator=g).to(device)
    rewards[5], rewards[8:16] = math.nan, 0.1
    ids = torch.arange(8 * 700, device=device) // 8
    order = torch.randperm(8 * 700, generator=g).to(device) if by == "ids" else torch.arange(8 * 700, device=device)
    groups = dict(group_ids=7 * ids[order]) if by == "ids" else dict(group_size=8)
    ours = group_advantages(rewards[order], **groups).advantages
    truth, naive = (x.advantages for x in exact(group_advantages, rewards[order], **groups))
    assert_budget(ours.cpu(), truth, naive)
    assert not ours[(ids[order] == 1) | (order == 5)].any()


def test_tokens_of_no_sequence_are_refused(device):
    """Without a look at the device: its kernels would read an offset that is not there."""
    none = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to N=3, got a single offset"):
        gae(torch.ones(3, device=device), torch.ones(3, device=device), cu_seqlens=none)
    assert gae(torch.ones(0, device=device), torch.ones(0, device=device), cu_seqlens=none).returns.shape == (0,)


def test_offsets_of_other_sequences(device):
    """An error on the CPU; on a GPU, which nobody waits for, a loss that is NaN, and no access out of bounds."""
    logprob = torch.randn(10, device=device, requires_grad=True)
    old, scores = logprob.detach() + 0.01, torch.ones(3, device=device)  # nothing is clipped
    call = lambda *cu, kind: policy_loss(  # noqa: E731
        logprob, old, scores, kind=kind, cu_seqlens=torch.tensor(cu, device=device)
    )[0]
    for kind in ("grpo", "gspo", "dapo"):
        assert call(0, 4, 4, 10, kind=kind).isfinite()
        for cu in ((0, 4, 6, 9), (0, 4, 6, 10**9), (1, 4, 6, 10), (0, 7, 3, 10), (0, -5, 3, 10)):
            if device.type == "cpu":
                with pytest.raises(ValueError, match="cu_seqlens must"):
                    call(*cu, kind=kind)
            else:
                loss = call(*cu, kind=kind)
                assert loss.isnan()
                assert torch.autograd.grad(loss, logprob)[0].isnan().any()


def test_streams_and_graphs(gpu):
    """On the current stream, and the same bits when a graph replays it with other numbers in the same memory."""
    rewards, values, cu, mask, *_ = batch(LENGTHS["mixed"], gpu)
    call = lambda: [  # noqa: E731
        *gae(rewards, values, gamma=0.99, cu_seqlens=cu, mask=mask, mask_mode="zero"), masked_whiten(rewards, mask)
    ]  # fmt: skip
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream reads what is not yet there
        rewards.mul_(2)
        aside = call()
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(aside, call(), strict=True):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        rewards.normal_()
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)


def test_nothing_waits_for_the_device(device):
    if device.type != "cuda":
        pytest.skip("of a GPU alone")
    rewards, values, cu, mask, *_ = batch(LENGTHS["short"], device)
    scores, ids = torch.randn(9, device=device), torch.arange(9, device=device) // 3
    logprob = rewards.clone().requires_grad_()
    calls = [
        lambda: gae(rewards, values, cu_seqlens=cu, mask=mask, mask_mode="zero"),
        lambda: ppo_advantages(scores, values, rewards, values, cu_seqlens=cu, mask=mask),
        lambda: masked_whiten(rewards, mask),
        lambda: group_advantages(scores, group_ids=ids),
        lambda: policy_loss(logprob, rewards, values, mask=mask)[0].backward(),
        lambda: policy_loss(logprob, rewards, values, mask=mask, cu_seqlens=cu, kind="grpo")[0].backward(),
        lambda: policy_loss(logprob, rewards, scores, mask=mask, cu_seqlens=cu, kind="gspo")[0].backward(),
    ]
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

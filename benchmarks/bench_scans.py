"""GAE at 256 x 4096 on the CPU: the op against the loops that trainers run.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_scans.py

Traffic of the op: two fp32 tensors read, two written, 16.8 MB in all.
"""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import gae, group_advantages, masked_whiten
from rlhf_fast._backend import use_backend

SHAPE = (256, 4096)


def columns_loop(rewards, values, gamma, lam):
    """Reversed loop over the columns of (B, T): TRL's and OpenRLHF's way."""
    running, collected = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    return advantages, advantages + values


def rows_loop(rewards, values, gamma, lam):
    """The same over contiguous rows of (T, B), transposition included: the best a loop can do."""
    r, v = rewards.T.contiguous(), values.T.contiguous()
    delta = r - v
    delta[:-1].add_(v[1:], alpha=gamma)
    for t in range(len(r) - 2, -1, -1):
        delta[t].add_(delta[t + 1], alpha=gamma * lam)
    advantages = delta.T.contiguous()
    return advantages, advantages + values


def with_torch_backend(*args):
    with use_backend("torch"):
        return gae(args[0], args[1], gamma=args[2], lam=args[3])


RUNNERS = {
    "rlhf_fast": lambda r, v, g, l: gae(r, v, gamma=g, lam=l),
    "rlhf_fast (torch backend)": with_torch_backend,
    "loop over columns": columns_loop,
    "loop over rows, in place": rows_loop,
}


@pytest.mark.parametrize("name", RUNNERS)
def test_gae(benchmark, name):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    benchmark.group = f"gae {SHAPE[0]} x {SHAPE[1]}"
    got = benchmark.pedantic(RUNNERS[name], (rewards, values, 0.99, 0.95), rounds=7, warmup_rounds=2)
    want = gae(rewards, values, gamma=0.99, lam=0.95)
    torch.testing.assert_close(got[0], want.advantages, rtol=1e-4, atol=1e-4)


def test_whitening(benchmark):
    x = torch.randn(SHAPE)
    benchmark.pedantic(masked_whiten, (x,), rounds=7, warmup_rounds=2)


def test_group_advantages(benchmark):
    rewards, ids = torch.randn(4096), torch.randint(0, 512, (4096,))
    benchmark.pedantic(group_advantages, (rewards,), {"group_ids": ids}, rounds=20, warmup_rounds=2)

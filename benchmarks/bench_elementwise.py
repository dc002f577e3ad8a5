"""The passes over token vectors on the CPU, beside what trainers run: GAE, policy loss, group advantages, whitening.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_elementwise.py --benchmark-columns=min,median,rounds

Every contender is checked against ours before it is timed. The loops are written here after the peers' structure.
Shapes: GAE 256 x 4096 (two fp32 tensors read, two written: 16.8 MB); policy loss 1024 x 1024 tokens with a mask
(logprob, old_logprob and mask read, the gradient written: 13.6 MB); 4096 rewards in groups of 8.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import gae, group_advantages, masked_whiten, policy_loss, ppo_advantages, shape_rewards
from rlhf_fast._backend import use_backend

GAMMA, LAM = 0.99, 0.95


def rounds(benchmark, runner, arguments=(), setup=None, many=15):
    """Time `runner`; a fresh set of arguments for each round where `setup` makes them."""
    return benchmark.pedantic(runner, arguments, setup=setup, rounds=many, warmup_rounds=2)


# ---- GAE ---------------------------------------------------------------------------------------------------


def columns_loop(rewards, values):
    """Reversed loop over the columns of (B, T): TRL's, verl's and OpenRLHF's way."""
    running, collected = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        running = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * running
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    return advantages, advantages + values


def masked_columns_loop(rewards, values):
    """The same carrying observation tokens over, as verl does: every step selects between new and old."""
    mask = torch.ones_like(rewards)
    next_value, running, collected = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        stepped = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * running
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        running = stepped * mask[:, t] + (1 - mask[:, t]) * running
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    return advantages, advantages + values


def rows_loop(rewards, values):
    """The loop over contiguous rows of (T, B) in place, transposition included: the best a loop can do."""
    r, v = rewards.T.contiguous(), values.T.contiguous()
    delta = r - v
    delta[:-1].add_(v[1:], alpha=GAMMA)
    for t in range(len(r) - 2, -1, -1):
        delta[t].add_(delta[t + 1], alpha=GAMMA * LAM)
    advantages = delta.T.contiguous()
    return advantages, advantages + values


def convolution(rewards, values):
    """Vectorised as in torchrl: TD errors convolved with the powers of gamma lam, cut where they fall below 1e-9."""
    delta = rewards - values
    delta[:, :-1].add_(values[:, 1:], alpha=GAMMA)
    taps = min(rewards.shape[1], int(torch.tensor(1e-9).log() / torch.tensor(GAMMA * LAM).log()) + 1)
    powers = (GAMMA * LAM) ** torch.arange(taps, dtype=torch.float32)
    advantages = F.conv1d(F.pad(delta[:, None], (0, taps - 1)), powers[None, None])[:, 0]
    return advantages, advantages + values


def ours_gae(rewards, values):
    return gae(rewards, values, gamma=GAMMA, lam=LAM)


def ours_gae_torch(rewards, values):
    with use_backend("torch"):
        return ours_gae(rewards, values)


GAE = {
    "rlhf_fast": ours_gae,
    "rlhf_fast, torch backend": ours_gae_torch,
    "columns loop": columns_loop,
    "columns loop with mask": masked_columns_loop,
    "rows loop, in place": rows_loop,
    "convolution": convolution,
}


@pytest.mark.parametrize("name", GAE)
def test_gae(benchmark, name):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(256, 4096, generator=g), torch.randn(256, 4096, generator=g)
    want, got = ours_gae(rewards.double(), values.double()), GAE[name](rewards, values)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)
    benchmark.group = "gae 256 x 4096"
    rounds(benchmark, GAE[name], (rewards, values), many=9)


# ---- from scores to whitened advantages --------------------------------------------------------------------


def three_functions(scores, values, logprob, ref_logprob, mask):
    rewards, kl = shape_rewards(scores, logprob, ref_logprob, mask=mask)
    advantages, returns = gae(rewards, values, mask=mask)
    return masked_whiten(advantages, mask), returns, rewards, kl


def one_call(scores, values, logprob, ref_logprob, mask):
    return ppo_advantages(scores, values, logprob, ref_logprob, mask=mask)


@pytest.mark.parametrize("runner", [one_call, three_functions])
def test_ppo_advantages(benchmark, runner):
    g = torch.Generator().manual_seed(0)
    scores, mask = torch.randn(256, generator=g), torch.rand(256, 4096, generator=g) < 0.9
    values, logprob, ref = (torch.randn(256, 4096, generator=g) for _ in range(3))
    arguments = (scores, values, logprob, ref, mask)
    for a, b in zip(runner(*arguments), one_call(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    benchmark.group = "rewards to whitened advantages, 256 x 4096"
    rounds(benchmark, runner, arguments, many=9)


# ---- policy loss -------------------------------------------------------------------------------------------


def eager_grpo(logprob, old_logprob, advantages, mask):
    """GRPO in plain torch with the metrics of `policy_loss`, as a trainer would write it."""
    log_ratio = logprob - old_logprob
    ratio, a, m = log_ratio.exp(), advantages[:, None], mask.float()
    loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    loss = ((loss * m).sum(1) / m.sum(1).clamp(min=1)).mean()
    with torch.no_grad():
        tokens = m.sum().clamp(min=1)
        low = (((ratio < 0.8) & (a < 0)).float() * m).sum() / tokens
        high = (((ratio > 1.2) & (a > 0)).float() * m).sum() / tokens
        metrics = {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
        metrics["ratio_mean"] = (ratio * m).sum() / tokens
        metrics["approx_kl"] = ((torch.expm1(log_ratio) - log_ratio) * m).sum() / tokens
        metrics["ratio_max"] = ratio.masked_fill(~mask, -torch.inf).amax()
        metrics["ratio_min"] = ratio.masked_fill(~mask, torch.inf).amin()
    return loss, metrics


def bare_grpo(logprob, old_logprob, advantages, mask):
    """The loss alone, without a metric."""
    ratio, a, m = (logprob - old_logprob).exp(), advantages[:, None], mask.float()
    loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return ((loss * m).sum(1) / m.sum(1).clamp(min=1)).mean(), {}


def ours_grpo(logprob, old_logprob, advantages, mask):
    return policy_loss(logprob, old_logprob, advantages, kind="grpo", mask=mask)


@functools.cache
def compiled(function):
    return torch.compile(function)


POLICY = {
    "rlhf_fast": lambda: ours_grpo,
    "eager": lambda: eager_grpo,
    "eager, no metrics": lambda: bare_grpo,
    "torch.compile": lambda: compiled(eager_grpo),
    "torch.compile, no metrics": lambda: compiled(bare_grpo),
}


@pytest.mark.parametrize("name", POLICY)
def test_policy_loss_forward_and_backward(benchmark, name):
    g = torch.Generator().manual_seed(0)
    logprob = -torch.rand(1024, 1024, generator=g)
    old = logprob + 0.1 * torch.randn(1024, 1024, generator=g)
    advantages = torch.randn(1024, generator=g)
    mask = torch.arange(1024)[None] < torch.randint(200, 1025, (1024, 1), generator=g)
    function = POLICY[name]()

    def step(x):
        loss, metrics = function(x, old, advantages, mask)
        loss.backward()
        return loss, x.grad, metrics

    def fresh():
        return (logprob.clone().requires_grad_(),), {}

    want, got = eager_grpo(*(t.double() for t in (logprob, old, advantages)), mask), step(*fresh()[0])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    for key in got[2].keys() & want[1].keys():
        torch.testing.assert_close(got[2][key].double(), want[1][key].double(), rtol=1e-4, atol=1e-5)
    x = logprob.double().requires_grad_()
    bare_grpo(x, old.double(), advantages.double(), mask)[0].backward()
    torch.testing.assert_close(got[1].double(), x.grad, rtol=1e-4, atol=1e-9)
    benchmark.group = "policy loss fwd + bwd, 1M tokens"
    rounds(benchmark, step, setup=fresh, many=25)


# ---- group advantages, whitening ---------------------------------------------------------------------------


def by_reshape(rewards):
    """TRL's way: groups are rows of a matrix."""
    groups = rewards.view(-1, 8)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    return ((groups - mean) / (std + 1e-4)).reshape(-1)


def by_dictionary(rewards):
    """verl's way: rewards gathered by the prompt's id in Python."""
    found: dict[int, list] = {}
    for i, group in enumerate((torch.arange(len(rewards)) // 8).tolist()):
        found.setdefault(group, []).append(rewards[i])
    statistics = {k: (torch.stack(v).mean(), torch.stack(v).std()) for k, v in found.items()}
    rows = [(rewards[i] - statistics[i // 8][0]) / (statistics[i // 8][1] + 1e-4) for i in range(len(rewards))]
    return torch.stack(rows)


GROUPS = {
    "rlhf_fast": lambda r: group_advantages(r, group_size=8).advantages,
    "rlhf_fast, by ids": lambda r: group_advantages(r, group_ids=torch.arange(len(r)) // 8).advantages,
    "reshape, mean, std": by_reshape,
    "dictionary of rows": by_dictionary,
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_advantages(benchmark, name):
    rewards = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(GROUPS[name](rewards), by_reshape(rewards), rtol=1e-4, atol=1e-5)
    benchmark.group = "group advantages, 4096 rewards in groups of 8"
    rounds(benchmark, GROUPS[name], (rewards,))


def eager_whiten(x, mask):
    """Masked mean and variance as verl forms them."""
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean).square() * mask).sum() / mask.sum()
    count = mask.sum()
    return (x - mean) * torch.rsqrt(variance * count / (count - 1) + 1e-8) * mask


@pytest.mark.parametrize("name", ["rlhf_fast", "eager"])
def test_masked_whiten(benchmark, name):
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(256, 4096, generator=g), torch.rand(256, 4096, generator=g) < 0.9
    runner = {"rlhf_fast": masked_whiten, "eager": eager_whiten}[name]
    torch.testing.assert_close(runner(x, mask), eager_whiten(x.double(), mask).float(), rtol=1e-4, atol=1e-5)
    benchmark.group = "masked whitening, 256 x 4096"
    rounds(benchmark, runner, (x, mask))

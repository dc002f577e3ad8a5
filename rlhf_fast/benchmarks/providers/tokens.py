"""Ops on tokens alone as the peers run them: their loops written here after their structure, torchrl's own calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.benchmarks.cases import CLIP, GAMMA, GROUP, KL_COEF, LAM, Case
from rlhf_fast.benchmarks.providers.base import Builder, Provider, Step, Unavailable, load, needs_gpu
from rlhf_fast.benchmarks.token_inputs import EPS, GROUP_EPS, TokenInputs

Scan = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# ---- GAE --------------------------------------------------------------------------------------------------


def _columns(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Reversed loop over the columns of (B, T): the way of TRL's PPO and of OpenRLHF."""
    running, collected = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    return advantages, advantages + values


def _masked_columns(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same carrying observation tokens over, as verl does: every step selects between new and old."""
    mask = torch.ones_like(rewards)
    following, running, collected = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        stepped = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        following = values[:, t] * mask[:, t] + (1 - mask[:, t]) * following
        running = stepped * mask[:, t] + (1 - mask[:, t]) * running
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    return advantages, advantages + values


def _rows(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over contiguous rows of (T, B) in place, transposition included: the best a loop can do."""
    r, v = rewards.T.contiguous(), values.T.contiguous()
    delta = r - v
    delta[:-1].add_(v[1:], alpha=GAMMA)
    for t in range(len(r) - 2, -1, -1):
        delta[t].add_(delta[t + 1], alpha=GAMMA * LAM)
    advantages = delta.T.contiguous()
    return advantages, advantages + values


def _convolution(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """torchrl's idea without its bookkeeping: TD errors convolved with powers of gamma lam, cut below 1e-9."""
    delta = rewards - values
    delta[:, :-1].add_(values[:, 1:], alpha=GAMMA)
    taps = min(rewards.shape[1], int(torch.tensor(1e-9).log() / torch.tensor(GAMMA * LAM).log()) + 1)
    powers = (GAMMA * LAM) ** torch.arange(taps, dtype=torch.float32, device=delta.device)
    advantages = F.conv1d(F.pad(delta[:, None], (0, taps - 1)), powers[None, None])[:, 0]
    return advantages, advantages + values


def _scan(fn: Scan) -> Builder:
    def builder(case: Case, x: TokenInputs) -> Step:
        return lambda: dict(zip(("advantages", "returns"), fn(x.rewards, x.values), strict=True))

    return builder


def _torchrl(case: Case, x: TokenInputs) -> Step:
    fn = load("torchrl.objectives.value.functional").vec_generalized_advantage_estimate
    rewards, values = x.rewards.unsqueeze(-1), x.values.unsqueeze(-1)
    following = F.pad(values[:, 1:], (0, 0, 0, 1))
    done = torch.zeros_like(rewards, dtype=torch.bool)
    done[:, -1] = True

    def step() -> dict[str, Tensor]:
        advantages, returns = fn(GAMMA, LAM, values, following, rewards, done)
        return {"advantages": advantages.squeeze(-1), "returns": returns.squeeze(-1)}

    return step


def _real(case: Case, x: TokenInputs) -> Step:
    needs_gpu(case, "a CUDA kernel")
    load("realhf")
    raise Unavailable("ReaL's gae_1d_nolp_misalign is built by its own setup, and no call to it is written here")


# ---- from scores to whitened advantages -------------------------------------------------------------------


def _whitened(x: Tensor, mask: Tensor) -> Tensor:
    """Masked mean and variance as verl forms them."""
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean).square() * mask).sum() / mask.sum()
    count = mask.sum()
    return (x - mean) * torch.rsqrt(variance * count / (count - 1) + EPS) * mask


def _advantages(fn: Scan) -> Builder:
    """The KL of every token into its reward, the score into the last one, the scan, whitening."""

    def builder(case: Case, x: TokenInputs) -> Step:
        logprob, last = x.logprob.detach(), x.mask.sum(1, keepdim=True) - 1

        def step() -> dict[str, Tensor]:
            rewards = -KL_COEF * (logprob - x.ref_logprob)
            rewards = rewards.scatter_add(1, last, x.scores[:, None]) * x.mask
            advantages, returns = fn(rewards, x.values * x.mask)
            return {"advantages": _whitened(advantages, x.mask), "returns": returns * x.mask}

        return step

    return builder


def _whiten(fn: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    return lambda case, x: lambda: {"whitened": fn(x.values, x.mask)}


# ---- policy loss ------------------------------------------------------------------------------------------


def _grpo(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
    """The loss alone, without a metric."""
    ratio, a, m = (logprob - old_logprob).exp(), advantages[:, None], mask.float()
    loss = -torch.min(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
    return ((loss * m).sum(1) / m.sum(1).clamp(min=1)).mean(), {}


def _grpo_metrics(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
    """With the metrics of `policy_loss`, as a trainer would write it."""
    loss, _ = _grpo(logprob, old_logprob, advantages, mask)
    with torch.no_grad():
        log_ratio = logprob - old_logprob
        ratio, a, m = log_ratio.exp(), advantages[:, None], mask.float()
        tokens = m.sum().clamp(min=1)
        low = (((ratio < 1 - CLIP) & (a < 0)).float() * m).sum() / tokens
        high = (((ratio > 1 + CLIP) & (a > 0)).float() * m).sum() / tokens
        metrics = {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
        metrics["ratio_mean"] = (ratio * m).sum() / tokens
        metrics["approx_kl"] = ((torch.expm1(log_ratio) - log_ratio) * m).sum() / tokens
        metrics["ratio_max"] = ratio.masked_fill(~mask, -torch.inf).amax()
        metrics["ratio_min"] = ratio.masked_fill(~mask, torch.inf).amin()
    return loss, metrics


def _ppo_style(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
    """verl's way: clamped log-ratio, both losses, their maximum, and the metrics it logs."""
    log_ratio = torch.clamp(logprob - old_logprob, min=-20.0, max=20.0)
    ratio, a, m = torch.exp(log_ratio), advantages[:, None].expand_as(logprob), mask.float()
    first, second = -a * ratio, -a * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    loss, tokens = torch.maximum(first, second), m.sum()
    metrics = {"kl": (-log_ratio.detach() * m).sum() / tokens}
    metrics["clip_fraction"] = (torch.gt(second, first).float() * m).sum() / tokens
    return ((loss * m).sum(1) / m.sum(1).clamp(min=1)).mean(), metrics


def _policy(fn: Callable, wrap: Callable = lambda fn: fn) -> Builder:
    def builder(case: Case, x: TokenInputs) -> Step:
        call = wrap(fn)

        def step() -> dict[str, Tensor]:
            loss, _ = call(x.logprob, x.old_logprob, x.advantages, x.mask)
            return {"loss": loss, "dlogprob": torch.autograd.grad(loss, x.logprob)[0]}

        return step

    return builder


# ---- group advantages -------------------------------------------------------------------------------------


def _reshape(case: Case, x: TokenInputs) -> Step:
    """TRL's way: groups are rows of a matrix."""

    def step() -> dict[str, Tensor]:
        groups = x.group_rewards.view(-1, GROUP)
        mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
        return {"advantages": ((groups - mean) / (std + GROUP_EPS)).reshape(-1)}

    return step


def _dictionary(case: Case, x: TokenInputs) -> Step:
    """verl's first way: rewards gathered by the prompt's id in Python."""
    rewards = x.group_rewards
    ids = (torch.arange(len(rewards)) // GROUP).tolist()

    def step() -> dict[str, Tensor]:
        found: dict[int, list] = {}
        for i, group in enumerate(ids):
            found.setdefault(group, []).append(rewards[i])
        moments = {k: (torch.stack(v).mean(), torch.stack(v).std()) for k, v in found.items()}
        rows = [(rewards[i] - moments[g][0]) / (moments[g][1] + GROUP_EPS) for i, g in enumerate(ids)]
        return {"advantages": torch.stack(rows)}

    return step


PLAIN: dict[str, Builder] = {
    "policy": _policy(_grpo_metrics),
    "gae": _scan(_columns),
    "advantages": _advantages(_columns),
    "group": _reshape,
    "whiten": _whiten(_whitened),
}
COMPILED: dict[str, Builder] = {
    "policy": _policy(_grpo_metrics, torch.compile),
    "whiten": lambda case, x: _whiten(torch.compile(_whitened))(case, x),
}
VERL: dict[str, Builder] = {
    "policy": _policy(_ppo_style),
    "gae": _scan(_masked_columns),
    "advantages": _advantages(_masked_columns),
    "group": _dictionary,
}

PROVIDERS = [
    Provider("verl-style", "verl's loops, written after their structure", VERL),
    Provider("torch-bare", "the policy loss without metrics", {"policy": _policy(_grpo)}),
    Provider("torch.compile-bare", "the same, compiled", {"policy": _policy(_grpo, torch.compile)}),
    Provider("rows-loop", "a loop over rows of the transposed batch, in place", {"gae": _scan(_rows)}),
    Provider("convolution", "torchrl's idea: a convolution with powers", {"gae": _scan(_convolution)}),
    Provider("torchrl", "torchrl's vec_generalized_advantage_estimate", {"gae": _torchrl}),
    Provider("real", "ReaL's CUDA GAE", {"gae": _real}),
]

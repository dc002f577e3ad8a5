"""Inputs and fp64 answers of the ops on tokens alone: policy loss, GAE, advantages of PPO and of groups, whitening."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import CLIP, GAMMA, GROUP, KL_COEF, LAM, OPS, Case

EPS = 1e-8
GROUP_EPS = 1e-4


class TokenInputs(NamedTuple):
    """A batch of B sequences of T tokens; `logprob` is the leaf that requires grad, all else is constant."""

    logprob: Tensor  # (B, T)
    old_logprob: Tensor
    ref_logprob: Tensor
    rewards: Tensor
    values: Tensor
    mask: Tensor  # bool: True = counts
    advantages: Tensor  # (B,)
    scores: Tensor  # (B,)
    group_rewards: Tensor  # (N / grain,)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.logprob,)


def make_inputs(case: Case, seed: int = 0) -> TokenInputs:
    """Ratios on both sides of the clip range, none near its edges; masked tokens at the end of every sequence."""
    n, t = case.shape.n, case.shape.length
    grain = OPS["group"].grain
    if n % t or n % (grain * GROUP) and case.op == "group" and n > grain * GROUP:
        raise ValueError(f"N must be a multiple of the length {t}, and of {grain * GROUP} for group, got {n}")
    g = torch.Generator(case.device).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, device=case.device)  # noqa: E731
    size = (n // t, t)
    logprob = -draw(*size).abs()
    centres = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=case.device)
    ratio = centres[torch.randint(4, size, generator=g, device=case.device)] + 0.02 * draw(*size)
    advantages = draw(size[0])
    advantages[: round(case.zero_rows * size[0])] = 0
    mask = torch.ones(size, dtype=torch.bool, device=case.device)
    mask[:, t - round(case.masked * t) :] = False
    return TokenInputs(
        logprob.requires_grad_(),
        logprob.detach() - ratio,
        logprob.detach() - 0.1 * draw(*size),
        draw(*size),
        draw(*size),
        mask,
        advantages,
        draw(size[0]),
        draw(max(GROUP, n // grain)),
    )


def answer(case: Case, x: TokenInputs) -> dict[str, Tensor]:
    """The op's outputs in fp64."""
    return _ANSWERS[case.op](x)


def _policy(x: TokenInputs) -> dict[str, Tensor]:
    """GRPO: mean over sequences of the mean over tokens of -min(r A, clip(r) A); dL/dlogprob = -r A where unclipped."""
    ratio = torch.exp(x.logprob.detach().double() - x.old_logprob.double())
    a, share = x.advantages.double().unsqueeze(1), x.mask.double()
    share = share / share.sum(1, keepdim=True).clamp(min=1) / share.shape[0]
    clipped = torch.where(a > 0, ratio > 1 + CLIP, ratio < 1 - CLIP) & (a != 0)
    bound = 1 + CLIP * a.sign()
    loss = -(torch.where(clipped, bound * a, ratio * a) * share).sum()
    return {"loss": loss, "dlogprob": torch.where(clipped, 0.0, -ratio * a * share)}


def _scan(rewards: Tensor, values: Tensor) -> dict[str, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, from the end."""
    rewards, values = rewards.double(), values.double()
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    running, advantages = rewards + GAMMA * following - values, torch.empty_like(values)
    total = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        total = running[:, t] + GAMMA * LAM * total
        advantages[:, t] = total
    return {"advantages": advantages, "returns": advantages + values}


def _whitened(x: Tensor, mask: Tensor) -> Tensor:
    chosen = x.double()[mask]
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    out[mask] = (chosen - chosen.mean()) / (chosen.var() + EPS).sqrt()
    return out


def _advantages(x: TokenInputs) -> dict[str, Tensor]:
    """r_t = -c (logprob - ref_logprob) + [last token] score, GAE over the tokens that count, whitened."""
    rewards = -KL_COEF * (x.logprob.detach().double() - x.ref_logprob.double())
    last = x.mask.sum(1) - 1  # masks end a sequence, so the scan may run over the rest as if it were 0
    rewards[torch.arange(len(last), device=last.device), last] += x.scores.double()
    zero = torch.zeros((), dtype=torch.float64, device=rewards.device)
    found = _scan(torch.where(x.mask, rewards, zero), torch.where(x.mask, x.values.double(), zero))
    returns = torch.where(x.mask, found["returns"], zero)
    return {"advantages": _whitened(found["advantages"], x.mask), "returns": returns}


def _group(x: TokenInputs) -> dict[str, Tensor]:
    groups = x.group_rewards.double().unflatten(0, (-1, GROUP))
    centred = groups - groups.sum(1, keepdim=True) / GROUP
    std = (centred.square().sum(1, keepdim=True) / (GROUP - 1)).sqrt()
    return {"advantages": (centred / (std + GROUP_EPS)).flatten()}


_ANSWERS = {
    "policy": _policy,
    "gae": lambda x: _scan(x.rewards, x.values),
    "advantages": _advantages,
    "group": _group,
    "whiten": lambda x: {"whitened": _whitened(x.values, x.mask)},
}

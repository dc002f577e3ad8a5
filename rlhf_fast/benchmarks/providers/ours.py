"""This library, as a user calls it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.benchmarks.cases import BETA, CLIP, ENTROPY_COEF, GAMMA, GROUP, KL_COEF, LAM, LENGTH, Case
from rlhf_fast.benchmarks.inputs import Inputs, grpo_objective
from rlhf_fast.benchmarks.providers.base import Builder, Provider, Step, Unavailable, head_ops, logits_ops, scalar
from rlhf_fast.benchmarks.token_inputs import TokenInputs
from rlhf_fast.losses import PolicyLoss, PreferenceLoss
from rlhf_fast.losses.pairs import pair_segments

OURS = "rlhf_fast"


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable rather than `use_backend`: autograd's own threads see it too. None: not set."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _on(backend: str | None, builder: Builder) -> Builder:
    def build_on(case: Case, x: Inputs | TokenInputs) -> Step:
        inner = builder(case, x)

        def step() -> dict[str, Tensor]:
            with _environment("RLHF_FAST_BACKEND", backend):
                return inner()

        return step

    return build_on


def _epilogue(builder: Builder) -> Builder:
    """By the epilogue of the product, where that can be had."""

    def build_on(case: Case, x: Inputs) -> Step:
        from rlhf_fast.ops import _epilogue

        inner = builder(case, x)
        with _environment("RLHF_FAST_HEAD", "epilogue"):
            if not _epilogue.applies(x.hidden, x.weight):
                raise Unavailable("needs bf16 or fp16, rows of whole 16 bytes, and a GPU of sm_90 or sm_100")

        def step() -> dict[str, Tensor]:
            with _environment("RLHF_FAST_HEAD", "epilogue"):
                return inner()

        return step

    return build_on


# ---- ops with a head --------------------------------------------------------------------------------------


def _offsets(x: Inputs) -> Tensor:
    return torch.arange(0, x.target.shape[0] + 1, LENGTH, device=x.target.device)


def _fused(case: Case, x: Inputs, loss_fn: Callable, batch: dict, segments: Tensor | None = None) -> Step:
    softcap = case.shape.softcap

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return rlhf_fast.fused_linear_loss(
            hidden, weight, x.target, loss_fn, batch=batch, segments=segments, softcap=softcap
        ).loss

    return scalar(case, x, loss)


def _grpo(case: Case, x: Inputs) -> Step:
    batch = {"advantages": x.advantages, "old_logprob": x.old_logprob}
    return _fused(case, x, PolicyLoss("grpo", clip_low=CLIP, clip_high=CLIP), batch, _offsets(x))


def _ppo(case: Case, x: Inputs) -> Step:
    batch = {"advantages": x.advantages, "old_logprob": x.old_logprob}
    return _fused(case, x, PolicyLoss("ppo", clip_low=CLIP, clip_high=CLIP, entropy_coef=ENTROPY_COEF), batch)


def _grpo_loss_fn(case: Case, x: Inputs) -> Step:
    """A loss as a user writes it: plain torch, gradient by autograd."""
    batch = {"advantages": x.token_advantages, "old": x.old_logprob, "share": x.share}

    def loss_fn(logprob: Tensor, entropy: Tensor | None, part: dict) -> Tensor:
        return grpo_objective(logprob, part["old"], part["advantages"], part["share"])

    return _fused(case, x, loss_fn, batch)


def _cross_entropy(case: Case, x: Inputs) -> Step:
    nll = lambda logprob, entropy, part: -(logprob * part["share"]).sum()  # noqa: E731
    return _fused(case, x, nll, {"share": x.share})


def _dpo(case: Case, x: Inputs) -> Step:
    segments, is_chosen = pair_segments(_offsets(x), x.target.shape[0])
    loss_fn, softcap = PreferenceLoss("sigmoid", beta=BETA), case.shape.softcap

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref = rlhf_fast.linear_logprob(x.ref_hidden, x.ref_weight, x.target, softcap=softcap).logprob
        batch = {"is_chosen": is_chosen, "ref_logprob": ref}
        return rlhf_fast.fused_linear_loss(
            hidden, weight, x.target, loss_fn, batch=batch, segments=segments, softcap=softcap
        ).loss

    return scalar(case, x, loss)


def _divergence(kind: str) -> Builder:
    def builder(case: Case, x: Inputs) -> Step:
        options = dict(kind=kind, weights=x.share, softcap=case.shape.softcap)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return rlhf_fast.linear_divergence(hidden, weight, x.ref_hidden, x.ref_weight, **options).loss

        return scalar(case, x, loss)

    return builder


def _logprob(case: Case) -> Callable:
    softcap = case.shape.softcap
    return lambda *args: rlhf_fast.linear_logprob(*args, softcap=softcap).logprob


# ---- ops on tokens ----------------------------------------------------------------------------------------


def _policy(case: Case, x: TokenInputs) -> Step:
    options = dict(kind="grpo", mask=x.mask, clip_low=CLIP, clip_high=CLIP)

    def step() -> dict[str, Tensor]:
        loss, _ = rlhf_fast.policy_loss(x.logprob, x.old_logprob, x.advantages, **options)
        return {"loss": loss, "dlogprob": torch.autograd.grad(loss, x.logprob)[0]}

    return step


def _gae(case: Case, x: TokenInputs) -> Step:
    return lambda: rlhf_fast.gae(x.rewards, x.values, gamma=GAMMA, lam=LAM)._asdict()


def _advantages(case: Case, x: TokenInputs) -> Step:
    logprob = x.logprob.detach()
    options = dict(kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, mask=x.mask)

    def step() -> dict[str, Tensor]:
        out = rlhf_fast.ppo_advantages(x.scores, x.values, logprob, x.ref_logprob, **options)
        return {"advantages": out.advantages, "returns": out.returns}

    return step


def _advantages_apart(case: Case, x: TokenInputs) -> Step:
    """In three calls, one after the other."""
    logprob = x.logprob.detach()

    def step() -> dict[str, Tensor]:
        rewards = rlhf_fast.shape_rewards(x.scores, logprob, x.ref_logprob, mask=x.mask, kl_coef=KL_COEF).rewards
        advantages, returns = rlhf_fast.gae(rewards, x.values, gamma=GAMMA, lam=LAM, mask=x.mask)
        return {"advantages": rlhf_fast.masked_whiten(advantages, x.mask), "returns": returns}

    return step


def _group(case: Case, x: TokenInputs) -> Step:
    return lambda: {"advantages": rlhf_fast.group_advantages(x.group_rewards, group_size=GROUP).advantages}


def _group_by_ids(case: Case, x: TokenInputs) -> Step:
    ids = torch.arange(len(x.group_rewards), device=x.group_rewards.device) // GROUP
    return lambda: {"advantages": rlhf_fast.group_advantages(x.group_rewards, group_ids=ids).advantages}


def _whiten(case: Case, x: TokenInputs) -> Step:
    return lambda: {"whitened": rlhf_fast.masked_whiten(x.values, x.mask)}


def _all(backend: str | None) -> dict[str, Builder]:
    ops = head_ops(_logprob) | logits_ops(lambda case: lambda *args: rlhf_fast.logprob_from_logits(*args).logprob)
    ops |= {"grpo": _grpo, "ppo": _ppo, "cross_entropy": _cross_entropy, "dpo": _dpo}
    ops |= {"forward_kl": _divergence("forward"), "jsd": _divergence("jsd")}
    ops |= {"policy": _policy, "gae": _gae, "advantages": _advantages, "group": _group, "whiten": _whiten}
    return {name: _on(backend, builder) for name, builder in ops.items()}


_HEAD = head_ops(_logprob)

PROVIDERS = [
    Provider(OURS, "this library, as installed", _all(None)),
    Provider(f"{OURS}-torch", "this library, its torch fallbacks", _all("torch")),
    Provider(f"{OURS}-loss_fn", "this library, the loss as a user's plain torch function", {"grpo": _grpo_loss_fn}),
    Provider(
        f"{OURS}-epilogue",
        "this library, RLHF_FAST_HEAD=epilogue: statistics and exponentials by the product itself",
        {name: _epilogue(_HEAD[name]) for name in ("logprob", "logprob_grad")}
        | {"grpo": _epilogue(_grpo), "cross_entropy": _epilogue(_cross_entropy)},
    ),
    Provider(f"{OURS}-apart", "this library, one call a step", {"advantages": _advantages_apart}),
    Provider(f"{OURS}-ids", "this library, groups by id", {"group": _group_by_ids}),
]

"""A valid call of every public op, drawn at random, and arguments that do not belong there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KINDS = ("ppo", "grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "gpg", "reinforce")
PAIR_KINDS = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "apo_zero", "apo_down", "discopop", "sft")


class Draw:
    """Numbers and tensors from one source of choices: `choose(list) -> element`."""

    def __init__(self, choose: Callable[[list], Any]):
        self.choose = choose
        self.generator = torch.Generator().manual_seed(choose(list(range(50))))

    def size(self, least: int = 1) -> int:
        return self.choose([n for n in (0, 1, 2, 3, 5, 7) if n >= least])

    def maybe(self, value: Any) -> Any:
        return self.choose([None, value])

    def dtype(self) -> torch.dtype:
        return self.choose([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def logprob(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return -self.normal(*shape).abs().to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return self.integers(3, *shape) > 0

    def offsets(self, total: int) -> Tensor:
        cuts = sorted(self.integers(total + 1, self.size(0)).tolist())
        return torch.tensor([0, *cuts, total], dtype=self.choose([torch.int32, torch.int64]))


def head(d: Draw) -> dict[str, Any]:
    n, width, vocab, dtype = d.size(0), d.size(), d.size() + 1, d.choose([torch.float32, torch.float64, torch.bfloat16])
    target = d.integers(vocab, n)
    target[d.integers(4, n) == 0] = -100
    return dict(
        hidden=d.normal(n, width, dtype=dtype),
        weight=d.normal(vocab, width, dtype=dtype),
        target=target,
        bias=d.maybe(d.normal(vocab, dtype=dtype)),
        temperature=d.choose([1.0, 0.5, 2]),
        logit_scale=d.choose([1.0, 0.25]),
        softcap=d.choose([None, 5.0]),
        ignore_index=-100,
        entropy=d.choose([False, True]),
        chunk_size=d.choose([None, 1, 3]),
    )


def linear_logprob(d: Draw) -> dict[str, Any]:
    call = head(d)
    rank, (vocab, width), dtype = d.size(), call["weight"].shape, call["weight"].dtype
    call["lora"] = d.maybe((d.normal(rank, width, dtype=dtype), d.normal(vocab, rank, dtype=dtype), 0.5))
    return call


def fused_linear_loss(d: Draw) -> dict[str, Any]:
    call = head(d)
    n = len(call["target"])
    segments = d.maybe(d.offsets(n))
    return {**call, "loss_fn": _weighted, "batch": dict(w=d.normal(n)), "segments": segments}


def _weighted(logprob: Tensor, entropy: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    return (logprob * batch["w"]).sum()


def logprob_from_logits(d: Draw) -> dict[str, Any]:
    call = head(d)
    names = ("target", "temperature", "logit_scale", "softcap", "ignore_index", "entropy")
    logits = d.normal(len(call["target"]), len(call["weight"]), dtype=d.dtype())
    return dict(logits=logits, **{name: call[name] for name in names})


def entropy_from_logits(d: Draw) -> dict[str, Any]:
    call = logprob_from_logits(d)
    return {name: call[name] for name in ("logits", "temperature", "logit_scale", "softcap")}


def linear_divergence(d: Draw) -> dict[str, Any]:
    n, width, other, vocab = d.size(0), d.size(), d.size(), d.size() + 1
    return dict(
        hidden=d.normal(n, width),
        weight=d.normal(vocab, width),
        ref_hidden=d.normal(n, other),
        ref_weight=d.normal(vocab, other),
        kind=d.choose(["forward", "reverse", "jsd"]),
        ref_share=0.5,
        weights=d.maybe(d.normal(n)),
        mask=d.maybe(d.mask(n)),
        bias=d.maybe(d.normal(vocab)),
        ref_bias=d.maybe(d.normal(vocab)),
        temperature=d.choose([1.0, 0.5]),
        softcap=d.choose([None, 5.0]),
        ref_options=d.choose([None, dict(temperature=2.0)]),
        chunk_size=d.choose([None, 1, 3]),
    )


def kl_estimate(d: Draw) -> dict[str, Any]:
    shape = (d.size(0), d.size())[: d.choose([1, 2])]
    return dict(
        logprob=d.logprob(*shape, dtype=d.dtype()),
        ref_logprob=d.logprob(*shape),
        estimator=d.choose(["k1", "abs", "k2", "k3"]),
        gradient=d.choose([None, "k2"]),
        mask=d.maybe(d.mask(*shape)),
    )


def policy_loss(d: Draw) -> dict[str, Any]:
    b, t = d.size(0), d.size()
    kind, mask = d.choose(list(KINDS)), d.maybe(d.mask(b, t))
    call = dict(
        logprob=d.logprob(b, t),
        old_logprob=d.maybe(d.logprob(b, t)),
        advantages=d.normal(*d.choose([(b,), (b, t)])),
        kind=kind,
        mask=mask,
        ref_logprob=d.maybe(d.logprob(b, t)),
    )
    call["beta"] = 0.0 if call["ref_logprob"] is None else 0.1
    if kind in ("ppo", "grpo", "dapo", "bnpo"):
        call |= dict(clip_low=0.2, clip_high=0.3)
    return call


def value_loss(d: Draw) -> dict[str, Any]:
    b, t = d.size(0), d.size()
    return dict(
        values=d.normal(b, t, dtype=d.dtype()),
        old_values=d.normal(b, t),
        returns=d.normal(b, t),
        clip=d.choose([None, 0.2]),
        kind=d.choose(["mse", "huber"]),
        huber_delta=1.0,
        mask=d.maybe(d.mask(b, t)),
        aggregation=d.choose(["token_mean", "seq_mean_token_mean"]),
        normalizer=None,
    )


def scan(d: Draw) -> dict[str, Any]:
    b, t = d.size(0), d.size()
    flat = d.choose([False, True])
    offsets = d.offsets(b * t) if flat else None
    shape, count = ((b * t,), len(offsets) - 1) if flat else ((b, t), b)
    cut = d.choose([False, True])
    return dict(
        rewards=d.normal(*shape),
        values=d.normal(*shape),
        gamma=d.choose([1.0, 0.9, 0]),
        lam=d.choose([0.95, 1.0, 0.0]),
        cu_seqlens=offsets,
        mask=d.maybe(d.mask(*shape)),
        mask_mode=d.choose(["carry", "zero"]),
        terminated=d.mask(count) if cut else None,
        bootstrap=d.normal(count) if cut else None,
    )


def discounted_returns(d: Draw) -> dict[str, Any]:
    call = scan(d)
    del call["values"], call["lam"]
    return call


def shape_rewards(d: Draw) -> dict[str, Any]:
    call = scan(d)
    shape, count = call["rewards"].shape, call["rewards"].shape[0]
    count = count if call["cu_seqlens"] is None else len(call["cu_seqlens"]) - 1
    return dict(
        scores=d.normal(count),
        logprob=d.logprob(*shape),
        ref_logprob=d.logprob(*shape),
        kl_coef=d.choose([0.05, 0.0]),
        kl_estimator=d.choose(["k1", "k2", "k3", "abs"]),
        kl_clip=d.choose([None, 1.0]),
        score_clip=d.choose([None, 0.5]),
        cu_seqlens=call["cu_seqlens"],
        mask=call["mask"],
    )


def ppo_advantages(d: Draw) -> dict[str, Any]:
    call, shaped = scan(d), None
    shape = call["rewards"].shape
    count = shape[0] if call["cu_seqlens"] is None else len(call["cu_seqlens"]) - 1
    del call["rewards"]
    shaped = dict(scores=d.normal(count), logprob=d.logprob(*shape), ref_logprob=d.logprob(*shape))
    options = dict(kl_coef=0.05, kl_estimator=d.choose(["k1", "k3"]), kl_clip=d.choose([None, 1.0]))
    return {**shaped, **call, **options, "score_clip": d.choose([None, 0.5]), "whiten": d.choose([True, False])}


def masked_whiten(d: Draw) -> dict[str, Any]:
    shape = (d.size(0), d.size())[: d.choose([1, 2])]
    flags = dict(shift_mean=d.choose([True, False]), unbiased=d.choose([True, False]))
    return dict(values=d.normal(*shape, dtype=d.dtype()), mask=d.maybe(d.mask(*shape)), eps=1e-8, **flags)


def group_advantages(d: Draw) -> dict[str, Any]:
    size, groups = d.size(), d.size()
    rows = size * groups
    how = d.choose([dict(group_size=size), dict(group_ids=d.integers(3, rows)), {}])
    baseline = d.choose(["mean", "loo", "batch", "none", "opo", "best_other"])
    return dict(
        rewards=d.normal(rows),
        **how,
        scale=d.choose(["group", "batch", "centered", "none"]),
        baseline=baseline,
        ddof=d.choose([0, 1]),
        eps=1e-4,
        lengths=d.integers(9, rows) + 1 if baseline == "opo" else None,
        zero_std=d.choose(["keep", "mask"]),
    )


def preference_loss(d: Draw) -> dict[str, Any]:
    rows, kind = d.size(0), d.choose(list(PAIR_KINDS))
    call = {name: d.logprob(rows, dtype=d.dtype()) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    call |= dict(kind=kind, beta=0.1, pair_weight=d.maybe(d.normal(rows).abs()), normalizer=d.choose([None, 3.0]))
    lengths = (d.integers(5, rows) + 1, d.integers(5, rows) + 1)
    return call | dict(lengths=lengths, label_smoothing=0.1 if kind in ("sigmoid", "exo_pair") else 0.0)


def kto_loss(d: Draw) -> dict[str, Any]:
    rows = d.size(0)
    options = dict(kl=d.choose([0.0, torch.tensor(0.3)]), kind="kto", beta=0.1)
    options |= dict(normalizer=d.choose([None, 3.0]), desirable_weight=1.0, undesirable_weight=d.choose([1.0, 2.0]))
    return dict(logprob=d.logprob(rows), ref_logprob=d.logprob(rows), desirable=d.mask(rows), **options)


def reward_loss(d: Draw) -> dict[str, Any]:
    rows = d.size(0)
    return dict(
        chosen=d.normal(rows, dtype=d.dtype()),
        rejected=d.normal(rows),
        margin=d.choose([None, 0.5, d.normal(rows)]),
        center=d.choose([0.0, 0.01]),
        label_smoothing=d.choose([0.0, 0.1]),
        mask=d.maybe(d.mask(rows)),
        normalizer=d.choose([None, 3.0]),
    )


CALLS: dict[str, Callable[[Draw], dict[str, Any]]] = dict(
    linear_logprob=linear_logprob,
    fused_linear_loss=fused_linear_loss,
    logprob_from_logits=logprob_from_logits,
    entropy_from_logits=entropy_from_logits,
    linear_divergence=linear_divergence,
    kl_estimate=kl_estimate,
    policy_loss=policy_loss,
    value_loss=value_loss,
    gae=scan,
    discounted_returns=discounted_returns,
    shape_rewards=shape_rewards,
    ppo_advantages=ppo_advantages,
    masked_whiten=masked_whiten,
    group_advantages=group_advantages,
    preference_loss=preference_loss,
    kto_loss=kto_loss,
    reward_loss=reward_loss,
)

OURS_ALONE = ("chunk_size", "memory_budget", "weight_grad", "group")  # the references take none of these

HOSTILE: list[Callable[[Any], Any]] = [
    lambda v: "text",
    lambda v: [1.0, 2.0],
    lambda v: object(),
    lambda v: {"a": 1},
    lambda v: None,
    lambda v: math.nan,
    lambda v: math.inf,
    lambda v: -math.inf,
    lambda v: -1,
    lambda v: -1.5,
    lambda v: 0,
    lambda v: 10**400,
    lambda v: 2**63,
    lambda v: True,
    lambda v: 1j,
    lambda v: torch.tensor(math.nan),
    lambda v: torch.ones(2, 3, 4),
    lambda v: torch.ones(0),
    lambda v: (torch.ones(2),),
]

TWISTS: list[Callable[[Tensor], Any]] = [
    lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.int32),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.bool),
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.float16),
    lambda t: t.float().to(torch.float8_e4m3fn),
    lambda t: t.numpy() if t.dtype not in (torch.bfloat16,) else t.tolist(),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t.flatten(),
    lambda t: t.flatten()[:-1],
    lambda t: t[:0],
    lambda t: torch.cat([t, t]),
    lambda t: t.mT if t.dim() > 1 else t[None].expand(2, -1),
    lambda t: t.sum(),
    lambda t: t.repeat_interleave(2, 0)[::2],  # strided, the same values
    lambda t: t.flip(0),
    lambda t: t.to_sparse(),
    lambda t: t * 0 - 7,
    lambda t: t + 1000,
    lambda t: t.new_zeros(1).expand(t.shape),
]


def twisted(value: Any, choose: Callable[[list], Any]) -> Any:
    """Something else in the place of `value`."""
    if isinstance(value, Tensor) and choose([True, True, False]):
        return choose(TWISTS)(value)
    if isinstance(value, tuple) and choose([True, False]):
        place = choose(list(range(len(value))))
        return (*value[:place], twisted(value[place], choose), *value[place + 1 :])
    return choose(HOSTILE)(value)

"""What a provider is, and how a log-probability function becomes each op with a head.

Every call takes the same leaves and gives the same outputs (`Op.outputs`); what it needs beforehand (modules, views,
compilation) is made by the builder. A provider that cannot be had raises `Unavailable` with the reason, which the
table shows. Peers run with their own defaults unless a comment says otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import Case
from rlhf_fast.benchmarks.inputs import IGNORE, Inputs, dpo_objective, grpo_objective, ppo_objective
from rlhf_fast.benchmarks.token_inputs import TokenInputs

Step = Callable[[], dict[str, Tensor]]
Builder = Callable[[Case, Any], Step]
LogprobFn = Callable[[Tensor, Tensor, Tensor], Tensor]
EntropyFn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Unavailable(Exception):
    """This provider cannot run this case here; the message says why."""


class Provider(NamedTuple):
    """A name in the table, one line about it, and a builder for each op it has."""

    name: str
    about: str
    ops: dict[str, Builder]


def build(provider: Provider, case: Case, x: Inputs | TokenInputs) -> Step:
    """The call to be timed. Unavailable when there is none."""
    if case.op not in provider.ops:
        raise Unavailable(f"has no {case.op}")
    return provider.ops[case.op](case, x)


def load(name: str) -> ModuleType:
    """Import a peer's module."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail at import in any way, and must not take the run with it
        raise Unavailable(f"cannot import {name}: {str(error).strip().splitlines()[0]}") from error


def needs_gpu(case: Case, what: str = "Triton kernels") -> None:
    """Unavailable on the CPU."""
    if case.device == "cpu":
        raise Unavailable(f"{what}: needs a GPU")


def no_softcap(case: Case) -> None:
    """Unavailable where the shape's logits are capped."""
    if case.shape.softcap is not None:
        raise Unavailable("has no softcap")


def ignoring(fn: Callable) -> Callable:
    """Give a log-probability function that knows no ignored targets the rows as they are, and put zeros there."""

    def call(hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
        out = fn(hidden, weight, target.clamp(min=0))
        ignored = target == IGNORE
        if isinstance(out, tuple):
            return tuple(part.masked_fill(ignored, 0) for part in out)
        return out.masked_fill(ignored, 0)

    return call


def scalar(case: Case, x: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A step from loss(hidden, weight)."""

    def step() -> dict[str, Tensor]:
        value = loss(*x.leaves)
        dhidden, dweight = torch.autograd.grad(value, x.leaves)
        return {"loss": value, "dhidden": dhidden, "dweight": dweight}

    return step


def _once(fn: Callable) -> Callable:
    return fn


def head_ops(
    get: Callable[[Case], LogprobFn],
    with_entropy: Callable[[Case], EntropyFn] | None = None,
    wrap: Callable[[Callable], Callable] = _once,
) -> dict[str, Builder]:
    """Builders from `get(case) -> logprob(hidden, weight, target)`; `wrap` (torch.compile) sees whole losses."""

    def forward(case: Case, x: Inputs) -> Step:
        fn = wrap(get(case))

        @torch.no_grad()
        def step() -> dict[str, Tensor]:
            return {"logprob": fn(x.hidden, x.weight, x.target)}

        return step

    def both(case: Case, x: Inputs) -> Step:
        fn = wrap(get(case))

        def step() -> dict[str, Tensor]:
            logprob = fn(x.hidden, x.weight, x.target)
            dhidden, dweight = torch.autograd.grad(logprob, x.leaves, x.dlogprob)
            return {"logprob": logprob, "dhidden": dhidden, "dweight": dweight}

        return step

    def cross_entropy(case: Case, x: Inputs) -> Step:
        fn = get(case)
        mean = wrap(lambda hidden, weight, target, share: -(fn(hidden, weight, target) * share).sum())
        return scalar(case, x, lambda hidden, weight: mean(hidden, weight, x.target, x.share))

    def grpo(case: Case, x: Inputs) -> Step:
        fn, args = get(case), (x.target, x.old_logprob, x.token_advantages, x.share)
        loss = wrap(lambda hidden, weight, target, *rest: grpo_objective(fn(hidden, weight, target), *rest))
        return scalar(case, x, lambda hidden, weight: loss(hidden, weight, *args))

    def ppo(case: Case, x: Inputs) -> Step:
        fn, args = with_entropy(case), (x.target, x.old_logprob, x.token_advantages, x.share)
        loss = wrap(lambda hidden, weight, target, *rest: ppo_objective(*fn(hidden, weight, target), *rest))
        return scalar(case, x, lambda hidden, weight: loss(hidden, weight, *args))

    def dpo(case: Case, x: Inputs) -> Step:
        fn = get(case)

        def loss(hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
            with torch.no_grad():
                ref = fn(ref_hidden, ref_weight, target)
            return dpo_objective(fn(hidden, weight, target), ref)

        loss = wrap(loss)
        return scalar(case, x, lambda hidden, weight: loss(hidden, weight, x.target, x.ref_hidden, x.ref_weight))

    found = {"logprob": forward, "logprob_grad": both, "cross_entropy": cross_entropy, "grpo": grpo, "dpo": dpo}
    return found | ({"ppo": ppo} if with_entropy else {})


def divergence_ops(get: Callable[[Case], Callable[..., Tensor]], wrap: Callable = _once) -> dict[str, Builder]:
    """Builders from `get(case) -> mean divergence(hidden, weight, ref_hidden, ref_weight, x)`."""

    def builder(case: Case, x: Inputs) -> Step:
        fn = wrap(get(case))
        return scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.ref_hidden, x.ref_weight, x))

    return dict.fromkeys(("forward_kl", "jsd"), builder)


def logits_ops(get: Callable[[Case], Callable[[Tensor, Tensor], Tensor]]) -> dict[str, Builder]:
    """Builders from `get(case) -> logprob(logits, target)`."""

    def forward(case: Case, x: Inputs) -> Step:
        fn = get(case)

        @torch.no_grad()
        def step() -> dict[str, Tensor]:
            return {"logprob": fn(x.logits, x.target)}

        return step

    def both(case: Case, x: Inputs) -> Step:
        fn = get(case)

        def step() -> dict[str, Tensor]:
            logprob = fn(x.logits, x.target)
            return {"logprob": logprob, "dlogits": torch.autograd.grad(logprob, x.logits, x.dlogprob)[0]}

        return step

    return {"from_logits": forward, "from_logits_grad": both}

"""torch itself: the naive expressions, the same compiled, and its chunked cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.benchmarks.cases import Case
from rlhf_fast.benchmarks.inputs import Inputs
from rlhf_fast.benchmarks.providers.base import (
    EntropyFn,
    LogprobFn,
    Provider,
    Step,
    Unavailable,
    divergence_ops,
    head_ops,
    ignoring,
    logits_ops,
    no_softcap,
    scalar,
)

NAIVE = "torch"


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """fp32 logits of a product in the inputs' dtype."""
    z = (hidden @ weight.t()).float()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _from_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _logprob(case: Case) -> LogprobFn:
    softcap = case.shape.softcap
    return ignoring(lambda hidden, weight, target: _from_logits(logits_of(hidden, weight, softcap), target))


def _with_entropy(case: Case) -> EntropyFn:
    softcap = case.shape.softcap

    def fn(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits_of(hidden, weight, softcap), dim=-1)
        return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    return ignoring(fn)


def _divergence(case: Case) -> Callable[..., Tensor]:
    softcap = case.shape.softcap
    kl = lambda a, b: F.kl_div(b, a, reduction="none", log_target=True).sum(-1)  # noqa: E731  KL(a || b)

    def fn(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, x: Inputs) -> Tensor:
        log_p = F.log_softmax(logits_of(hidden, weight, softcap), dim=-1)
        log_q = F.log_softmax(logits_of(ref_hidden, ref_weight, softcap), dim=-1)
        if case.op == "forward_kl":
            return (kl(log_q, log_p) * x.share).sum()
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return ((kl(log_p, log_m) + kl(log_q, log_m)) / 2 * x.share).sum()

    return fn


def _naive_cross_entropy(case: Case, x: Inputs) -> Step:
    softcap = case.shape.softcap
    return scalar(case, x, lambda hidden, weight: F.cross_entropy(logits_of(hidden, weight, softcap), x.target))


def compiled(fn: Callable) -> Callable:
    """torch.compile, whole graphs only."""
    return torch.compile(fn, fullgraph=True)


def _linear_cross_entropy(case: Case) -> Callable:
    """torch's own, in chunks (`options` given; without, it is the naive expression)."""
    no_softcap(case)
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"F.linear_cross_entropy of torch {torch.__version__} cannot chunk")
    return lambda *args, reduction: F.linear_cross_entropy(*args, reduction=reduction, options=options())


def _lce_logprob(case: Case) -> LogprobFn:
    fn = _linear_cross_entropy(case)
    return lambda *args: -fn(*args, reduction="none").float()


def _lce_mean(case: Case, x: Inputs) -> Step:
    fn = _linear_cross_entropy(case)
    return scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target, reduction="mean"))


PROVIDERS = [
    Provider(
        NAIVE,
        "log_softmax of fp32 logits, gather; plain loops over tokens",
        head_ops(_logprob, _with_entropy)
        | {"cross_entropy": _naive_cross_entropy}
        | divergence_ops(_divergence)
        | logits_ops(lambda case: _from_logits),
    ),
    Provider(
        "torch.compile",
        "the same, compiled",
        head_ops(_logprob, _with_entropy, compiled)
        | divergence_ops(_divergence, compiled)
        | logits_ops(lambda case: compiled(_from_logits)),
    ),
    Provider("torch-lce", "F.linear_cross_entropy in chunks", head_ops(_lce_logprob) | {"cross_entropy": _lce_mean}),
]

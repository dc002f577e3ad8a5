"""TRL's kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlhf_fast.benchmarks.cases import LENGTH, Case
from rlhf_fast.benchmarks.inputs import Inputs
from rlhf_fast.benchmarks.providers.base import (
    EntropyFn,
    LogprobFn,
    Provider,
    Unavailable,
    divergence_ops,
    head_ops,
    ignoring,
    load,
    logits_ops,
)
from rlhf_fast.benchmarks.providers.plain import logits_of


def _apply(case: Case, outputs: tuple[str, ...]) -> Callable:
    kernels = load("trl.kernels")
    if not hasattr(kernels, "ChunkedLogProbFunction"):
        raise Unavailable("this TRL has no fused head (1.16 has)")
    columns = getattr(load("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    apply, softcap = kernels.ChunkedLogProbFunction.apply, case.shape.softcap
    return lambda hidden, weight, target: apply(hidden, weight, None, target, 1.0, columns, softcap, 1.0, outputs)


def _head(case: Case) -> LogprobFn:
    apply = _apply(case, ())
    return ignoring(lambda *args: apply(*args)[0])


def _head_with_entropy(case: Case) -> EntropyFn:
    apply = _apply(case, ("entropy",))
    return ignoring(lambda *args: apply(*args)[:2])


def _from_logits(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    fn = load("trl.trainer.utils").selective_log_softmax
    return lambda logits, target: fn(logits.unflatten(0, (-1, LENGTH)), target.unflatten(0, (-1, LENGTH))).flatten()


def _logits(case: Case) -> LogprobFn:
    fn, softcap = _from_logits(case), case.shape.softcap
    if softcap is not None:
        return ignoring(lambda hidden, weight, target: fn(logits_of(hidden, weight, softcap), target))
    return ignoring(lambda hidden, weight, target: fn(hidden @ weight.t(), target))


def _divergence(case: Case) -> Callable[..., Tensor]:
    apply = load("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    softcap, beta = case.shape.softcap, 0.0 if case.op == "forward_kl" else 0.5

    def fn(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, x: Inputs) -> Tensor:
        heads = (hidden, weight, None, ref_hidden, ref_weight, None)
        return (apply(*heads, beta, 1.0, 1.0, softcap, 1.0, softcap)[0] * x.share).sum()

    return fn


PROVIDERS = [
    Provider(
        "trl",
        "TRL's fused head and divergence; selective_log_softmax",
        head_ops(_head, _head_with_entropy) | divergence_ops(_divergence) | logits_ops(_from_logits),
    ),
    Provider("trl-logits", "TRL without the fused head: logits, selective_log_softmax", head_ops(_logits)),
]

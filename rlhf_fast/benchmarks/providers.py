"""Who is measured. A provider maps ops to builders; a builder gets the inputs and returns the call that is timed.

Every call takes the same leaves and gives the same outputs (`Op.outputs`); what it needs beforehand (modules, views,
compilation) is made by the builder. A provider that cannot be had raises `Unavailable` with the reason, which the
table shows. Peers run with their own defaults unless a comment says otherwise.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_fast
from rlhf_fast.benchmarks.cases import CLIP, LENGTH, Case, Inputs, grpo_objective
from rlhf_fast.losses import PolicyLoss

Step = Callable[[], dict[str, Tensor]]
Builder = Callable[[Case, Inputs], Step]
LogprobFn = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "rlhf_fast"
NAIVE = "torch"


class Unavailable(Exception):
    """This provider cannot run this case here; the message says why."""


class Provider(NamedTuple):
    """A name in the table, one line about it, and a builder for each op it has."""

    name: str
    about: str
    ops: dict[str, Builder]


def build(provider: Provider, case: Case, x: Inputs) -> Step:
    """The call to be timed. Unavailable when there is none."""
    if case.op not in provider.ops:
        raise Unavailable(f"has no {case.op}")
    return provider.ops[case.op](case, x)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail at import in any way, and must not take the run with it
        raise Unavailable(f"cannot import {name}: {error}") from error


# ---- steps: how a log-probability function becomes each op ------------------------------------------------


def _scalar(case: Case, x: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    def step() -> dict[str, Tensor]:
        value = loss(*x.leaves)
        dhidden, dweight = torch.autograd.grad(value, x.leaves)
        return {"loss": value, "dhidden": dhidden, "dweight": dweight}

    return step


def _head_ops(get: Callable[[Case], LogprobFn], wrap: Callable = lambda fn: fn) -> dict[str, Builder]:
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
        mean = wrap(lambda hidden, weight, target: -fn(hidden, weight, target).mean())
        return _scalar(case, x, lambda hidden, weight: mean(hidden, weight, x.target))

    def grpo(case: Case, x: Inputs) -> Step:
        fn, advantages = get(case), x.token_advantages
        loss = wrap(lambda hidden, weight, target, old, adv: grpo_objective(fn(hidden, weight, target), old, adv))
        return _scalar(case, x, lambda hidden, weight: loss(hidden, weight, x.target, x.old_logprob, advantages))

    return {"logprob": forward, "logprob_grad": both, "cross_entropy": cross_entropy, "grpo": grpo}


def _logits_ops(get: Callable[[Case], Callable[[Tensor, Tensor], Tensor]]) -> dict[str, Builder]:
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


# ---- ours -------------------------------------------------------------------------------------------------


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """RLHF_FAST_BACKEND rather than `use_backend`: autograd's own threads see it too."""
    before = os.environ.pop("RLHF_FAST_BACKEND", None)
    if name is not None:
        os.environ["RLHF_FAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("RLHF_FAST_BACKEND", None)
        if before is not None:
            os.environ["RLHF_FAST_BACKEND"] = before


def _on(backend: str | None, builder: Builder) -> Builder:
    def build_on(case: Case, x: Inputs) -> Step:
        inner = builder(case, x)

        def step() -> dict[str, Tensor]:
            with _backend(backend):
                return inner()

        return step

    return build_on


def _ours_grpo(case: Case, x: Inputs) -> Step:
    loss_fn = PolicyLoss("grpo", clip_low=CLIP, clip_high=CLIP)
    batch = {"advantages": x.advantages, "old_logprob": x.old_logprob}
    cu_seqlens = torch.arange(0, x.target.shape[0] + 1, LENGTH, device=x.target.device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return rlhf_fast.fused_linear_loss(hidden, weight, x.target, loss_fn, batch=batch, segments=cu_seqlens).loss

    return _scalar(case, x, loss)


def _ours_loss_fn(case: Case, x: Inputs) -> Step:
    """A loss as a user writes it: plain torch, gradient by autograd."""
    n = x.target.shape[0]
    batch = {"advantages": x.token_advantages, "old": x.old_logprob}

    def loss_fn(logprob: Tensor, entropy: Tensor | None, part: dict) -> Tensor:
        return grpo_objective(logprob, part["old"], part["advantages"]) * (logprob.shape[0] / n)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return rlhf_fast.fused_linear_loss(hidden, weight, x.target, loss_fn, batch=batch).loss

    return _scalar(case, x, loss)


def _ours_cross_entropy(case: Case, x: Inputs) -> Step:
    n = x.target.shape[0]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = lambda logprob, entropy, part: -logprob.sum() / n  # noqa: E731
        return rlhf_fast.fused_linear_loss(hidden, weight, x.target, nll).loss

    return _scalar(case, x, loss)


def _ours(backend: str | None) -> dict[str, Builder]:
    ops = _head_ops(lambda case: lambda *args: rlhf_fast.linear_logprob(*args).logprob)
    ops |= _logits_ops(lambda case: lambda *args: rlhf_fast.logprob_from_logits(*args).logprob)
    ops |= {"grpo": _ours_grpo, "cross_entropy": _ours_cross_entropy}
    return {name: _on(backend, builder) for name, builder in ops.items()}


# ---- torch ------------------------------------------------------------------------------------------------


def _naive_from_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _naive_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _naive_from_logits(hidden @ weight.t(), target)


def _naive_cross_entropy(case: Case, x: Inputs) -> Step:
    return _scalar(case, x, lambda hidden, weight: F.cross_entropy((hidden @ weight.t()).float(), x.target))


def _compile(fn: Callable) -> Callable:
    return torch.compile(fn, fullgraph=True)


def _linear_cross_entropy() -> Callable:
    """torch's own, in chunks (`options` given; without, it is the naive expression)."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"F.linear_cross_entropy of torch {torch.__version__} cannot chunk")
    return lambda *args, reduction: F.linear_cross_entropy(*args, reduction=reduction, options=options())


def _torch_lce_logprob(case: Case) -> LogprobFn:
    fn = _linear_cross_entropy()
    return lambda *args: -fn(*args, reduction="none").float()


def _torch_lce_mean(case: Case, x: Inputs) -> Step:
    fn = _linear_cross_entropy()
    return _scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target, reduction="mean"))


# ---- peers ------------------------------------------------------------------------------------------------


def _trl_head(case: Case) -> LogprobFn:
    kernels = _import("trl.kernels")
    if not hasattr(kernels, "ChunkedLogProbFunction"):
        raise Unavailable("this TRL has no fused head (1.16 has)")
    columns = getattr(_import("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    apply = kernels.ChunkedLogProbFunction.apply
    return lambda hidden, weight, target: apply(hidden, weight, None, target, 1.0, columns, None, 1.0, ())[0]


def _trl_from_logits(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    fn = _import("trl.trainer.utils").selective_log_softmax
    return lambda logits, target: fn(logits.unflatten(0, (-1, LENGTH)), target.unflatten(0, (-1, LENGTH))).flatten()


def _trl_logits(case: Case) -> LogprobFn:
    fn = _trl_from_logits(case)
    return lambda hidden, weight, target: fn(hidden @ weight.t(), target)


def _liger_logprob(case: Case) -> LogprobFn:
    module = _import("liger_kernel.chunked_loss.fused_linear_ppo")
    function = getattr(module, "_ChunkedSelectiveLogProbFunction", None)
    if function is None:
        raise Unavailable("this Liger has no chunked log-probabilities")
    columns = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return lambda hidden, weight, target: function.apply(hidden, weight, target, None, 1.0, columns)


def _liger_grpo(sequences: int) -> Builder:
    def builder(case: Case, x: Inputs) -> Step:
        liger = _import("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
        module = liger(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", chunk_size=sequences
        )
        batch = lambda tensor: tensor.unflatten(0, (-1, LENGTH))  # noqa: E731
        target, old = batch(x.target), batch(x.old_logprob)
        mask = torch.ones_like(target)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return module(batch(hidden), weight, target, mask, x.advantages, old_per_token_logps=old)[0]

        return _scalar(case, x, loss)

    return builder


def _liger_cross_entropy(case: Case, x: Inputs) -> Step:
    if case.device == "cpu":
        raise Unavailable("Triton kernels: needs a GPU")
    fn = _import("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return _scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target))


def _cce(impl: str) -> dict[str, Builder]:
    def load(case: Case) -> Callable:
        if impl == "cce" and case.device == "cpu":
            raise Unavailable("Triton kernels: needs a GPU")
        if impl == "cce" and case.dtype == "fp32":
            raise Unavailable("takes 16-bit inputs only")
        fn = _import("cut_cross_entropy").linear_cross_entropy
        return lambda *args, reduction: fn(*args, reduction=reduction, impl=impl)

    def logprob(case: Case) -> LogprobFn:
        fn = load(case)
        return lambda *args: -fn(*args, reduction="none")

    def cross_entropy(case: Case, x: Inputs) -> Step:
        fn = load(case)
        return _scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target, reduction="mean"))

    return _head_ops(logprob) | {"cross_entropy": cross_entropy}


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, "this library, as installed", _ours(None)),
        Provider(f"{OURS}-torch", "this library, row passes in torch", _ours("torch")),
        Provider(f"{OURS}-loss_fn", "this library, the loss as a user's plain torch function", {"grpo": _ours_loss_fn}),
        Provider(
            NAIVE,
            "log_softmax of fp32 logits, gather",
            _head_ops(lambda case: _naive_logprob)
            | {"cross_entropy": _naive_cross_entropy}
            | _logits_ops(lambda case: _naive_from_logits),
        ),
        Provider(
            "torch.compile",
            "the same, compiled",
            _head_ops(lambda case: _naive_logprob, _compile) | _logits_ops(lambda case: _compile(_naive_from_logits)),
        ),
        Provider(
            "torch-lce",
            "F.linear_cross_entropy in chunks",
            _head_ops(_torch_lce_logprob) | {"cross_entropy": _torch_lce_mean},
        ),
        Provider(
            "trl", "TRL's fused head; selective_log_softmax", _head_ops(_trl_head) | _logits_ops(_trl_from_logits)
        ),
        Provider("trl-logits", "TRL without the fused head: logits, selective_log_softmax", _head_ops(_trl_logits)),
        Provider(
            "liger",
            "Liger's chunked log-probs and fused linear losses",
            _head_ops(_liger_logprob) | {"grpo": _liger_grpo(1), "cross_entropy": _liger_cross_entropy},
        ),
        Provider("liger-8", "Liger's fused linear GRPO, 8 sequences a chunk", {"grpo": _liger_grpo(8)}),
        Provider("cce", "Cut Cross-Entropy", _cce("cce")),
        Provider("cce-compile", "Cut Cross-Entropy's torch_compile", _cce("torch_compile")),
    )
}

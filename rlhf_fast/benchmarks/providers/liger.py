"""Liger's chunked losses, its Triton kernels and its CuTe kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import BETA, CLIP, LENGTH, Case
from rlhf_fast.benchmarks.inputs import IGNORE, Inputs
from rlhf_fast.benchmarks.providers.base import (
    Builder,
    EntropyFn,
    LogprobFn,
    Provider,
    Step,
    Unavailable,
    divergence_ops,
    head_ops,
    ignoring,
    load,
    needs_gpu,
    no_softcap,
    scalar,
)


def _sequences(tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, LENGTH))


def _logprob(case: Case) -> LogprobFn:
    no_softcap(case)
    module = load("liger_kernel.chunked_loss.fused_linear_ppo")
    function = getattr(module, "_ChunkedSelectiveLogProbFunction", None)
    if function is None:
        raise Unavailable("this Liger has no chunked log-probabilities")
    columns = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return ignoring(lambda hidden, weight, target: function.apply(hidden, weight, target, None, 1.0, columns))


def _scaled(case: Case) -> EntropyFn:
    """Liger's scaled cross-entropy with entropy: torch in row chunks, CuTe on Hopper."""
    no_softcap(case)
    module = load("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def fn(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = apply(hidden, weight, target, 1.0, IGNORE, 1, True)
        return -nll, entropy

    return fn


def _scaled_logprob(case: Case) -> LogprobFn:
    no_softcap(case)
    module = load("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def fn(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = apply(hidden, weight, target, 1.0, IGNORE, 1, False)
        return -(out[0] if isinstance(out, tuple) else out)

    return fn


def _grpo(sequences: int) -> Builder:
    def builder(case: Case, x: Inputs) -> Step:
        no_softcap(case)
        liger = load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
        module = liger(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", chunk_size=sequences
        )
        target, old = _sequences(x.target), _sequences(x.old_logprob)
        mask, target = (target != IGNORE).long(), target.clamp(min=0)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return module(_sequences(hidden), weight, target, mask, x.advantages, old_per_token_logps=old)[0]

        return scalar(case, x, loss)

    return builder


def _dpo(pairs: int) -> Builder:
    """It takes all chosen, then all rejected; the copies are small beside the products."""

    def builder(case: Case, x: Inputs) -> Step:
        no_softcap(case)
        module = load("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=BETA, chunk_size=pairs)
        halves = lambda t: torch.cat([_sequences(t)[::2], _sequences(t)[1::2]])  # noqa: E731
        target, ref_hidden = halves(x.target), halves(x.ref_hidden)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return module(weight, halves(hidden), target, ref_input=ref_hidden, ref_weight=x.ref_weight)[0]

        return scalar(case, x, loss)

    return builder


def _divergence(case: Case) -> Callable[..., Tensor]:
    no_softcap(case)
    liger = load("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    module = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0 if case.op == "forward_kl" else 0.5)
    return lambda hidden, weight, ref_hidden, ref_weight, x: module(hidden, weight, ref_hidden, ref_weight, x.target)


# ---- Triton and CuTe --------------------------------------------------------------------------------------


def _cross_entropy(case: Case, x: Inputs) -> Step:
    needs_gpu(case)
    fn, softcap = load("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy, case.shape.softcap
    return scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target, softcap=softcap))


def _triton_divergence(case: Case) -> Callable[..., Tensor]:
    needs_gpu(case)
    no_softcap(case)
    apply = load("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction.apply
    beta = 0.0 if case.op == "forward_kl" else 0.5
    return lambda hidden, weight, ref_hidden, ref_weight, x: apply(
        hidden, weight, ref_hidden, ref_weight, x.target, beta
    )


def _triton_grpo(case: Case, x: Inputs) -> Step:
    """The loss in one kernel over logits (B, L + 1, V), which it overwrites; the last position is not read."""
    needs_gpu(case)
    no_softcap(case)
    fn = load("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    target, old = _sequences(x.target), _sequences(x.old_logprob)
    mask, target = (target != IGNORE).long(), target.clamp(min=0)
    options = dict(temperature=1.0, beta=0.0, eps_low=CLIP, eps_high=CLIP, loss_type="grpo", reduce=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(_sequences(hidden), (0, 0, 0, 1))
        return fn(padded @ weight.t(), old, None, target, x.advantages, completion_mask=mask, **options)[0]

    return scalar(case, x, loss)


def _cute_cross_entropy(case: Case, x: Inputs) -> Step:
    needs_gpu(case, "CuTe kernels")
    module, softcap = load("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy"), case.shape.softcap
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    options = (None, None, IGNORE, 0.0, 0.0, "mean", softcap)
    return scalar(case, x, lambda hidden, weight: apply(hidden, weight, x.target, *options)[0])


PROVIDERS = [
    Provider(
        "liger",
        "Liger's chunked log-probs and losses, their default chunks",
        head_ops(_logprob) | divergence_ops(_divergence) | {"grpo": _grpo(1), "dpo": _dpo(1)},
    ),
    Provider("liger-8", "the same, 8 sequences or pairs a chunk", {"grpo": _grpo(8), "dpo": _dpo(8)}),
    Provider(
        "liger-scaled",
        "Liger's scaled cross-entropy with entropy: torch chunks, CuTe on Hopper",
        head_ops(_scaled_logprob, _scaled),
    ),
    Provider(
        "liger-triton",
        "Liger's Triton kernels",
        divergence_ops(_triton_divergence) | {"cross_entropy": _cross_entropy, "grpo": _triton_grpo},
    ),
    Provider("liger-cute", "Liger's CuTe cross-entropy", {"cross_entropy": _cute_cross_entropy}),
]

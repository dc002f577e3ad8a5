"""What takes the place of TRL's token scorers, each under the contract of the function it stands for.

TRL computes from the tensors of the head, not through its module, so both directions gather what ZeRO-3 has
partitioned, and an adapter on the head has to be brought along: `add_fused_lm_head` leaves the head itself in `HEAD`
for the length of a fused call.
"""

from __future__ import annotations

import contextvars
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.integrations.lm_head import head_parts
from rlhf_fast.ops.from_logits import logprob_from_logits
from rlhf_fast.ops.linear import check_transform, linear_logprob

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IGNORE = -100
NOT_A_TARGET = -(2**31)
"""An ignore_index that no caller means: -100 among the indices is their error, as in TRL."""

HEAD: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("HEAD", default=None)


def _host() -> Any:
    import trl.trainer.utils

    return trl.trainer.utils


def _work_dtype(hidden: Tensor) -> torch.dtype:
    """TRL's rule: autocast's dtype where that is on, otherwise that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _whole(tensor: Tensor) -> Tensor:
    """A parameter of FSDP2 gathered, as TRL gathers the head's weight."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class ChunkedLogProb:
    """Stands for `trl.kernels.chunked_logprob.ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs, entropy, log sum_v p_v^2, mean logit, is top-1), each (N,); what `outputs` does not name is None.

        Log-probs and entropy are differentiable. `chunk_size`, TRL's tile over the vocabulary, has no meaning here:
        tiles are whole rows, as many as fit in the memory budget of `linear_logprob`.
        """
        lora, entropy = _adapter(), "entropy" in outputs
        stats = any(name in outputs for name in OUTPUTS[1:])
        transform = dict(temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping)
        if _zero3():
            logprob, *rest = _gathered(hidden, weight, bias, lora, targets, transform, entropy, stats)
        else:
            if not torch.is_autocast_enabled(hidden.device.type):
                weight, bias = _cast(hidden.dtype, weight, bias)
                lora = lora and (*_cast(hidden.dtype, *lora[:2]), lora[2])
            options = dict(bias=bias, lora=lora, entropy=entropy, token_stats=stats)
            logprob, h, _, *extra = linear_logprob(hidden, weight, targets, **options, **transform)
            rest = h, *(extra or (None, None, None))
        return logprob, *(x if name in outputs else None for name, x in zip(OUTPUTS, rest, strict=True))


def _adapter() -> tuple[Tensor, Tensor, float] | None:
    """The LoRA of the head in use, whole."""
    head = HEAD.get()
    lora = None if head is None else head_parts(head)[1]
    return lora and (_whole(lora[0]), _whole(lora[1]), lora[2])


def _zero3() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def _gathered(hidden, weight, bias, lora, target, transform, entropy, token_stats) -> tuple[Tensor, ...]:
    """`linear_logprob` of parameters that are there only inside a gathering context."""
    a, b, scaling = lora or (None, None, 1.0)
    options = (scaling, tuple(check_transform(**transform)), entropy, token_stats)
    with _host().maybe_gather_lm_head_ctx(a, b):  # TRL has gathered weight and bias around the call
        return _LinearLogProb.apply(hidden, weight, bias, a, b, target, *options)


class _LinearLogProb(torch.autograd.Function):
    """The op of `linear_logprob`; the backward enters TRL's gathering context before it reads the head again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, target, scaling, transform, entropy, token_stats):
        ctx.set_materialize_grads(False)
        ctx.dtype = _work_dtype(hidden)
        logprob, h, _, row_max, log_sum, *extra = torch.ops.rlhf_fast.linear_logprob(
            *_cast(ctx.dtype, hidden, weight, bias, a, b), target, scaling, *transform, IGNORE, entropy, token_stats,
            None, None,
        )  # fmt: skip
        ctx.scalars = scaling, *transform, IGNORE, None, None
        ctx.save_for_backward(hidden, weight, bias, a, b, target, h, row_max, log_sum)
        ctx.mark_non_differentiable(*extra)
        return logprob, h, *extra

    @staticmethod
    def backward(ctx, dlogprob, dentropy, *_):
        *tensors, target, h, row_max, log_sum = ctx.saved_tensors
        want = list(ctx.needs_input_grad[:5])
        if (dlogprob is None and dentropy is None) or not any(want):
            return (None,) * 10
        zeros = torch.zeros_like(row_max)
        dlogprob = zeros if dlogprob is None else dlogprob.to(row_max.dtype)
        h, dentropy = (h[:0], zeros) if dentropy is None else (h, dentropy.to(row_max.dtype))
        with _host().maybe_gather_lm_head_ctx(*tensors[1:]):
            grads = torch.ops.rlhf_fast.linear_logprob_backward(
                *_cast(ctx.dtype, *tensors), target, h, row_max, log_sum, dlogprob, dentropy, zeros, *ctx.scalars, want
            )
            grads = [g.to(t.dtype) if w else None for g, t, w in zip(grads, tensors, want, strict=True)]
        return *grads, *(None,) * 5


class ChunkedDivergence:
    """Stands for `trl.kernels.chunked_divergence.ChunkedDivergenceFunction`."""

    @staticmethod
    def apply(
        student_hidden: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        student_bias: Tensor | None,
        teacher_hidden: Tensor,  # (N, D')
        teacher_weight: Tensor,  # (V, D')
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, the student's entropy), each (N,). The divergence is differentiable by the student.

        beta 0: KL(teacher || student); 1: KL(student || teacher); between: JSD with `ref_share` beta.
        """
        kind = {0.0: "forward", 1.0: "reverse"}.get(float(beta), "jsd")
        tf = check_transform(temperature, student_logit_scale, student_final_logit_softcapping)
        teacher_tf = check_transform(temperature, teacher_logit_scale, teacher_final_logit_softcapping)
        options = (kind, float(beta) if kind == "jsd" else 0.5, *tf, *teacher_tf, None, None)
        tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
        with _both_gathered(tensors):
            return _LinearDivergence.apply(*tensors, options)


class _LinearDivergence(torch.autograd.Function):
    """The op of `linear_divergence`, gathering as TRL's function does, and the entropy beside it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, options):
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.options = (_work_dtype(hidden), _work_dtype(ref_hidden)), options
        own = _cast(ctx.dtypes[0], hidden, weight, bias)
        ref = _cast(ctx.dtypes[1], ref_hidden, ref_weight, ref_bias)
        divergence, stats = torch.ops.rlhf_fast.linear_divergence(*own, *ref, None, *options)
        first = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        scalars = (1.0, *options[2:5], IGNORE, True, False, None, None)
        entropy = torch.ops.rlhf_fast.linear_logprob(*own, None, None, first, *scalars)[1]
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, stats)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx, grad, _):
        *tensors, stats = ctx.saved_tensors
        want = [*ctx.needs_input_grad[:3], False, False, False]
        if grad is None or not any(want):
            return (None,) * 7
        with _both_gathered(tensors):
            own, ref = _cast(ctx.dtypes[0], *tensors[:3]), _cast(ctx.dtypes[1], *tensors[3:])
            grads = torch.ops.rlhf_fast.linear_divergence_backward(
                *own, *ref, None, stats, grad.to(stats.dtype), *ctx.options, want
            )
            grads = [g.to(t.dtype) if w else None for g, t, w in zip(grads, tensors, want, strict=True)]
        return *grads[:3], *(None,) * 4


def _both_gathered(tensors: Any) -> Any:
    return _host().maybe_gather_lm_head_ctx(tensors[1], tensors[2], tensors[4], tensors[5])


# ---- from logits that exist ------------------------------------------------------------------------------------


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Stands for TRL's function of this name: log-probabilities of `index` (...) or (..., K), fp32; 0 where
    `row_mask` is 0."""
    return _from_logits(logits, index, temperature, row_mask, entropy=False)[0]


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Stands for TRL's function of this name: the entropy of each row, fp32. Rows are not chunked: nothing of the
    logits' size is formed."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _from_logits(logits, index, 1.0, None, entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands for TRL's function of this name: both in one read."""
    logprob, entropy = _from_logits(logits, index, temperature, row_mask, entropy=True)
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def _from_logits(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, NOT_A_TARGET)
    options = dict(temperature=temperature, ignore_index=NOT_A_TARGET, entropy=entropy)
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1) and logits.shape[0]:
        # `logits[:, :-1]`: one matrix a sequence rather than a copy of them all
        parts = [logprob_from_logits(z, t, **options) for z, t in zip(logits.unbind(), index.unbind(), strict=True)]
        stacked = [
            None if x[0] is None else torch.stack(x) for x in ([p.logprob for p in parts], [p[1] for p in parts])
        ]
        return stacked[0], stacked[1]
    out = logprob_from_logits(logits, index, **options)
    return out.logprob, out.entropy


# ---- the model's forward ---------------------------------------------------------------------------------------


def scored_rows_only(use_triton: Any) -> Any:
    """For TRL's `_use_triton` where the answer decides whether masked positions are left out: on the CPU too."""

    @functools.wraps(use_triton)
    def leave_masked_out(device: torch.device) -> bool:
        return device.type == "cpu" or use_triton(device)

    return leave_masked_out


def refused_adapter() -> type:
    """For PEFT's `BaseTunerLayer` where TRL refuses adapters on the head: a type whose instances are those that ours
    cannot take either, with an error that says why."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    class Refused(type):
        def __instancecheck__(cls, head: object) -> bool:
            if isinstance(head, BaseTunerLayer):
                head_parts(head)
            return False

    return Refused("RefusedAdapter", (), {})


def with_adapters(original: Any) -> Any:
    """TRL's `add_fused_lm_head`, for heads that carry a LoRA adapter too."""

    @functools.wraps(original)
    def add_fused_lm_head(
        model: nn.Module,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        original(model, temperature, cast_lm_head_to_fp32, outputs)
        if not hasattr(model.get_output_embeddings(), "base_layer"):
            return
        if cast_lm_head_to_fp32:
            raise ValueError("cast_lm_head_to_fp32=True is not possible with an adapter on lm_head")
        inner = model.forward.__func__

        @functools.wraps(type(model).forward)
        def forward(self, *args, fused_lm_head=False, **kwargs):
            if not fused_lm_head:
                return inner(self, *args, **kwargs)
            if _host()._ChunkedLogProbFunction is not ChunkedLogProb:
                raise RuntimeError(
                    "lm_head carries an adapter, which TRL alone would ignore: call patch() before this model runs"
                )
            token = HEAD.set(self.get_output_embeddings())
            try:
                return inner(self, *args, fused_lm_head=True, **kwargs)
            finally:
                HEAD.reset(token)

        model.forward = types.MethodType(forward, model)

    return add_fused_lm_head

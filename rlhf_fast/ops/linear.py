"""`linear_logprob`: log-probabilities of targets under a linear head, without the logits tensor.

Forward: one product per tile, one read of the tile. Backward: recompute the tile, turn it into its gradient in place,
two more products. Ignored rows reach no product; rows whose upstream gradients are all zero are not even recomputed,
nor, on the CPU, are those whose logits fit in the memory budget.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast import _checks
from rlhf_fast.ops import _linear_run
from rlhf_fast.ops._eager import WAITS
from rlhf_fast.ops._head import Lora, Wanted, wanted
from rlhf_fast.ops._linear_run import Call, Inputs, Outputs, Saved
from rlhf_fast.ops._once import once_differentiable, roots
from rlhf_fast.ops._rows import Transform
from rlhf_fast.ops._shards import as_group
from rlhf_fast.types import LogProb, TokenLogProb


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    token_stats: bool = False,
    lora: Lora | tuple[Tensor, Tensor, float] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
) -> LogProb | TokenLogProb:
    """Log-probabilities of `target` under softmax(hidden @ weight.T + bias), with entropy and log-sum-exp.

        s = softcap(z * logit_scale) / temperature,   z = hidden @ weight.T + bias
        logprob = s_target - lse(s),   entropy = -sum_j p_j log p_j,   softcap(x) = c tanh(x / c)

    Equivalent to `reference.linear_logprob`, without materialising the logits (N, V).

    Args:
        hidden: (N, D) or (..., D) float. Differentiable.
        weight: (V, D), dtype of `hidden`. Differentiable; frozen, it costs no product.
        target: (N,) or (...) int64 or int32, already aligned to `hidden` (nothing is shifted here).
        bias: (V,) or None. Differentiable.
        temperature: > 0. The last step: after scale and softcap.
        logit_scale: multiplies the raw logits (Cohere, Granite, ...).
        softcap: cap > 0 (Gemma 2) or None.
        ignore_index: targets equal to it give 0 in every output, no gradient, and their rows reach no product.
        entropy: also return the differentiable entropy.
        token_stats: return a `TokenLogProb`, which adds log_sum_sq (log sum_j p_j^2, WPO's weight), mean_logit (mean_j
            s_j) and is_top1 (the target is the first argmax). Constants; they cost further reads of the tile.
        lora: (a (r, D), b (V, r), scaling): the head is weight + scaling * b @ a, which is never formed; nor is a
            gradient of weight's size when weight is frozen. a and b are differentiable, in the dtype of `weight`.
        chunk_size: rows of one tile of logits. None: from `memory_budget`.
        memory_budget: bytes of one tile of logits. None: 128 MiB on the CPU, 896 MiB on a GPU. On the CPU this is also
            what a call keeps of its logits until its backward (None: 256 MiB), which then recomputes only the other
            rows: three products for the rows that are kept, four for the others. With `chunk_size`, `lora` or
            `token_stats`, without gradients and under torch.compile nothing is kept.
        group: the head's rows are spread over this group, or dimension of a mesh, `weight` and `bias` being this
            rank's: see `vocab_parallel_logprob`, which is what runs. Not together with `token_stats`.
    Returns: LogProb(logprob, entropy or None, lse), or TokenLogProb, each of the shape of `target`, fp32 (fp64 for
        fp64 inputs), on the inputs' device. These three are differentiable.
    Raises: ValueError naming the tensor, expected and actual shape, dtype or device; naming row and value of a target
        outside [0, V).
    Source: the recomputation is that of Wijmans et al. 2024, "Cut Your Losses", section 4.
    Notes: statistics in fp32; on CUDA the logits are never rounded below fp32. Under autocast the inputs are cast to
        its dtype. Second derivatives raise. A row whose logits are all -inf gives NaN.
    Example:
        >>> hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
        >>> logprob, _, lse = linear_logprob(hidden, weight, torch.tensor([0, 3, -100, 10, 1]))
        >>> logprob.shape
        torch.Size([5])
    """
    if group is not None:
        from rlhf_fast.ops.vocab_parallel import vocab_parallel_logprob

        group = as_group(group)
        if token_stats:
            raise ValueError("token_stats cannot be had over a process group: leave out one of token_stats and group")
        options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
        options |= dict(entropy=entropy, lora=lora, chunk_size=chunk_size, memory_budget=memory_budget)
        return vocab_parallel_logprob(hidden, weight, target, group=group, bias=bias, **options)
    hidden, weight, bias = check_head(hidden, weight, bias, target)
    check_scoring(ignore_index, entropy)
    _checks.check_flag("token_stats", token_stats)
    tf = check_transform(temperature, logit_scale, softcap)
    chunk, budget = check_chunk(chunk_size, memory_budget)
    a, b, scaling = check_lora(lora, hidden, weight)
    _checks.check_no_tangent("linear_logprob", hidden=hidden, weight=weight, bias=bias, lora_a=a, lora_b=b)
    flat, rows = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if a is None and not token_stats and chunk is None and wanted(hidden, weight, bias).any and _may_keep(hidden):
        call = Call(tf, ignore_index, chunk, budget)
        logprob, h, lse, *extra = _KeepingLogprob.apply(
            flat, weight, bias, rows, call, entropy, roots(flat, weight, bias)
        )
    else:
        options = (scaling, *tf, ignore_index, entropy, token_stats, chunk, budget)
        logprob, h, lse, _, _, *extra = _linear_logprob(flat, weight, bias, a, b, rows, *options)
    shape = target.shape
    out = LogProb(logprob.reshape(shape), h.reshape(shape) if entropy else None, lse.reshape(shape))
    return TokenLogProb(*out, *(x.reshape(shape) for x in extra)) if token_stats else out


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, shard: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validate the tensors of a head, or of a shard of one (it may have no rows), and cast them to autocast's dtype
    where that is on."""
    _checks.check_float("hidden", hidden)
    _checks.check_float("weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"hidden must be (..., D) and weight (V, D), got {_checks.shape_str(hidden.shape)} and "
            f"{_checks.shape_str(weight.shape)}"
        )
    if weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not shard):
        raise ValueError(
            f"weight must be (V, D) with V > 0 and D={hidden.shape[-1]} as in hidden "
            f"{_checks.shape_str(hidden.shape)}, got {_checks.shape_str(weight.shape)}"
        )
    _checks.check_target("target", target, hidden.shape[:-1], "hidden's leading shape")
    if bias is not None:
        _checks.check_float("bias", bias)
        _checks.check_shape("bias", bias, weight.shape[:1], "(V,)")
    _checks.check_same_device(hidden=hidden, weight=weight, bias=bias, target=target)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _checks.check_same_dtype(hidden=hidden, weight=weight)
    return hidden, weight, bias


def check_lora(
    lora: Lora | tuple[Tensor, Tensor, float] | None, hidden: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, float]:
    """Validate (a, b, scaling) against the head (already cast by autocast) and cast it alike."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora must be (a, b, scaling), got {type(lora).__name__}")
    a, b, scaling = lora
    for name, tensor, dims, axis, size in (
        ("lora a", a, "(r, D)", 1, weight.shape[1]),
        ("lora b", b, "(V, r)", 0, weight.shape[0]),
    ):
        _checks.check_float(name, tensor)
        if tensor.dim() != 2 or tensor.shape[axis] != size:
            raise ValueError(
                f"{name} must be {dims} with {dims[1 + 3 * axis]}={size}, got {_checks.shape_str(tensor.shape)}"
            )
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"lora a (r, D) and b (V, r) must share r, got {a.shape[0]} and {b.shape[1]}")
    _checks.check_same_device(hidden=hidden, **{"lora a": a, "lora b": b})
    if torch.is_autocast_enabled(hidden.device.type):
        a, b = a.to(weight.dtype), b.to(weight.dtype)
    _checks.check_same_dtype(weight=weight, **{"lora a": a, "lora b": b})
    return a, b, _checks.check_finite("lora scaling", scaling)


def check_scoring(ignore_index: int, entropy: bool) -> None:
    """Validate which targets count, and whether the entropy is wanted."""
    _checks.check_int("ignore_index", ignore_index)
    _checks.check_flag("entropy", entropy)


def check_transform(temperature: float, logit_scale: float, softcap: float | None) -> Transform:
    """Validate the scalars between raw logits and softmax."""
    temperature = _checks.check_positive("temperature", temperature)
    logit_scale = _checks.check_finite("logit_scale", logit_scale)
    softcap = None if softcap is None else _checks.check_positive("softcap", softcap)
    return Transform(logit_scale, softcap, 1.0 / temperature)


def check_chunk(chunk_size: int | None, memory_budget: int | None) -> tuple[int | None, int | None]:
    """Validate the two ways to size a tile."""
    for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
            raise ValueError(f"{name} must be a positive integer or None, got {_checks.short(value)}")
    return chunk_size, memory_budget


@torch.library.custom_op("rlhf_fast::linear_logprob", mutates_args=(), tags=WAITS)
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    lora_scaling: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    entropy: bool,
    token_stats: bool,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, lse, row max, log-sum, log_sum_sq, mean_logit, is_top1 or empty), each (N,)."""
    call = Call(Transform(scale, softcap, inv_temperature), ignore_index, chunk_size, memory_budget, lora_scaling)
    inputs = Inputs(hidden, weight, bias, lora_a, lora_b)
    return tuple(_linear_run.forward(inputs, target, call, entropy=entropy, token_stats=token_stats)[0])


@_linear_logprob.register_fake
def _(hidden, weight, bias, a, b, target, lora_scaling, scale, softcap, inv_temperature, ignore, entropy, stats, *_):
    return tuple(Outputs.zeros(hidden, entropy, stats))


@torch.library.custom_op("rlhf_fast::linear_logprob_backward", mutates_args=(), tags=WAITS)
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    lora_scaling: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    chunk_size: int | None,
    memory_budget: int | None,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, lora_a and lora_b, in their dtypes; empty where not wanted."""
    call = Call(Transform(scale, softcap, inv_temperature), ignore_index, chunk_size, memory_budget, lora_scaling)
    inputs, saved = Inputs(hidden, weight, bias, lora_a, lora_b), Saved(entropy, row_max, log_sum)
    return _linear_run.backward(inputs, target, saved, (dlogprob, dentropy, dlse), call, Wanted(*want))


@_linear_logprob_backward.register_fake
def _(hidden, weight, bias, lora_a, lora_b, *args):
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return tuple(
        (weight if x is None else x).new_empty(x.shape if want else (0,))
        for x, want in zip(inputs, args[-1], strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.scalars = *inputs[:6], inputs[6:]
    _, entropy, _, row_max, log_sum, *extra = output
    ctx.mark_non_differentiable(row_max, log_sum, *extra)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(*tensors, entropy, row_max, log_sum)


def _backward(ctx, dlogprob, dentropy, dlse, *_):
    lora_scaling, scale, softcap, inv_temperature, ignore_index, _, _, chunk_size, memory_budget = ctx.scalars
    want = [bool(w) for w in ctx.needs_input_grad[:5]]
    grads = _linear_logprob_backward(
        *(*ctx.saved_tensors, dlogprob, dentropy, dlse, lora_scaling),
        *(scale, softcap, inv_temperature, ignore_index, chunk_size, memory_budget, want),
    )
    return (*(g if w else None for g, w in zip(grads, want, strict=True)), *(None,) * 10)


_linear_logprob.register_autograd(_backward, setup_context=_save)


# ---- the same with logits that stay from the forward to the backward: eager, on the CPU ----


def _may_keep(hidden: Tensor) -> bool:
    """Whether this is a plain tensor on the CPU outside of torch.compile: what is kept is overwritten by the backward,
    which no graph may know of."""
    return hidden.device.type == "cpu" and type(hidden) in (Tensor, Parameter) and not torch.compiler.is_compiling()


class _KeepingLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, call: Call, entropy: bool, descend: tuple[Tensor, ...]):
        inputs = Inputs(hidden, weight, bias, None, None)
        out, ctx.kept, logits = _linear_run.forward(inputs, target, call, entropy=entropy, keep=True)
        ctx.call, ctx.used, ctx.roots = call, False, descend
        ctx.save_for_backward(hidden, weight, bias, target, out.entropy, out.row_max, out.log_sum, logits)
        return out.logprob, out.entropy, out.lse

    @staticmethod
    @once_differentiable("linear_logprob")
    def backward(ctx, *upstream):
        hidden, weight, bias, target, *saved, logits = ctx.saved_tensors
        # `.data`: autograd would refuse a second walk over a graph whose tensor has changed. That walk makes them anew.
        logits = None if ctx.used or logits is None else logits.data
        ctx.used = True
        want = Wanted(*ctx.needs_input_grad[:3])
        inputs = Inputs(hidden, weight, bias, None, None)
        grads = _linear_run.backward(inputs, target, Saved(*saved), upstream, ctx.call, want, ctx.kept, logits)
        return *(g if w else None for g, w in zip(grads, want, strict=False)), None, None, None, None

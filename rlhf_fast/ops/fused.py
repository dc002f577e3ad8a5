"""`fused_linear_loss`: a loss over log-probabilities whose gradient is formed in the forward pass.

Three products in all: the tile of logits that yields the log-probabilities is still there when the loss of its rows is
known, so it becomes its own gradient in place and nothing is recomputed. Rows that are not scored reach no product,
rows of exactly zero gradient only the first.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._eager import WAITS, last_walk
from rlhf_fast.ops._fused_run import ROW_COUNTS, Call, LossFn, run
from rlhf_fast.ops._head import Lora, Wanted, hidden_grad_dtype, wanted, weight_grad_dtype
from rlhf_fast.ops._once import once_differentiable, roots
from rlhf_fast.ops._rows import Transform, stat_dtype
from rlhf_fast.ops._shards import Joined, as_group
from rlhf_fast.ops.linear import check_chunk, check_head, check_lora, check_scoring, check_transform
from rlhf_fast.types import FusedLoss, Metrics


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFn,
    *,
    batch: dict[str, Any] | None = None,
    segments: Tensor | None = None,
    entropy: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lora: Lora | tuple[Tensor, Tensor, float] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    weight_grad: Tensor | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
) -> FusedLoss:
    """A loss over the log-probabilities of `target` under a linear head, in three products with that head.

        L = sum over chunks of loss_fn(logprob, entropy, batch),   logprob as in `linear_logprob`

    Equivalent to `reference.fused_linear_loss`, without materialising the logits (N, V) and without recomputation:
    autograd runs over the (n,) vectors of a chunk only, inside the forward pass.

    Args:
        hidden: (N, D) or (..., D) float. Differentiable.
        weight: (V, D), dtype of `hidden`. Differentiable; frozen, it costs no product.
        target: (N,) or (...) int64 or int32, aligned to `hidden`. `ignore_index` marks rows that are not scored.
        loss_fn: `loss_fn(logprob (n,), entropy (n,) or None, batch) -> loss ()`, the SUM over the chunk's share of the
            loss, or `(loss, metrics)` with metrics a dict of 0-d tensors. It sees scored rows only. Divide by a
            normaliser that is known beforehand (pass it in `batch`), never by the chunk's own length. Ready-made
            ones: `rlhf_fast.losses`. Gradients reach `hidden` and the head through `logprob` and `entropy`,
            and nothing else: tensors in `batch` are constants.
        batch: what loss_fn needs. Tensors of N entries (or of the shape of `target`) are cut like the rows; with
            `segments`, tensors of S entries are cut like the segments; 0-d tensors and other values pass whole.
        segments: (S+1,) int32 or int64 offsets into the N rows (`cu_seqlens`). A chunk then holds whole segments, and
            `batch` gains "segment_ids" (n,) and "num_segments". A segment larger than a tile is still exact: its
            tiles are recomputed (four products for its rows). None: chunks are cut anywhere. Segments must be whole:
            where a sequence is spread over ranks, sum `linear_logprob`'s over the ranks instead (docs/training.md).
        entropy: hand loss_fn the entropy and return it.
        bias, temperature, logit_scale, softcap, ignore_index, lora, chunk_size, memory_budget: as in `linear_logprob`.
        weight_grad: (V, D) float. The backward adds the head's gradient to it in one pass, straight from the
            accumulator, and autograd gets none for `weight`: `weight.grad` itself, or an fp32 buffer in which
            micro-batches add up without being rounded to bf16 each time.
        group: the vocabulary is spread over this process group, as in `vocab_parallel_logprob`: `weight` and `bias`
            are this rank's rows, `target` holds global ids, hidden and the rest are the same on every rank. loss_fn
            runs on every rank, and the first rank's loss and gradient count. Every rank's hidden states get the
            whole gradient, `weight` and `bias` that of their rows. lora: a whole, and this rank's rows of b.
    Returns: FusedLoss(loss (), logprob, entropy or None, metrics). `loss` is differentiable and honours any upstream
        scalar; the rest are constants of the shape of `target`, zero where not scored. `metrics` holds what loss_fn
        returned, added over chunks (names ending in _max or _min: the extreme), and the rows that entered each
        product: rows_total, rows_forward (first), rows_backward (second and third).
    Raises: ValueError naming the tensor or batch key; whatever loss_fn raises.
    Source: gradient-in-forward as in Hsu et al. 2024, "Liger Kernel", section 3.2, generalised to any loss.
    Notes: under torch.compile a ready-made loss (`rlhf_fast.losses`), built outside the compiled function, is one op;
        any other loss_fn is a graph break. Without gradients (no_grad, frozen inputs) one product. Nothing
        scored: loss 0, zero gradients, still attached to the graph. fp32 statistics, fp32 weight gradient. Second
        derivatives raise.
    Example:
        >>> def nll(logprob, entropy, batch):
        ...     return -(logprob * batch["w"]).sum()
        >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
        >>> batch = {"w": torch.full((6,), 1 / 6)}
        >>> fused_linear_loss(hidden, weight, torch.arange(6), nll, batch=batch).loss.backward()
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    group = None if group is None else as_group(group)
    name = None if group is None else group.group_name
    with Joined(group, hidden):
        hidden, weight, bias = check_head(hidden, weight, bias, target, shard=group is not None)
        check_scoring(ignore_index, entropy)
        tf = check_transform(temperature, logit_scale, softcap)
        chunk, budget = check_chunk(chunk_size, memory_budget)
        flat = target.reshape(-1)
        if segments is not None and not torch.compiler.is_compiling():
            _checks.check_cu_seqlens("segments", segments, flat.shape[0])
        batch = _flat_batch({} if batch is None else batch, target)
        if hasattr(loss_fn, "prepare"):
            batch = loss_fn.prepare(batch, flat != ignore_index, segments)
        if not getattr(loss_fn, "needs_segments", True):  # a ready-made loss that may be cut anywhere
            segments = None
        entropy = entropy or bool(getattr(loss_fn, "needs_entropy", False))
        lora_a, lora_b, scaling = check_lora(lora, hidden, weight)
        if weight_grad is not None:
            _check_weight_grad(weight_grad, weight)
    want = wanted(hidden, weight, bias, lora_a, lora_b)
    if weight_grad is not None:
        want = want._replace(weight=torch.is_grad_enabled())
    low_rank = None if lora_a is None else Lora(lora_a, lora_b, scaling)
    call = Call(loss_fn, batch, segments, entropy, tf, ignore_index, chunk, budget, want, low_rank, name)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_a, lora_b, flat)
    if torch.compiler.is_compiling() and hasattr(loss_fn, "_ready_key") and weight_grad is None:
        loss, logprob, h, metrics = _call_op(*inputs, call)
    else:
        loss, logprob, h, names, *values = _FusedLinearLoss.apply(*inputs, call, weight_grad, roots(*inputs[:5]))
        metrics = dict(zip(names, values, strict=True))
    shape = target.shape
    return FusedLoss(loss, logprob.reshape(shape), h.reshape(shape) if entropy else None, metrics)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        target,
        call: Call,
        weight_grad: Tensor | None,
        descend: tuple[Tensor, ...],
    ):
        if lora_a is not None:
            call = call._replace(lora=Lora(lora_a, lora_b, call.lora.scaling))
        out = run(hidden, weight, bias, target, call)
        ctx.want, ctx.dtypes = call.want, _dtypes(hidden, weight, bias, lora_a, lora_b)
        ctx.weight_grad, ctx.roots = weight_grad, descend
        ctx.save_for_backward(*out.grads)
        ctx.mark_non_differentiable(out.logprob, out.entropy, *out.metrics.values())
        return out.loss, out.logprob, out.entropy, tuple(out.metrics), *out.metrics.values()

    @staticmethod
    @once_differentiable("fused_linear_loss")
    def backward(ctx, dloss, *_):
        saved, want = ctx.saved_tensors, ctx.want
        if ctx.weight_grad is not None and want.weight:
            total, dweight = ctx.weight_grad, saved[1]
            if dweight.dtype == total.dtype:
                total.addcmul_(dweight, dloss.to(total.dtype))
            else:
                total.add_(dweight * dloss)
            want = want._replace(weight=False)
        grads = [
            scaled(grad, dloss, dtype) if wanted_ else None
            for grad, wanted_, dtype in zip(saved, want, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None


def _check_weight_grad(weight_grad: Tensor, weight: Tensor) -> None:
    _checks.check_float("weight_grad", weight_grad)
    _checks.check_shape("weight_grad", weight_grad, weight.shape, "(V, D)")
    _checks.check_same_device(weight=weight, weight_grad=weight_grad)
    if weight_grad.requires_grad:
        raise ValueError("weight_grad is written in place and must not require grad")


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


def scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * dloss in `dtype`, never in place: the graph may be walked twice.

    On the CPU, where looking costs nothing, a factor of 1 hands the gradient on as it is, once nobody walks again.
    """
    if grad.dtype == dtype and dloss.device.type == "cpu" and last_walk(dloss) and dloss.item() == 1.0:
        return grad
    return torch.mul(grad, dloss).to(dtype) if grad.dtype == dtype else _scaled_cast(grad, dloss, dtype)


def _scaled_cast(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass from the fp32 accumulator to the narrow gradient."""
    return torch.mul(grad, dloss, out=torch.empty_like(grad, dtype=dtype))


def _flat_batch(batch: dict[str, Any], target: Tensor) -> dict[str, Any]:
    """Tensors of target's shape become (N,)."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a dict of tensors and numbers, got {type(batch).__name__}")
    flat = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"batch[{key!r}] requires grad, but the fused loss differentiates the head's inputs only: detach it"
                )
            if value.dim() and value.device != target.device:
                raise ValueError(f"batch[{key!r}] must be on target's device {target.device}, got {value.device}")
            if value.dim() > 1 and value.shape == target.shape:
                value = value.reshape(-1)
        flat[key] = value
    return flat


# ---- the same as one op, for ready-made losses: torch.compile sees no graph break ----

_READY: weakref.WeakValueDictionary[str, ReadyMade] = weakref.WeakValueDictionary()
_ready_count = itertools.count()


class ReadyMade:
    """Base of the losses that a compiled graph can refer to: it knows each object by a key of its own.

    A subclass has `prepare(batch, mask, cu_seqlens)`, traceable, whose result depends on no values; and it calls
    `_register` when it has been built. A copy, or an object from another process, gets a key of its own.
    """

    def _register(self) -> None:
        key = f"{type(self).__name__}-{next(_ready_count)}"
        object.__setattr__(self, "_ready_key", key)
        _READY[key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ready_key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Autograd records again: the dispatcher leaves it out within an op's implementation."""
    c = torch._C
    excluded = c._dispatch_tls_local_exclude_set().remove(c.DispatchKey.AutogradFunctionality)
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded), torch.no_grad():
        yield


def _call_op(hidden, weight, bias, lora_a, lora_b, target, call: Call) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """(loss, logprob, entropy, metrics) through the op."""
    device = target.device
    numbers = {k: torch.tensor(v, device=device) for k, v in call.batch.items() if isinstance(v, (bool, int, float))}
    tensors = {k: v for k, v in (call.batch | numbers).items() if isinstance(v, Tensor) and k != "num_segments"}
    empty = hidden.new_empty(0, dtype=stat_dtype(hidden.dtype))
    probe = {k: v if v.dim() == 0 else v[:0] for k, v in tensors.items()} | {"num_segments": 0}
    _, metrics = call.loss_fn(empty, empty if call.entropy else None, probe)  # for their names; no work
    loss, logprob, entropy, values, *_ = _fused_linear_loss(
        *(hidden, weight, bias, lora_a, lora_b, target, call.segments),
        *(list(tensors.values()), ",".join(tensors), ",".join(metrics)),
        *(call.group, call.lora.scaling if call.lora else 1.0),
        *(call.loss_fn._ready_key, call.entropy, *call.tf, call.ignore_index),
        *(call.chunk_size, call.memory_budget, list(call.want)),
    )
    return loss, logprob, entropy, dict(zip([*metrics, *ROW_COUNTS], values.unbind(), strict=True))


@torch.library.custom_op("rlhf_fast::fused_linear_loss", mutates_args=(), tags=WAITS)
def _fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    segments: Tensor | None,
    batch: list[Tensor],
    batch_names: str,
    metric_names: str,
    group: str | None,
    lora_scaling: float,
    loss_key: str,
    entropy: bool,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    chunk_size: int | None,
    memory_budget: int | None,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob, entropy or empty, metrics (M,), unscaled gradients of the first five inputs or empty).

    Names are joined by commas: the schema knows no list of strings.
    """
    if loss_key not in _READY:
        raise RuntimeError(f"the loss {loss_key} of a compiled fused_linear_loss no longer exists: keep it alive")
    values = dict(zip(batch_names.split(","), batch, strict=True))
    tf = Transform(scale, softcap, inv_temperature)
    lora = None if lora_a is None else Lora(lora_a, lora_b, lora_scaling)
    options = (entropy, tf, ignore_index, chunk_size, memory_budget, Wanted(*want), lora, group)
    with _autograd_inside():
        out = run(hidden, weight, bias, target, Call(_READY[loss_key], values, segments, *options))
    zero = hidden.new_zeros((), dtype=stat_dtype(hidden.dtype))
    metrics = [out.metrics.get(name, zero) for name in (*metric_names.split(","), *ROW_COUNTS)]
    return out.loss, out.logprob, out.entropy, torch.stack([m.to(zero) for m in metrics]), *out.grads


@_fused_linear_loss.register_fake
def _(
    hidden, weight, bias, a, b, target, segments, batch, batch_names, metric_names, group, scaling, key, entropy, *args
):
    want, dtype = args[-1], stat_dtype(hidden.dtype)
    n, acc = target.shape[0], stat_dtype(weight.dtype)
    hidden_dtype = hidden_grad_dtype(hidden.dtype, hidden.device)
    return (
        *(hidden.new_empty(size, dtype=dtype) for size in ((), n, n if entropy else 0)),
        hidden.new_empty(len(metric_names.split(",")) + len(ROW_COUNTS), dtype=dtype),
        hidden.new_empty(hidden.shape if want[0] else (0,), dtype=hidden_dtype),
        weight.new_empty(weight.shape if want[1] else (0,), dtype=weight_grad_dtype(weight.dtype, weight.device)),
        weight.new_empty(weight.shape[0] if want[2] else 0, dtype=acc),
        weight.new_empty(a.shape if want[3] else (0,), dtype=acc),
        weight.new_empty(b.shape if want[4] else (0,), dtype=acc),
    )


def _save(ctx, inputs, output):
    ctx.want, ctx.dtypes = inputs[-1], _dtypes(*inputs[:5])
    ctx.batch_size = len(inputs[7])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _backward(ctx, dloss, *_):
    grads = [
        (grad * dloss).to(dtype) if want else None
        for grad, want, dtype in zip(ctx.saved_tensors, ctx.want, ctx.dtypes, strict=True)
    ]
    return *grads, None, None, [None] * ctx.batch_size, *(None,) * 13


_fused_linear_loss.register_autograd(_backward, setup_context=_save)

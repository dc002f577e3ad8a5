"""`fused_linear_loss`: a loss over log-probabilities whose gradient is formed in the forward pass.

Three products in all: the tile of logits that yields the log-probabilities is still there when the loss of its rows is
known, so it becomes its own gradient in place and nothing is recomputed. Rows that are not scored reach no product,
rows of exactly zero gradient only the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._head import Head, Wanted, tile_rows, wanted
from rlhf_fast.ops._rows import RowStats, Transform, stat_dtype
from rlhf_fast.ops.linear import check_chunk, check_head, check_transform, scored_rows
from rlhf_fast.types import FusedLoss, LossGrad, Metrics

LossFn = Callable[[Tensor, "Tensor | None", dict[str, Any]], "Tensor | tuple[Tensor, Metrics]"]
ROW_COUNTS = ("rows_total", "rows_forward", "rows_backward")


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
    chunk_size: int | None = None,
    memory_budget: int | None = None,
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
            ones: `rlhf_fast.losses`. Gradients reach `hidden`, `weight` and `bias` through `logprob` and `entropy`,
            and nothing else: tensors in `batch` are constants.
        batch: what loss_fn needs. Tensors of N entries (or of the shape of `target`) are cut like the rows; with
            `segments`, tensors of S entries are cut like the segments; 0-d tensors and other values pass whole.
        segments: (S+1,) int32 or int64 offsets into the N rows (`cu_seqlens`). A chunk then holds whole segments, and
            `batch` gains "segment_ids" (n,) and "num_segments". A segment larger than a tile is still exact: its
            tiles are recomputed (four products for its rows). None: chunks are cut anywhere.
        entropy: hand loss_fn the entropy and return it.
        bias, temperature, logit_scale, softcap, ignore_index, chunk_size, memory_budget: as in `linear_logprob`.
    Returns: FusedLoss(loss (), logprob, entropy or None, metrics). `loss` is differentiable and honours any upstream
        scalar; the rest are constants of the shape of `target`, zero where not scored. `metrics` holds what loss_fn
        returned, added over chunks (names ending in _max or _min: the extreme), and the rows that entered each
        product: rows_total, rows_forward (first), rows_backward (second and third).
    Raises: ValueError naming the tensor or batch key; whatever loss_fn raises.
    Source: gradient-in-forward as in Hsu et al. 2024, "Liger Kernel", section 3.2, generalised to any loss.
    Notes: without gradients (no_grad, frozen inputs) one product. Nothing scored: loss 0, zero gradients, still
        attached to the graph. fp32 statistics, fp32 weight gradient. Second derivatives raise.
    Example:
        >>> def nll(logprob, entropy, batch):
        ...     return -(logprob * batch["w"]).sum()
        >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
        >>> fused_linear_loss(hidden, weight, torch.arange(6), nll, batch={"w": torch.full((6,), 1 / 6)}).loss.backward()
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    hidden, weight, bias = check_head(hidden, weight, bias, target)
    tf = check_transform(temperature, logit_scale, softcap)
    chunk, budget = check_chunk(chunk_size, memory_budget)
    flat = target.reshape(-1)
    if segments is not None:
        _checks.check_cu_seqlens("segments", segments, flat.shape[0])
    batch = _flat_batch(batch or {}, target)
    if hasattr(loss_fn, "prepare"):
        batch = loss_fn.prepare(batch, flat != ignore_index, segments)
    if not getattr(loss_fn, "needs_segments", True):  # a ready-made loss that may be cut anywhere
        segments = None
    entropy = entropy or bool(getattr(loss_fn, "needs_entropy", False))
    want = wanted(hidden, weight, bias)
    call = _Call(loss_fn, batch, segments, entropy, tf, ignore_index, chunk, budget, want)
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, logprob, h, names, *values = _FusedLinearLoss.apply(rows, weight, bias, flat, call)
    shape = target.shape
    metrics = dict(zip(names, values, strict=True))
    return FusedLoss(loss, logprob.reshape(shape), h.reshape(shape) if entropy else None, metrics)


class _Call(NamedTuple):
    """Everything of a call that is not a differentiable tensor."""

    loss_fn: LossFn
    batch: dict[str, Any]
    segments: Tensor | None
    entropy: bool
    tf: Transform
    ignore_index: int
    chunk_size: int | None
    memory_budget: int | None
    want: Wanted


class _Result(NamedTuple):
    loss: Tensor  # ()
    logprob: Tensor  # (N,)
    entropy: Tensor  # (N,) or (0,)
    metrics: Metrics
    grads: tuple[Tensor, Tensor, Tensor]


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, call: _Call):
        out = _run(hidden, weight, bias, target, call)
        ctx.want, ctx.dtypes = call.want, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*out.grads)
        ctx.mark_non_differentiable(out.logprob, out.entropy, *out.metrics.values())
        return out.loss, out.logprob, out.entropy, tuple(out.metrics), *out.metrics.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        grads = [
            scaled(grad, dloss, dtype) if want else None
            for grad, want, dtype in zip(ctx.saved_tensors, ctx.want, ctx.dtypes, strict=True)
        ]
        return *grads, None, None


def scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * dloss in `dtype`, never in place: the graph may be walked twice.

    On the CPU, where looking costs nothing, a factor of 1 hands the gradient on as it is.
    """
    if grad.dtype == dtype and dloss.device.type == "cpu" and dloss.item() == 1.0:
        return grad
    return torch.mul(grad, dloss).to(dtype) if grad.dtype == dtype else _scaled_cast(grad, dloss, dtype)


def _scaled_cast(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass from the fp32 accumulator to the narrow gradient."""
    return torch.mul(grad, dloss, out=torch.empty_like(grad, dtype=dtype))


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call) -> _Result:
    """The whole computation, chunk by chunk: product, statistics, loss, gradient in place, two products."""
    n, vocab, dtype = target.shape[0], weight.shape[0], stat_dtype(hidden.dtype)
    logprob = hidden.new_zeros(n, dtype=dtype)
    entropy = hidden.new_zeros(n if call.entropy else 0, dtype=dtype)
    live = scored_rows(target, call.ignore_index, vocab)
    count = n if live is None else live.shape[0]
    step = tile_rows(count, vocab, hidden.dtype, hidden.device, call.chunk_size, call.memory_budget)
    loss, metrics = hidden.new_zeros((), dtype=dtype), {}
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, call.tf, step, call.want)
        for chunk in _plan(count, step, target != call.ignore_index, call.segments):
            rows = slice(chunk.start, chunk.stop) if live is None else live[chunk.start : chunk.stop]
            grad = _chunk(head, hidden, target, rows, chunk, step, call, logprob, entropy)
            loss += grad.loss.detach()
            merge_metrics(metrics, grad.metrics)
    counts = (n, head.rows_forward, head.rows_backward)
    metrics |= {name: torch.tensor(c) for name, c in zip(ROW_COUNTS, counts, strict=True)}
    return _Result(loss, logprob, entropy, metrics, tuple(head.grads))


class _Chunk(NamedTuple):
    """Scored rows [start, stop), and the segments they belong to."""

    start: int
    stop: int
    segments: tuple[int, int] | None
    segment_ids: Tensor | None


def _plan(count: int, step: int, scored: Tensor, segments: Tensor | None):
    """Cut the scored rows into chunks of at most `step` rows, or of whole segments."""
    if segments is None:
        yield from (_Chunk(i, min(i + step, count), None, None) for i in range(0, count, step))
        return
    cu = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[segments.long()]
    ids = torch.repeat_interleave(torch.arange(cu.shape[0] - 1, device=cu.device), cu.diff())
    cu, first = cu.tolist(), 0
    while first < len(cu) - 1:
        last = first + 1
        while last < len(cu) - 1 and cu[last + 1] - cu[first] <= step:
            last += 1
        yield _Chunk(cu[first], cu[last], (first, last), ids[cu[first] : cu[last]] - first)
        first = last


def _chunk(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | slice,
    chunk: _Chunk,
    step: int,
    call: _Call,
    logprob: Tensor,
    entropy: Tensor,
) -> LossGrad:
    """Log-probs, loss and gradient of one chunk; fills its rows of `logprob` and `entropy`."""
    n = chunk.stop - chunk.start
    tiles = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    h, t = hidden[rows], target[rows].long()
    z, stats = None, []
    for tile in tiles:
        z = head.logits(h[tile])
        stats.append(head.stats(z, t[tile], entropy=call.entropy))
    logprob[rows] = lp = torch.cat([s.logprob for s in stats]) if stats else logprob.new_zeros(0)
    ent = None
    if call.entropy:
        entropy[rows] = ent = torch.cat([s.entropy for s in stats]) if stats else entropy.new_zeros(0)
    grad = loss_gradient(call.loss_fn, lp, ent, _slice(call, target.shape[0], rows, chunk), call.want.any)
    if call.want.any:
        for tile, stat in zip(tiles, stats, strict=True):
            if len(tiles) > 1:  # a segment wider than the tile: its logits were overwritten
                z = head.logits(h[tile])
            where = slice(rows.start + tile.start, rows.start + tile.stop) if isinstance(rows, slice) else rows[tile]
            dentropy = None if grad.dentropy is None else grad.dentropy[tile]
            head.backward(z, h[tile], where, t[tile], RowStats(*stat), grad.dlogprob[tile], dentropy)
    return grad


def loss_gradient(loss_fn: LossFn, logprob: Tensor, entropy: Tensor | None, batch: dict, wanted: bool) -> LossGrad:
    """The loss of one chunk and its gradient: the loss's own formula if it has one, otherwise autograd's."""
    if hasattr(loss_fn, "gradient"):
        return loss_fn.gradient(logprob, entropy, batch)
    with torch.set_grad_enabled(wanted):
        leaves = [x.detach().requires_grad_(wanted) for x in (logprob, entropy) if x is not None]
        out = loss_fn(leaves[0], leaves[1] if entropy is not None else None, batch)
        loss, metrics = out if isinstance(out, tuple) else (out, {})
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {_checks.shape_str(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a 0-d tensor summed over the chunk, got {got}")
        grads = [None, None]
        if wanted and loss.requires_grad:
            grads = [*torch.autograd.grad(loss, leaves, allow_unused=True), None]
    dlogprob = torch.zeros_like(logprob) if grads[0] is None else grads[0]
    return LossGrad(loss.detach(), dlogprob, grads[1], {k: _metric(k, v, loss) for k, v in metrics.items()})


def _metric(name: str, value: object, like: Tensor) -> Tensor:
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(value, device=like.device)
    if value.dim() != 0:
        raise ValueError(f"loss_fn's metric {name!r} must be a 0-d tensor, got {_checks.shape_str(value.shape)}")
    return value


def merge_metrics(total: Metrics, new: Metrics) -> None:
    """Add the metrics of one more chunk: sums, but extremes for names that end in _max or _min."""
    for name, value in new.items():
        if name not in total:
            total[name] = value
        elif name.endswith("_max"):
            total[name] = torch.maximum(total[name], value)
        elif name.endswith("_min"):
            total[name] = torch.minimum(total[name], value)
        else:
            total[name] = total[name] + value


def _flat_batch(batch: dict[str, Any], target: Tensor) -> dict[str, Any]:
    """Tensors of target's shape become (N,)."""
    flat = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"batch[{key!r}] requires grad, but the fused loss differentiates hidden, weight and bias only: "
                    "detach it"
                )
            if value.dim() and value.device != target.device:
                raise ValueError(f"batch[{key!r}] must be on target's device {target.device}, got {value.device}")
            if value.dim() > 1 and value.shape == target.shape:
                value = value.reshape(-1)
        flat[key] = value
    return flat


def _slice(call: _Call, n: int, rows: Tensor | slice, chunk: _Chunk) -> dict[str, Any]:
    """The chunk's share of the batch."""
    out = {}
    size = None if call.segments is None else call.segments.shape[0] - 1
    for key, value in call.batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            out[key] = value
        elif value.shape[0] == n:
            out[key] = value[rows]
        elif size is not None and value.shape[0] == size:
            out[key] = value[slice(*chunk.segments)]
        else:
            sizes = f"N={n}" + ("" if size is None else f" or S={size}")
            raise ValueError(f"batch[{key!r}] must have {sizes} entries, got {_checks.shape_str(value.shape)}")
    if chunk.segments is not None:
        out["segment_ids"] = chunk.segment_ids
        out["num_segments"] = chunk.segments[1] - chunk.segments[0]
    return out

"""What `fused_linear_loss` computes: chunk by chunk, product, statistics, loss, gradient in place, two products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops import _epilogue_head
from rlhf_fast.ops._head import Head, Lora, Wanted, tile_rows
from rlhf_fast.ops._linear_run import scored_rows
from rlhf_fast.ops._rows import RowStats, Transform, stat_dtype
from rlhf_fast.ops._shards import Agreement, ShardedHead, Shards, lora_options, sharded_head
from rlhf_fast.types import LossGrad, Metrics

LossFn = Callable[[Tensor, "Tensor | None", dict[str, Any]], "Tensor | tuple[Tensor, Metrics]"]
ROW_COUNTS = ("rows_total", "rows_forward", "rows_backward")


class Call(NamedTuple):
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
    lora: Lora | None = None
    group: str | None = None  # name of the process group over which the vocabulary is spread


class Result(NamedTuple):
    loss: Tensor  # ()
    logprob: Tensor  # (N,)
    entropy: Tensor  # (N,) or (0,)
    metrics: Metrics
    grads: tuple[Tensor, ...]  # of hidden, weight, bias, lora_a, lora_b


def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call) -> Result:
    """The whole computation, chunk by chunk: product, statistics, loss, gradient in place, two products."""
    n, vocab, dtype = target.shape[0], weight.shape[0], stat_dtype(hidden.dtype)
    shards = None if call.group is None else _shards(hidden, weight, bias, target, call)
    logprob = hidden.new_zeros(n, dtype=dtype)
    entropy = hidden.new_zeros(n if call.entropy else 0, dtype=dtype)
    live = scored_rows(target, call.ignore_index, vocab if shards is None else shards.vocab)
    count = n if live is None else live.shape[0]
    widest = vocab if shards is None else shards.widest  # the same tiles on every rank
    budget, served = call.memory_budget, (hidden, weight, call.tf, call.want, call.lora, call.entropy)
    by_epilogue = shards is None and _epilogue_head.serves(*served)
    if by_epilogue:
        budget = _epilogue_head.tile_budget(hidden, budget)
    step = tile_rows(count, widest, hidden.dtype, hidden.device, call.chunk_size, budget)
    loss, metrics = hidden.new_zeros((), dtype=dtype), {}
    with torch.autocast(hidden.device.type, enabled=False):
        args = (hidden, weight, bias, call.tf, step, call.want)
        if shards is not None:
            head = sharded_head(*args, shards, call.lora)
        else:
            head = _epilogue_head.EpilogueHead(*args) if by_epilogue else Head(*args, call.lora)
        whole = getattr(call.loss_fn, "needs_batch", False)  # one chunk; its tiles are recomputed if it has several
        for chunk in _plan(count, max(count, 1) if whole else step, target != call.ignore_index, call.segments):
            rows = slice(chunk.start, chunk.stop) if live is None else live[chunk.start : chunk.stop]
            grad = _chunk(head, hidden, target, rows, chunk, step, call, logprob, entropy)
            loss += grad.loss.detach()
            merge_metrics(metrics, grad.metrics)
    counts = (n, head.rows_forward, head.rows_backward)
    metrics |= {name: torch.tensor(c) for name, c in zip(ROW_COUNTS, counts, strict=True)}
    return Result(loss, logprob, entropy, metrics, (*head.grads(), *head.lora_grads()))


def _shards(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call) -> Shards:
    """How the vocabulary lies over the ranks; raises on every rank unless all were called alike."""
    segments = None if call.segments is None else call.segments.tolist()
    options = (call.tf, call.ignore_index, call.entropy, call.chunk_size, call.memory_budget, segments)
    options = (*options, lora_options(call.lora))
    gradients = 4 * call.want.lora_a + 2 * call.want.hidden + call.want.any
    mine = Agreement.of(hidden, weight, bias, target, options, gradients)
    return Shards.agreed(call.group, mine, hidden)


class _Chunk(NamedTuple):
    """Scored rows [start, stop), and the segments they belong to."""

    start: int
    stop: int
    segments: tuple[int, int] | None
    segment_ids: Tensor | None


def _plan(count: int, step: int, scored: Tensor, segments: Tensor | None) -> Iterator[_Chunk]:
    """Cut the scored rows into chunks of at most `step` rows, or of whole segments.

    A segment without a scored row goes with its neighbours: no chunk is empty, unless all of them are.
    """
    if segments is None:
        yield from (_Chunk(i, min(i + step, count), None, None) for i in range(0, count, step))
        return
    cu = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[segments.long()]
    ids = torch.repeat_interleave(torch.arange(cu.shape[0] - 1, device=cu.device), cu.diff())
    cu, first = cu.tolist(), 0
    while first < len(cu) - 1:
        last = first + 1
        while last < len(cu) - 1 and (
            cu[last] == cu[first] or cu[last + 1] == cu[last] or cu[last + 1] - cu[first] <= step
        ):
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
    call: Call,
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
    if isinstance(head, ShardedHead):
        grad = head.shards.agree(grad)
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
    """Add the metrics of one more chunk or micro-batch: sums, but extremes for names that end in _max or _min.

    One without a scored row (rows_forward 0) has no extremes.
    """
    empty = not new.get("rows_forward", True)
    for name, value in new.items():
        if empty and name.endswith(("_max", "_min")):
            continue
        if name not in total:
            total[name] = value
        elif name.endswith("_max"):
            total[name] = torch.maximum(total[name], value)
        elif name.endswith("_min"):
            total[name] = torch.minimum(total[name], value)
        else:
            total[name] = total[name] + value


def _slice(call: Call, n: int, rows: Tensor | slice, chunk: _Chunk) -> dict[str, Any]:
    """The chunk's share of the batch."""
    out = {}
    size = None if call.segments is None else call.segments.shape[0] - 1
    per_segment = getattr(call.loss_fn, "segment_keys", ())  # told apart from (N,) where N = S
    for key, value in call.batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            out[key] = value
        elif value.shape[0] == n and key not in per_segment:
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

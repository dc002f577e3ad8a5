"""`vocab_parallel_logprob`: `linear_logprob` with the head's rows spread over a process group.

Forward: one exchange of sizes, then each rank's own tiles, then one gather of four numbers a row. Backward: the
upstream gradients once, then one sum of hidden gradients a tile, which travels while the tile's weight gradient is
computed.

A `torch.library` op that knows its group by name, as torch's functional collectives do: it traces, compiles whole, and
its collectives run in the order of the calls, in the backward too (autograd walks the same graph on every rank).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.ops._eager import WAITS
from rlhf_fast.ops._head import Lora, Wanted, tile_rows, wanted
from rlhf_fast.ops._linear_run import scored_rows
from rlhf_fast.ops._rows import RowStats, Transform, stat_dtype
from rlhf_fast.ops._shards import Agreement, Joined, Shards, as_group, lora_options, resolve, sharded_head
from rlhf_fast.ops.linear import check_chunk, check_head, check_lora, check_transform
from rlhf_fast.types import LogProb


def vocab_parallel_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | dist.DeviceMesh,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    lora: Lora | tuple[Tensor, Tensor, float] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> LogProb:
    """Log-probabilities, entropy and log-sum-exp as `linear_logprob` gives them for the whole head.

        head = the shards of all ranks of `group`, in the order of the ranks

    Equivalent to `reference.vocab_parallel_logprob`; neither the head nor the logits (N, V) exist anywhere.

    Every rank calls it, with the same `hidden`, `target` and options. Shards may differ in size and may be empty. The
    hidden states are replicated, as under tensor parallelism: their gradient is complete on every rank (it is summed
    over the group here; do not sum it again), that of the shard and its bias is local. Every rank must form the same
    loss of the outputs; where the upstream gradients differ in their last bits, the first rank's count.

    Args:
        hidden: (N, D) or (..., D) float, the same on every rank. Differentiable.
        weight_shard: (V_r, D), this rank's rows of the head. Differentiable.
        target: (N,) or (...) int64 or int32: ids in the whole vocabulary, the same on every rank.
        group: of any backend that has `all_gather`, `all_reduce` and `broadcast` on the tensors' device; or a mesh of
            one dimension, such as `mesh["tp"]`.
        bias: (V_r,), this rank's entries, or None on every rank. Differentiable.
        lora: (a (r, D), the same on every rank; b (V_r, r), this rank's rows; scaling), or None on every rank. The
            gradient of a is complete on every rank, as that of the hidden states.
        temperature, logit_scale, softcap, ignore_index, entropy, chunk_size, memory_budget: as in `linear_logprob`;
            the tile is sized for the largest shard, so that all ranks cut alike.
    Returns: LogProb(logprob, entropy or None, lse), each of the shape of `target`, fp32 (fp64 for fp64 inputs), the
        same bits on every rank.
    Raises: ValueError on every rank when an argument is bad on any of them, when targets or options differ between
        ranks, or naming row and value of a target outside the vocabulary.
    Source: the split softmax of Shoeybi et al. 2019, "Megatron-LM", section 3, with maximum and log-sum kept apart.
    Notes: the hidden states' gradient is summed over ranks in fp32. Tested with gloo on the CPU. Second derivatives
        raise.
    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, shard, target = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 10, -100])
        >>> vocab_parallel_logprob(hidden, shard, target, group=dist.group.WORLD).logprob.shape
        torch.Size([3])
        >>> dist.destroy_process_group()
    """
    group = as_group(group)
    with Joined(group, hidden):
        hidden, weight, bias = check_head(hidden, weight_shard, bias, target, shard=True)
        tf = check_transform(temperature, logit_scale, softcap)
        chunk, budget = check_chunk(chunk_size, memory_budget)
        a, b, scaling = check_lora(lora, hidden, weight)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, a, b)
    want = wanted(*inputs)
    gradients = 4 * want.lora_a + 2 * want.hidden + want.any
    logprob, h, lse, *_ = _vocab_parallel_logprob(
        *(*inputs, target.reshape(-1), group.group_name, int(gradients)),
        *(scaling, *tf, ignore_index, entropy, chunk, budget),
    )
    shape = target.shape
    return LogProb(logprob.reshape(shape), h.reshape(shape) if entropy else None, lse.reshape(shape))


@torch.library.custom_op("rlhf_fast::vocab_parallel_logprob", mutates_args=(), tags=WAITS)
def _vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    group: str,
    gradients: int,
    lora_scaling: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    entropy: bool,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, lse, row max, log-sum), each (N,), and the sizes of the shards (W,), on the CPU."""
    lora = None if lora_a is None else Lora(lora_a, lora_b, lora_scaling)
    options = (scale, softcap, inv_temperature, ignore_index, entropy, chunk_size, memory_budget, lora_options(lora))
    shards = Shards.agreed(group, Agreement.of(hidden, weight, bias, target, options, gradients), hidden)
    live = scored_rows(target, ignore_index, shards.vocab)
    n, dtype = target.shape[0], stat_dtype(hidden.dtype)
    count = n if live is None else live.shape[0]
    step = tile_rows(count, shards.widest, hidden.dtype, hidden.device, chunk_size, memory_budget)
    local = hidden.new_empty((3 + entropy, count), dtype=dtype)
    tf = Transform(scale, softcap, inv_temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        head = sharded_head(hidden, weight, bias, tf, step, Wanted(False, False, False), shards, lora)
        for start in range(0, count, step):
            tile = slice(start, min(start + step, count))
            rows = tile if live is None else live[tile]
            local[:, tile] = head.local_stats(head.logits(hidden[rows]), target[rows].long(), entropy=entropy)
    rows = slice(None) if live is None else live
    stats = shards.combine(local, target[rows], entropy=entropy)
    logprob, lse, row_max, log_sum = (hidden.new_zeros(n, dtype=dtype) for _ in range(4))
    h = hidden.new_zeros(n if entropy else 0, dtype=dtype)
    logprob[rows], row_max[rows], log_sum[rows] = stats[:3]
    lse[rows] = stats.row_max + stats.log_sum
    if entropy:
        h[rows] = stats.entropy
    return logprob, h, lse, row_max, log_sum, torch.tensor(shards.sizes)


@_vocab_parallel_logprob.register_fake
def _(hidden, weight, bias, a, b, target, group, gradients, lora_scaling, scale, softcap, inv_t, ignore, entropy, *_):
    n, dtype = hidden.shape[0], stat_dtype(hidden.dtype)
    per_row = (hidden.new_empty(size, dtype=dtype) for size in (n, n if entropy else 0, n, n, n))
    return *per_row, torch.empty(resolve(group).size(), dtype=torch.int64, device="cpu")


@torch.library.custom_op("rlhf_fast::vocab_parallel_logprob_backward", mutates_args=(), tags=WAITS)
def _vocab_parallel_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    sizes: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    group: str,
    lora_scaling: float,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    ignore_index: int,
    chunk_size: int | None,
    memory_budget: int | None,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden and lora_a (complete), weight, bias and lora_b (of the shard), in their dtypes; empty where
    not wanted."""
    shards = Shards(group, sizes.tolist())
    has_entropy = entropy.numel() > 0
    dlogprob, dlse, dentropy = shards.from_first(dlogprob, dlse, dentropy if has_entropy else None)
    live = (target != ignore_index) & ((dlogprob != 0) | (dlse != 0) | (dentropy != 0 if has_entropy else False))
    live = live.nonzero().squeeze(1)
    count = live.shape[0]
    step = tile_rows(count, shards.widest, hidden.dtype, hidden.device, chunk_size, memory_budget)
    tf = Transform(scale, softcap, inv_temperature)
    lora = None if lora_a is None else Lora(lora_a, lora_b, lora_scaling)
    with torch.autocast(hidden.device.type, enabled=False):
        head = sharded_head(hidden, weight, bias, tf, step, Wanted(*want), shards, lora)
        for start in range(0, count, step):
            rows = live[start : start + step]
            h = hidden[rows]
            stats = RowStats(dlogprob[rows], row_max[rows], log_sum[rows], entropy[rows] if has_entropy else None)
            grads = (dlogprob[rows], dentropy[rows] if has_entropy else None, dlse[rows])
            head.backward(head.logits(h), h, rows, target[rows].long(), stats, *grads)
        grads = (*head.grads(), *head.lora_grads())
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


@_vocab_parallel_logprob_backward.register_fake
def _(hidden, weight, bias, lora_a, lora_b, *args):
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return tuple(
        (weight if x is None else x).new_empty(x.shape if want else (0,))
        for x, want in zip(inputs, args[-1], strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.group, _ = inputs[:8]
    *scalars, ctx.chunk_size, ctx.memory_budget = inputs[8:]
    ctx.scalars = scalars[:5]
    _, entropy, _, row_max, log_sum, sizes = output
    ctx.mark_non_differentiable(row_max, log_sum, sizes)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(*tensors, entropy, row_max, log_sum, sizes)


def _backward(ctx, dlogprob, dentropy, dlse, *_):
    want = [bool(w) for w in ctx.needs_input_grad[:5]]
    grads = _vocab_parallel_logprob_backward(
        *(*ctx.saved_tensors, dlogprob, dentropy, dlse, ctx.group, *ctx.scalars),
        *(ctx.chunk_size, ctx.memory_budget, want),
    )
    return (*(g if w else None for g, w in zip(grads, want, strict=True)), *(None,) * 11)


_vocab_parallel_logprob.register_autograd(_backward, setup_context=_save)

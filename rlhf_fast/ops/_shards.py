"""A head whose rows are spread over a process group: what the ranks say to each other, and the products of one shard.

Every rank holds the same hidden states and targets and some rows of the head. A row's statistics are those of the
shards, put together; its gradient reaches the hidden states as a sum over the shards. Per call: one small exchange of
sizes; per tile (or per call) one gather of (k, n) statistics; per tile one sum of (n, D) gradients.

Ranks that disagree about which rows matter would wait for each other for ever. So whatever decides that is either the
same bits everywhere (gathered, then reduced in the order of the ranks, on each of them) or comes from the first rank.
"""

from __future__ import annotations

import zlib
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops._head import Head, Lora, Wanted
from rlhf_fast.ops._rows import RowStats, Transform, join_stats
from rlhf_fast.types import LossGrad


class Agreement(NamedTuple):
    """What every rank tells the others before the first product; all but `accepted` and `rows` must be equal."""

    accepted: int = 0  # 0: this rank's arguments were bad, and it has raised
    rows: int = 0  # of its shard
    tokens: int = 0
    hidden_size: int = 0
    dtype: int = 0
    bias: int = 0
    targets: int = 0  # a checksum
    options: int = 0  # a checksum
    gradients: int = 0  # which ones autograd will ask for

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: object, gradients: int):
        """This rank's line. hidden (N, D), target (N,); the options go in by their repr."""
        mix = torch.arange(target.shape[0], device=target.device).mul_(2).add_(1)
        return cls(
            1,
            weight.shape[0],
            *hidden.shape,
            _checks.FLOAT_DTYPES.index(hidden.dtype),
            int(bias is not None),
            int(mix.mul_(target).sum()),
            zlib.crc32(repr(options).encode()),
            gradients,
        )


SAME = {
    "tokens": "target must hold the same number of tokens",
    "hidden_size": "hidden must have the same D",
    "dtype": "hidden and weight_shard must have the same dtype",
    "bias": "bias must be given, or be None,",
    "targets": "target must hold the same (global) ids",
    "options": "scalars, chunk sizes and segments must be the same",
    "gradients": "gradients must be wanted of the same tensors",
}
"""Fields of `Agreement` that must not differ, and how an error begins."""


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return dist.distributed_c10d._resolve_process_group(group_name)


def lora_options(lora: Lora | None) -> tuple[int, float] | None:
    """What the ranks must agree about: rank and scaling."""
    return lora and (lora.a.shape[0], lora.scaling)


def as_group(group: object) -> dist.ProcessGroup:
    """A process group, or the one behind a dimension of a device mesh; raise unless this rank belongs to it."""
    available = dist.is_available()
    if available and not isinstance(group, dist.ProcessGroup) and isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(f"group must be one dimension of a mesh, such as mesh[{names[-1]!r}], got {names}")
        group = group.get_group()
    if not available or not isinstance(group, dist.ProcessGroup):
        kinds = "a torch.distributed.ProcessGroup or a dimension of a DeviceMesh"
        raise TypeError(f"group must be {kinds}, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"group must contain this rank, got ranks {dist.get_process_group_ranks(group)}")
    return group


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(W, *x.shape): x of every rank."""
    out = x.new_empty((group.size(), *x.shape))
    dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out


def exchange(group: dist.ProcessGroup, mine: Agreement, near: object) -> list[Agreement]:
    """Every rank's line, one small collective: over the CPU where the group has one, so that no GPU is waited for,
    otherwise on the GPU of `near`, which may be none when an argument was bad."""
    if any(device.type == "cpu" for device in group._device_types):
        device = torch.device("cpu")
    elif isinstance(near, Tensor) and near.is_cuda:
        device = near.device
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    lines = gather(torch.tensor(mine, dtype=torch.int64, device=device), group)
    return [Agreement(*line) for line in lines.tolist()]


class Joined:
    """Around the checks of a call over `group` (None: of any call): an error raised on this rank reaches the others.
    `near`: a tensor on the call's device."""

    def __init__(self, group: dist.ProcessGroup | None, near: object):
        self.group, self.near = group, near

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.group is not None and not torch.compiler.is_compiling():
            exchange(self.group, Agreement(), self.near)


class Shards:
    """How the vocabulary lies over the ranks of a group: rank r holds sizes[r] rows, in the order of the ranks."""

    def __init__(self, group_name: str, sizes: list[int]):
        self.group = resolve(group_name)
        self.sizes = sizes
        self.rank = dist.get_rank(self.group)
        self.first = sum(sizes[: self.rank])
        self.vocab, self.widest = sum(sizes), max(sizes)

    @classmethod
    def agreed(cls, group_name: str, mine: Agreement, near: Tensor) -> Shards:
        """Exchange sizes; raise on every rank if the ranks were given different things."""
        lines = exchange(resolve(group_name), mine, near)
        bad = [rank for rank, line in enumerate(lines) if not line.accepted]
        if bad:
            raise ValueError(f"rank {bad[0]} of the group got bad arguments; the error it raised says which")
        for field, rule in SAME.items():
            values = [getattr(line, field) for line in lines]
            rank = next((r for r, value in enumerate(values) if value != values[0]), None)
            if rank is not None:
                sizes = f": {values[0]} and {values[rank]}" if field in ("tokens", "hidden_size") else ""
                raise ValueError(f"{rule} on every rank of the group, but ranks 0 and {rank} differ{sizes}")
        sizes = [line.rows for line in lines]
        if sum(sizes) == 0:
            raise ValueError("weight_shard must have rows on some rank of the group, got (0, D) on all of them")
        return cls(group_name, sizes)

    def local(self, target: Tensor) -> Tensor:
        """The targets' rows in this shard, -1 where they lie in another."""
        here = (target >= self.first) & (target < self.first + self.sizes[self.rank])
        return torch.where(here, target - self.first, -1)

    def combine(self, local: Tensor, target: Tensor, *, entropy: bool) -> RowStats:
        """Statistics of whole rows from (3 or 4, n): the shard's logprob, m, L and entropy; target (n,) global."""
        if len(self.sizes) == 1:
            return RowStats(*local[:3], local[3] if entropy else None)
        return join_stats(gather(local, self.group), target, list(accumulate(self.sizes)), entropy=entropy)

    def from_first(self, *vectors: Tensor | None) -> list[Tensor | None]:
        """The first rank's copy of vectors of one dtype, in one collective; None stays None.

        Gradients that are equal but for their last bits may be zero on one rank alone.
        """
        given = [v for v in vectors if v is not None]
        if len(self.sizes) == 1 or not given:
            return list(vectors)
        packed = torch.cat([v.reshape(-1) for v in given])
        dist.broadcast(packed, group_src=0, group=self.group)
        parts = iter(packed.split([v.numel() for v in given]))
        return [None if v is None else next(parts).view(v.shape) for v in vectors]

    def agree(self, grad: LossGrad) -> LossGrad:
        """The first rank's loss and gradient; metrics stay."""
        dtype = grad.dlogprob.dtype
        loss, *rest = self.from_first(grad.loss.detach().to(dtype), grad.dlogprob, grad.dentropy)
        return LossGrad(loss, *rest, grad.metrics)


class ShardedHead(Head):
    """The products of one shard. `stats` takes global targets and gives statistics of whole rows; the gradients of the
    hidden states and of lora's a are complete on every rank, those of weight, bias and lora's b are the shard's."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tf: Transform,
        rows: int,
        want: Wanted,
        shards: Shards,
        lora: Lora | None = None,
    ):
        super().__init__(hidden, weight, bias, tf, rows, want, lora)
        self.shards = shards
        self.want_hidden, self.want = want.hidden, want._replace(hidden=False)  # this class sees to the first

    def local_stats(self, z: Tensor, target: Tensor, *, entropy: bool) -> Tensor:
        """(3 or 4, n): logprob, m, L and entropy within the shard."""
        stats = super().stats(z, self.shards.local(target).clamp(min=0), entropy=entropy)
        return torch.stack([s for s in stats if s is not None])

    def stats(self, z: Tensor, target: Tensor, *, entropy: bool) -> RowStats:
        """Statistics of whole rows. One collective."""
        return self.shards.combine(self.local_stats(z, target, entropy=entropy), target, entropy=entropy)

    def backward(self, z: Tensor, h: Tensor, rows: Tensor | slice, target: Tensor, stats: RowStats, *grads) -> None:
        """As `Head.backward`, with global targets. One collective, or none where every gradient is zero."""
        super().backward(z, h, rows, self.shards.local(target), stats, *grads)

    def products(self, dz: Tensor, h: Tensor, rows: Tensor | slice, order: Tensor | None, scale: Tensor | None) -> None:
        if not self.want_hidden:
            self._own_products(dz, h, rows, order, scale)
            return
        dh = self._share_of_hidden(dz)
        total = dist.all_reduce(dh, group=self.shards.group, async_op=True)
        self._own_products(dz, h, rows, order, scale)  # while the sum travels
        total.wait()
        if scale is not None:
            dh /= scale
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=dz.device)
        self.dhidden.index_copy_(0, rows if order is None else rows[order], dh.to(self.dhidden.dtype))

    def _own_products(self, *args) -> None:
        """Gradients that stay on this rank."""
        super().products(*args)

    def _share_of_hidden(self, dz: Tensor) -> Tensor:
        """This shard's part of the hidden states' gradient, in fp32: it is summed before it is rounded. (On the CPU
        oneDNN has rounded a bf16 product already.)"""
        dh = self._mm(dz, self.weight, self.wide).to(self.acc)
        if self.lora is not None:
            self._add_mm(dh, self._through(dz), self.lora.a)
        return dh

    def lora_grads(self) -> tuple[Tensor, Tensor]:
        """One collective where the gradient of a is wanted."""
        if self.want.lora_a:
            dist.all_reduce(self.dlora_a, group=self.shards.group)
        return self.dlora_a, self.dlora_b


class EmptyShard(ShardedHead):
    """A shard without rows: no product, and a part in every collective."""

    def logits(self, h: Tensor) -> Tensor:
        self.rows_forward += h.shape[0]
        return self.tile[: h.shape[0]]

    def local_stats(self, z: Tensor, target: Tensor, *, entropy: bool) -> Tensor:
        local = z.new_zeros((3 + entropy, z.shape[0]), dtype=self.acc)
        local[1] = -torch.inf  # no mass
        return local

    def narrow(self, z: Tensor) -> Tensor:
        return z.new_empty(z.shape, dtype=self.work)

    def _own_products(self, *args) -> None:
        pass

    def _share_of_hidden(self, dz: Tensor) -> Tensor:
        return dz.new_zeros((dz.shape[0], self.weight.shape[1]), dtype=self.acc)


def sharded_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tf: Transform,
    rows: int,
    want: Wanted,
    shards: Shards,
    lora: Lora | None = None,
) -> ShardedHead:
    """The products of this rank's shard."""
    kind = ShardedHead if weight.shape[0] else EmptyShard
    return kind(hidden, weight, bias, tf, rows, want, shards, lora)

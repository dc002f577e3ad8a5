"""The products with the LM head, tile by tile: what `linear_logprob` and `fused_linear_loss` share.

A tile holds the raw logits of some rows. It is made by one product, read once for its statistics, turned into its own
gradient in place, and consumed by two more products. One buffer serves all tiles of a call.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._memory import empty, huge
from rlhf_fast.ops._rows import RowStats, Transform, row_dlogits, row_stats, stat_dtype

BUDGET = {"cpu": 128 << 20, "cuda": 896 << 20}
"""Bytes of one tile of logits, by device type, when the caller does not choose. On the CPU products slow down below
some 500 rows (8% at 256, 25% at 128), whatever the cache holds. On a GPU the tile, the fp32 gradient of a head of
(151936, 896) and cuBLAS's workspaces stay below 1.5 GiB (docs/kernels.md)."""

ROW_MULTIPLE = 64
ADD_ROWS = 1024


def work_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the products' inputs: the caller's, but on the CPU fp32 for fp16, which has no units there, and for
    bf16 where the processor has none: torch's own loops then take 10 to 200 times as long."""
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not bf16_products())):
        return torch.float32
    return dtype


@cache
def bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and (supported is None or bool(supported()))


def tile_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a product leaves its logits: fp32 on CUDA; oneDNN hands bf16 back for bf16."""
    return stat_dtype(dtype) if device.type == "cuda" else work_dtype(dtype, device)


def hidden_grad_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the hidden states' gradient is kept: theirs, or fp32 where the products run in fp32; for fp16
    too, whose range would not hold it before loss scaling."""
    return torch.float32 if dtype == torch.float16 else work_dtype(dtype, device)


def weight_grad_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the weight gradient is handed over: fp32, the accumulator's; on the CPU bf16 for bf16."""
    return dtype if device.type == "cpu" and dtype == torch.bfloat16 else stat_dtype(dtype)


def tile_stride(vocab: int, device: torch.device) -> int:
    """Elements from one row of a tile to the next: on CUDA a multiple of 16, so that every row starts aligned and a
    ragged vocabulary costs neither the products nor the row passes their wide loads."""
    return -(-vocab // 16) * 16 if device.type == "cuda" else vocab


def tile_rows(
    n: int, vocab: int, dtype: torch.dtype, device: torch.device, chunk_size: int | None, budget: int | None
) -> int:
    """Rows of a tile: `chunk_size`, or what fits in `budget` bytes, spread evenly over the tiles."""
    if chunk_size is not None:
        return max(1, min(chunk_size, n))
    itemsize = tile_dtype(dtype, device).itemsize
    if budget is None:
        budget = BUDGET.get(device.type, BUDGET["cuda"])
        if work_dtype(dtype, device).itemsize > dtype.itemsize:
            budget //= 2  # a widened copy of the head lies beside the tile
    rows = max(1, budget // (vocab * itemsize))
    if rows >= n:
        return max(1, n)
    if rows > ROW_MULTIPLE:
        rows -= rows % ROW_MULTIPLE
        tiles = math.ceil(n / rows)
        rows = min(rows, math.ceil(math.ceil(n / tiles) / ROW_MULTIPLE) * ROW_MULTIPLE)
    return rows


class Wanted(NamedTuple):
    """Which gradients the caller needs. None of them: one product, no second pass."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool = False
    lora_b: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias or self.lora_a or self.lora_b


def wanted(*tensors: Tensor | None) -> Wanted:
    """The gradients of hidden, weight, bias, lora_a, lora_b that autograd will ask for, now."""
    on = torch.is_grad_enabled()
    return Wanted(*(on and t is not None and t.requires_grad for t in tensors))


class Grads(NamedTuple):
    """Accumulated gradients; a tensor of no elements where none is wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Lora(NamedTuple):
    """A low-rank addition to the head: W + scaling * b @ a, which is never formed."""

    a: Tensor  # (r, D)
    b: Tensor  # (V, r)
    scaling: float = 1.0


class Head:
    """One call's products: the head, its tile buffer, and the gradients that build up.

    hidden (N, D), weight (V, D), bias (V,) or None. Gradients: hidden in its own dtype (fp32 for fp16, whose range
    would not hold them before loss scaling), weight and bias in fp32 (fp64 for fp64), weight in bf16 for bf16 on the
    CPU. Sums over tiles are in fp32 everywhere. With `lora` each product with W is joined by one of rank r.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tf: Transform,
        rows: int,
        want: Wanted,
        lora: Lora | None = None,
    ):
        self.tf, self.want = tf, want
        self.work = work_dtype(hidden.dtype, hidden.device)
        self.wide = tile_dtype(hidden.dtype, hidden.device)
        self.acc = stat_dtype(weight.dtype)
        self.given = weight
        self.bias = None if bias is None else bias.to(self.acc).contiguous()
        self.rescale = self.work == torch.float16
        v = weight.shape[0]
        self.tile = empty((rows, tile_stride(v, hidden.device)), self.wide, hidden.device)[:, :v]
        hidden_dtype = hidden_grad_dtype(hidden.dtype, hidden.device)
        self.dhidden = huge(hidden.new_empty(hidden.shape if want.hidden else (0,), dtype=hidden_dtype)).zero_()
        self.dweight: Tensor | None = None  # made by the first tile: a product costs less than zeros and a sum
        self.dbias = weight.new_zeros(v if want.bias else 0, dtype=self.acc)
        self.lora = lora and Lora(lora.a.to(self.work), lora.b.to(self.work), lora.scaling)
        self.dlora_a = weight.new_zeros(lora.a.shape if want.lora_a else (0,), dtype=self.acc)
        self.dlora_b = weight.new_zeros(lora.b.shape if want.lora_b else (0,), dtype=self.acc)
        self.rows_forward = 0
        self.rows_backward = 0

    @cached_property
    def weight(self) -> Tensor:
        """The head in the products' dtype."""
        return self.given.to(self.work)

    def grads(self) -> Grads:
        """The gradients of all tiles so far."""
        if not self.want.weight:
            return Grads(self.dhidden, self.given.new_empty(0), self.dbias)
        shape, device = self.given.shape, self.given.device
        dtype = weight_grad_dtype(self.given.dtype, device)
        if self.dweight is None:
            return Grads(self.dhidden, empty(shape, dtype, device).zero_(), self.dbias)
        dweight = self.dweight
        if dweight.dtype != dtype:
            dweight = empty(shape, dtype, device).copy_(dweight)
        return Grads(self.dhidden, dweight, self.dbias)

    def lora_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of lora's a and b over all tiles; of no elements where not wanted."""
        return self.dlora_a, self.dlora_b

    def logits(self, h: Tensor) -> Tensor:
        """Raw logits (n, V) of h (n, D), in the tile buffer. First product."""
        self.rows_forward += h.shape[0]
        h = h.to(self.work)
        z = self._mm(h, self.weight.t(), self.wide, out=self.tile[: h.shape[0]])
        if self.lora is not None:
            self._add_mm(z, self._low_rank(h), self.lora.b.t())
        return z

    def start(self, place: Tensor | slice, order: Tensor | None, dhidden: Tensor | None, *sums: Tensor | None) -> None:
        """Begin with gradients that are there already: of the rows place[order], and of weight and bias."""
        self.dweight, dbias = sums
        if dbias is not None:
            self.dbias.copy_(dbias)
        if dhidden is not None and order is None and isinstance(place, slice):
            self.dhidden[place] = dhidden
        elif dhidden is not None:
            rows = torch.arange(place.start, place.stop) if isinstance(place, slice) else place
            self.dhidden.index_copy_(0, rows if order is None else rows[order], dhidden.to(self.dhidden.dtype))

    def _low_rank(self, h: Tensor) -> Tensor:
        """scaling * h @ a.T, (n, r)."""
        return torch.mm(h, self.lora.a.t()).mul_(self.lora.scaling)

    def _add_mm(self, total: Tensor, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
        """total += left @ right / scale, summed in the dtype of `total` without a copy where this torch can."""
        if scale is None and total.dtype == left.dtype:
            total.addmm_(left, right)
        elif scale is None and left.is_cuda and addmm_accumulates(left.device, left.dtype):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            widens = self.wide != self.work  # the CPU has no product with a wider result
            product = self._mm(left, right, total.dtype if widens else left.dtype)
            total.add_(product if scale is None else product / scale)

    def _mm(self, left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """left @ right with the accumulator handed back in `dtype` where the inputs are narrower (CUDA)."""
        if dtype == left.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=dtype, out=out)

    def stats(self, z: Tensor, target: Tensor, *, entropy: bool) -> RowStats:
        """Statistics of the tile's rows."""
        return row_stats(z, target, self.bias, self.tf, entropy=entropy)

    def backward(
        self,
        z: Tensor,  # (n, V), overwritten
        h: Tensor,  # (n, D)
        rows: Tensor | slice,  # where these rows stand in hidden
        target: Tensor,  # (n,)
        stats: RowStats,
        dlogprob: Tensor,  # (n,)
        dentropy: Tensor | None,  # (n,)
        dlse: Tensor | None = None,  # (n,)
    ) -> None:
        """Second and third product over the rows whose gradient is not exactly zero."""
        live, a, b = row_weights(stats, dlogprob, dentropy, dlse)
        order, kept = compaction(live)
        if kept == 0:
            return
        self.rows_backward += kept
        scale = None
        if self.rescale:  # gradients of a mean over many tokens lie below fp16's range
            scale = power_of_two(dlogprob, dentropy, dlse)
            dlogprob, a, b = dlogprob * scale, a * scale, None if b is None else b * scale
        dz = self.narrow(z)[:kept]
        row_dlogits(z, dz, order, target, self.bias, self.tf, stats, dlogprob, a, b)
        self.products(dz, h if order is None else h[order], rows, order, scale)

    def narrow(self, z: Tensor) -> Tensor:
        """The tile's rows in the products' dtype, in the same bytes."""
        return z if z.dtype == self.work else z.view(self.work)[:, : z.shape[1]]

    def products(self, dz: Tensor, h: Tensor, rows: Tensor | slice, order: Tensor | None, scale: Tensor | None) -> None:
        h = h.to(self.work)
        through = None
        if self.lora is not None and (self.want.hidden or self.want.lora_a):
            through = self._through(dz)
        if self.want.hidden:
            self._add_hidden(dz, through, rows, order, scale)
        if self.want.weight:
            self._add_weight(dz, h, scale)
        if self.want.bias:
            db = dz.sum(0, dtype=self.acc)
            self.dbias.add_(db if scale is None else db / scale)
        if self.want.lora_a:
            self._add_mm(self.dlora_a, through.t(), h, scale)
        if self.want.lora_b:
            self._add_mm(self.dlora_b, dz.t(), self._low_rank(h), scale)

    def _through(self, dz: Tensor) -> Tensor:
        """scaling * dz @ b, (k, r): what reaches a, and through it the hidden states."""
        return torch.mm(dz, self.lora.b).mul_(self.lora.scaling)

    def _add_hidden(
        self, dz: Tensor, through: Tensor | None, rows: Tensor | slice, order: Tensor | None, scale: Tensor | None
    ) -> None:
        dst = self.dhidden
        in_place = order is None and isinstance(rows, slice) and scale is None
        dh = self._mm(dz, self.weight, dst.dtype, out=dst[rows] if in_place else None)
        if through is not None:
            self._add_mm(dh, through, self.lora.a)
        if in_place:
            return
        if scale is not None:
            dh /= scale
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=dz.device)
        dst.index_copy_(0, rows if order is None else rows[order], dh)

    def _add_weight(self, dz: Tensor, h: Tensor, scale: Tensor | None) -> None:
        dw = self.dweight
        if self.wide == self.acc:
            if dw is None:
                self.dweight = dw = empty(self.weight.shape, self.acc, dz.device)
                self._mm(dz.t(), h, self.acc, out=dw)
                if scale is not None:
                    dw.div_(scale)
            else:
                self._add_mm(dw, dz.t(), h, scale)
            return
        # bf16 on the CPU: oneDNN sums a product in fp32 but hands it back rounded; the sum over tiles stays in fp32
        product = torch.mm(dz.t(), h, out=empty(self.weight.shape, dz.dtype, dz.device))
        if dw is None:
            self.dweight = product
            return
        if dw.dtype != self.acc:
            self.dweight = empty(dw.shape, self.acc, dw.device).copy_(dw)
        add_narrow(self.dweight, product)


def row_weights(
    stats: RowStats, dlogprob: Tensor, dentropy: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(whether a row has a gradient, a, b), each (n,): what upstream gradients (n,) come to in `row_dlogits`.

    d s_j = dlogprob [j == target] + p_j (dlse - dlogprob - dentropy (log p_j + H))
    """
    live = dlogprob != 0
    a, b = -dlogprob, None
    if dlse is not None:
        live, a = live | (dlse != 0), a + dlse
    if dentropy is not None:
        live, a, b = live | (dentropy != 0), a - dentropy * stats.entropy, -dentropy
    return live, a, b


def add_narrow(total: Tensor, narrow: Tensor) -> None:
    """total += narrow, both (V, D) on the CPU, a few rows at a time: torch's own mixed sum first widens the whole of
    `narrow` into fresh memory and takes seven times as long."""
    wide = torch.empty((min(ADD_ROWS, total.shape[0]), total.shape[1]), dtype=total.dtype)
    for start in range(0, total.shape[0], ADD_ROWS):
        part = total[start : start + ADD_ROWS]
        part.add_(wide[: part.shape[0]].copy_(narrow[start : start + ADD_ROWS]))


@cache
def addmm_accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of narrow inputs to an fp32 matrix in place, and rightly; the first releases
    with `out_dtype` want the matrix narrow too, and then the sum costs a pass of its own. One host sync, once."""
    a, sum_ = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(sum_, a, a, out_dtype=torch.float32, out=sum_)
    except RuntimeError:
        return False
    return bool((sum_ == 17).all())


def compaction(live: Tensor) -> tuple[Tensor | None, int]:
    """How to bring the live rows to the front of a tile while every row moves at most once.

    Live rows among the first K stay; the holes there take the live rows from behind. No destination is ever another
    row's source, so all rows may move at the same time. Returns (order (K,) or None when all are live, K). One host
    sync: the rest is arithmetic of fixed size.
    """
    n = live.shape[0]
    kept = int(live.sum())
    if kept in (0, n):
        return None, kept
    place = torch.arange(kept, device=live.device)
    behind = live[kept:]  # hole i takes the i-th of these: the entry past the end takes what is no row
    source = place.new_zeros(n - kept + 1)
    rank = torch.where(behind, behind.cumsum(0) - 1, n - kept)
    source.scatter_(0, rank, torch.arange(kept, n, device=live.device))
    hole = (~live[:kept]).cumsum(0) - 1
    return torch.where(live[:kept], place, source[hole.clamp(min=0, max=n - kept)]), kept


def power_of_two(*grads: Tensor | None) -> Tensor:
    """The power of two () that lifts the largest entry of the given gradients to [2^12, 2^13), so that the softmax's
    tails stay above fp16's smallest number. 1 if all of them are zero."""
    top = torch.stack([g.abs().amax() for g in grads if g is not None]).amax()
    exponent = torch.where((top > 0) & top.isfinite(), 12 - torch.floor(torch.log2(top)), torch.zeros_like(top))
    return torch.exp2(exponent.clamp(-120, 120))

"""Row passes over a tile of raw logits (n, V): statistics, and the gradient, in place if wanted.

    x = (z + bias) * scale;   y = softcap * tanh(x / softcap);   s = y * inv_temperature
    m = max_j s_j;   L = log sum_j exp(s_j - m);   logprob = (s_target - m) - L
    entropy = L - sum_j exp(s_j - m) (s_j - m) / exp(L)
    dz_j = ds_j/dz_j * (d_target [j == target] + p_j (a + b log p_j)),   p_j = exp((s_j - m) - L)

The same as `reference.logprob_from_logits` and its derivative.

Bytes per row, which is what these passes cost (z of `i` bytes, gradient of `o` bytes per element):
    row_stats      reads i V                 fp32: 4V          bf16: 2V
    row_dlogits    reads i V, writes o V     fp32 -> bf16: 6V  fp32 -> fp32: 8V   bf16 -> bf16: 4V
    both           fp32 tile, bf16 gradient: 10V; bf16 tile: 6V. One pass over both does not exist: every
                   gradient needs L of its whole row. A row of 151936 fp32 logits is 608 KB, more than the
                   shared memory of a multiprocessor, so the second read comes from DRAM unless the rows in
                   flight fit the L2 (50 MB on H100: 80 such rows); a program that reads its row twice
                   would save at most 4 of the 10 bytes, for the case of a loss known inside the kernel.

Access. A row is cut into segments by V alone (not by n: a row's bits do not depend on how many rows there are),
a program takes a segment, and segments of one row are combined in a fixed order by a second, tiny launch. So
512 rows of 151936 make 2560 programs, enough to fill the multiprocessors and to even out the last wave.
A program of 8 warps keeps 64 bytes per thread in flight (4 loads of 16 bytes, fp32 or bf16); 4 programs per
multiprocessor are 64 KB, twice what latency * bandwidth asks of an H200. Lanes keep their own running maximum
and sums: no barrier and no shuffle inside the loop, 1.25 exponentials per element.
Loads are 16 bytes wide when the row stride is a multiple of 16 elements and the tensor starts on 16 bytes: pad
the stride of a tile whose V is ragged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import EXACT, LOG_FLOOR, LOWEST, ceil_div, next_pow2, tanh_sech2

WARPS = 8
ROWS_PER_BLOCK = 4  # rows of the (rows, lanes) view of a block; each thread holds all rows of its lanes
STATS_SEGMENT = 32768  # elements of a row per program, at most
DLOGITS_BLOCK = 4096
DLOGITS_SEGMENT = 16384
COMBINE_ROWS = 64

_HAS = {
    "HAS_BIAS": lambda args: args["bias_ptr"] is not None,
    "HAS_SOFTCAP": lambda args: args["post"] is not None,
    "HAS_TARGET": lambda args: args["target_ptr"] is not None,
}
_HAS_STATS = {
    **_HAS,
    "HAS_LOGPROB": lambda args: args["logprob_ptr"] is not None and args["target_ptr"] is not None,
    "HAS_ENTROPY": lambda args: args["entropy_ptr"] is not None,
}


@triton.jit
def _squash(b_z, bias_ptr, o_v, m_v, pre, post, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """s and ds/dz of the raw logits of columns o_v; `pre` and `post` as `_folded` makes them."""
    b_z = b_z.to(tl.float32)
    if HAS_BIAS:
        b_z = b_z + tl.load(bias_ptr + o_v, mask=m_v)
    b_u = b_z * pre
    if HAS_SOFTCAP:
        b_tanh, b_sech2 = tanh_sech2(b_u)
        return b_tanh * post, b_sech2 * (pre * post)
    else:
        return b_u, pre


@triton.jit
def _load_block(p_row, bias_ptr, o_v, m_v, pre, post, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """s and ds/dz at columns o_v; whatever stands where `m_v` is false is the caller's to discard."""
    b_z = tl.load(p_row + o_v, mask=m_v)
    return _squash(b_z, bias_ptr, o_v, m_v, pre, post, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def _target_logit(p_row, bias_ptr, b_target, m_ok, pre, post, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """s at the target; NaN where `m_ok` is false (never an access out of bounds)."""
    b_s, _ = _load_block(p_row, bias_ptr, b_target, m_ok, pre, post, HAS_BIAS, HAS_SOFTCAP)
    return tl.where(m_ok, b_s, float("nan"))


@triton.jit
def _accumulate(b_s, b_max, b_sum, b_dot, HAS_ENTROPY: tl.constexpr):
    """Add a block (rows, lanes) to the lanes' running max, sum exp(s - max), sum exp(s - max) (s - max)."""
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    b_shift = b_max - b_new
    b_alpha = tl.exp(b_shift)
    b_d = b_s - b_new[None, :]
    b_p = tl.exp(b_d)
    if HAS_ENTROPY:
        # The old maximum's shift enters every old term: sum p (s - new) = alpha (dot + sum shift).
        b_moved = b_alpha * (b_dot + b_sum * tl.maximum(b_shift, LOG_FLOOR))
        b_dot = b_moved + tl.sum(b_p * tl.maximum(b_d, LOG_FLOOR), 0)
    return b_new, b_sum * b_alpha + tl.sum(b_p, 0), b_dot


@triton.jit
def _finish(b_max, b_sum, b_dot):
    """row_max, log_sum, entropy. A row of -inf alone: -inf, 0, NaN (so lse = -inf, logprob = NaN, as torch)."""
    m_empty = b_sum == 0.0
    b_safe = tl.where(m_empty, 1.0, b_sum)
    b_log = tl.log(b_safe)
    b_entropy = tl.where(m_empty, float("nan"), b_log - b_dot / b_safe)
    return tl.where(m_empty, -float("inf"), b_max), b_log, b_entropy


@triton.heuristics(_HAS_STATS)
@triton.jit(do_not_specialize=["n"])
def row_stats_kernel(
    z_ptr,  # (n, V), row stride z_stride
    target_ptr,  # (n,) or None
    bias_ptr,  # (V,) fp32 or None
    logprob_ptr,
    max_ptr,
    logsum_ptr,
    entropy_ptr,
    part_ptr,  # (3, n, SEGMENTS) fp32 when SEGMENTS > 1: max, sum, dot of each segment
    n,
    v,
    z_stride,
    segment,  # elements per segment, a multiple of the block
    pre,
    post,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    i_n = i_p // SEGMENTS
    i_seg = (i_p % SEGMENTS).to(tl.int32)
    b_target = i_n
    if HAS_TARGET:
        b_target = tl.load(target_ptr + i_n).to(tl.int64)
        if b_target < 0:  # an ignored row is not read
            if SEGMENTS == 1:
                if HAS_LOGPROB:
                    tl.store(logprob_ptr + i_n, 0.0)
                tl.store(max_ptr + i_n, 0.0)
                tl.store(logsum_ptr + i_n, 0.0)
                if HAS_ENTROPY:
                    tl.store(entropy_ptr + i_n, 0.0)
            return

    BLOCK: tl.constexpr = ROWS * LANES
    lo = i_seg * segment
    hi = tl.minimum(lo + segment, v)
    whole = lo + (hi - lo) // BLOCK * BLOCK  # blocks below need no mask, hence no predicate per element
    p_row = z_ptr + i_n * z_stride
    o_block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    b_max = tl.full([LANES], LOWEST, tl.float32)
    b_sum = tl.zeros([LANES], tl.float32)
    b_dot = tl.zeros([LANES], tl.float32)
    for o in range(lo, whole, BLOCK):
        b_s, _ = _load_block(p_row, bias_ptr, o + o_block, None, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_max, b_sum, b_dot = _accumulate(b_s, b_max, b_sum, b_dot, HAS_ENTROPY)
    if whole < hi:
        o_v = whole + o_block
        m_v = o_v < hi
        b_s, _ = _load_block(p_row, bias_ptr, o_v, m_v, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_s = tl.where(m_v, b_s, -float("inf"))
        b_max, b_sum, b_dot = _accumulate(b_s, b_max, b_sum, b_dot, HAS_ENTROPY)

    b_all = tl.max(b_max, 0)
    b_shift = b_max - b_all
    b_alpha = tl.exp(b_shift)
    b_dot = tl.sum(b_alpha * (b_dot + b_sum * tl.maximum(b_shift, LOG_FLOOR)), 0)
    b_sum = tl.sum(b_sum * b_alpha, 0)
    if SEGMENTS > 1:
        tl.store(part_ptr + i_p, b_all)
        tl.store(part_ptr + n.to(tl.int64) * SEGMENTS + i_p, b_sum)
        if HAS_ENTROPY:
            tl.store(part_ptr + 2 * n.to(tl.int64) * SEGMENTS + i_p, b_dot)
    else:
        b_m, b_log, b_entropy = _finish(b_all, b_sum, b_dot)
        tl.store(max_ptr + i_n, b_m)
        tl.store(logsum_ptr + i_n, b_log)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + i_n, b_entropy)
        if HAS_LOGPROB:
            b_s = _target_logit(p_row, bias_ptr, b_target, b_target < v, pre, post, HAS_BIAS, HAS_SOFTCAP)
            tl.store(logprob_ptr + i_n, (b_s - b_m) - b_log)


@triton.heuristics(_HAS_STATS)
@triton.jit(do_not_specialize=["n"])
def row_combine_kernel(
    z_ptr,
    target_ptr,
    bias_ptr,
    logprob_ptr,
    max_ptr,
    logsum_ptr,
    entropy_ptr,
    part_ptr,
    n,
    v,
    z_stride,
    pre,
    post,
    SEGMENTS: tl.constexpr,
    PADDED: tl.constexpr,  # SEGMENTS rounded up to a power of two
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    m_read = m_n
    b_target = o_n
    if HAS_TARGET:
        b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1).to(tl.int64)
        m_read = m_n & (b_target >= 0)  # the segments of ignored rows were never written
    o_seg = tl.arange(0, PADDED)[None, :]
    m_part = m_read[:, None] & (o_seg < SEGMENTS)
    p_part = part_ptr + o_n[:, None] * SEGMENTS + o_seg
    stride = n.to(tl.int64) * SEGMENTS
    b_max = tl.load(p_part, mask=m_part, other=LOWEST)
    b_sum = tl.load(p_part + stride, mask=m_part, other=0.0)
    b_all = tl.max(b_max, 1)
    b_shift = b_max - b_all[:, None]
    b_alpha = tl.exp(b_shift)
    b_total = tl.sum(b_sum * b_alpha, 1)
    b_dot = b_total
    if HAS_ENTROPY:
        b_dot = tl.load(p_part + 2 * stride, mask=m_part, other=0.0)
        b_dot = tl.sum(b_alpha * (b_dot + b_sum * tl.maximum(b_shift, LOG_FLOOR)), 1)
    b_m, b_log, b_entropy = _finish(b_all, b_total, b_dot)
    tl.store(max_ptr + o_n, tl.where(m_read, b_m, 0.0), mask=m_n)
    tl.store(logsum_ptr + o_n, tl.where(m_read, b_log, 0.0), mask=m_n)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + o_n, tl.where(m_read, b_entropy, 0.0), mask=m_n)
    if HAS_LOGPROB:
        m_ok = m_read & (b_target < v)
        p_row = z_ptr + o_n * z_stride
        b_s = _target_logit(p_row, bias_ptr, b_target, m_ok, pre, post, HAS_BIAS, HAS_SOFTCAP)
        tl.store(logprob_ptr + o_n, tl.where(m_read, (b_s - b_m) - b_log, 0.0), mask=m_n)


@triton.jit
def _gradient(b_s, b_jac, m_target, row_max, log_sum, d, a, b, HAS_TARGET: tl.constexpr, HAS_B: tl.constexpr):
    b_logp = (b_s - row_max) - log_sum
    b_g = tl.exp(b_logp)
    if HAS_B:
        b_g = b_g * (a + b * tl.maximum(b_logp, LOG_FLOOR))
    else:
        b_g = b_g * a
    if HAS_TARGET:
        b_g = tl.where(m_target, b_g + d, b_g)
    return b_g * b_jac


@triton.heuristics(
    {
        **_HAS,
        "HAS_ORDER": lambda args: args["order_ptr"] is not None,
        "HAS_B": lambda args: args["b_ptr"] is not None,
    }
)
@triton.jit
def row_dlogits_kernel(
    z_ptr,  # (n, V), row stride z_stride
    out_ptr,  # (K, V), row stride out_stride; may share its rows' storage with z
    order_ptr,  # (K,) or None
    target_ptr,  # (n,) or None
    bias_ptr,  # (V,) fp32 or None
    max_ptr,
    logsum_ptr,
    d_ptr,  # (n,): gradient of the target's logit
    a_ptr,  # (n,): factor of p
    b_ptr,  # (n,) or None: factor of p log p
    v,
    z_stride,
    out_stride,
    segment,
    pre,
    post,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_B: tl.constexpr,
):
    """One program per segment of a row. Block i + 1 is on its way while block i is worked on.

    Without that prefetch ptxas saves registers by loading 16 bytes at a time with the arithmetic in between, and
    a quarter of the bytes are in flight.

    In place with narrowing (4-byte z, 2-byte out in the same rows, SEGMENTS = 1) the barriers make it right. With B
    elements per block and both starting at the same byte, block i is read from bytes [4iB, 4iB + 4B) and written
    to [2iB, 2iB + 2B): inside the first half of block 0 for i = 0, inside block i // 2 < i for i > 0. A write never
    touches a block that is still to be loaded, so loading ahead is safe; but it may touch one that *another warp*
    has not loaded yet. Past barrier i all warps have loaded blocks 0..i, and only then is i stored.
    Elements of equal size would need no barrier: an element is loaded and stored by the same program, its store
    depends on its own load, and no two elements share bytes.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_k = i_p // SEGMENTS
    i_seg = (i_p % SEGMENTS).to(tl.int32)
    i_r = i_k
    if HAS_ORDER:
        i_r = tl.load(order_ptr + i_k).to(tl.int64)
    d = tl.load(d_ptr + i_r)
    a = tl.load(a_ptr + i_r)
    row_max = tl.load(max_ptr + i_r)
    log_sum = tl.load(logsum_ptr + i_r)
    nothing = (d == 0.0) & (a == 0.0)
    b = 0.0
    if HAS_B:
        b = tl.load(b_ptr + i_r)
        nothing = nothing & (b == 0.0)
    i_target = i_r * 0 - 1
    if HAS_TARGET:
        i_target = tl.load(target_ptr + i_r).to(tl.int64)
    # int32 column index: an int64 comparison per element would cost two
    i_target = tl.where(i_target < v, i_target, -1).to(tl.int32)

    lo = i_seg * segment
    hi = tl.minimum(lo + segment, v)
    whole = lo + (hi - lo) // BLOCK * BLOCK
    p_row = z_ptr + i_r * z_stride
    p_out = out_ptr + i_k * out_stride
    o_block = tl.arange(0, BLOCK)
    if nothing:  # zeros, and the row is not read
        b_zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        for o in range(lo, whole, BLOCK):
            tl.store(p_out + (o + o_block), b_zero)
        if whole < hi:
            tl.store(p_out + (whole + o_block), b_zero, mask=whole + o_block < hi)
    else:
        # A mask that is the same for all lanes leaves the loads 16 bytes wide.
        b_next = tl.load(p_row + (lo + o_block), mask=tl.full([BLOCK], lo, tl.int32) < whole)
        for o in range(lo, whole, BLOCK):
            b_z = b_next
            o_next = o + BLOCK
            b_next = tl.load(p_row + (o_next + o_block), mask=tl.full([BLOCK], o_next, tl.int32) < whole)
            tl.debug_barrier()
            o_v = o + o_block
            b_s, b_jac = _squash(b_z, bias_ptr, o_v, None, pre, post, HAS_BIAS, HAS_SOFTCAP)
            b_g = _gradient(b_s, b_jac, o_v == i_target, row_max, log_sum, d, a, b, HAS_TARGET, HAS_B)
            tl.store(p_out + o_v, b_g.to(out_ptr.dtype.element_ty))
        if whole < hi:
            o_v = whole + o_block
            m_v = o_v < hi
            b_s, b_jac = _load_block(p_row, bias_ptr, o_v, m_v, pre, post, HAS_BIAS, HAS_SOFTCAP)
            tl.debug_barrier()
            b_g = _gradient(b_s, b_jac, o_v == i_target, row_max, log_sum, d, a, b, HAS_TARGET, HAS_B)
            tl.store(p_out + o_v, b_g.to(out_ptr.dtype.element_ty), mask=m_v)


def _folded(scale: float, softcap: float | None, inv_temperature: float) -> tuple[float, float | None]:
    """(pre, post): s = z pre, or s = post tanh(z pre) under a softcap. Folded in double, rounded once."""
    if softcap is None:
        return scale * inv_temperature, None
    return scale / softcap, softcap * inv_temperature


def split_row(v: int, longest: int, block: int) -> tuple[int, int]:
    """(count, elements per segment): equal segments of whole blocks, none longer than `longest`."""
    count = ceil_div(v, longest)
    size = ceil_div(ceil_div(v, count), block) * block
    return ceil_div(v, size), size


def stats_lanes(element_size: int) -> int:
    """Columns of the block's (rows, lanes) view: 16 bytes per thread."""
    return WARPS * 32 * (16 // element_size)


def row_stats(
    logits,  # (n, V) fp32, bf16 or fp16, last dimension contiguous
    target,  # (n,) int64, < 0 = ignored; None: no logprob
    bias,  # (V,) fp32 or None
    *,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    logprob,  # (n,) fp32 or None, as everything below
    row_max,
    log_sum,
    entropy,
) -> None:
    """Write the statistics of each row into the given tensors."""
    n, v = logits.shape
    if n == 0:
        return
    pre, post = _folded(scale, softcap, inv_temperature)
    lanes = stats_lanes(logits.element_size())
    rows = ROWS_PER_BLOCK
    segments, segment = split_row(v, STATS_SEGMENT, rows * lanes)
    part = row_max.new_empty((3, n, segments)) if segments > 1 else None
    tensors = (logits, target, bias, logprob, row_max, log_sum, entropy, part)
    row_stats_kernel[(n * segments,)](
        *tensors,
        n=n,
        v=v,
        z_stride=logits.stride(0),
        segment=segment,
        pre=pre,
        post=post,
        SEGMENTS=segments,
        ROWS=rows,
        LANES=lanes,
        num_warps=WARPS,
        **EXACT,
    )
    if segments > 1:
        row_combine_kernel[(ceil_div(n, COMBINE_ROWS),)](
            *tensors,
            n=n,
            v=v,
            z_stride=logits.stride(0),
            pre=pre,
            post=post,
            SEGMENTS=segments,
            PADDED=next_pow2(segments),
            BLOCK_N=COMBINE_ROWS,
            num_warps=4,
            **EXACT,
        )


def dlogits_split(logits, out) -> tuple[int, int]:
    """`split_row` for the gradient. Narrowing in place keeps a row in one program, which reads before it writes."""
    shared = out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    narrow = shared and out.element_size() < logits.element_size()
    v = out.shape[1]
    return split_row(v, v if narrow else DLOGITS_SEGMENT, DLOGITS_BLOCK)


def row_dlogits(
    logits,  # (n, V)
    out,  # (K, V) fp32, bf16 or fp16: its own storage, or logits' rows from their first byte on
    order,  # (K,) int64: row k of out is the gradient of row order[k]; None: of row k
    target,  # (n,) int64 or None
    bias,  # (V,) fp32 or None
    *,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    row_max,  # (n,) fp32, from row_stats
    log_sum,
    d_target,  # (n,) fp32
    a,  # (n,) fp32
    b,  # (n,) fp32 or None
) -> None:
    """Write jac_j (d_target [j == target] + p_j (a + b log p_j)) into `out`."""
    k, v = out.shape
    if k == 0:
        return
    pre, post = _folded(scale, softcap, inv_temperature)
    segments, segment = dlogits_split(logits, out)
    row_dlogits_kernel[(k * segments,)](
        logits,
        out,
        order,
        target,
        bias,
        row_max,
        log_sum,
        d_target,
        a,
        b,
        v=v,
        z_stride=logits.stride(0),
        out_stride=out.stride(0),
        segment=segment,
        pre=pre,
        post=post,
        SEGMENTS=segments,
        BLOCK=DLOGITS_BLOCK,
        num_warps=WARPS,
        **EXACT,
    )

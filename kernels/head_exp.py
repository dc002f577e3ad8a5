"""Exponentials of a tile's logits, written by the product's own epilogue: a tile that needs no pass to be a gradient.

    s = pre (hidden @ weight.T + bias);   E = exp(s - c),  c (n,) given;   sums of E over blocks of columns, in fp32

E is rounded to its own dtype, the sums and s at the target are not. bf16 has fp32's range, so that any c within 80 of
the row's maximum serves. What E is for: docs/kernels.md, "The gradient by epilogue". The product is that of
`head_stats`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import EXACT, ceil_div
from .head_stats import GROUP_BYTES, Config, _halves, _place


@triton.jit
def _columns(b_z, lo, v, b_column, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS: tl.constexpr):
    """Store E of the columns from `lo` on; its sum, and s at b_column (0 where that lies elsewhere)."""
    o_v = tl.arange(0, b_z.shape[1])
    m_v = lo + o_v < v
    if HAS_BIAS:
        b_z += tl.load(bias_ptr + lo + o_v, mask=m_v, other=0.0)[None, :]
    b_s = b_z * pre
    b_hit = tl.sum(tl.where(o_v[None, :] == b_column[:, None], b_s, 0.0), 1)
    b_e = tl.exp(tl.where(m_v[None, :], b_s, -float("inf")) - b_shift[:, None])
    out.store([i_n * b_z.shape[0], lo], b_e.to(out.dtype))  # what lies past an edge is not stored
    return tl.sum(b_e, 1), b_hit


@triton.jit
def _half(b_z, lo, v, b_column, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS: tl.constexpr):
    W: tl.constexpr = b_z.shape[1] // 2
    b_left, b_right = _halves(b_z)
    b_sum, b_hit = _columns(b_left, lo, v, b_column, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS)
    b_sum2, b_hit2 = _columns(b_right, lo + W, v, b_column - W, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS)
    return b_sum + b_sum2, b_hit + b_hit2


@triton.heuristics({"HAS_BIAS": lambda args: args["bias_ptr"] is not None})
@triton.jit(do_not_specialize=["n", "blocks_n", "blocks_v", "tiles", "programs", "group"])
def head_exp_kernel(
    hidden,  # descriptor of (n, D), blocks (BLOCK_N, BLOCK_D)
    weight,  # descriptor of (V, D), blocks (BLOCK_V, BLOCK_D)
    target_ptr,  # (n,) int64
    bias_ptr,  # (V,) fp32 or None
    shift_ptr,  # (n,) fp32: c
    out,  # descriptor of (n, V), blocks (BLOCK_N, BLOCK_V // 4): E
    part_ptr,  # (blocks_v, n) fp32
    picked_ptr,  # (n,) fp32: s of the target
    n,
    v,
    d,
    blocks_n,
    blocks_v,
    tiles,
    programs,
    group,
    pre,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    W: tl.constexpr = BLOCK_V // 2
    steps = tl.cdiv(d, BLOCK_D)
    for i_tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        i_n, i_v = _place(i_tile, blocks_n, blocks_v, group)
        b_z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for i_d in range(steps):
            b_h = hidden.load([i_n * BLOCK_N, i_d * BLOCK_D])
            b_w = weight.load([i_v * BLOCK_V, i_d * BLOCK_D])
            b_z = tl.dot(b_h, b_w.T, b_z)

        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        lo = i_v * BLOCK_V
        b_column = (tl.load(target_ptr + o_n, mask=m_n, other=-1) - lo).to(tl.int32)
        b_shift = tl.load(shift_ptr + o_n, mask=m_n, other=0.0)
        b_left, b_right = _halves(b_z)
        b_sum, b_hit = _half(b_left, lo, v, b_column, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS)
        b_sum2, b_hit2 = _half(b_right, lo + W, v, b_column - W, b_shift, out, i_n, bias_ptr, pre, HAS_BIAS)
        tl.store(part_ptr + i_v.to(tl.int64) * n + o_n, b_sum + b_sum2, mask=m_n)
        tl.store(picked_ptr + o_n, b_hit + b_hit2, mask=(b_column >= 0) & (b_column < BLOCK_V))


def head_exp(
    hidden,  # (n, D) bf16 or fp16; rows that start on 16 bytes
    weight,  # (V, D), likewise
    target,  # (n,) int64, inside [0, V)
    bias,  # (V,) fp32 or None
    shift,  # (n,) fp32
    *,
    pre: float,
    out,  # (n, V), written; rows that start on 16 bytes
    config: Config,
    programs: int,  # multiprocessors
):
    """Write E into `out`; returns (sum of E, s of the target), each (n,) fp32."""
    (n, d), v = hidden.shape, weight.shape[0]
    blocks_n, blocks_v = ceil_div(n, config.block_n), ceil_div(v, config.block_v)
    part = shift.new_empty((blocks_v, n))
    picked = shift.new_empty(n)
    grid = min(programs, blocks_n * blocks_v)
    head_exp_kernel[(grid,)](
        TensorDescriptor(hidden, [n, d], [hidden.stride(0), 1], [config.block_n, config.block_d]),
        TensorDescriptor(weight, [v, d], [weight.stride(0), 1], [config.block_v, config.block_d]),
        target,
        bias,
        shift,
        TensorDescriptor(out, [n, v], [out.stride(0), 1], [config.block_n, config.block_v // 4]),
        part,
        picked,
        n=n,
        v=v,
        d=d,
        blocks_n=blocks_n,
        blocks_v=blocks_v,
        tiles=blocks_n * blocks_v,
        programs=grid,
        group=max(1, GROUP_BYTES // (config.block_n * d * hidden.element_size())),
        pre=pre,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        num_warps=config.warps,
        num_stages=config.stages,
        **EXACT,
    )
    return part.sum(0), picked

"""Softmax statistics of hidden @ weight.T in the product's own epilogue: no tile of logits is written.

    z = hidden @ weight.T (fp32 accumulators);  s, m, L, logprob, entropy as in row_pass

One program per multiprocessor walks over tiles of (BLOCK_N rows, BLOCK_V columns). Of a tile it leaves, for each row,
the maximum, the sum of exponentials and their first moment, (3, tiles of columns, n) in all; whoever holds a row's
target leaves its logit too. A second, small launch joins the tiles of a row in the order of the columns. So the bits of
a row depend neither on how many rows or multiprocessors there are, nor on who came first.

Order of the tiles. `group` blocks of rows are taken together and swept over the whole vocabulary, rows fastest. A tile
of the head is then read from DRAM once per group and comes from the L2 for the other rows, and the group's hidden
states stay there (GROUP_BYTES, a third of an H100's 50 MB). What that comes to is in docs/kernels.md.

Operands come by TMA, with descriptors made on the host: no workspace, nothing that a CUDA graph could not replay. What
lies past an edge reads as 0. A descriptor wants rows that start on 16 bytes. sm_80 has no TMA, and sm_120 too
little shared memory for these blocks: neither is served.

The epilogue looks at a quarter of the columns at a time: looking at all of them at once, ptxas keeps several values per
element alive beside the 128 accumulators of a thread, and spills. The loop over tiles is flattened, so that the next
tile's first loads are on their way during the epilogue; the epilogue's arithmetic itself is not overlapped.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import EXACT, LOG_FLOOR, LOWEST, ceil_div
from .row_pass import _finish, _folded, _squash

GROUP_BYTES = 16 << 20
COMBINE_ROWS = 32
COMBINE_TILES = 32


class Config(NamedTuple):
    """Shape of a tile and how its product is run; by architecture, never by the number of rows."""

    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int


# By what the assembler says (no spills, shared memory of one program per multiprocessor), not yet by timing.
CONFIGS = {90: Config(128, 256, 64, 8, 4), 100: Config(128, 128, 64, 4, 4)}


def config_for(capability: int) -> Config:
    """That of the newest architecture not newer than `capability` (90 for 9.0), which is 90 or 100 to 109."""
    return CONFIGS[max(sm for sm in CONFIGS if sm <= capability)]


@triton.jit
def _place(i_tile, blocks_n, blocks_v, group):
    """(block of rows, block of columns) of a tile; the last group may be smaller."""
    in_group = group * blocks_v
    i_group = i_tile // in_group
    first = i_group * group
    rows = tl.minimum(blocks_n - first, group)
    rest = i_tile - i_group * in_group
    return first + rest % rows, rest // rows


@triton.jit
def _columns(
    b_z,
    lo,
    b_column,
    bias_ptr,
    v,
    pre,
    post,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Maximum, sum of exponentials, their moment, and s at b_column (0 where that lies elsewhere) of columns lo on."""
    o_v = tl.arange(0, b_z.shape[1])
    m_v = lo + o_v < v
    if HAS_BIAS:
        b_z += tl.load(bias_ptr + lo + o_v, mask=m_v, other=0.0)[None, :]
    b_s, _ = _squash(b_z, None, None, None, pre, post, False, HAS_SOFTCAP)
    b_s = tl.where(m_v[None, :], b_s, -float("inf"))
    b_hit = tl.sum(tl.where(o_v[None, :] == b_column[:, None], b_s, 0.0), 1)
    b_max = tl.maximum(tl.max(b_s, 1), LOWEST)
    b_d = b_s - b_max[:, None]
    b_p = tl.exp(b_d)
    b_sum = tl.sum(b_p, 1)
    b_dot = b_sum
    if HAS_ENTROPY:
        b_dot = tl.sum(b_p * tl.maximum(b_d, LOG_FLOOR), 1)
    return b_max, b_sum, b_dot, b_hit


@triton.jit
def _join(b_max, b_sum, b_dot, b_max2, b_sum2, b_dot2):
    """Of two sets of columns, those of both."""
    b_all = tl.maximum(b_max, b_max2)
    b_shift, b_shift2 = b_max - b_all, b_max2 - b_all
    b_alpha, b_alpha2 = tl.exp(b_shift), tl.exp(b_shift2)
    b_dot = b_alpha * (b_dot + b_sum * tl.maximum(b_shift, LOG_FLOOR))
    b_dot += b_alpha2 * (b_dot2 + b_sum2 * tl.maximum(b_shift2, LOG_FLOOR))
    return b_all, b_alpha * b_sum + b_alpha2 * b_sum2, b_dot


@triton.jit
def _halves(b_z):
    """The left and the right columns; of accumulators, every thread has as many of either."""
    return tl.split(tl.permute(tl.reshape(b_z, (b_z.shape[0], 2, b_z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _half(
    b_z,
    lo,
    b_column,
    bias_ptr,
    v,
    pre,
    post,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    W: tl.constexpr = b_z.shape[1] // 2
    b_left, b_right = _halves(b_z)
    form = (bias_ptr, v, pre, post)
    b_max, b_sum, b_dot, b_hit = _columns(b_left, lo, b_column, *form, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY)
    b_max2, b_sum2, b_dot2, b_hit2 = _columns(b_right, lo + W, b_column - W, *form, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY)
    b_max, b_sum, b_dot = _join(b_max, b_sum, b_dot, b_max2, b_sum2, b_dot2)
    return b_max, b_sum, b_dot, b_hit + b_hit2


@triton.heuristics(
    {
        "HAS_BIAS": lambda args: args["bias_ptr"] is not None,
        "HAS_SOFTCAP": lambda args: args["post"] is not None,
    }
)
@triton.jit(do_not_specialize=["n", "blocks_n", "blocks_v", "tiles", "programs", "group"])
def head_stats_kernel(
    hidden,  # descriptor of (n, D), blocks (BLOCK_N, BLOCK_D)
    weight,  # descriptor of (V, D), blocks (BLOCK_V, BLOCK_D)
    target_ptr,  # (n,) int64
    bias_ptr,  # (V,) fp32 or None
    part_ptr,  # (3, blocks_v, n) fp32: max, sum, dot
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
    post,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
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
        b_left, b_right = _halves(b_z)
        form = (bias_ptr, v, pre, post)
        b_max, b_sum, b_dot, b_hit = _half(b_left, lo, b_column, *form, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY)
        b_max2, b_sum2, b_dot2, b_hit2 = _half(
            b_right, lo + BLOCK_V // 2, b_column - BLOCK_V // 2, *form, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY
        )
        b_max, b_sum, b_dot = _join(b_max, b_sum, b_dot, b_max2, b_sum2, b_dot2)
        p_part = part_ptr + i_v.to(tl.int64) * n + o_n
        plane = blocks_v.to(tl.int64) * n
        tl.store(p_part, b_max, mask=m_n)
        tl.store(p_part + plane, b_sum, mask=m_n)
        if HAS_ENTROPY:
            tl.store(p_part + 2 * plane, b_dot, mask=m_n)
        tl.store(picked_ptr + o_n, b_hit + b_hit2, mask=(b_column >= 0) & (b_column < BLOCK_V))


@triton.heuristics({"HAS_ENTROPY": lambda args: args["entropy_ptr"] is not None})
@triton.jit(do_not_specialize=["n", "blocks_v"])
def head_combine_kernel(
    target_ptr,  # (n,) int64
    part_ptr,  # (3, blocks_v, n) fp32
    picked_ptr,  # (n,) fp32
    logprob_ptr,  # (n,) fp32, as everything below
    max_ptr,
    logsum_ptr,
    entropy_ptr,  # or None
    n,
    v,
    blocks_v,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < n
    plane = blocks_v.to(tl.int64) * n
    b_max = tl.full([TILES, ROWS], LOWEST, tl.float32)
    b_sum = tl.zeros([TILES, ROWS], tl.float32)
    b_dot = tl.zeros([TILES, ROWS], tl.float32)
    for first in range(0, blocks_v, TILES):
        o_tile = first + tl.arange(0, TILES)
        m_part = (o_tile < blocks_v)[:, None] & m_n[None, :]
        p_part = part_ptr + o_tile.to(tl.int64)[:, None] * n + o_n[None, :]
        b_max2 = tl.load(p_part, mask=m_part, other=LOWEST)
        b_sum2 = tl.load(p_part + plane, mask=m_part, other=0.0)
        b_dot2 = b_sum2
        if HAS_ENTROPY:
            b_dot2 = tl.load(p_part + 2 * plane, mask=m_part, other=0.0)
        b_max, b_sum, b_dot = _join(b_max, b_sum, b_dot, b_max2, b_sum2, b_dot2)
    b_all = tl.max(b_max, 0)
    b_shift = b_max - b_all[None, :]
    b_alpha = tl.exp(b_shift)
    b_dot = tl.sum(b_alpha * (b_dot + b_sum * tl.maximum(b_shift, LOG_FLOOR)), 0)
    b_m, b_log, b_entropy = _finish(b_all, tl.sum(b_alpha * b_sum, 0), b_dot)
    b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
    m_scored = b_target >= 0
    b_picked = tl.load(picked_ptr + o_n, mask=m_scored & (b_target < v), other=float("nan"))
    tl.store(max_ptr + o_n, tl.where(m_scored, b_m, 0.0), mask=m_n)
    tl.store(logsum_ptr + o_n, tl.where(m_scored, b_log, 0.0), mask=m_n)
    tl.store(logprob_ptr + o_n, tl.where(m_scored, (b_picked - b_m) - b_log, 0.0), mask=m_n)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + o_n, tl.where(m_scored, b_entropy, 0.0), mask=m_n)


def partial_bytes(vocab: int, config: Config) -> int:
    """Bytes of partial results per row."""
    return 12 * ceil_div(vocab, config.block_v)


def head_stats(
    hidden,  # (n, D) bf16 or fp16; rows that start on 16 bytes
    weight,  # (V, D), likewise
    target,  # (n,) int64; < 0: all results are 0
    bias,  # (V,) fp32 or None
    *,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    logprob,  # (n,) fp32, written, as everything below
    row_max,
    log_sum,
    entropy,  # or None
    config: Config,
    programs: int,  # multiprocessors
) -> None:
    """Write the statistics of each row of hidden @ weight.T + bias into the given tensors."""
    (n, d), v = hidden.shape, weight.shape[0]
    if n == 0:
        return
    pre, post = _folded(scale, softcap, inv_temperature)
    blocks_n, blocks_v = ceil_div(n, config.block_n), ceil_div(v, config.block_v)
    part = row_max.new_empty((3, blocks_v, n))
    picked = row_max.new_empty(n)
    grid = min(programs, blocks_n * blocks_v)
    head_stats_kernel[(grid,)](
        TensorDescriptor(hidden, [n, d], [hidden.stride(0), 1], [config.block_n, config.block_d]),
        TensorDescriptor(weight, [v, d], [weight.stride(0), 1], [config.block_v, config.block_d]),
        target,
        bias,
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
        post=post,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        HAS_ENTROPY=entropy is not None,
        num_warps=config.warps,
        num_stages=config.stages,
        **EXACT,
    )
    head_combine_kernel[(ceil_div(n, COMBINE_ROWS),)](
        target,
        part,
        picked,
        logprob,
        row_max,
        log_sum,
        entropy,
        n=n,
        v=v,
        blocks_v=blocks_v,
        ROWS=COMBINE_ROWS,
        TILES=COMBINE_TILES,
        num_warps=4,
        **EXACT,
    )

"""Row passes over two tiles of raw logits (n, V), the policy's ("own") and the reference's: divergence, gradient.

    p, q = softmaxes of the shaped logits (row_pass.py);   M = a q + (1 - a) p,   a = ref_share
    KL(a || b) = sum_j a_j h(log b_j - log a_j),   h(d) = exp(d) - 1 - d >= 0
    own_kl = KL(p || q or M),   ref_kl = KL(q || p or M)

             d / d s_j                               d / d s'_j
    forward  p_j - q_j                               q_j (log q_j - log p_j - ref_kl)
    reverse  p_j (log p_j - log q_j - own_kl)        q_j - p_j
    jsd      (1 - a) p_j (log p_j - log M_j - own_kl)    a q_j (log q_j - log M_j - ref_kl)

The same as `reference.divergence`.

Bytes per row, z of `i` bytes and gradient of `o`: row_divergence reads 2 i V, divergence_dlogits reads 2 i V and
writes o V for each side that trains. With the two row_stats before them a fused call on fp32 tiles moves 26 V bytes
to a bf16 gradient; only the forward KL's gradient could do without the sums of its row.
A block of 2048 elements of either tile is 64 bytes per thread in flight, as in row_pass.py, and rows are cut into
segments in the same way. Sums of segments are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import EXACT
from .row_pass import WARPS, _folded, _load_block, _squash, split_row

FORWARD, REVERSE, JSD = (tl.constexpr(k) for k in range(3))
SERIES = tl.constexpr(0.5)
BLOCK = 2048
SEGMENT = 16384

_HAS = {
    "HAS_BIAS": lambda args: args["bias_ptr"] is not None,
    "HAS_SOFTCAP": lambda args: args["post"] is not None,
    "HAS_REF_BIAS": lambda args: args["ref_bias_ptr"] is not None,
    "HAS_REF_SOFTCAP": lambda args: args["ref_post"] is not None,
}


@triton.jit
def _kl_term(b_a, b_b, b_d):
    """a h(d), d = log b - log a; by its series near 0, where exp(d) - 1 - d cancels; a = 0 leaves b."""
    b_h = tl.fma(b_d, 1.0 / 40320, 1.0 / 5040)
    b_h = tl.fma(b_h, b_d, 1.0 / 720)
    b_h = tl.fma(b_h, b_d, 1.0 / 120)
    b_h = tl.fma(b_h, b_d, 1.0 / 24)
    b_h = tl.fma(b_h, b_d, 1.0 / 6)
    b_h = tl.fma(b_h, b_d, 0.5)
    b_term = tl.where(tl.abs(b_d) < SERIES, b_a * (b_d * b_d * b_h), (b_b - b_a) - b_a * b_d)
    return tl.where(b_a == 0.0, b_b, b_term)


@triton.jit
def _mixture(b_logp, b_logq, share):
    """log M - log p and log M - log q: exactly 0 where p = q, no overflow where they are far apart."""
    b_u = b_logp - b_logq
    b_gap = tl.abs(b_u)
    b_smaller = tl.where(b_u > 0, share, 1.0 - share)
    b_near = tl.log(1.0 + b_smaller * (tl.exp(-b_gap) - 1.0))
    b_far = b_near + b_gap
    return tl.where(b_u > 0, b_near, b_far), tl.where(b_u > 0, b_far, b_near)


@triton.jit
def _centred(b_a, b_from, kl):
    """a (log a - log b - KL(a || b)); a = 0 gives 0 whatever log b is."""
    return tl.where(b_a == 0.0, 0.0, b_a * (-b_from - kl))


@triton.jit
def _sums(b_s, b_r, m_v, row_max, log_sum, ref_max, ref_sum, share, KIND: tl.constexpr):
    """The terms of own_kl and ref_kl of a block; zeros where the kind has none or `m_v` is false."""
    b_logp = (b_s - row_max) - log_sum
    b_logq = (b_r - ref_max) - ref_sum
    b_p = tl.exp(b_logp)
    b_q = tl.exp(b_logq)
    b_own = tl.zeros_like(b_p)
    b_ref = tl.zeros_like(b_p)
    if KIND == FORWARD:
        b_ref = _kl_term(b_q, b_p, b_logp - b_logq)
    elif KIND == REVERSE:
        b_own = _kl_term(b_p, b_q, b_logq - b_logp)
    else:
        b_from_p, b_from_q = _mixture(b_logp, b_logq, share)
        b_m = share * b_q + (1.0 - share) * b_p
        b_own = _kl_term(b_p, b_m, b_from_p)
        b_ref = _kl_term(b_q, b_m, b_from_q)
    if m_v is not None:
        b_own = tl.where(m_v, b_own, 0.0)
        b_ref = tl.where(m_v, b_ref, 0.0)
    return b_own, b_ref


@triton.jit
def _gradients(b_s, b_r, row_max, log_sum, ref_max, ref_sum, own_kl, ref_kl, share, KIND: tl.constexpr):
    """Gradients by the shaped logits of either side."""
    b_logp = (b_s - row_max) - log_sum
    b_logq = (b_r - ref_max) - ref_sum
    b_p = tl.exp(b_logp)
    b_q = tl.exp(b_logq)
    b_own = b_p - b_q
    b_ref = b_q - b_p
    if KIND == FORWARD:
        b_ref = _centred(b_q, b_logp - b_logq, ref_kl)
    elif KIND == REVERSE:
        b_own = _centred(b_p, b_logq - b_logp, own_kl)
    else:
        b_from_p, b_from_q = _mixture(b_logp, b_logq, share)
        b_own = (1.0 - share) * _centred(b_p, b_from_p, own_kl)
        b_ref = share * _centred(b_q, b_from_q, ref_kl)
    return b_own, b_ref


@triton.heuristics(_HAS)
@triton.jit
def row_divergence_kernel(
    z_ptr,  # (n, V), row stride z_stride
    ref_ptr,  # (n, V), row stride ref_stride
    bias_ptr,  # (V,) fp32 or None
    ref_bias_ptr,
    max_ptr,  # (n,) fp32, as all below
    logsum_ptr,
    ref_max_ptr,
    ref_sum_ptr,
    part_ptr,  # (n, SEGMENTS) or None: own_kl of each segment
    ref_part_ptr,  # likewise ref_kl
    v,
    z_stride,
    ref_stride,
    segment,
    pre,
    post,
    ref_pre,
    ref_post,
    share,
    KIND: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    i_n = i_p // SEGMENTS
    i_seg = (i_p % SEGMENTS).to(tl.int32)
    row_max = tl.load(max_ptr + i_n)
    log_sum = tl.load(logsum_ptr + i_n)
    ref_max = tl.load(ref_max_ptr + i_n)
    ref_sum = tl.load(ref_sum_ptr + i_n)
    lo = i_seg * segment
    hi = tl.minimum(lo + segment, v)
    whole = lo + (hi - lo) // BLOCK * BLOCK
    p_row = z_ptr + i_n * z_stride
    p_ref = ref_ptr + i_n * ref_stride
    o_block = tl.arange(0, BLOCK)
    b_own_sum = tl.zeros([BLOCK], tl.float32)
    b_ref_sum = tl.zeros([BLOCK], tl.float32)
    for o in range(lo, whole, BLOCK):
        b_s, _ = _load_block(p_row, bias_ptr, o + o_block, None, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_r, _ = _load_block(p_ref, ref_bias_ptr, o + o_block, None, ref_pre, ref_post, HAS_REF_BIAS, HAS_REF_SOFTCAP)
        b_own, b_ref = _sums(b_s, b_r, None, row_max, log_sum, ref_max, ref_sum, share, KIND)
        b_own_sum += b_own
        b_ref_sum += b_ref
    if whole < hi:
        o_v = whole + o_block
        m_v = o_v < hi
        b_s, _ = _load_block(p_row, bias_ptr, o_v, m_v, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_r, _ = _load_block(p_ref, ref_bias_ptr, o_v, m_v, ref_pre, ref_post, HAS_REF_BIAS, HAS_REF_SOFTCAP)
        b_own, b_ref = _sums(b_s, b_r, m_v, row_max, log_sum, ref_max, ref_sum, share, KIND)
        b_own_sum += b_own
        b_ref_sum += b_ref
    if KIND != FORWARD:
        tl.store(part_ptr + i_p, tl.sum(b_own_sum, 0))
    if KIND != REVERSE:
        tl.store(ref_part_ptr + i_p, tl.sum(b_ref_sum, 0))


@triton.heuristics(
    {
        **_HAS,
        "HAS_OUT": lambda args: args["out_ptr"] is not None,
        "HAS_REF_OUT": lambda args: args["ref_out_ptr"] is not None,
    }
)
@triton.jit
def divergence_dlogits_kernel(
    z_ptr,  # (n, V), row stride z_stride
    ref_ptr,  # (n, V), row stride ref_stride
    out_ptr,  # (n, V) or None, row stride out_stride; may share its rows' storage with z
    ref_out_ptr,  # likewise with ref
    bias_ptr,  # (V,) fp32 or None
    ref_bias_ptr,
    max_ptr,  # (n,) fp32, as all below
    logsum_ptr,
    ref_max_ptr,
    ref_sum_ptr,
    kl_ptr,  # or None
    ref_kl_ptr,  # or None
    grad_ptr,
    v,
    z_stride,
    ref_stride,
    out_stride,
    ref_out_stride,
    segment,
    pre,
    post,
    ref_pre,
    ref_post,
    share,
    KIND: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_REF_OUT: tl.constexpr,
):
    """One program per segment of a row; the next block of both tiles is on its way while one is worked on.

    In place with narrowing (SEGMENTS = 1) the barrier makes it right, for the reason given in row_dlogits_kernel:
    a write stays inside blocks that all warps have loaded.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_n = i_p // SEGMENTS
    i_seg = (i_p % SEGMENTS).to(tl.int32)
    row_max = tl.load(max_ptr + i_n)
    log_sum = tl.load(logsum_ptr + i_n)
    ref_max = tl.load(ref_max_ptr + i_n)
    ref_sum = tl.load(ref_sum_ptr + i_n)
    grad = tl.load(grad_ptr + i_n)
    own_kl = 0.0
    ref_kl = 0.0
    if HAS_OUT and KIND != FORWARD:
        own_kl = tl.load(kl_ptr + i_n)
    if HAS_REF_OUT and KIND != REVERSE:
        ref_kl = tl.load(ref_kl_ptr + i_n)
    lo = i_seg * segment
    hi = tl.minimum(lo + segment, v)
    whole = lo + (hi - lo) // BLOCK * BLOCK
    p_row = z_ptr + i_n * z_stride
    p_ref = ref_ptr + i_n * ref_stride
    o_block = tl.arange(0, BLOCK)
    m_next = tl.full([BLOCK], lo, tl.int32) < whole  # the same for all lanes: loads stay 16 bytes wide
    b_next = tl.load(p_row + (lo + o_block), mask=m_next)
    b_ref_next = tl.load(p_ref + (lo + o_block), mask=m_next)
    for o in range(lo, whole, BLOCK):
        b_z = b_next
        b_y = b_ref_next
        o_next = o + BLOCK
        m_next = tl.full([BLOCK], o_next, tl.int32) < whole
        b_next = tl.load(p_row + (o_next + o_block), mask=m_next)
        b_ref_next = tl.load(p_ref + (o_next + o_block), mask=m_next)
        tl.debug_barrier()
        o_v = o + o_block
        b_s, b_jac = _squash(b_z, bias_ptr, o_v, None, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_r, b_ref_jac = _squash(b_y, ref_bias_ptr, o_v, None, ref_pre, ref_post, HAS_REF_BIAS, HAS_REF_SOFTCAP)
        b_g, b_h = _gradients(b_s, b_r, row_max, log_sum, ref_max, ref_sum, own_kl, ref_kl, share, KIND)
        if HAS_OUT:
            p_out = out_ptr + i_n * out_stride
            tl.store(p_out + o_v, (b_jac * (grad * b_g)).to(out_ptr.dtype.element_ty))
        if HAS_REF_OUT:
            p_ref_out = ref_out_ptr + i_n * ref_out_stride
            tl.store(p_ref_out + o_v, (b_ref_jac * (grad * b_h)).to(ref_out_ptr.dtype.element_ty))
    if whole < hi:
        o_v = whole + o_block
        m_v = o_v < hi
        b_s, b_jac = _load_block(p_row, bias_ptr, o_v, m_v, pre, post, HAS_BIAS, HAS_SOFTCAP)
        b_r, b_ref_jac = _load_block(p_ref, ref_bias_ptr, o_v, m_v, ref_pre, ref_post, HAS_REF_BIAS, HAS_REF_SOFTCAP)
        tl.debug_barrier()
        b_g, b_h = _gradients(b_s, b_r, row_max, log_sum, ref_max, ref_sum, own_kl, ref_kl, share, KIND)
        if HAS_OUT:
            p_out = out_ptr + i_n * out_stride
            tl.store(p_out + o_v, (b_jac * (grad * b_g)).to(out_ptr.dtype.element_ty), mask=m_v)
        if HAS_REF_OUT:
            p_ref_out = ref_out_ptr + i_n * ref_out_stride
            tl.store(p_ref_out + o_v, (b_ref_jac * (grad * b_h)).to(ref_out_ptr.dtype.element_ty), mask=m_v)


def _forms(form, ref_form) -> dict:
    pre, post = _folded(*form)
    ref_pre, ref_post = _folded(*ref_form)
    return dict(pre=pre, post=post, ref_pre=ref_pre, ref_post=ref_post)


def row_divergence(
    logits,  # (n, V) fp32, bf16 or fp16, last dimension contiguous
    ref_logits,  # (n, V), dtype of its own
    bias,  # (V,) fp32 or None
    ref_bias,  # (V,) fp32 or None
    *,
    kind: int,  # 0 forward, 1 reverse, 2 jsd
    ref_share: float,
    form,  # scale, softcap or None, inv_temperature
    ref_form,
    row_max,  # (n,) fp32, as everything below; from row_stats
    log_sum,
    ref_max,
    ref_sum,
    own_kl,  # written, unless forward
    ref_kl,  # written, unless reverse
) -> None:
    """Write the divergence sums of each row."""
    n, v = logits.shape
    if n == 0:
        return
    segments, segment = split_row(v, SEGMENT, BLOCK)
    part, ref_part = (None if x is None else x.new_empty((n, segments)) for x in (own_kl, ref_kl))
    row_divergence_kernel[(n * segments,)](
        logits,
        ref_logits,
        bias,
        ref_bias,
        row_max,
        log_sum,
        ref_max,
        ref_sum,
        part,
        ref_part,
        v=v,
        z_stride=logits.stride(0),
        ref_stride=ref_logits.stride(0),
        segment=segment,
        **_forms(form, ref_form),
        share=ref_share,
        KIND=kind,
        SEGMENTS=segments,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **EXACT,
    )
    for total, parts in ((own_kl, part), (ref_kl, ref_part)):
        if total is not None:
            total.copy_(parts.sum(1))


def dlogits_split(v: int, *pairs) -> tuple[int, int]:
    """`split_row` for the gradient. A pair (tile, out) that narrows in place keeps a row in one program."""
    narrow = [(tile, out) for tile, out in pairs if out is not None and out.element_size() < tile.element_size()]
    shared = any(out.untyped_storage().data_ptr() == tile.untyped_storage().data_ptr() for tile, out in narrow)
    return split_row(v, v if shared else SEGMENT, BLOCK)


def divergence_dlogits(
    logits,
    ref_logits,
    bias,
    ref_bias,
    *,
    kind: int,
    ref_share: float,
    form,
    ref_form,
    row_max,
    log_sum,
    ref_max,
    ref_sum,
    own_kl,  # (n,) fp32 or None, from row_divergence
    ref_kl,
    grad,  # (n,) fp32
    out,  # (n, V) fp32, bf16 or fp16, or None: its own storage, or logits' rows from their first byte on
    ref_out,  # likewise for ref_logits
) -> None:
    """Write grad times the gradient of each row's divergence by the raw logits of either side."""
    n, v = logits.shape
    if n == 0 or (out is None and ref_out is None):
        return
    segments, segment = dlogits_split(v, (logits, out), (ref_logits, ref_out))
    divergence_dlogits_kernel[(n * segments,)](
        logits,
        ref_logits,
        out,
        ref_out,
        bias,
        ref_bias,
        row_max,
        log_sum,
        ref_max,
        ref_sum,
        own_kl,
        ref_kl,
        grad,
        v=v,
        z_stride=logits.stride(0),
        ref_stride=ref_logits.stride(0),
        out_stride=0 if out is None else out.stride(0),
        ref_out_stride=0 if ref_out is None else ref_out.stride(0),
        segment=segment,
        **_forms(form, ref_form),
        share=ref_share,
        KIND=kind,
        SEGMENTS=segments,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **EXACT,
    )

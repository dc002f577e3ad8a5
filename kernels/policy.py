"""The clip family of policy losses with its gradient: one read of the token vectors, no intermediate.

    r = exp(clip(logprob - old_logprob, -20, 20));   A = advantages
    l = max(-min(r, delta) A, -clip(r, 1 - clip_low, 1 + clip_high) A);   l <= -dual_clip A where A < 0
    loss = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef u_t H_t

The same as `reference.policy_loss`. Rows with w = 0 are not there, whatever they hold.

Bytes per token, fp32: 4 vectors read (logprob, old_logprob, advantages, weight), 1 written: 20. Every option adds
the vectors it needs and no others: what is None is not compiled. The metrics cost 48 bytes per 1024 tokens, reduced
in a fixed order by a second launch of 12 programs: equal bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import EXACT, ceil_div

BLOCK = 1024  # tokens per program: 8 per thread, two loads of 16 bytes per vector
WARPS = 4
SUM_BLOCK = 1024
MAX_LOG_RATIO = tl.constexpr(20.0)
SUMS = (
    12  # loss, policy_loss, clip_low, clip_high, clip_far, ratio, approx_kl, kl, entropy, count, ratio_max, ratio_min
)
RATIO_MAX = tl.constexpr(10)
RATIO_MIN = tl.constexpr(11)


@triton.jit
def _fp32(ptr, o_n, m_n):
    """fp32 values; where `m_n` is false, the caller's weight of 0 removes whatever came."""
    return tl.load(ptr + o_n, mask=m_n).to(tl.float32)


@triton.jit
def _upper(b_x, bound):
    return tl.minimum(b_x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lower(b_x, bound):
    return tl.maximum(b_x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp_minus_1_minus_x(b_x):
    """exp(x) - 1 - x, by its series for |x| < 0.5, where the difference cancels (truncated below 2e-9)."""
    b_p = tl.fma(b_x, 1.0 / 362880, 1.0 / 40320)
    b_p = tl.fma(b_p, b_x, 1.0 / 5040)
    b_p = tl.fma(b_p, b_x, 1.0 / 720)
    b_p = tl.fma(b_p, b_x, 1.0 / 120)
    b_p = tl.fma(b_p, b_x, 1.0 / 24)
    b_p = tl.fma(b_p, b_x, 1.0 / 6)
    b_p = tl.fma(b_p, b_x, 0.5)
    return tl.where(tl.abs(b_x) < 0.5, b_p * b_x * b_x, (tl.exp(b_x) - 1.0) - b_x)


@triton.jit
def _kl_value(b_delta, KL: tl.constexpr):
    if KL == "k1":
        return b_delta
    elif KL == "abs":
        return tl.abs(b_delta)
    elif KL == "k2":
        return 0.5 * b_delta * b_delta
    else:
        return exp_minus_1_minus_x(_upper(-b_delta, MAX_LOG_RATIO))


@triton.jit
def _kl_slope(b_delta, KL: tl.constexpr):
    """Derivative of the estimator by logprob; delta = logprob - ref_logprob."""
    if KL == "k1":
        return b_delta * 0.0 + 1.0
    elif KL == "abs":
        return tl.where(b_delta > 0, 1.0, tl.where(b_delta < 0, -1.0, b_delta * 0.0))
    elif KL == "k2":
        return b_delta
    else:
        b_x = _upper(-b_delta, MAX_LOG_RATIO)
        return tl.where(-b_delta > MAX_LOG_RATIO, 0.0, -(exp_minus_1_minus_x(b_x) + b_x))


@triton.jit
def _clip_loss(b_ratio, b_dratio, b_adv, low, high, delta, dual_clip):
    """Loss, its derivative by logprob, and where delta or the dual clip took effect."""
    b_open = b_ratio
    if delta is not None:
        b_open = _upper(b_ratio, delta)
    b_loss_open = -b_open * b_adv
    b_loss_clip = -_upper(_lower(b_ratio, low), high) * b_adv
    b_loss = _lower(b_loss_open, b_loss_clip)
    # The clipped branch wins strictly only where the ratio left the range, save for a delta inside of it.
    m_inside = (b_ratio >= low) & (b_ratio <= high)
    m_moves = ((b_loss_open >= b_loss_clip) & (b_ratio == b_open)) | ((b_loss_open < b_loss_clip) & m_inside)
    m_far = (b_ratio != b_open) & (b_adv < 0)
    if dual_clip is not None:
        b_cap = -dual_clip * b_adv
        m_capped = (b_adv < 0) & (b_loss > b_cap)
        b_loss = tl.where(m_capped, b_cap, b_loss)
        m_moves = m_moves & (m_capped == 0)
        m_far = m_far | m_capped
    return b_loss, tl.where(m_moves, -b_adv * b_dratio, 0.0), m_far


@triton.jit
def _count(m_a, m_b, m_c, m_d):
    """Four counts by one reduction: 16 bits each of an int64 (a block has at most 2^15 rows)."""
    b_bits = m_a.to(tl.int64) + (m_b.to(tl.int64) << 16) + (m_c.to(tl.int64) << 32) + (m_d.to(tl.int64) << 48)
    bits = tl.sum(b_bits, 0)
    a = (bits & 65535).to(tl.float32)
    b = ((bits >> 16) & 65535).to(tl.float32)
    c = ((bits >> 32) & 65535).to(tl.float32)
    return a, b, c, ((bits >> 48) & 65535).to(tl.float32)


@triton.jit
def _policy_clip_block(
    logprob_ptr,
    old_ptr,
    adv_ptr,
    weight_ptr,
    policy_weight_ptr,
    ref_ptr,
    entropy_ptr,
    entropy_weight_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    partial_ptr,
    o_n,
    m_n,
    low,
    high,
    delta,
    dual_clip,
    beta,
    entropy_coef,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
):
    b_weight = _fp32(weight_ptr, o_n, m_n)
    if m_n is not None:
        b_weight = tl.where(m_n, b_weight, 0.0)
    # The other vectors are loaded without waiting for the weights; a select then removes what they hide.
    m_valid = b_weight != 0.0
    b_logp = tl.where(m_valid, _fp32(logprob_ptr, o_n, m_n), 0.0)
    b_adv = tl.where(m_valid, _fp32(adv_ptr, o_n, m_n), 0.0)
    b_log_ratio = b_logp * 0.0
    if old_ptr is not None:
        b_log_ratio = b_logp - tl.where(m_valid, _fp32(old_ptr, o_n, m_n), 0.0)
    b_bounded = _lower(_upper(b_log_ratio, MAX_LOG_RATIO), -MAX_LOG_RATIO)
    b_ratio = tl.exp(b_bounded)
    b_dratio = tl.where(b_bounded == b_log_ratio, b_ratio, 0.0)

    b_loss, b_slope, m_far = _clip_loss(b_ratio, b_dratio, b_adv, low, high, delta, dual_clip)
    if policy_weight_ptr is not None:
        b_pw = tl.where(m_valid, _fp32(policy_weight_ptr, o_n, m_n), 0.0)
        b_loss = b_loss * b_pw
        b_slope = b_slope * b_pw
    policy_sum = tl.sum(b_weight * b_loss, 0)
    loss_sum = policy_sum
    kl_sum = 0.0
    if ref_ptr is not None:
        b_delta = b_logp - tl.where(m_valid, _fp32(ref_ptr, o_n, m_n), 0.0)
        b_kl = _kl_value(b_delta, KL)
        b_dkl = _kl_slope(b_delta, KL_GRADIENT)
        kl_sum = tl.sum(b_kl, 0)
        b_term = b_kl
        if KL_CORRECTION:
            b_term = b_kl * b_ratio
            b_dkl = b_dkl * b_ratio + b_kl * b_dratio
        loss_sum += beta * tl.sum(b_weight * b_term, 0)
        b_slope += beta * b_dkl
    tl.store(dlogprob_ptr + o_n, b_weight * b_slope, mask=m_n)
    entropy_sum = 0.0
    if entropy_ptr is not None:
        b_entropy = tl.where(m_valid, _fp32(entropy_ptr, o_n, m_n), 0.0)
        entropy_sum = tl.sum(b_entropy, 0)
        if dentropy_ptr is not None:
            b_dentropy = -entropy_coef * tl.where(m_valid, _fp32(entropy_weight_ptr, o_n, m_n), 0.0)
            loss_sum += tl.sum(b_dentropy * b_entropy, 0)
            tl.store(dentropy_ptr + o_n, b_dentropy, mask=m_n)

    m_low = (b_ratio < low) & (b_adv < 0)
    m_high = (b_ratio > high) & (b_adv > 0)
    low_count, high_count, far_count, count = _count(m_low, m_high, m_far & m_valid, m_valid)
    stride = tl.num_programs(0).to(tl.int64)
    p = partial_ptr + tl.program_id(0).to(tl.int64)
    tl.store(p, loss_sum)
    tl.store(p + stride, policy_sum)
    tl.store(p + 2 * stride, low_count)
    tl.store(p + 3 * stride, high_count)
    tl.store(p + 4 * stride, far_count)
    tl.store(p + 5 * stride, tl.sum(tl.where(m_valid, b_ratio, 0.0), 0))
    tl.store(p + 6 * stride, tl.sum(exp_minus_1_minus_x(b_bounded), 0))
    tl.store(p + 7 * stride, kl_sum)
    tl.store(p + 8 * stride, entropy_sum)
    tl.store(p + 9 * stride, count)
    tl.store(p + 10 * stride, tl.max(tl.where(m_valid, b_ratio, -float("inf")), 0))
    tl.store(p + 11 * stride, tl.min(tl.where(m_valid, b_ratio, float("inf")), 0))


@triton.jit
def policy_clip_kernel(
    logprob_ptr,  # (n,) each; None: absent
    old_ptr,
    adv_ptr,
    weight_ptr,
    policy_weight_ptr,
    ref_ptr,
    entropy_ptr,
    entropy_weight_ptr,
    dlogprob_ptr,  # (n,) fp32
    dentropy_ptr,  # (n,) fp32 or None
    partial_ptr,  # (SUMS, programs) fp32
    n,
    low,  # 1 - clip_low
    high,  # 1 + clip_high
    delta,
    dual_clip,
    beta,
    entropy_coef,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK
    o_n = i_n + tl.arange(0, BLOCK)
    # A mask of any n splits the 16-byte accesses: only the last program carries one.
    if i_n + BLOCK <= n:
        _policy_clip_block(
            logprob_ptr, old_ptr, adv_ptr, weight_ptr, policy_weight_ptr, ref_ptr,
            entropy_ptr, entropy_weight_ptr, dlogprob_ptr, dentropy_ptr, partial_ptr,
            o_n, None, low, high, delta, dual_clip,
            beta, entropy_coef, KL, KL_GRADIENT, KL_CORRECTION
        )  # fmt: skip
    else:
        _policy_clip_block(
            logprob_ptr, old_ptr, adv_ptr, weight_ptr, policy_weight_ptr, ref_ptr,
            entropy_ptr, entropy_weight_ptr, dlogprob_ptr, dentropy_ptr, partial_ptr,
            o_n, o_n < n, low, high, delta, dual_clip,
            beta, entropy_coef, KL, KL_GRADIENT, KL_CORRECTION
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def policy_sums_kernel(partial_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """One program per sum. The extremes are 1 where no row counted."""
    i_s = tl.program_id(0)
    p_row = partial_ptr + i_s.to(tl.int64) * programs
    sign = tl.where(i_s == RATIO_MIN, -1.0, 1.0)
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_max = tl.full([BLOCK], -float("inf"), tl.float32)
    for o in range(0, programs, BLOCK):
        o_p = o + o_block
        b_x = tl.load(p_row + o_p, mask=o_p < programs, other=0.0)
        b_sum += b_x
        b_max = _lower(b_max, tl.where(o_p < programs, sign * b_x, -float("inf")))
    extreme = tl.max(b_max, 0)
    extreme = tl.where(extreme == -float("inf"), 1.0, sign * extreme)
    tl.store(sums_ptr + i_s, tl.where(i_s >= RATIO_MAX, extreme, tl.sum(b_sum, 0)))


def policy_clip_fwd(
    logprob,  # (n,) fp32, bf16 or fp16, contiguous, as every tensor here
    old_logprob,  # (n,) or None: the ratio is 1, with the gradient of exp
    advantages,  # (n,)
    weight,  # (n,)
    policy_weight=None,  # (n,)
    ref_logprob=None,  # (n,), needed when beta != 0
    entropy=None,  # (n,)
    entropy_weight=None,  # (n,), needed when entropy_coef != 0
    *,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str = "k3",
    kl_correction: bool = False,
    entropy_coef: float = 0.0,
):
    """(sums (12,), dlogprob (n,), dentropy (n,) or None), fp32; sums in the order of SUMS above."""
    n = logprob.numel()
    programs = ceil_div(n, BLOCK)
    dlogprob = weight.new_empty(0).float().new_empty(n)
    has_kl = beta != 0.0
    has_bonus = entropy is not None and entropy_coef != 0.0
    dentropy = dlogprob.new_empty(n) if has_bonus else None
    partial = dlogprob.new_empty((SUMS, programs))
    sums = dlogprob.new_empty(SUMS)
    if n:
        policy_clip_kernel[(programs,)](
            logprob,
            old_logprob,
            advantages,
            weight,
            policy_weight,
            ref_logprob if has_kl else None,
            entropy,
            entropy_weight if has_bonus else None,
            dlogprob,
            dentropy,
            partial,
            n=n,
            low=1.0 - clip_low,
            high=1.0 + clip_high,
            delta=delta,
            dual_clip=dual_clip,
            beta=beta if has_kl else None,
            entropy_coef=entropy_coef if has_bonus else None,
            KL=kl_estimator if has_kl else "",
            KL_GRADIENT=kl_gradient if has_kl else "",
            KL_CORRECTION=kl_correction and has_kl,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **EXACT,
        )
    policy_sums_kernel[(SUMS,)](partial, sums, programs=programs, BLOCK=SUM_BLOCK, num_warps=4, **EXACT)
    return sums, dlogprob, dentropy

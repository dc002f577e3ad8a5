"""What every kernel file shares: constants, device helpers, launch helpers."""

from __future__ import annotations

import triton
import triton.language as tl

# Finite stand-ins for -inf. A running maximum starts at LOWEST, so that `-inf - max` is -inf and never NaN.
# A log-probability is raised to LOG_FLOOR before it is multiplied by its own probability: exp(-200) is exactly
# 0 in fp32, so that 0 * -inf becomes 0 * -200 = 0 and no other value changes.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG_FLOOR = tl.constexpr(-200.0)
TANH_SPLIT = tl.constexpr(0.6)

# Whole-kernel launch options. A multiply and an add are not contracted: `scale * z - max` must be exactly 0
# where the maximum is, and the forward and the backward pass must see the same bits of s.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def tanh_sech2(b_u):
    """tanh(u) and 1 - tanh(u)^2, both to a few ulp for any u (infinities included).

    By t = exp(-2|u|): tanh = (1 - t) / (1 + t), sech^2 = 4t / (1 + t)^2. The first cancels for small u, where
    an odd polynomial (minimax for |u| < 0.6, relative error 3e-9 before rounding) takes over.
    """
    b_abs = tl.abs(b_u)
    b_t = tl.exp(-2.0 * b_abs)
    b_inv = 1.0 / (1.0 + b_t)
    b_far = (1.0 - b_t) * b_inv
    b_w = tl.minimum(b_u * b_u, 1.0)  # bounded, so that an infinite u leaves no inf * 0 behind
    b_poly = tl.fma(b_w, -0.0058951363898813725, 0.020795952528715134)
    b_poly = tl.fma(b_poly, b_w, -0.05378382280468941)
    b_poly = tl.fma(b_poly, b_w, 0.13331924378871918)
    b_poly = tl.fma(b_poly, b_w, -0.33333298563957214)
    b_near = tl.fma(b_abs * b_w, b_poly, b_abs)
    b_tanh = tl.where(b_abs < TANH_SPLIT, b_near, b_far)
    return tl.where(b_u < 0, -b_tanh, b_tanh), 4.0 * b_t * b_inv * b_inv


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

"""`kl_estimate`: scalar formulas, stability near 0, straight-through gradients, masks, errors. Runs on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import _backend
from rlhf_fast.ops.kl import ESTIMATORS, kl_estimate, kl_slope
from rlhf_fast.reference import policy as oracle

NAMES = ["k1", "abs", "k2", "k3"]


def scalar(name: str, logprob: float, ref: float) -> tuple[float, float]:
    """(value, derivative by logprob) in plain Python."""
    d = logprob - ref
    if name == "k1":
        return d, 1.0
    if name == "abs":
        return abs(d), math.copysign(1.0, d) if d else 0.0
    if name == "k2":
        return d * d / 2, d
    if -d > 20:
        return math.expm1(20) - 20, 0.0
    return math.expm1(-d) + d, -math.expm1(-d)


@pytest.mark.parametrize("value_of", NAMES)
@pytest.mark.parametrize("slope_of", [None, *NAMES])
@pytest.mark.parametrize("d", [0.0, 0.3, -0.7, 5.0, -5.0, 19.9, 25.0, -25.0, 1e-4, -1e-9])
def test_scalar_formulas(value_of, slope_of, d):
    logprob = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(-1.5 - d, dtype=torch.float64)
    out = kl_estimate(logprob, ref, estimator=value_of, gradient=slope_of)
    (grad,) = torch.autograd.grad(out, logprob)
    value, _ = scalar(value_of, -1.5, float(ref))
    _, slope = scalar(slope_of or value_of, -1.5, float(ref))
    assert out.item() == pytest.approx(value, rel=1e-12, abs=1e-300)
    assert grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-300)


def test_k3_does_not_cancel_near_zero():
    """In fp32 exp(x) - 1 - x is 100% wrong at 1e-4; the result must keep fp32's own error of its input's square."""
    d = torch.logspace(-7, -1, 200)
    d = torch.cat([d, -d])
    out = kl_estimate(d, torch.zeros_like(d), estimator="k3")
    exact = torch.expm1(-d.double()) + d.double()
    # expm1 is right to about 1 ulp of x, and then x is taken away from it: an absolute error of ulp(x).
    assert ((out.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * d.abs()).all()
    naive = torch.exp(-d) - 1 + d
    small = d.abs() < 1e-3
    assert (naive.double() - exact).abs()[small].max() > 10 * (out.double() - exact).abs()[small].max()
    assert (out >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_error_budget_and_dtypes(name, dtype):
    g = torch.Generator().manual_seed(0)
    logprob = (-torch.randn(507, generator=g).abs()).to(dtype)
    ref = (logprob.float() + 0.5 * torch.randn(507, generator=g)).to(dtype)
    results = []
    for function, d in ((kl_estimate, dtype), (oracle.kl_estimate, dtype), (oracle.kl_estimate, torch.float64)):
        x = logprob.to(d).requires_grad_()
        out = function(x, ref.to(d), estimator=name)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), x)))
    ours, naive, truth = results
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for a, b, t, eps in zip(ours, naive, truth, (0.0, torch.finfo(dtype).eps), strict=True):
        error, budget = (a.double() - t).abs(), (b.double() - t).abs()
        assert (error <= budget + 1e-6 + eps * t.abs()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_garbage(name, poison):
    logprob = torch.tensor([-1.0, poison, -2.0, 0.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -1.0, poison])
    out = kl_estimate(logprob, ref, estimator=name, gradient="k2", mask=torch.tensor([True, False, True, False]))
    out.sum().backward()
    assert out.isfinite().all()
    assert logprob.grad.isfinite().all()
    assert not out[[1, 3]].any()
    assert not logprob.grad[[1, 3]].any()
    assert logprob.grad[[0, 2]].all()


def test_overflow_is_clamped_on_one_side_only():
    logprob = torch.tensor([-500.0, -1.0], requires_grad=True)
    out = kl_estimate(logprob, torch.tensor([-1.0, -500.0]))
    out.sum().backward()
    out = out.detach()
    assert out[0] == pytest.approx(math.expm1(20) - 20, rel=1e-6)
    assert out[1] == pytest.approx(498.0, rel=1e-6)
    assert logprob.grad.tolist() == [0.0, 1.0]  # far above the reference the pull back stays


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.sampled_from(NAMES))
def test_slope_is_the_derivative(deltas, name):
    delta = torch.tensor(deltas, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ESTIMATORS[name](delta).sum(), delta)
    torch.testing.assert_close(kl_slope(delta.detach(), name), grad, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_reference():
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_()
    ref = (torch.linspace(-2, 2.7, 12, dtype=torch.float64)).requires_grad_()
    for name in NAMES:
        assert torch.autograd.gradcheck(lambda a, b, n=name: oracle.kl_estimate(a, b, estimator=n), (x, ref))


def test_second_derivative():
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_()
    for name in ("k2", "k3"):
        assert torch.autograd.gradgradcheck(lambda a, n=name: kl_estimate(a, torch.zeros_like(a), estimator=n), x)


def test_bad_input():
    a = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ref_logprob must be logprob's shape=\(3,\), got \(2,\)"):
        kl_estimate(a, torch.zeros(2))
    with pytest.raises(ValueError, match="estimator must be one of k1, abs, k2, k3, got 'k4'"):
        kl_estimate(a, a, estimator="k4")
    with pytest.raises(ValueError, match="gradient must be one of"):
        kl_estimate(a, a, gradient="k0")
    with pytest.raises(ValueError, match="mask"):
        kl_estimate(a, a, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="logprob must be float32"):
        kl_estimate(a.long(), a)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_a_reference_from_inference_mode(estimator):
    with torch.inference_mode():
        ref_logprob = torch.randn(4, 5)
    logprob = torch.randn(4, 5, requires_grad=True)
    kl_estimate(logprob, ref_logprob, estimator=estimator).sum().backward()
    (want,) = torch.autograd.grad(kl_estimate(logprob, ref_logprob.clone(), estimator=estimator).sum(), logprob)
    assert torch.equal(logprob.grad, want)


@pytest.mark.skipif(not _backend.cpp_available(), reason="no C++ extension")
def test_a_view_with_the_negative_bit_is_not_read_as_it_lies():
    with pytest.raises(ValueError, match="negative bit"):
        kl_estimate(torch._neg_view(torch.randn(4, 5)), torch.randn(4, 5))

"""Estimates of KL(policy || reference) from the log-probabilities of tokens that the policy sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast import _backend, _backend_policy, _checks
from rlhf_fast.ops._eager import plain
from rlhf_fast.ops._memory import huge

# exp() of a larger log-ratio says nothing that a number could hold on to: 20 nats are a factor of 5e8.
MAX_LOG_RATIO = 20.0


def _k1(delta: Tensor) -> Tensor:
    return delta


def _abs(delta: Tensor) -> Tensor:
    return delta.abs()


def _k2(delta: Tensor) -> Tensor:
    return 0.5 * delta.square()


class _K3(torch.autograd.Function):
    """expm1(x) - x at x = -delta; its derivative -expm1(x) as such, not as the difference that autograd would form.

    Clamped on the side that overflows only: far above the reference the slope stays 1 and pulls back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(delta: Tensor) -> Tensor:
        x = (-delta).clamp(max=MAX_LOG_RATIO)
        return torch.expm1(x) - x

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * kl_slope(*ctx.saved_tensors, "k3")


def _k3(delta: Tensor) -> Tensor:
    return _K3.apply(delta)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "abs": _abs, "k2": _k2, "k3": _k3}


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: str = "k3",
    gradient: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference), its value and its gradient chosen separately.

        d = logprob - ref_logprob
        k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d

    Equivalent to `reference.kl_estimate`, with k3 formed by expm1 (no cancellation near d = 0).

    Args:
        logprob: float of any shape: log-probabilities of sampled tokens. Differentiable.
        ref_logprob: the same shape. Differentiable too (detach it, or compute it under no_grad, as usual).
        estimator: whose value is returned. k1 and k3 are unbiased; k2 and abs are not.
        gradient: whose gradient flows; None: the estimator's own. As a loss on on-policy samples, the gradient of
            k1 is zero in expectation and that of k3 is biased, while that of k2 is the gradient of the KL.
        mask: bool, the same shape. False gives 0 and no gradient, whatever stands there.
    Returns: a tensor of the shape of `logprob`, fp32 (fp64 for fp64 input).
    Raises: ValueError naming the argument, what was expected and what came.
    Source: Schulman 2020, "Approximating KL Divergence" (k1, k2, k3).
    Notes: in k3, -d is clamped at 20 before exp; beyond it the value is constant and the gradient 0. (TRL 1.16 clamps
        nothing; verl clamps -d to +-20 and the result to +-10.)
    Example:
        >>> logprob, ref_logprob = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
        >>> kl_estimate(logprob, ref_logprob, estimator="k1")
        tensor([ 0.5000, -1.0000])
    """
    if not _checks.alike(logprob, ref_logprob):
        _checks.check_float("logprob", logprob)
        _checks.check_float("ref_logprob", ref_logprob)
        _checks.check_shape("ref_logprob", ref_logprob, logprob.shape, "logprob's shape")
    _checks.check_same_device(logprob=logprob, ref_logprob=ref_logprob, mask=mask)
    check_estimator("estimator", estimator)
    if gradient is not None:
        check_estimator("gradient", gradient)
    if mask is not None:
        _checks.check_mask("mask", mask, logprob.shape, "logprob's shape")
    ref_logprob = _checks.savable(ref_logprob)
    if _in_one_pass(logprob, ref_logprob, mask):
        return _KlPass.apply(logprob, ref_logprob, mask, estimator, gradient or estimator)
    if mask is not None:
        logprob, ref_logprob = keep(logprob, mask), keep(ref_logprob, mask)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    return kl_terms(logprob.to(dtype) - ref_logprob.to(dtype), estimator, gradient)


def _in_one_pass(logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None) -> bool:
    wide = torch.float64 in (logprob.dtype, ref_logprob.dtype)
    return (
        logprob.is_cpu
        and not wide
        and plain(logprob, ref_logprob, mask)
        and _backend.backend("cpu", "policy_loss") == "cpp"
    )


class _KlPass(torch.autograd.Function):
    """Value and slope by the C++ kernel, in eager mode. Where the gradient itself is differentiated, torch forms it."""

    @staticmethod
    def forward(ctx, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str, gradient: str):
        flat = [t.float().reshape(-1).contiguous() for t in (logprob, ref_logprob)]
        counted = None if mask is None else mask.bool().reshape(-1).contiguous()
        value = huge(torch.empty(logprob.numel()))
        slope = huge(torch.empty(logprob.numel())) if any(ctx.needs_input_grad) else None
        _backend_policy.kl_terms(*flat, counted, estimator=estimator, gradient=gradient, value=value, slope=slope)
        ctx.gradient = gradient
        if slope is not None:
            slope = slope.reshape(logprob.shape)
        ctx.save_for_backward(logprob, ref_logprob, mask, slope)
        return value.reshape(logprob.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logprob, ref_logprob, mask, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (logprob, ref_logprob) if mask is None else (keep(logprob, mask), keep(ref_logprob, mask))
            slope = kl_slope(inputs[0].float() - inputs[1].float(), ctx.gradient)
            slope = slope if mask is None else keep(slope, mask)
        by_logprob = grad * slope
        wanted = ctx.needs_input_grad
        return (
            by_logprob.to(logprob.dtype) if wanted[0] else None,
            -by_logprob.to(ref_logprob.dtype) if wanted[1] else None,
            None, None, None,
        )  # fmt: skip


def kl_terms(delta: Tensor, estimator: str, gradient: str | None) -> Tensor:
    """`kl_estimate` of delta = logprob - ref_logprob, unchecked."""
    value = ESTIMATORS[estimator](delta)
    if gradient is None or gradient == estimator:
        return value
    slope = ESTIMATORS[gradient](delta)
    return value.detach() + (slope - slope.detach())


def kl_slope(delta: Tensor, gradient: str) -> Tensor:
    """Derivative by logprob of an estimator, delta = logprob - ref_logprob."""
    if gradient == "k1":
        return torch.ones_like(delta)
    if gradient == "abs":
        return delta.sign()
    if gradient == "k2":
        return delta
    return torch.where(-delta > MAX_LOG_RATIO, 0.0, -torch.expm1((-delta).clamp(max=MAX_LOG_RATIO)))


def keep(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where `mask`, else 0: NaN under the mask reaches neither value nor gradient."""
    return torch.where(mask.bool(), tensor, 0)


def check_estimator(name: str, value: str) -> None:
    """Raise unless `value` names an estimator."""
    _checks.check_choice(name, value, ESTIMATORS)

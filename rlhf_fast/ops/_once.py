"""First derivatives only: a gradient that a kernel has made says so when it is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor):
        ctx.name = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name} has no second derivative; use the function of that name in rlhf_fast.reference for one"
        )


def roots(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors that descend from the given ones, without holding their memory: a Function keeps them as
    `ctx.roots`."""
    if not torch.is_grad_enabled():
        return ()
    plain = [t for t in tensors if type(t) in (Tensor, torch.nn.Parameter) and t.requires_grad]
    return tuple(t[:0].clone() for t in plain)


def once_differentiable(name: str) -> Callable[[Callable[..., Sequence[Any]]], Callable[..., tuple]]:
    """For a `backward`: its gradients depend on what the forward took, and differentiating them raises RuntimeError.

    torch's own `once_differentiable` raises where the upstream gradient requires grad, and gives a silent zero where it
    is a constant, as in `grad(loss, x, create_graph=True)`.
    """

    def decorate(backward: Callable[..., Sequence[Any]]) -> Callable[..., tuple]:
        @wraps(backward)
        def guarded(ctx: Any, *upstream: Tensor) -> tuple:
            with torch.no_grad():
                grads = tuple(backward(ctx, *upstream))
            if not torch.is_grad_enabled():  # no create_graph
                return grads
            own = [g for g in grads if g is not None]
            sources = [t for t in (*ctx.roots, *upstream) if isinstance(t, Tensor) and t.requires_grad]
            handed = iter(_Guard.apply(name, len(own), *own, *sources))
            return tuple(None if g is None else next(handed) for g in grads)

        return guarded

    return decorate

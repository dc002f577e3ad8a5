"""Calls past torch's dispatcher, what ops tell it, and gradients that were formed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

WAITS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
"""Tags of ops whose kernel waits for the device (to check targets, to count rows): torch.compile keeps them out of CUDA
graphs, as mode="reduce-overhead" makes them."""


def plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain ones in eager mode: nobody traces or transforms, and none is a subclass.

    Then an op's kernel may be called as a Python function. torch's dispatcher takes 50 to 150 us for a custom op with a
    gradient, as long as a kernel needs for some 100,000 tokens.
    """
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def last_walk(grad: Tensor) -> bool:
    """Whether the backward pass under way is the last over its graph: what the forward has stored may be used up."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return type(grad) is Tensor and not (torch.is_grad_enabled() or keeps_graph())


def handed_over(grad: Tensor, stored: Tensor) -> Tensor:
    """grad () * stored in the memory of `stored`: fresh pages cost more than the pass itself."""
    if grad.is_cuda or grad.item() != 1.0:
        stored.mul_(grad)
    return stored

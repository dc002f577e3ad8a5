"""The acceptance rule of every op: no further from fp64 than the naive expression in the same dtype, plus a floor."""

import torch

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def assert_within_budget(ours, naive, truth, dtype, *, scale=1.0, rounding=0.0, name=""):
    """|truth - ours| <= max |truth - naive| + floor * scale, everywhere; NaN fails.

    `scale` is the size of the terms that were summed: a sum of n terms of size s rounds at s, not at its result.
    `rounding` is what the working dtype may lose in a step that both share, with the reason at the call.
    """
    truth = truth.detach().double()
    error = (ours.detach().double() - truth).abs()
    allowed = (naive.detach().double() - truth).abs().max() + FLOOR[dtype] * scale + rounding
    worst = error.max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= allowed).all()), f"{name}: error {worst:.3e} > {allowed:.3e} in {dtype}"

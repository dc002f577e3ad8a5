"""What is measured: shapes of named models, ops, their inputs and their fp64 answers.

A case is an op at a shape and dtype. Its inputs are drawn once and handed to every provider; its answer is computed
once, in fp64, in blocks of rows, by formulas of its own: the library is not asked what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 0.2
LENGTH = 64
"""Tokens of a sequence in the GRPO cases: all equal, so that a mean over sequences is a mean over tokens."""

BLOCK_BYTES = 256 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """N scored tokens, hidden size D, vocabulary V."""

    name: str
    n: int
    d: int
    v: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 32, 507),
        Shape("small", 512, 128, 4096),
        Shape("cpu", 2048, 512, 32000),
        Shape("qwen2.5-0.5b", 8192, 896, 151936),
        Shape("qwen2.5-0.5b-64k", 65536, 896, 151936),
        Shape("llama-3.2-1b", 8192, 2048, 128256),
        Shape("qwen3-8b", 8192, 4096, 151936),
        Shape("qwen3-8b-64k", 65536, 4096, 151936),
        Shape("gemma-2-2b", 8192, 2304, 256000),
    )
}


def parse_shape(text: str) -> Shape:
    """A named shape, or `N,D,V`. ValueError names the known ones."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) == 3 and all(p.strip().isdigit() and int(p) > 0 for p in parts):
        return Shape("custom", *(int(p) for p in parts))
    raise ValueError(f"shape must be N,D,V or one of {', '.join(SHAPES)}, got {text!r}")


class Op(NamedTuple):
    """An operation: its outputs, and its floor in bare products with the head or in passes over the logits."""

    name: str
    outputs: tuple[str, ...]
    products: int = 0
    passes: int = 0
    about: str = ""


OPS = {
    op.name: op
    for op in (
        Op("logprob", ("logprob",), products=1, about="log-probabilities under a linear head, no gradient"),
        Op("logprob_grad", ("logprob", "dhidden", "dweight"), products=3, about="the same, forward and backward"),
        Op("cross_entropy", ("loss", "dhidden", "dweight"), products=3, about="mean cross-entropy, with gradients"),
        Op("grpo", ("loss", "dhidden", "dweight"), products=3, about="GRPO loss from hidden states, with gradients"),
        Op("from_logits", ("logprob",), passes=1, about="log-probabilities from existing logits, no gradient"),
        Op("from_logits_grad", ("logprob", "dlogits"), passes=3, about="the same, forward and backward"),
    )
}


class Case(NamedTuple):
    """An op at a shape and dtype; `zero_rows` is the share of sequences whose advantage is 0 (grpo)."""

    op: str
    shape: Shape
    dtype: str
    zero_rows: float = 0.0
    device: str = "cpu"

    @property
    def label(self) -> str:
        share = f", {self.zero_rows:.0%} zero advantages" if self.zero_rows else ""
        return f"{self.op} ({self.shape.n}, {self.shape.d}, {self.shape.v}) {self.dtype}{share}"


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D) or logits (N, V), leaves that require grad; the rest are constants of (N,)."""

    hidden: Tensor | None
    weight: Tensor | None
    logits: Tensor | None
    target: Tensor
    dlogprob: Tensor
    old_logprob: Tensor
    advantages: Tensor  # (N / LENGTH,), one per sequence

    @property
    def token_advantages(self) -> Tensor:
        """(N,)"""
        return self.advantages.repeat_interleave(LENGTH)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.logits is None else (self.logits,)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Logits of standard deviation 2; half of the targets are planted to be likely, the others are in the tails."""
    n, d, v = case.shape[1:]
    if n % LENGTH:
        raise ValueError(f"N must be a multiple of {LENGTH}, the benchmark's sequence length, got {n}")
    g = torch.Generator(case.device).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, device=case.device)  # noqa: E731
    dtype = DTYPES[case.dtype]
    target = torch.randint(v, (n,), generator=g, device=case.device)
    weight = (draw(v, d) * (2 / d**0.5)).to(dtype)
    hidden = draw(n, d)
    hidden[::2] += 5.5 * torch.nn.functional.normalize(weight[target[::2]].float(), dim=1)
    hidden = hidden.to(dtype)
    # log-ratios on both sides of the clip range, but none near its edges: there rounding decides the gradient
    centres = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=case.device)
    ratio = centres[torch.randint(4, (n,), generator=g, device=case.device)] + 0.02 * draw(n)
    old = torch.cat([_logprob(z, t)[0] for z, t in _blocks(hidden, weight, target, torch.float32)]) - ratio
    advantages = draw(n // LENGTH)
    advantages[: round(case.zero_rows * advantages.shape[0])] = 0
    dlogprob = draw(n) / n
    if OPS[case.op].passes:
        logits = (hidden @ weight.t()).requires_grad_()
        return Inputs(None, None, logits, target, dlogprob, old, advantages)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), None, target, dlogprob, old, advantages)


def grpo_objective(logprob: Tensor, old_logprob: Tensor, advantages: Tensor) -> Tensor:
    """-mean min(r A, clip(r, 0.8, 1.2) A), all arguments (N,): the loss around providers that have none."""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def _objective(case: Case, x: Inputs) -> Callable[[Tensor], Tensor]:
    """logprob (N,) -> the scalar whose gradient the op returns."""
    if case.op == "cross_entropy":
        return lambda logprob: -logprob.mean()
    if case.op == "grpo":
        return lambda logprob: grpo_objective(logprob, x.old_logprob.double(), x.token_advantages.double())
    return lambda logprob: torch.dot(logprob, x.dlogprob.double())


def answer(case: Case, x: Inputs) -> dict[str, Tensor]:
    """The op's outputs in fp64, from the inputs as they were rounded."""
    with torch.no_grad():
        if x.logits is not None:
            return _answer_from_logits(case, x)
        hidden, weight = x.hidden.double(), x.weight.double()
        logprob = torch.cat([_logprob(z, t)[0] for z, t in _blocks(hidden, weight, x.target, torch.float64)])
        loss, dlogprob = _slope(_objective(case, x), logprob)
        out = {"logprob": logprob, "loss": loss}
        if "dhidden" in OPS[case.op].outputs:
            out["dhidden"], out["dweight"] = torch.empty_like(hidden), torch.zeros_like(weight)
            row = 0
            for z, t in _blocks(hidden, weight, x.target, torch.float64):
                rows = slice(row, row := row + t.shape[0])
                dz = _dlogits(z, t, dlogprob[rows])
                out["dhidden"][rows] = dz @ weight
                out["dweight"].addmm_(dz.t(), hidden[rows])
        return {name: out[name] for name in OPS[case.op].outputs}


def _answer_from_logits(case: Case, x: Inputs) -> dict[str, Tensor]:
    logprob, dlogits = [], []
    rows = max(1, BLOCK_BYTES // (8 * x.logits.shape[1]))
    for start in range(0, x.logits.shape[0], rows):
        part = slice(start, start + rows)
        z, t = x.logits[part].double(), x.target[part]
        logprob.append(_logprob(z, t)[0])
        if "dlogits" in OPS[case.op].outputs:
            dlogits.append(_dlogits(z, t, x.dlogprob[part].double()))
    out = {"logprob": torch.cat(logprob)}
    return out | ({"dlogits": torch.cat(dlogits)} if dlogits else {})


def _blocks(hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, BLOCK_BYTES // (dtype.itemsize * weight.shape[0]))
    weight = weight.to(dtype)
    for start in range(0, hidden.shape[0], rows):
        yield hidden[start : start + rows].to(dtype) @ weight.t(), target[start : start + rows]


def _logprob(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    lse = z.logsumexp(-1)
    return z.gather(-1, target.unsqueeze(-1)).squeeze(-1) - lse, lse


def _dlogits(z: Tensor, target: Tensor, dlogprob: Tensor) -> Tensor:
    """dlogprob (onehot - p)"""
    dz = torch.exp(z - z.logsumexp(-1, keepdim=True)).mul_(-dlogprob.unsqueeze(-1))
    return dz.scatter_add_(-1, target.unsqueeze(-1), dlogprob.unsqueeze(-1))


def _slope(objective: Callable[[Tensor], Tensor], logprob: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = logprob.detach().requires_grad_()
        loss = objective(leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---- errors ----

LIMITS = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.1}
"""A result further off than this is another function, not a rounding: it is not timed."""

FLOORS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}


def errors(out: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of vectors and scalars (nats); ||out - truth|| / ||truth|| of gradients. NaN stays NaN."""
    found = {}
    for name, right in truth.items():
        got = out[name].detach()
        if got.shape != right.shape:
            raise ValueError(f"{name} must be {tuple(right.shape)}, got {tuple(got.shape)}")
        diff = got.double() - right
        found[name] = float(diff.norm() / right.norm()) if name.startswith("d") else float(diff.abs().max())
    return found


def wrong(case: Case, error: dict[str, float]) -> str:
    """Why these errors mean a wrong result, or ''."""
    limit = LIMITS[case.dtype]
    bad = [f"{name} off by {e:.2e} (limit {limit:g})" for name, e in error.items() if not e <= limit]
    return "; ".join(bad)


def within_budget(case: Case, error: dict[str, float], naive: dict[str, float]) -> bool:
    """Whether the errors are those of the naive expression in the same dtype, plus a floor."""
    return all(e <= naive[name] + FLOORS[case.dtype] for name, e in error.items())

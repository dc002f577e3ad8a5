"""What is measured: shapes of named models, ops, and how far a result may be off.

A case is an op at a shape and dtype. Its inputs are drawn once and handed to every provider, its answer is computed
once in fp64 (`inputs`, `token_inputs`), by formulas of its own: the library is not asked what is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 0.2
BETA = 0.1
ENTROPY_COEF = 0.01
GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05
GROUP = 8
LENGTH = 64
"""Tokens of a sequence in the ops with a head: all equal, so that a mean over sequences is a mean over tokens."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """N scored tokens, hidden size D, vocabulary V; for ops on tokens alone D and V are 0, and `length` counts."""

    name: str
    n: int
    d: int
    v: int
    length: int = LENGTH
    softcap: float | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 32, 507),
        Shape("tiny-softcap", 128, 32, 507, softcap=5.0),
        Shape("small", 512, 128, 4096),
        Shape("cpu", 2048, 512, 32000),
        Shape("qwen2.5-0.5b", 8192, 896, 151936),
        Shape("llama-3.2-1b", 8192, 2048, 128256),
        Shape("qwen3-8b", 8192, 4096, 151936),
        Shape("gemma-2-2b", 8192, 2304, 256000, softcap=30.0),
    )
}
"""Heads. `NAME@N` takes another N, as in qwen3-8b@64k."""

TOKENS = {
    shape.name: shape
    for shape in (
        Shape("tiny", 256, 0, 0, length=16),
        Shape("small", 16384, 0, 0, length=256),
        Shape("cpu", 256 * 4096, 0, 0, length=4096),
        Shape("4m", 4096 * 1024, 0, 0, length=1024),
        Shape("16m", 4096 * 4096, 0, 0, length=4096),
    )
}
"""Batches for the ops on tokens alone."""


class Op(NamedTuple):
    """An operation: its outputs, and its floor in products with the head, passes over the logits, or bytes a token.

    `uses` names the options that make a difference to it: zero_rows, masked. `grain` tokens stand behind one number.
    """

    name: str
    outputs: tuple[str, ...]
    products: int = 0
    passes: int = 0
    bytes: int = 0
    grain: int = 1
    uses: tuple[str, ...] = ()
    about: str = ""


_GRADS = ("loss", "dhidden", "dweight")
_BOTH = ("zero_rows", "masked")
OPS = {
    op.name: op
    for op in (
        Op("logprob", ("logprob",), 1, uses=("masked",), about="log-probabilities under a linear head, no gradient"),
        Op("logprob_grad", ("logprob", *_GRADS[1:]), 3, uses=_BOTH, about="the same, forward and backward"),
        Op("cross_entropy", _GRADS, 3, uses=("masked",), about="mean cross-entropy, with gradients"),
        Op("grpo", _GRADS, 3, uses=_BOTH, about="GRPO loss from hidden states, with gradients"),
        Op("ppo", _GRADS, 3, uses=_BOTH, about="PPO loss with an advantage a token and an entropy bonus"),
        Op("dpo", _GRADS, 4, uses=("masked",), about="DPO from hidden states of policy and reference, with gradients"),
        Op("forward_kl", _GRADS, 4, uses=("masked",), about="KL(reference || policy) of two heads, with gradients"),
        Op("jsd", _GRADS, 4, uses=("masked",), about="mean Jensen-Shannon divergence of two heads, with gradients"),
        Op("from_logits", ("logprob",), passes=1, about="log-probabilities from existing logits, no gradient"),
        Op("from_logits_grad", ("logprob", "dlogits"), passes=3, about="the same, forward and backward"),
        # logprob, old_logprob, mask (1 byte) read, dlogprob written; a sequence's advantage is nothing beside them
        Op("policy", ("loss", "dlogprob"), bytes=13, uses=_BOTH, about="GRPO loss from log-probs, with gradient"),
        Op("gae", ("advantages", "returns"), bytes=16, about="GAE of rewards and values"),
        # scores to whitened advantages: values, logprob, ref_logprob, mask read; advantages, returns written;
        # the advantages read and written once more when their moments are known
        Op("advantages", ("advantages", "returns"), bytes=29, uses=("masked",), about="score, KL, GAE, whitening"),
        Op("group", ("advantages",), bytes=8, grain=256, about=f"group advantages, groups of {GROUP}"),
        # moments read x and mask once, the rest reads them again and writes
        Op("whiten", ("whitened",), bytes=14, uses=("masked",), about="masked whitening"),
    )
}


def on_tokens(op: str) -> bool:
    """Whether the op knows no vocabulary."""
    return OPS[op].bytes > 0


def parse_shape(text: str, op: str = "logprob") -> Shape:
    """A named shape, NAME@N, `N,D,V`, or `BxT` for ops on tokens alone. ValueError names the known ones."""
    known = TOKENS if on_tokens(op) else SHAPES
    name, _, rows = text.lower().partition("@")
    if name in known and not rows:
        return known[name]
    if name in known and _count(rows):
        return known[name]._replace(name=text.lower(), n=_count(rows))
    sizes = [_count(part) for part in text.lower().replace("x", ",").split(",")]
    if len(sizes) == 3 and all(sizes) and not on_tokens(op):
        return Shape("custom", *sizes)
    if len(sizes) == 2 and all(sizes) and on_tokens(op):
        return Shape("custom", sizes[0] * sizes[1], 0, 0, length=sizes[1])
    form = "BxT" if on_tokens(op) else "N,D,V, NAME@N"
    raise ValueError(f"shape of {op} must be {form} or one of {', '.join(known)}, got {text!r}")


def shapes_for(op: str, texts: Iterable[str]) -> list[Shape]:
    """The shapes among `texts` that suit the op; a model's name gives ops on tokens alone their largest common one.

    ValueError when a text means nothing to any op.
    """
    found: list[Shape] = []
    for text in texts:
        try:
            found.append(parse_shape(text, op))
        except ValueError as error:
            try:
                other = parse_shape(text, "logprob" if on_tokens(op) else "gae")
            except ValueError:
                raise error from None
            if on_tokens(op) and other.name != "custom":
                found.append(TOKENS["4m"])
    return list(dict.fromkeys(found))


def _count(text: str) -> int:
    """A positive integer, in thousands of 1024 with k; 0 when it is none."""
    text = text.strip()
    times, text = (1024, text[:-1]) if text.endswith("k") else (1, text)
    return int(text) * times if text.isdigit() else 0


class Case(NamedTuple):
    """An op at a shape and dtype.

    `zero_rows` is the share of rows whose gradient is zero (sequences of advantage 0), `masked` that of the tokens of
    every sequence that do not count (target -100, mask False).
    """

    op: str
    shape: Shape
    dtype: str
    zero_rows: float = 0.0
    device: str = "cpu"
    masked: float = 0.0

    @property
    def label(self) -> str:
        return label(self.op, *self.shape[1:5], self.dtype, self.zero_rows, self.masked)


def label(op: str, n: int, d: int, v: int, length: int, dtype: str, zero_rows: float, masked: float) -> str:
    """A case in words."""
    size = f"({n // length} x {length})" if on_tokens(op) else f"({n}, {d}, {v})"
    share = f", {zero_rows:.0%} zero advantages" if zero_rows else ""
    return f"{op} {size} {dtype}{share}" + (f", {masked:.0%} masked" if masked else "")


def make_cases(
    ops: Iterable[str],
    shapes: Iterable[str],
    dtypes: Iterable[str],
    zero_rows: Iterable[float] = (0.0,),
    masked: Iterable[float] = (0.0,),
    device: str = "cpu",
) -> Iterator[Case]:
    """Every combination that means something, once: an option that an op does not use is left at 0."""
    shapes, dtypes, zero_rows, masked = list(shapes), list(dtypes), list(zero_rows), list(masked)
    seen = set()
    for op in ops:
        uses = OPS[op].uses
        for shape in shapes_for(op, shapes):
            for dtype in ["fp32"] if on_tokens(op) else dtypes:
                for zero in zero_rows if "zero_rows" in uses else [0.0]:
                    for share in masked if "masked" in uses else [0.0]:
                        case = Case(op, shape, dtype, zero, device, share)
                        if case not in seen:
                            seen.add(case)
                            yield case


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

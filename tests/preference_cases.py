"""Pairs to test preference losses on, and every loss once more as scalar arithmetic on Python floats."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEEDED = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
BATCH_KINDS = ("aot", "aot_unpaired")
DIFFERENCE_KINDS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft")


class Pairs(NamedTuple):
    """P pairs of ragged length, per token and padded; what stands under False is NaN."""

    chosen: Tensor  # (P, T)
    rejected: Tensor  # (P, T')
    ref_chosen: Tensor
    ref_rejected: Tensor
    mask: tuple[Tensor, Tensor]

    def sums(self) -> list[Tensor]:
        """chosen, rejected, ref_chosen, ref_rejected as (P,)."""
        return [torch.where(m, x, 0).sum(1) for x, m in zip(self[:4], self.mask * 2, strict=True)]

    def lengths(self) -> tuple[Tensor, Tensor]:
        return tuple(m.sum(1) for m in self.mask)


def make_pairs(pairs: int = 5, width: int = 7, seed: int = 0, dtype=torch.float64) -> Pairs:
    gen = torch.Generator().manual_seed(seed)

    def tokens(t: int, mask: Tensor, spread: float) -> Tensor:
        values = -torch.rand(pairs, t, generator=gen, dtype=torch.float64) * spread - 0.05
        return torch.where(mask, values, torch.nan).to(dtype)

    widths = (width, width + 2)
    masks = []
    for t in widths:  # holes, too
        mask = torch.rand(pairs, t, generator=gen) < 0.7
        mask[:, 1] = True
        masks.append(mask)
    policy = [tokens(t, m, 4.0) for t, m in zip(widths, masks, strict=True)]
    ref = [tokens(t, m, 3.0) for t, m in zip(widths, masks, strict=True)]
    return Pairs(*policy, *ref, tuple(masks))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def smooth(x: float, e: float) -> float:
    return (1 - e) * softplus(-x) + e * softplus(x)


def scalar_loss(kind: str, w, l, rw, rl, nw, nl, *, beta=0.1, e=0.0, score=lambda x: x, **more) -> float:  # noqa: E741
    """One pair's loss. w, l: log-probabilities; rw, rl: the reference's; nw, nl: lengths; score: f'."""
    a, b = w - rw, l - rl
    fa, fb = score(a), score(b)
    x = beta * (fa - fb)
    p, q = sigmoid(x), sigmoid(-x)
    odds = [math.exp(v / n) / (1 - math.exp(v / n)) for v, n in ((w, nw), (l, nl))] if kind == "orpo" else []
    return {
        "sigmoid": lambda: smooth(x, e),
        "sigmoid_norm": lambda: smooth(beta * (fa / nw - fb / nl), e),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (fa / nw - fb / nl - 1 / (2 * beta)) ** 2,
        "ipo_sum": lambda: (fa - fb - 1 / (2 * beta)) ** 2,
        "robust": lambda: ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e),
        "exo_pair": lambda: p * math.log(p / (1 - e)) + q * math.log(q / e),
        "nca_pair": lambda: softplus(-beta * a) + softplus(beta * a) / 2 + softplus(beta * b) / 2,
        "bco_pair": lambda: softplus(more.get("delta", 0) - beta * a) + softplus(beta * b - more.get("delta", 0)),
        "sppo_hard": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo_zero": lambda: sigmoid(-beta * a) + sigmoid(beta * b),
        "apo_down": lambda: sigmoid(beta * a) + sigmoid(-beta * (a - b)),
        "discopop": lambda: sigmoid(-x / 0.05) * softplus(-x) + sigmoid(x / 0.05) * math.exp(-x),
        "sft": lambda: -w / nw,
        "cpo": lambda: smooth(beta * (w - l), e) - w / nw,
        "simpo": lambda: smooth(beta * (w / nw - l / nl) - more.get("gamma", 0.5), e),
        "orpo": lambda: -w / nw + beta * softplus(-math.log(odds[0] / odds[1])),
    }[kind]()


def scalar_batch_loss(kind: str, w, l, rw, rl, *, beta=0.1, e=0.0) -> float:  # noqa: E741
    """The mean of aot and aot_unpaired."""
    if kind == "aot":
        left = sorted(x - y for x, y in zip(w, l, strict=True))
        right = sorted(x - y for x, y in zip(rw, rl, strict=True))
    else:
        left = sorted(x - y for x, y in zip(w, rw, strict=True))
        right = sorted(x - y for x, y in zip(l, rl, strict=True))
    return sum(smooth(beta * (x - y), e) for x, y in zip(left, right, strict=True)) / len(left)

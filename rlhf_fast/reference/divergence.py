"""Divergence between the distributions of two heads over the whole vocabulary: the plain formulas.

Notation: s, s' shaped logits of the policy and the reference, p = softmax(s), q = softmax(s'), a = ref_share.

    forward   KL(q || p) = sum_j q_j (log q_j - log p_j)
    reverse   KL(p || q) = sum_j p_j (log p_j - log q_j)
    jsd       a KL(q || M) + (1 - a) KL(p || M),   M = a q + (1 - a) p

and their gradients with respect to the shaped logits,

              d / d s_j                                      d / d s'_j
    forward   p_j - q_j                                      q_j (log q_j - log p_j - KL(q || p))
    reverse   p_j (log p_j - log q_j - KL(p || q))           q_j - p_j
    jsd       (1 - a) p_j (log p_j - log M_j - KL(p || M))   a q_j (log q_j - log M_j - KL(q || M))

A sum over j with a first factor of exactly 0 has no such term: 0 log 0 = 0, and 0 * inf = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.types import DivergenceLoss


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_probs(
    logits: Tensor, counts: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """log_softmax of the shaped logits (..., V); rows that do not count are uniform."""
    x = logits.to(_stat_dtype(logits.dtype)) * logit_scale
    x = torch.where(counts.unsqueeze(-1), x, torch.zeros_like(x))  # NaN in a masked row stays there
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return torch.log_softmax(x / temperature, dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) (...): where a_j = 0 the inputs are replaced, so that no inf - inf reaches value or gradient."""
    absent = log_a == -torch.inf
    zero = torch.zeros_like(log_a)
    difference = torch.where(absent, zero, log_a) - torch.where(absent, zero, log_b)
    return (log_a.exp() * difference).sum(-1)


def divergence_from_log_probs(log_p: Tensor, log_q: Tensor, *, kind: str, ref_share: float = 0.5) -> Tensor:
    """Divergence (...) between p (policy) and q (reference), both (..., V)."""
    if kind == "forward":
        return _kl(log_q, log_p)
    if kind == "reverse":
        return _kl(log_p, log_q)
    if kind != "jsd":
        raise ValueError(f"kind must be forward, reverse or jsd, got {kind!r}")
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp of two -inf has a NaN gradient
    zero = torch.zeros_like(log_p)
    log_m = torch.logaddexp(
        torch.where(absent, zero, log_p) + math.log1p(-ref_share),
        torch.where(absent, zero, log_q) + math.log(ref_share),
    )
    return ref_share * _kl(log_q, log_m) + (1 - ref_share) * _kl(log_p, log_m)


def linear_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D')
    ref_weight: Tensor,  # (V, D')
    *,
    kind: str = "reverse",
    ref_share: float = 0.5,
    weights: Tensor | None = None,  # (...)
    mask: Tensor | None = None,  # (...) bool
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_options: dict[str, Any] | None = None,
) -> Tensor | DivergenceLoss:
    """Divergence of `hidden @ weight.T + bias` and `ref_hidden @ ref_weight.T + ref_bias`, row by row."""
    counts = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask
    if weights is not None:
        counts = counts & (weights != 0)
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    log_p = _log_probs(torch.nn.functional.linear(hidden, weight, bias), counts, **options)
    ref = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    log_q = _log_probs(ref, counts, **options | (ref_options or {}))
    divergence = divergence_from_log_probs(log_p, log_q, kind=kind, ref_share=ref_share)
    divergence = torch.where(counts, divergence, torch.zeros_like(divergence))
    if weights is None:
        return divergence
    share = torch.where(counts, weights, torch.zeros_like(weights)).to(divergence.dtype)
    return DivergenceLoss((share * divergence).sum(), divergence.detach())

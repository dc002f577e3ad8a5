"""Log-probabilities of given targets, their entropy, and a loss over them: the plain formulas.

Notation: z raw logits, s = softcap(z * logit_scale) / temperature, p = softmax(s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.types import FusedLoss, LogProb, TokenLogProb


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logprob_from_logits(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...) or (..., K)
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
) -> LogProb:
    """log p(target), the entropy of p and log-sum-exp of s, for logits that exist. `target` may be (..., K)."""
    several = target.dim() == logits.dim()
    index = target if several else target.unsqueeze(-1)
    scored = index != ignore_index
    row = scored.any(-1)
    x = logits.to(_stat_dtype(logits.dtype)) * logit_scale
    x = torch.where(row.unsqueeze(-1), x, torch.zeros_like(x))  # NaN in an ignored row stays there
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)  # Gemma 2, section 2
    s = x / temperature
    log_p = torch.log_softmax(s, dim=-1)
    picked = log_p.gather(-1, index.long().masked_fill(~scored, 0))
    picked = torch.where(scored, picked, torch.zeros_like(picked))
    h, zero = None, torch.zeros_like(s[..., 0])
    if entropy:
        plogp = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * log_p)
        h = torch.where(row, -plogp.sum(-1), zero)
    lse = torch.where(row, torch.logsumexp(s, -1), zero)
    return LogProb(picked if several else picked.squeeze(-1), h, lse)


def linear_logprob(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    token_stats: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,  # (r, D), (V, r), scaling
) -> LogProb | TokenLogProb:
    """`logprob_from_logits` of `hidden @ weight.T + bias`, with weight + scaling b @ a under `lora`."""
    if lora is not None:
        a, b, scaling = lora
        weight = weight + scaling * (b @ a)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    out = logprob_from_logits(logits, target, ignore_index=ignore_index, entropy=entropy, **options)
    if not token_stats:
        return out
    s = logits.detach().to(_stat_dtype(logits.dtype)) * logit_scale
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    scored = target != ignore_index
    log_sum_sq = torch.logsumexp(2 * torch.log_softmax(s, -1), -1).masked_fill(~scored, 0)
    return TokenLogProb(*out, log_sum_sq, s.mean(-1).masked_fill(~scored, 0), (s.argmax(-1) == target) & scored)


def fused_linear_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    loss_fn: Callable[..., Any],
    *,
    batch: Mapping[str, Any] | None = None,
    segments: Tensor | None = None,  # (S + 1,)
    entropy: bool = False,
    **head: Any,
) -> FusedLoss:
    """`loss_fn` over all scored rows at once, differentiated by autograd. Same contract as the fused op."""
    n = target.numel()
    ignore_index = head.get("ignore_index", -100)
    want_entropy = entropy or getattr(loss_fn, "needs_entropy", False)
    out = linear_logprob(hidden, weight, target, entropy=want_entropy, **head)
    scored = (target != ignore_index).reshape(-1)
    batch = {
        k: v.reshape(-1) if torch.is_tensor(v) and v.shape == target.shape else v for k, v in (batch or {}).items()
    }
    if hasattr(loss_fn, "prepare"):
        batch = loss_fn.prepare(batch, scored, segments)
    batch = {k: v[scored] if torch.is_tensor(v) and v.dim() and v.shape[0] == n else v for k, v in batch.items()}
    if segments is not None:
        lengths = (segments[1:] - segments[:-1]).long()
        ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        batch |= {"segment_ids": ids[scored], "num_segments": len(lengths)}
    h = out.entropy.reshape(-1)[scored] if want_entropy else None
    value = loss_fn(out.logprob.reshape(-1)[scored], h, batch)
    loss, metrics = value if isinstance(value, tuple) else (value, {})
    return FusedLoss(loss, out.logprob.detach(), out.entropy.detach() if want_entropy else None, metrics)


def entropy_from_logits(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """-sum_j p_j log p_j."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return logprob_from_logits(logits, target, entropy=True, **options).entropy

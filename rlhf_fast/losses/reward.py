"""`reward_loss`: training a reward model from pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast import _checks
from rlhf_fast.ops.kl import keep
from rlhf_fast.types import LossMetrics


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center: float = 0.0,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> LossMetrics:
    """Bradley-Terry loss of a reward model's scores, averaged over the pairs, and its metrics.

        L = mean [-(1 - e) log sigmoid(d) - e log sigmoid(-d) + center (chosen + rejected)^2],
        d = chosen - rejected - margin,  e = label_smoothing

    Equivalent to `reference.reward_loss`.

    Args:
        chosen, rejected: (B,) scores. Differentiable.
        margin: (B,) or a number: by how much better chosen is known to be. Constant.
        center: coefficient of the term that keeps scores around 0 (TRL: center_rewards_coefficient); try 0.01.
        label_smoothing: probability of a flipped label, in [0, 0.5).
        mask: (B,) bool. True = counts.
        normalizer: global count of pairs; None: those of this batch that count.
    Returns: LossMetrics(loss (), metrics), fp32 (fp64 for fp64 input). metrics: rewards/{chosen,rejected,margins,
        accuracies} (means), rewards_max, rewards_min.
    Raises: ValueError naming the tensor, expected and got.
    Source: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; center: Eisenstein et al. 2023,
        eq. 2. As TRL 1.16, which has no label_smoothing.
    Notes: no pair that counts: loss 0, zero gradients, finite metrics.
    Example:
        >>> chosen = torch.tensor([1.0, 0.2], requires_grad=True)
        >>> reward_loss(chosen, torch.tensor([0.5, 0.4]), margin=0.1, center=0.01).loss.backward()
    """
    _checks.check_float("chosen", chosen)
    _checks.check_float("rejected", rejected)
    if chosen.dim() != 1:
        raise ValueError(f"chosen must be (B,), got {_checks.shape_str(chosen.shape)}")
    _checks.check_shape("rejected", rejected, chosen.shape, "(B,)")
    center = _checks.check_number("center", center, least=0)
    if not 0 <= _checks.check_number("label_smoothing", label_smoothing) < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if normalizer is not None:
        _checks.check_scalar("normalizer", normalizer, positive=True)
    _checks.check_same_device(chosen=chosen, rejected=rejected, mask=mask)
    dtype = torch.float64 if torch.float64 in (chosen.dtype, rejected.dtype) else torch.float32
    if mask is not None:
        _checks.check_mask("mask", mask, chosen.shape, "(B,)")
    valid = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask.bool()
    if margin is not None and not isinstance(margin, Tensor):
        margin = _checks.check_number("margin", margin)
    if isinstance(margin, Tensor):
        _checks.check_float("margin", margin)
        _checks.check_same_device(chosen=chosen, margin=margin)
        _checks.check_shape("margin", margin, chosen.shape, "(B,)")
        margin = keep(margin.detach().to(dtype), valid)
    win, lose = keep(chosen.to(dtype), valid), keep(rejected.to(dtype), valid)
    d = win - lose if margin is None else win - lose - margin
    losses = -logsigmoid(d)
    if label_smoothing != 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-d)
    if center != 0:
        losses = losses + center * (win + lose).square()
    share = valid.to(dtype) / (valid.sum().clamp(min=1) if normalizer is None else normalizer)
    with torch.no_grad():
        values = {"chosen": win, "rejected": lose, "margins": win - lose, "accuracies": (win > lose).to(dtype)}
        metrics = {f"rewards/{name}": torch.dot(share, value) for name, value in values.items()}
        metrics["rewards_max"], metrics["rewards_min"] = _range(torch.cat([win, lose]), valid.repeat(2))
    return LossMetrics(torch.dot(share, losses), metrics)


def _range(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest valid value, 0 when there is none."""
    if values.numel() == 0:
        return values.new_zeros(()), values.new_zeros(())
    some = valid.any()
    high = torch.where(valid, values, -torch.inf).max()
    low = torch.where(valid, values, torch.inf).min()
    return torch.where(some, high, 0.0), torch.where(some, low, 0.0)

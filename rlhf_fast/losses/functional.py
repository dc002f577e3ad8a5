"""`policy_loss`: a policy loss of a whole batch in one call, padded or packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.losses.prepare import prepare_batch
from rlhf_fast.losses.registry import made_once, variant
from rlhf_fast.types import Metrics


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    kind: str | PolicyLoss = "ppo",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    importance_weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Policy-gradient loss of a batch and its metrics.

        r = exp(logprob - old_logprob)
        ppo: L = -mean_mask min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL - entropy_coef mean_mask H

    Equivalent to `reference.policy_loss`; for the clip family forward and gradient are one pass.

    Args:
        logprob: (N,) or (B, T) float. Differentiable.
        old_logprob: the same shape, constant. None: on-policy, the ratio is exactly 1 and the gradient flows.
        advantages: (N,), (B, T), or one per sequence, (S,), (B,) or (B, 1). Constant.
        kind: a registered name, or a `PolicyLoss` (then without options).
        mask: bool, shape of logprob. True = counts. What stands under False matters to nothing.
        cu_seqlens: (S+1,) int, for (N,) input: needed by all that knows sequences.
        ref_logprob: needed when beta != 0. Constant.
        entropy: needed by entropy_coef (then differentiable) and top_entropy; otherwise a metric.
        rollout_logprob: the sampler's log-probabilities, for `correction` and `off_policy_threshold`. NaN: unknown,
            taken as equal to old_logprob.
        importance_weight: finished weights of the policy term in the place of `correction`, whatever bounded them and
            whatever they reject (0); the KL and the entropy keep theirs. The shapes of `advantages`. Constant.
        options: those of `PolicyLoss`, and the kind's own parameters. clip_low given alone is symmetric.
    Returns: (loss (), metrics), fp32 (fp64 for fp64 input), on the input's device. Metrics are means over tokens
        (sequence-level ratios too, where TRL averages over sequences), constants, never moved to the host.
    Raises: ValueError naming the tensor or option, what was expected and what came.
    Source: see `losses.variants` for each kind's paper and where TRL 1.16 and verl differ.
    Notes: log-ratios are clamped to +-20 before exp. All-masked input: loss 0, zero gradients, finite metrics. The
        numbers of a cu_seqlens on the GPU are not looked at (that would wait for the device): where they do not rise
        from 0 to N the loss is NaN.
    Example:
        >>> logprob = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
        >>> loss, metrics = policy_loss(logprob, None, torch.tensor([1.0]), kind="grpo")
        >>> loss.backward()
    """
    if isinstance(kind, PolicyLoss) and options:
        raise ValueError(f"options must be in the PolicyLoss given as kind, got {', '.join(options)} beside it")
    loss_fn = kind if isinstance(kind, PolicyLoss) else made_once(PolicyLoss, kind, options, variant)
    _check(logprob, advantages, mask, old_logprob=old_logprob, ref_logprob=ref_logprob, entropy=entropy,
           rollout_logprob=rollout_logprob)  # fmt: skip
    padded = logprob.dim() == 2
    if padded and cu_seqlens is not None:
        raise ValueError("cu_seqlens goes with (N,) input; for (B, T) give a mask")
    batch: dict[str, Any] = {"old_logprob": old_logprob, "ref_logprob": ref_logprob}
    batch.update(rollout_logprob=rollout_logprob, logprob=logprob.detach())
    if entropy is not None and loss_fn.top_entropy is not None:
        batch["old_entropy"] = entropy.detach()
    batch["advantages"] = _token_or_row("advantages", advantages, logprob) if padded else advantages
    if importance_weight is not None:
        _checks.check_float("importance_weight", importance_weight)
        _checks.check_same_device(logprob=logprob, importance_weight=importance_weight)
        weight = _token_or_row("importance_weight", importance_weight, logprob) if padded else importance_weight
        batch["importance_weight"] = weight
    batch = {name: _flat(t) for name, t in batch.items()}
    length = logprob.shape[1] if padded else None
    batch = prepare_batch(loss_fn, batch, _flat(mask), cu_seqlens, length=length, whole=True)
    return loss_fn(_flat(logprob), _flat(entropy), batch)


def _check(logprob: Tensor, advantages: Tensor, mask: Tensor | None, **others: Tensor | None) -> None:
    """Raise unless the tensors are what the docstring says, but for the shape of advantages."""
    _checks.check_float("logprob", logprob)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"logprob must be (N,) or (B, T), got {_checks.shape_str(logprob.shape)}")
    dims = "(B, T)" if logprob.dim() == 2 else "(N,)"
    if not _checks.alike(logprob, *others.values()):
        for name, tensor in others.items():
            if tensor is not None:
                _checks.check_float(name, tensor)
                _checks.check_shape(name, tensor, logprob.shape, dims)
    if mask is not None:
        _checks.check_mask("mask", mask, logprob.shape, dims)
    _checks.check_float("advantages", advantages)
    _checks.check_same_device(logprob=logprob, **others, mask=mask, advantages=advantages)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _token_or_row(name: str, tensor: Tensor, logprob: Tensor) -> Tensor:
    """(B, T), (B,) or (B, 1) -> (B T,) or (B,); (0,) where T = 0."""
    _checks.check_tensor(name, tensor)
    rows, columns = logprob.shape
    shape = tuple(tensor.shape)
    if shape not in ((rows, columns), (rows,), (rows, 1)):
        raise ValueError(f"{name} must be (B, T)=({rows}, {columns}) or (B,)=({rows},), got {_checks.shape_str(shape)}")
    return tensor.reshape(-1) if columns else tensor.new_empty(0)  # no token belongs to any row

"""verl with our head, losses and advantages: `patch()`, `unpatch()`, or `with patch(): ...`.

    linear_cross_entropy, FusedLinearForPPO     both fused-kernel backends: log-probabilities without logits
    compute_gae_advantage_return                a scan instead of a loop over the response
    policy losses        loss_mode: rlhf_fast_ppo, _gspo, _cispo, ... (every registered policy loss, see `losses`)
    advantages           adv_estimator: rlhf_fast_grpo, _dr_grpo, _rloo, _opo, _pass_at_k, _reinforce_plus_plus,
                         _reinforce_plus_plus_baseline

Call it in every worker process, for instance from a module that `actor_rollout_ref.model.external_lib` names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.integrations._patching import Expect, Patch, PatchError, Register, Replace
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.losses.prepare import prepare_batch
from rlhf_fast.losses.registry import made_once, policy_loss_kinds, variant
from rlhf_fast.ops.advantages import advantage_options, group_advantages
from rlhf_fast.ops.kl import MAX_LOG_RATIO, keep
from rlhf_fast.ops.linear import linear_logprob
from rlhf_fast.ops.policy import segment_counts
from rlhf_fast.ops.value import discounted_returns, gae, masked_whiten

VERSIONS = ">=0.9,<0.10"
PREFIX = "rlhf_fast_"
EPS = 1e-6  # verl's, beside the std of a group
CORE = "verl.trainer.ppo.core_algos"
# Kinds that are "ppo" here: aggregation and clips come from verl's own config.
SAME_AS_PPO = ("grpo", "dapo", "dr_grpo", "bnpo")

_patch: Patch | None = None


def patch(*, any_version: bool = False) -> Patch:
    """Put our functions in the place of verl's and into its registries; undone by `unpatch()` or a `with` block.

    Args:
        any_version: accept other releases if every signature is the known one.
    Returns: the patch, a context manager.
    Raises: PatchError, and nothing is changed, when verl is missing or of another version, when a signature is not the
        known one, when somebody else has replaced a symbol or taken a name, or when the patch is in place already.
    """
    global _patch
    if _patch is not None and _patch.active:
        raise PatchError("verl is patched already: call unpatch() first")
    _patch = Patch("verl", VERSIONS, _changes()).apply(any_version=any_version)
    return _patch


def unpatch() -> None:
    """Take `patch` back."""
    if _patch is not None:
        _patch.undo()


# ---- the head


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy), each (N,) fp32. A head that is spread over several ranks stays with verl's kernel, whose
    gradient of the hidden states is the rank's part alone, for Megatron to sum.
    """
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        return _LINEAR.original(hidden, weight, labels, temperature, reduction, dist_process_group)
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be 'none', got {reduction!r}")
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    out = linear_logprob(flat, weight, labels, temperature=float(temperature), entropy=True)
    return out.logprob, out.entropy


def fused_linear_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`FusedLinearForPPO.forward`: (logprob, entropy) of the shape of input_ids, both fp32."""
    options = dict(temperature=float(temperature), entropy=True)
    out = linear_logprob(hidden_states, vocab_weights, input_ids.to(torch.int64), **options)
    return out.logprob, out.entropy


# ---- policy losses


def registered_policy_loss(
    kind: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss of ours as verl calls it: (B, T) tensors, its clips, its aggregation, its metrics."""
    rows, width = response_mask.shape
    mask = response_mask.bool().reshape(-1)
    lengths = segment_counts(mask, None, rows, width)
    options = {**_clips(kind, config), **_own_options(kind, config)}
    info = getattr(config, "global_batch_info", None) or {}
    options["aggregation"], normalizer = _aggregation(kind, loss_agg_mode, lengths, width, info)
    loss_fn = made_once(PolicyLoss, kind, options, variant)
    flat = log_prob.reshape(-1)
    batch = {"old_logprob": old_log_prob.reshape(-1), "logprob": flat.detach(), "advantages": advantages.reshape(-1)}
    batch |= {"normalizer": normalizer, "num_tokens": lengths.sum().clamp(min=1)}
    batch = prepare_batch(loss_fn, batch, mask, None, length=width, whole=True)
    if rollout_is_weights is not None:
        if kind == "geo_mean":
            raise ValueError("rollout_is_weights are per token, rlhf_fast_geo_mean has one ratio a sequence")
        weights = keep(rollout_is_weights.to(log_prob.dtype).reshape(-1), mask)
        batch["policy_weight"] = weights * batch.get("policy_weight", 1.0)
    loss, metrics = loss_fn(flat, None, batch)
    drift = keep(old_log_prob.reshape(-1) - flat.detach(), mask).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    named = {
        "actor/pg_clipfrac": metrics.get("clip_fraction"),
        "actor/ppo_kl": drift.sum() * batch["inv_tokens"],
        "actor/pg_clipfrac_lower": metrics.get("dual_clip_fraction"),
    }
    there = {name: value for name, value in named.items() if value is not None}
    values = torch.stack([v.detach().double() for v in there.values()]).tolist()  # one wait for the device
    return loss, dict.fromkeys(named, 0.0) | dict(zip(there, values, strict=True))


def _clips(kind: str, config: Any) -> dict[str, Any]:
    """verl's clip ranges. For cispo both are bounds of the ratio itself."""
    low, high = (
        config.clip_ratio if value is None else value for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if kind == "cispo":
        return {"clip_high": 1 + high, "ratio_min": max(1 - low, 0.0)}
    options = {"clip_low": low, "clip_high": high}
    return {**options, "dual_clip": config.get("clip_ratio_c", 3.0)} if kind == "ppo" else options


def _own_options(kind: str, config: Any) -> dict[str, Any]:
    if kind == "sapo":
        return {"temperature_pos": config.tau_pos, "temperature_neg": config.tau_neg}
    if kind == "gspo":
        return {"importance_level": "sequence_token"}
    if kind.startswith("dppo"):
        return {"ratio_max": config.get("clip_ratio_c", 20.0)}
    own = config.policy_loss
    if kind == "dro" and own.dro_beta is not None:
        return {"dro_beta": own.dro_beta}
    if kind == "clip_cov":
        return {"fraction": own.clip_cov_ratio, "cov_low": own.clip_cov_lb, "cov_high": own.clip_cov_ub}
    if kind == "kl_cov":
        return {"fraction": own.kl_cov_ratio, "coef": own.ppo_kl_coef}
    return {}


def _aggregation(kind: str, mode: str, lengths: Tensor, width: int, info: dict[str, Any]) -> tuple[str, Tensor | float]:
    """verl's `agg_loss` as our aggregation and its normalizer, with global counts; sequences without a token do not
    count."""
    if kind == "geo_mean":  # as verl's own: a mean over the rows, whatever the mode
        return "seq_mean_token_mean", lengths.numel()
    mode = "seq-mean-token-mean" if kind in ("gspo", "sapo") else mode  # as verl's own, whatever is asked
    ranks, tokens, sequences = (info.get(n) for n in ("dp_size", "batch_num_tokens", "global_batch_size"))
    ranks = ranks or 1
    if mode == "token-sum":
        return "token_mean", 1 / ranks
    by_token = mode == "token-mean"
    count, name = (tokens, "batch_num_tokens") if by_token else (sequences, "global_batch_size")
    if count is None:
        if ranks > 1:
            raise ValueError(f"{name} is required when dp_size > 1")
        count = (lengths if by_token else lengths > 0).sum().clamp(min=1)
    count = count / ranks
    if mode == "seq-mean-token-sum-norm":
        count = count * (info.get("loss_scale_factor") or width)
    aggregations = {"token-mean": "token_mean", "seq-mean-token-mean": "seq_mean_token_mean"}
    aggregations |= dict.fromkeys(("seq-mean-token-sum", "seq-mean-token-sum-norm"), "seq_mean_token_sum")
    if mode not in aggregations:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    return aggregations[mode], count


# ---- advantages: (token_level_rewards, response_mask, config, index, ...) -> (advantages, returns), both (B, T)


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl's GAE: masked tokens are skipped, advantages whitened over the batch. 0 where masked."""
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=mask)
    return masked_whiten(advantages, mask), returns


@torch.no_grad()
def group_estimator(
    name: str, token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """An outcome reward against the other responses to the prompt. `norm_adv_by_std_in_grpo` False: not divided."""
    options = advantage_options(name)
    if options["scale"] == "group" and config is not None and not config.get("norm_adv_by_std_in_grpo", True):
        options["scale"] = "none"
    advantages = _of_groups(token_level_rewards, response_mask, index, eps=EPS, **options)
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


@torch.no_grad()
def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Discounted returns, whitened over the tokens of the batch (Hu 2025, arXiv 2501.03262)."""
    mask = response_mask.bool()
    returns = discounted_returns(token_level_rewards, gamma=float(config.gamma), mask=mask)
    return masked_whiten(returns, mask), returns


@torch.no_grad()
def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, whitened over the tokens of the batch."""
    centred = _of_groups(token_level_rewards, response_mask, index, baseline="mean", scale="none")
    mask = response_mask.bool()
    advantages = masked_whiten(centred[:, None].expand(mask.shape).contiguous(), mask)
    return advantages, advantages


def _of_groups(rewards: Tensor, mask: Tensor, index: Any, **options: Any) -> Tensor:
    if index is None:
        raise ValueError("index must hold the prompt's uid of each response, got None")
    ids = np.unique(np.asarray(index.cpu() if isinstance(index, Tensor) else index), return_inverse=True)[1]
    ids = torch.from_numpy(np.ascontiguousarray(ids.reshape(-1))).to(rewards.device)
    lengths = mask.sum(-1) if options.get("baseline") == "opo" else None
    return group_advantages(rewards.sum(-1), group_ids=ids, lengths=lengths, **options).advantages


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    **{name: partial(group_estimator, name) for name in ("grpo", "dr_grpo", "rloo", "opo", "pass_at_k")},
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}

_KERNEL, _TORCH = "verl.utils.kernel.linear_cross_entropy", "verl.utils.experimental.torch_functional"
_LINEAR = Replace(_KERNEL, "linear_cross_entropy", linear_cross_entropy, {}, origin="torch.autograd")


def _changes() -> list[Expect | Register | Replace]:
    """Made when asked for: policy losses that the user has registered by then are among them."""
    kinds = [kind for kind in policy_loss_kinds() if kind not in SAME_AS_PPO and not variant(kind).absorbs_correction]
    loss = "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
    forward = "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)"
    return [
        Expect(
            _KERNEL,
            "LinearCrossEntropy",
            {"forward": "(ctx, hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)"},
        ),
        _LINEAR,
        Replace(_TORCH, "FusedLinearForPPO.forward", fused_linear_forward, {"": forward}),
        Replace(
            CORE,
            "compute_gae_advantage_return",
            compute_gae_advantage_return,
            {"": "(token_level_rewards, values, response_mask, gamma, lam)"},
        ),
        Expect(CORE, "compute_policy_loss_vanilla", {"": loss + "rollout_is_weights=None)"}),
        *(
            Register(CORE, "POLICY_LOSS_REGISTRY", PREFIX + kind, partial(registered_policy_loss, kind))
            for kind in kinds
        ),
        *(Register(CORE, "ADV_ESTIMATOR_REGISTRY", PREFIX + name, fn) for name, fn in ESTIMATORS.items()),
    ]


__all__ = ["PatchError", "patch", "unpatch"]

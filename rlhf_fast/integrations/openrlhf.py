"""OpenRLHF with our losses and log-probabilities: `patch()`, `unpatch()`, or `with patch(): ...`.

    log_probs_from_logits, compute_entropy    one read of the logits instead of several copies of them
    PolicyLoss, ValueLoss, DPOLoss            one pass over the tokens, forward and gradient
    compute_approx_kl                         k3 without cancellation near 0
    RemoteExperienceMaker's GAE               a scan instead of a loop over the response

Call it in every process that trains: with Ray, in the actors' start-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations._patching import Expect, Patch, PatchError, Replace
from rlhf_fast.losses import policy_loss, preference_loss
from rlhf_fast.ops.from_logits import entropy_from_logits, logprob_from_logits
from rlhf_fast.ops.kl import kl_estimate
from rlhf_fast.ops.value import gae
from rlhf_fast.ops.value_loss import value_loss

VERSIONS = ">=0.11,<0.12"
KL_BOUND = 10.0  # OpenRLHF clamps every estimate to it
KL_WEIGHT_BOUND = 10.0  # and the importance weight of its unbiased gradient


def patch(*, any_version: bool = False) -> Patch:
    """Put our functions in the place of OpenRLHF's; undone by `unpatch()`, or by leaving a `with` block.

    Modules and losses that exist already are served as well. A `PolicyLoss` whose rollout correction gates by
    divergence or by sequence keeps OpenRLHF's own formula.

    Args:
        any_version: accept other releases if every signature is the known one.
    Returns: the patch, a context manager.
    Raises: PatchError, and nothing is changed, when OpenRLHF is missing or of another version, when a signature is not
        the known one, when somebody else has replaced a symbol, or when the patch is in place already.
    """
    return PATCH.apply(any_version=any_version)


def unpatch() -> None:
    """Take `patch` back."""
    PATCH.undo()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """(...) fp32 log-probabilities of labels under logits (..., V). The logits stay as they are."""
    return logprob_from_logits(logits, labels, temperature=temperature).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    """(...) fp32 entropy of logits (..., V)."""
    return entropy_from_logits(logits)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """OpenRLHF's bounded estimate; `unbiased_gradient`: w times the gradient of k2, w = pi / pi_old bounded."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    value = kl_estimate(log_probs, log_probs_base, estimator=kl_estimator).clamp(-KL_BOUND, KL_BOUND)
    if not unbiased_gradient:
        return value
    slope = kl_estimate(log_probs, log_probs_base, estimator="k2")
    if log_probs_old is not None:
        slope = slope * (log_probs - log_probs_old).detach().exp().clamp(max=KL_WEIGHT_BOUND)
    return value.detach() + (slope - slope.detach())


def _aggregation(
    by_token: bool, mask: Tensor | None, like: Tensor, dp_size: int, tokens: float | None, sequences: float | None
) -> dict[str, Any]:
    """OpenRLHF's `aggregate_loss`: means by token or by sequence, with global counts; empty sequences do not count."""
    if by_token:
        return {"aggregation": "token_mean", "normalizer": None if tokens is None else tokens / dp_size}
    if sequences is None:
        filled = torch.full((), like.shape[0], device=like.device) if mask is None else mask.any(-1).sum()
        return {"aggregation": "seq_mean_token_mean", "normalizer": filled.clamp(min=1)}
    return {"aggregation": "seq_mean_token_mean", "normalizer": sequences / dp_size}


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`PolicyLoss.forward`: (loss, clip ratio, PPO KL, KL to the rollout, share of corrected tokens); the last two only
    with a correction.
    """
    gspo, corrects = self.policy_loss_type == "gspo", self.is_correction_level != "off"
    if corrects and not gspo and (self.is_correction_level != "token" or self.is_correction_gating != "ratio"):
        given = (action_mask, rollout_log_probs, dp_size, batch_num_tokens, global_batch_size)
        return _POLICY.original(self, log_probs, old_log_probs, advantages, *given)
    mask = None if action_mask is None else action_mask.bool()
    shared = _aggregation(self.token_level_loss, mask, log_probs, dp_size, batch_num_tokens, global_batch_size)
    options = dict(clip_low=self.clip_eps_low, clip_high=self.clip_eps_high, dual_clip=self.dual_clip, **shared)
    behaviour = old_log_probs
    if gspo:
        options["importance_level"] = "sequence"
        behaviour = rollout_log_probs if corrects else old_log_probs
    elif corrects:
        low, high = self.is_correction_threshold
        kind = "token_truncate" if self.is_correction_mode == "clip" else "token_mask"
        options.update(correction=kind, correction_min=low, correction_max=high)
    loss, metrics = policy_loss(
        log_probs,
        behaviour,
        advantages,
        kind="ppo",
        mask=mask,
        rollout_logprob=rollout_log_probs if corrects and not gspo else None,
        **options,
    )
    tokens = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    share = batch_num_tokens / dp_size if self.token_level_loss and batch_num_tokens is not None else None
    clip_ratio = metrics["clip_fraction"]
    if share is not None:  # metrics are means over this batch, the loss is a share of the global one
        clip_ratio = clip_ratio * share / tokens.sum()
    with torch.no_grad():
        ppo_kl = _masked_mean(old_log_probs - log_probs, tokens)
        if not corrects or gspo:
            return loss, clip_ratio, ppo_kl, None, None
        log_weight = old_log_probs - rollout_log_probs
        outside = (log_weight.exp() < low) | (log_weight.exp() > high)
        return loss, clip_ratio, ppo_kl, _masked_mean(-log_weight, tokens), _masked_mean(outside.float(), tokens)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def value_loss_forward(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """`ValueLoss.forward`."""
    mask = None if action_mask is None else action_mask.bool()
    shared = _aggregation(self.token_level_loss, mask, values, dp_size, batch_num_tokens, global_batch_size)
    return value_loss(values, old_values, returns, clip=self.clip_eps, mask=mask, **shared).loss


def dpo_loss_forward(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`DPOLoss.forward`: (loss, chosen rewards, rejected rewards)."""
    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    refs = (reference_chosen_logps, reference_rejected_logps)
    if self.ipo:
        loss, _ = preference_loss(chosen, rejected, *refs, kind="ipo", beta=self.beta, length_average=False)
    else:
        options = dict(beta=self.beta, label_smoothing=self.label_smoothing)
        loss, _ = preference_loss(chosen, rejected, *refs, kind="sigmoid", **options)
    return loss, self.beta * (chosen - refs[0]).detach(), self.beta * (rejected - refs[1]).detach()


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """GAE with OpenRLHF's reading of masked tokens (steps of no reward and no value). 0 where masked."""
    mask = None if action_mask is None else action_mask.bool()
    return tuple(gae(rewards, values, gamma=gamma, lam=lambd, mask=mask, mask_mode="zero"))


_LOSSES, _UTILS = "openrlhf.models.loss", "openrlhf.models.utils"
_COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None"
_POLICY = Replace(
    _LOSSES,
    "PolicyLoss.forward",
    policy_loss_forward,
    {
        "": "(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, " + _COUNTS + ")",
    },
)
PATCH = Patch(
    "openrlhf",
    VERSIONS,
    [
        Replace(_UTILS, "log_probs_from_logits", log_probs_from_logits, {"": "(logits, labels, temperature=1.0)"}),
        Replace(_UTILS, "compute_entropy", compute_entropy, {"": "(logits)"}),
        Replace(
            _UTILS,
            "compute_approx_kl",
            compute_approx_kl,
            {"": "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False)"},
        ),
        Expect(
            _LOSSES,
            "PolicyLoss",
            {
                "__init__": "(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, "
                "policy_loss_type='ppo', is_correction_level='off', is_correction_mode='mask', "
                "is_correction_gating='ratio', is_correction_threshold=(0.5, 5.0))"
            },
        ),
        Expect(_LOSSES, "ValueLoss", {"__init__": "(self, clip_eps=None, token_level_loss=True)"}),
        Expect(_LOSSES, "DPOLoss", {"__init__": "(self, beta, label_smoothing=0.0, ipo=False)"}),
        _POLICY,
        Replace(
            _LOSSES,
            "ValueLoss.forward",
            value_loss_forward,
            {"": "(self, values, old_values, returns, action_mask=None, " + _COUNTS + ")"},
        ),
        Replace(
            _LOSSES,
            "DPOLoss.forward",
            dpo_loss_forward,
            {
                "": "(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, "
                "reference_rejected_logps)"
            },
        ),
        Replace(
            "openrlhf.trainer.ppo_utils.experience_maker",
            "RemoteExperienceMaker.get_advantages_and_returns",
            get_advantages_and_returns,
            {"": "(self, values, rewards, action_mask, gamma, lambd)"},
        ),
    ],
)

__all__ = ["PATCH", "PatchError", "patch", "unpatch"]

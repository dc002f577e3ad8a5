"""Ready-made losses over log-probabilities."""

from rlhf_fast.losses.policy import PolicyLoss, policy_loss
from rlhf_fast.losses.registry import PolicyTerms, policy_loss_kinds, register_policy_loss

__all__ = ["PolicyLoss", "PolicyTerms", "policy_loss", "policy_loss_kinds", "register_policy_loss"]

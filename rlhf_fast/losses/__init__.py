"""Ready-made losses over log-probabilities."""

from rlhf_fast.losses.functional import policy_loss
from rlhf_fast.losses.kto import KTO, kto_kl, kto_loss
from rlhf_fast.losses.nll import NLL
from rlhf_fast.losses.pairs import PairSegments, pair_segments
from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.losses.preference import DPO, PreferenceLoss, preference_loss
from rlhf_fast.losses.preference_kinds import PairTerms, preference_loss_kinds, register_preference_loss
from rlhf_fast.losses.registry import PolicyTerms, policy_loss_kinds, register_policy_loss
from rlhf_fast.losses.reward import reward_loss

__all__ = [
    "DPO",
    "KTO",
    "NLL",
    "PairSegments",
    "PairTerms",
    "PolicyLoss",
    "PolicyTerms",
    "PreferenceLoss",
    "kto_kl",
    "kto_loss",
    "pair_segments",
    "policy_loss",
    "policy_loss_kinds",
    "preference_loss",
    "preference_loss_kinds",
    "register_policy_loss",
    "register_preference_loss",
    "reward_loss",
]

"""Fused kernels and thin trainers for reinforcement learning on language models.

    from rlhf_fast import fused_linear_loss, linear_logprob, group_advantages, policy_loss

`import rlhf_fast` needs torch alone. The formulas stand in `rlhf_fast.reference`, ready-made losses for
`fused_linear_loss` in `rlhf_fast.losses`, the trainers in `rlhf_fast.trainers`.
"""

from rlhf_fast import losses, reference
from rlhf_fast.losses import (
    KTO,
    PolicyLoss,
    PreferenceLoss,
    kto_loss,
    policy_loss,
    preference_loss,
    register_policy_loss,
    register_preference_loss,
    reward_loss,
)
from rlhf_fast.ops.advantages import advantage_options, group_advantages
from rlhf_fast.ops.divergence import linear_divergence
from rlhf_fast.ops.from_logits import entropy_from_logits, logprob_from_logits
from rlhf_fast.ops.fused import fused_linear_loss
from rlhf_fast.ops.kl import kl_estimate
from rlhf_fast.ops.linear import linear_logprob
from rlhf_fast.ops.ppo import ppo_advantages
from rlhf_fast.ops.value import discounted_returns, gae, masked_whiten, shape_rewards
from rlhf_fast.ops.value_loss import value_loss
from rlhf_fast.ops.vocab_parallel import vocab_parallel_logprob
from rlhf_fast.types import (
    DivergenceLoss,
    FusedLoss,
    Gae,
    GroupAdvantages,
    LogProb,
    LossMetrics,
    PpoAdvantages,
    ShapedRewards,
    ValueLoss,
)

__version__ = "0.1.0"

__all__ = [
    "DivergenceLoss",
    "FusedLoss",
    "Gae",
    "GroupAdvantages",
    "KTO",
    "LogProb",
    "LossMetrics",
    "PolicyLoss",
    "PpoAdvantages",
    "PreferenceLoss",
    "ShapedRewards",
    "ValueLoss",
    "advantage_options",
    "discounted_returns",
    "entropy_from_logits",
    "fused_linear_loss",
    "gae",
    "group_advantages",
    "kl_estimate",
    "kto_loss",
    "linear_divergence",
    "linear_logprob",
    "logprob_from_logits",
    "losses",
    "masked_whiten",
    "policy_loss",
    "ppo_advantages",
    "preference_loss",
    "reference",
    "register_policy_loss",
    "register_preference_loss",
    "reward_loss",
    "shape_rewards",
    "value_loss",
    "vocab_parallel_logprob",
]

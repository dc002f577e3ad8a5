"""Every formula once, in plain torch, any dtype: the oracle that judges the kernels.

Named like the public operations; autograd gives the gradients.
"""

from rlhf_fast.reference.advantages import group_advantages
from rlhf_fast.reference.divergence import linear_divergence
from rlhf_fast.reference.logprob import (
    entropy_from_logits,
    fused_linear_loss,
    linear_logprob,
    logprob_from_logits,
)
from rlhf_fast.reference.policy import kl_estimate, policy_loss
from rlhf_fast.reference.preference import kto_kl, kto_loss, preference_loss, reward_loss
from rlhf_fast.reference.value import (
    discounted_returns,
    gae,
    masked_whiten,
    ppo_advantages,
    shape_rewards,
    value_loss,
)
from rlhf_fast.reference.vocab_parallel import vocab_parallel_logprob

__all__ = [
    "discounted_returns",
    "entropy_from_logits",
    "fused_linear_loss",
    "gae",
    "group_advantages",
    "kl_estimate",
    "kto_kl",
    "kto_loss",
    "linear_divergence",
    "linear_logprob",
    "logprob_from_logits",
    "masked_whiten",
    "policy_loss",
    "ppo_advantages",
    "preference_loss",
    "reward_loss",
    "shape_rewards",
    "value_loss",
    "vocab_parallel_logprob",
]

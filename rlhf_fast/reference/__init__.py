"""Every formula once, in plain torch, any dtype: the oracle that judges the kernels.

Named like the public operations; autograd gives the gradients.
"""

from rlhf_fast.reference.logprob import (
    entropy_from_logits,
    fused_linear_loss,
    linear_logprob,
    logprob_from_logits,
)

__all__ = ["entropy_from_logits", "fused_linear_loss", "linear_logprob", "logprob_from_logits"]

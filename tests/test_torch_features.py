"""What callers do with torch around every op: masks of any dtype, forward mode, torch.func, pickling. On the CPU."""

import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, vmap

from rlhf_fast import (
    entropy_from_logits,
    fused_linear_loss,
    gae,
    kl_estimate,
    linear_divergence,
    linear_logprob,
    logprob_from_logits,
    masked_whiten,
    policy_loss,
    ppo_advantages,
    preference_loss,
    shape_rewards,
    value_loss,
)
from rlhf_fast.losses import PolicyLoss

torch.manual_seed(0)
HIDDEN, WEIGHT, TARGET = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(0, 7, (2, 3))
LOGITS, TOKENS = torch.randn(2, 3, 7), -torch.rand(2, 3)
OTHER = TOKENS - torch.rand(2, 3)

MASKED = {
    "gae": lambda m: gae(TOKENS, OTHER, mask=m).advantages,
    "kl_estimate": lambda m: kl_estimate(TOKENS, OTHER, mask=m),
    "linear_divergence": lambda m: linear_divergence(HIDDEN, WEIGHT, HIDDEN + 1, WEIGHT, mask=m),
    "masked_whiten": lambda m: masked_whiten(TOKENS, m),
    "policy_loss": lambda m: policy_loss(TOKENS, OTHER, TOKENS, mask=m)[0],
    "ppo_advantages": lambda m: ppo_advantages(TOKENS[:, 0], OTHER, mask=m).advantages,
    "preference_loss": lambda m: preference_loss(TOKENS, OTHER, OTHER, TOKENS, mask=(m, m)).loss,
    "shape_rewards": lambda m: shape_rewards(TOKENS[:, 0], TOKENS, OTHER, mask=m).rewards,
    "value_loss": lambda m: value_loss(TOKENS, OTHER, OTHER - 1, mask=m).loss,
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=["int64", "uint8", "fp32"])
@pytest.mark.parametrize("name", MASKED)
def test_masks_of_any_dtype(name, dtype):
    """A tokenizer's attention mask is int64; peers take floats."""
    mask = torch.tensor([[True, True, False], [False, True, True]])
    want = MASKED[name](mask)
    assert not torch.equal(want, MASKED[name](torch.ones_like(mask)))
    torch.testing.assert_close(MASKED[name](mask.to(dtype)), want, rtol=0, atol=0)


BACKWARD_ONLY = {
    "linear_logprob": (lambda x: linear_logprob(x, WEIGHT, TARGET).logprob, HIDDEN),
    "logprob_from_logits": (lambda x: logprob_from_logits(x, TARGET).logprob, LOGITS),
    "entropy_from_logits": (entropy_from_logits, LOGITS),
    "linear_divergence": (lambda x: linear_divergence(x, WEIGHT, HIDDEN + 1, WEIGHT), HIDDEN),
    "fused_linear_loss": (lambda x: fused_linear_loss(x, WEIGHT, TARGET, lambda l, h, b: l.sum()).loss, HIDDEN),
    "policy_loss": (lambda x: policy_loss(x, OTHER, TOKENS)[0], TOKENS),
    "kl_estimate": (lambda x: kl_estimate(x, OTHER), TOKENS),
    "masked_whiten": (masked_whiten, TOKENS),
}


@pytest.mark.parametrize("needs_grad", [False, True], ids=["constant", "differentiable"])
@pytest.mark.parametrize("name", BACKWARD_ONLY)
def test_forward_mode_is_an_error_and_not_a_zero(name, needs_grad):
    function, x = BACKWARD_ONLY[name]
    function(x)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="forward|jvp"):
        function(forward_ad.make_dual(x.clone().requires_grad_(needs_grad), torch.ones_like(x)))


@pytest.mark.parametrize("name", [n for n in BACKWARD_ONLY if n != "fused_linear_loss"])
def test_vmap(name):
    function, x = BACKWARD_ONLY[name]
    batch = torch.stack([x, x / 2, x - 1])
    torch.testing.assert_close(vmap(function)(batch), torch.stack([function(part) for part in batch]))


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_kl_estimate_under_torch_func(estimator):
    def total(x):
        return kl_estimate(x, OTHER, estimator=estimator).square().sum()

    x = TOKENS.clone().requires_grad_()
    want = torch.autograd.grad(total(x), x)[0]
    torch.testing.assert_close(grad(total)(TOKENS), want)
    torch.testing.assert_close(vmap(grad(total))(TOKENS.expand(2, 2, 3))[1], want)


def test_results_and_losses_are_pickled():
    """Results travel between processes, losses into workers."""
    out = linear_logprob(HIDDEN, WEIGHT, TARGET, entropy=True)
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    loss = PolicyLoss("dapo", beta=0.1, clip_high=0.3)
    assert pickle.loads(pickle.dumps(loss)) == loss


def test_inference_mode():
    with torch.inference_mode():
        for function, x in BACKWARD_ONLY.values():
            assert function(x).isfinite().all()

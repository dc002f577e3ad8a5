"""OpenRLHF's own code with and without the patch: the same losses, the same gradients. Skipped without OpenRLHF."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hosts import host

pytest.importorskip("transformers")
pytest.importorskip("peft")

from rlhf_fast.integrations import openrlhf as ours  # noqa: E402
from rlhf_fast.integrations._patching import PatchError  # noqa: E402

MODULES = (
    *("openrlhf.models.loss", "openrlhf.models.utils", "openrlhf.models.actor"),
    "openrlhf.trainer.ppo_utils.experience_maker",
)
STUBS = (
    "deepspeed",
    "ray",
    "flash_attn.bert_padding",
    "flash_attn.utils",
    "vllm",
    "pylatexenc",
    "aiohttp",
    "torchdata",
)


@pytest.fixture(scope="module")
def openrlhf():
    with host("openrlhf", MODULES, STUBS) as (loss, utils, actor, maker):
        yield SimpleNamespace(loss=loss, utils=utils, actor=actor, maker=maker)


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def both(function, *leaves, rtol=1e-7, atol=1e-10):
    """Values and gradients of `function(*leaves)`, without and with the patch; asserts that they agree."""
    results = []
    for patched in (False, True):
        copies = [x.clone().requires_grad_() for x in leaves]
        if patched:
            with ours.patch():
                out = function(*copies)
        else:
            out = function(*copies)
        values = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        first = values[0]
        torch.manual_seed(1)
        cotangent = torch.randn(first.shape, dtype=first.dtype)
        grads = torch.autograd.grad(first, copies, cotangent)
        results.append(([v.detach().double() for v in values], grads))
    (theirs, their_grads), (mine, my_grads) = results
    assert len(theirs) == len(mine)
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    torch.testing.assert_close(my_grads, their_grads, rtol=rtol, atol=atol)
    return mine


def batch(rows=4, width=9, holes=True):
    """fp64 log-probabilities far from each other, ragged masks with a hole, and a row that is all masked."""
    torch.manual_seed(0)
    logprob = -torch.rand(rows, width, dtype=torch.float64) * 3
    other = logprob + 0.6 * torch.randn_like(logprob)
    advantages = torch.randn_like(logprob)
    mask = torch.arange(width) < torch.tensor([width, 5, 3, 1])[:rows, None]
    if holes:
        mask[0, 3:5] = False
    return logprob, other, advantages, mask


# fp64 on both sides; OpenRLHF adds 1e-8 to the number of tokens of a sequence
TOKENS = (True, {}), (True, {"batch_num_tokens": 40.0, "dp_size": 2})
SEQUENCES = (False, {}), (False, {"global_batch_size": 16.0, "dp_size": 2})


@pytest.mark.parametrize(("by_token", "counts"), [*TOKENS, *SEQUENCES])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.5}, {"clip_eps_high": 0.4}, {"policy_loss_type": "gspo"}])
def test_policy_loss(openrlhf, by_token, counts, options):
    logprob, old, advantages, mask = batch()
    if options.get("policy_loss_type") == "gspo":
        advantages = advantages[:, :1].expand_as(logprob)
    loss_fn = openrlhf.loss.PolicyLoss(token_level_loss=by_token, **options)
    loss, clip_ratio, kl = both(lambda x: loss_fn(x, old, advantages, action_mask=mask, **counts), logprob)
    assert clip_ratio > 0.1
    assert loss != 0
    assert kl != 0


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"is_correction_level": "token", "is_correction_mode": "clip"},
        {"is_correction_level": "token", "is_correction_mode": "mask"},
        {"is_correction_level": "seq", "is_correction_mode": "mask"},  # OpenRLHF's own formula
        {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0, 0.2)},
        {"is_correction_level": "token", "policy_loss_type": "gspo"},
    ],
)
def test_policy_loss_with_a_rollout_correction(openrlhf, by_token, options):
    logprob, old, advantages, mask = batch()
    rollout = old + 0.4 * torch.randn_like(old)
    rollout[1] += 1  # a whole sequence out of bounds
    options = {"is_correction_threshold": (0.7, 1.3), **options}
    loss_fn = openrlhf.loss.PolicyLoss(token_level_loss=by_token, **options)

    def call(x):
        return loss_fn(x, old, advantages, action_mask=mask, rollout_log_probs=rollout)

    values = both(call, logprob)
    assert len(values) == (3 if "policy_loss_type" in options else 5)
    assert values[-1] != 0


@pytest.mark.parametrize(("by_token", "counts"), [*TOKENS, *SEQUENCES])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(openrlhf, by_token, counts, clip):
    values, old, returns, mask = batch()
    loss_fn = openrlhf.loss.ValueLoss(clip, token_level_loss=by_token)
    both(lambda x: loss_fn(x, old, returns, action_mask=mask, **counts), values)


def test_without_a_mask(openrlhf):
    logprob, old, advantages, _ = batch()
    loss_fn, value_fn = openrlhf.loss.PolicyLoss(), openrlhf.loss.ValueLoss(0.2)
    both(lambda x: loss_fn(x, old, advantages), logprob)
    both(lambda x: value_fn(x, old, advantages), logprob)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ipo": True}])
def test_dpo_loss(openrlhf, options):
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 6, dtype=torch.float64) * 5
    loss_fn = openrlhf.loss.DPOLoss(0.3, **options)
    both(lambda a, b: loss_fn(a, b, ref_chosen, ref_rejected), chosen, rejected)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_compute_approx_kl(openrlhf, estimator, unbiased):
    """OpenRLHF computes in fp32: compared in it. Log-ratios up to 30, beyond its bounds."""
    torch.manual_seed(0)
    logprob = torch.cat([torch.randn(50), torch.tensor([30.0, -30.0, 12.0, -12.0])])
    base, old = torch.zeros_like(logprob), logprob + 0.3 * torch.randn_like(logprob)
    both(
        lambda x: openrlhf.utils.compute_approx_kl(x, base, old, estimator, unbiased),
        logprob, rtol=2e-6, atol=2e-6,  # exp(-d) - 1 + d cancels: a few units of 2^-23 of terms near e^4
    )  # fmt: skip
    with ours.patch(), pytest.raises(ValueError, match="Unknown kl_estimator: k9"):
        openrlhf.utils.compute_approx_kl(logprob, base, kl_estimator="k9")


def test_k3_near_zero_is_closer_with_the_patch(openrlhf):
    d = torch.tensor([1e-4])
    want = (torch.expm1(-d.double()) + d.double()).item()
    theirs = openrlhf.utils.compute_approx_kl(d, torch.zeros(1), kl_estimator="k3").item()
    with ours.patch():
        mine = openrlhf.utils.compute_approx_kl(d, torch.zeros(1), kl_estimator="k3").item()
    assert mine == pytest.approx(want, abs=2**-37)  # one rounding of d in fp32
    assert abs(theirs - want) > 2**-27  # several of 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(openrlhf, temperature):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 23, dtype=torch.float64) * 4, torch.randint(0, 23, (2, 5))
    both(lambda x: openrlhf.utils.log_probs_from_logits(x * 1.0, labels, temperature), logits)
    kept = logits.clone()
    with ours.patch():
        openrlhf.utils.log_probs_from_logits(logits, labels, 0.7)
    assert torch.equal(logits, kept)


def test_bf16_log_probs_are_closer_to_fp64(openrlhf):
    torch.manual_seed(0)
    logits, labels = (torch.randn(2, 64, 500) * 4).bfloat16(), torch.randint(0, 500, (2, 64))
    want = torch.log_softmax(logits.double(), -1).gather(-1, labels[..., None])[..., 0]
    theirs = openrlhf.utils.log_probs_from_logits(logits.clone(), labels)
    with ours.patch():
        mine = openrlhf.utils.log_probs_from_logits(logits, labels)
    assert ((mine - want).abs() <= (theirs - want).abs() + 1e-6).all()
    assert (theirs - want).abs().max() > 1e-3


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
def test_gae(openrlhf, gamma, lam):
    values, rewards, _, mask = batch()
    mask[1, 1] = False  # a hole
    method = openrlhf.maker.RemoteExperienceMaker.get_advantages_and_returns
    theirs = method(None, values, rewards, mask, gamma, lam)
    with ours.patch():
        mine = openrlhf.maker.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, mask, gamma, lam)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-12, atol=1e-13)
        assert a[~mask].eq(0).all()


def tiny():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1)).double()


def test_a_step_of_the_actor(openrlhf, monkeypatch):
    """OpenRLHF's Actor, its policy loss and its entropy bonus, end to end: the same loss and gradients of the model."""
    monkeypatch.setattr(openrlhf.actor, "compute_entropy", openrlhf.utils.compute_entropy._torchdynamo_orig_callable)
    actor = openrlhf.actor.Actor(tiny())
    actor.packing_samples, actor.temperature = False, 0.8
    torch.manual_seed(2)
    sequences, attention = torch.randint(3, 31, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    attention[0, :3] = 0  # left padding
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    old, advantages = -torch.rand(3, 6, dtype=torch.float64) * 4, torch.randn(3, 6, dtype=torch.float64)
    loss_fn = openrlhf.loss.PolicyLoss(dual_clip=3.0)

    def step():
        actor.zero_grad()
        logprob, output = actor(sequences, mask, attention_mask=attention, return_output=True, return_entropy=True)
        loss, *_ = loss_fn(logprob, old, advantages, action_mask=mask)
        entropy = openrlhf.loss.aggregate_loss(output.entropy[:, -6:], mask)
        (loss - 0.01 * entropy).backward()
        return loss.detach(), {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}

    theirs = step()
    monkeypatch.undo()
    with ours.patch():
        assert openrlhf.actor.log_probs_from_logits is ours.log_probs_from_logits
        mine = step()
    # the Actor rounds the logits to fp32: both sides start from the same ones
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6, check_dtype=False)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_taken_back_and_refused(openrlhf, monkeypatch):
    before = openrlhf.actor.log_probs_from_logits, openrlhf.loss.PolicyLoss.forward
    ours.patch()
    with pytest.raises(PatchError, match="openrlhf is patched already"):
        ours.patch()
    assert openrlhf.actor.log_probs_from_logits is not before[0]
    ours.unpatch()
    assert (openrlhf.actor.log_probs_from_logits, openrlhf.loss.PolicyLoss.forward) == before
    changed = lambda self, values, returns: None  # noqa: E731
    changed.__module__ = "openrlhf.models.loss"
    monkeypatch.setattr(openrlhf.loss.ValueLoss, "forward", changed)
    with pytest.raises(PatchError, match=r"ValueLoss\.forward has the signature \(self, values, returns\); .* knows"):
        ours.patch()
    assert openrlhf.actor.log_probs_from_logits is before[0]

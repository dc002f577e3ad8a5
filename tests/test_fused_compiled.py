"""Every ready-made loss under torch.compile(fullgraph=True) with a changing N: one op, no graph break."""

import copy
import pickle

import torch

from rlhf_fast import fused_linear_loss
from rlhf_fast.losses import (
    KTO,
    NLL,
    PolicyLoss,
    PreferenceLoss,
    pair_segments,
    policy_loss_kinds,
    preference_loss_kinds,
    register_policy_loss,
    reward_loss,
)
from rlhf_fast.losses.registry import _VARIANTS as POLICY_VARIANTS

V, D = 23, 6
POLICY = {kind: PolicyLoss(kind, max_length=8) for kind in policy_loss_kinds()} | {
    "kl": PolicyLoss("cispo", beta=0.1, kl_estimator="k3", kl_gradient="k2", kl_correction=True),
    "entropy": PolicyLoss("sapo", entropy_coef=0.02),
    "sequence": PolicyLoss("dapo", importance_level="sequence", aggregation="seq_mean_token_mean"),
    "correction": PolicyLoss("vespo", correction="sequence_truncate", correction_max=2.0),
    "off-policy": PolicyLoss("grpo", off_policy_threshold=0.1, delta=3.0),
    "top entropy": PolicyLoss("gpg", top_entropy=0.5),
}
SMOOTHING = dict(robust=0.1, exo_pair=1e-3)
PREFERENCE = {
    kind: PreferenceLoss(kind, beta=0.02, label_smoothing=SMOOTHING.get(kind, 0.0)) for kind in preference_loss_kinds()
} | {
    "mix": PreferenceLoss({"sigmoid": 0.7, "sft": 0.3}, label_smoothing=0.1, f_divergence="js"),
    "ld": PreferenceLoss("sigmoid", ld_alpha=0.4, rpo_alpha=0.5),
    "wpo": PreferenceLoss("ipo", weighting="wpo"),
    "smooth": PreferenceLoss("exo_pair", label_smoothing=0.1),
}


def check(losses, step, make_inputs):
    """Losses, gradients and metrics of `step(loss_fn, hidden, weight, *inputs)` compiled, against the same in eager
    mode. One compiled function holds all `losses`: compiling is what takes time."""

    def steps(hidden, weight, *inputs):
        return {name: step(loss_fn, hidden, weight, *inputs) for name, loss_fn in losses.items()}

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(V, D, requires_grad=True)
    for lengths in ((2, 3, 1, 4), (3, 3, 5, 2)):
        hidden, inputs = torch.randn(sum(lengths), D), make_inputs(lengths)
        results = [outcome(fn, hidden, weight, inputs) for fn in (steps, compiled)]
        torch.testing.assert_close(results[1], results[0])


def outcome(fn, hidden, weight, inputs):
    """Losses, metrics and the gradients of a sum of the losses."""
    h = hidden.clone().requires_grad_()
    torch.manual_seed(3)  # clip_cov draws
    out = fn(h, weight, *inputs)
    total = sum((i + 2) * loss for i, (loss, _) in enumerate(out.values()))
    grads = torch.autograd.grad(total, (h, weight))
    assert all(g.abs().sum() > 0 for g in grads)
    return {n: (x.detach(), {k: float(v) for k, v in m.items()}) for n, (x, m) in out.items()}, grads


def sequences(lengths):
    n = sum(lengths)
    target = torch.randint(0, V, (n,))
    target[1] = -100
    return target, torch.tensor([0, *lengths]).cumsum(0)


def policy_step(loss_fn, hidden, weight, target, cu, advantages, old, drift):
    batch = dict(advantages=advantages, old_logprob=old)
    if loss_fn.beta:
        batch["ref_logprob"] = old + drift
    if loss_fn.correction:
        batch["rollout_logprob"] = old - drift
    if loss_fn.top_entropy:
        batch["old_entropy"] = drift.abs()
    out = fused_linear_loss(hidden, weight, target, loss_fn, batch=batch, segments=cu, chunk_size=5)
    return out.loss, out.metrics


def policy_inputs(lengths):
    target, cu = sequences(lengths)
    n = target.shape[0]
    return target, cu, torch.randn(4), torch.randn(n) / 4 - 3, torch.randn(n) / 4


def in_eager_mode(losses, step, make_inputs, monkeypatch):
    """The op outside of a compiled graph, for every loss: that its implementation finds each gradient."""
    weight, lengths = torch.randn(V, D, requires_grad=True), (2, 3, 1, 4)
    hidden, inputs = torch.randn(sum(lengths), D), make_inputs(lengths)
    for name, loss_fn in losses.items():
        results = []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            results.append(outcome(lambda *args: {name: step(loss_fn, *args)}, hidden, weight, inputs))  # noqa: B023
        torch.testing.assert_close(results[1], results[0], msg=lambda m, name=name: f"{name}: {m}")


def test_policy_losses():
    some = ("gspo", "correction", "top entropy", "off-policy")
    check({name: POLICY[name] for name in some}, policy_step, policy_inputs)


def test_the_op_takes_every_policy_loss(monkeypatch):
    in_eager_mode(POLICY, policy_step, policy_inputs, monkeypatch)


def test_a_loss_registered_by_the_user(monkeypatch):
    monkeypatch.setattr("rlhf_fast.losses.registry._VARIANTS", dict(POLICY_VARIANTS))

    @register_policy_loss("squared", aggregation="token_mean")
    def squared(terms, loss):
        return -(terms.ratio**2) * terms.advantages

    check({"squared": PolicyLoss("squared")}, policy_step, policy_inputs)


def preference_step(loss_fn, hidden, weight, target, segments, is_chosen, ref):
    batch = dict(is_chosen=is_chosen, ref_logprob=ref)
    out = fused_linear_loss(hidden, weight, target, loss_fn, batch=batch, segments=segments, chunk_size=5)
    return out.loss, out.metrics


def preference_inputs(lengths):
    target, cu = sequences(lengths)
    return target, *pair_segments(cu, target.shape[0]), torch.randn(target.shape[0]) / 4 - 3


def test_preference_losses():
    some = ("mix", "ld", "aot")
    check({name: PREFERENCE[name] for name in some}, preference_step, preference_inputs)


def test_the_op_takes_every_preference_loss(monkeypatch):
    in_eager_mode(PREFERENCE, preference_step, preference_inputs, monkeypatch)


def test_kto():
    def step(loss_fn, hidden, weight, target, cu, ref, desirable, kl):
        batch = dict(desirable=desirable, ref_logprob=ref, kl=kl)
        out = fused_linear_loss(hidden, weight, target, loss_fn, batch=batch, segments=cu, chunk_size=5)
        return out.loss, out.metrics

    def make(lengths):
        target, cu = sequences(lengths)
        ref = torch.randn(target.shape[0]) / 4 - 3
        return target, cu, ref, torch.tensor([True, False, False, True]), torch.rand(())

    check({kind: KTO(kind, desirable_weight=1.3) for kind in ("kto", "apo_zero_unpaired")}, step, make)


def test_nll():
    def step(loss_fn, hidden, weight, target):
        out = fused_linear_loss(hidden, weight, target, loss_fn, chunk_size=3)
        return out.loss, out.metrics

    losses = {str(n): NLL(n) for n in (None, 7.0, torch.tensor(5))}
    check(losses, step, lambda lengths: sequences(lengths)[:1])


def test_reward_loss():
    def step(loss_fn, hidden, weight, mask):
        score = hidden @ weight[0]
        return loss_fn(score, score.flip(0) ** 2, margin=0.1, center=0.01, label_smoothing=0.1, mask=mask)

    check({"reward": reward_loss}, step, lambda lengths: (torch.rand(sum(lengths)) < 0.8,))


def test_copies_have_keys_of_their_own():
    for loss_fn in (PolicyLoss("gspo"), PreferenceLoss("ipo"), KTO("kto"), NLL()):
        copies = (copy.deepcopy(loss_fn), copy.copy(loss_fn), pickle.loads(pickle.dumps(loss_fn)))
        assert len({x._ready_key for x in (loss_fn, *copies)}) == 4
        assert all(type(x) is type(loss_fn) for x in copies)
        if not isinstance(loss_fn, NLL):
            assert all(x == loss_fn for x in copies)

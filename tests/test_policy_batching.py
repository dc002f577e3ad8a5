"""How a batch is laid out and cut changes nothing: padding, packing, micro-batches, chunks, masked garbage.

Runs on the CPU; no GPU needed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import KINDS, make_batch, options_of, ours_with_noise, pack, run

from rlhf_fast import fused_linear_loss, linear_logprob
from rlhf_fast.losses import PolicyLoss, policy_loss
from rlhf_fast.reference import policy as oracle

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # fp64, other orders of summation
FULL = {"beta": 0.1, "entropy_coef": 0.02, "correction": "sequence_truncate", "off_policy_threshold": 0.1}


@pytest.mark.parametrize("options", [{}, FULL, {"top_entropy": 0.4}], ids=["plain", "full", "top_entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_packed(kind, options):
    batch = make_batch()
    options = {**options_of(kind), **options}
    padded = run(ours_with_noise, batch, kind, with_noise=True, **options)
    packed = run(ours_with_noise, pack(batch), kind, with_noise=True, **options)
    torch.testing.assert_close(padded[0], packed[0], **EXACT)
    torch.testing.assert_close(padded[2][batch["mask"]], packed[2], **EXACT)
    assert not padded[2][~batch["mask"]].any()
    for name, value in padded[1].items():
        torch.testing.assert_close(value, packed[1][name], **EXACT)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("clip_cov", "kl_cov")])  # those rank within a batch
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_micro_batches_add_up(kind, options):
    """Counts of the whole step, given from outside; a micro-batch with no scored token at all among them."""
    batch = make_batch((7, 1, 12, 5, 0, 9), seed=4)
    loss_fn = PolicyLoss(kind, **options_of(kind), **options)
    tokens, sequences = int(batch["mask"].sum()), batch["mask"].shape[0]
    normalizer = tokens if loss_fn.aggregation == "token_mean" else sequences
    counts = {"normalizer": normalizer, "entropy_normalizer": tokens, "num_tokens": tokens}
    whole = run(policy_loss, batch, kind, **options_of(kind), **options)
    loss, metrics, grads = 0.0, {}, []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6)):
        part = {name: t[rows] for name, t in batch.items()}
        logprob = part["logprob"].clone().requires_grad_()
        keys = {k: part[k].reshape(-1) for k in ("old_logprob", "ref_logprob", "rollout_logprob")}
        cu = torch.arange(part["mask"].shape[0] + 1) * part["mask"].shape[1]
        prepared = loss_fn.prepare({"advantages": part["advantages"], **keys, **counts}, part["mask"], cu)
        one, one_metrics = loss_fn(logprob.reshape(-1), part["entropy"].reshape(-1), prepared)
        one.backward()
        loss = loss + one.detach()
        grads.append(logprob.grad)
        for name, value in one_metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    torch.testing.assert_close(loss, whole[0], **EXACT)
    torch.testing.assert_close(torch.cat(grads), whole[2], **EXACT)
    for name in metrics:
        if not name.endswith(("_max", "_min", "_ess")) and not name.startswith("rollout"):
            torch.testing.assert_close(metrics[name], whole[1][name], msg=lambda m, n=name: f"{n}: {m}", **EXACT)


def test_normalizer_of_the_options_and_of_the_batch_agree():
    batch = make_batch()
    a, _ = policy_loss(batch["logprob"], batch["old_logprob"], batch["advantages"], mask=batch["mask"], normalizer=7.0)
    loss_fn = PolicyLoss("ppo")
    flat = {"old_logprob": batch["old_logprob"].reshape(-1), "normalizer": torch.tensor(7.0)}
    flat["advantages"] = batch["advantages"][:, None].expand(5, 12).reshape(-1)
    b, _ = loss_fn(batch["logprob"].reshape(-1), None, loss_fn.prepare(flat, batch["mask"], None))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # one sums by sequences, the other does not know them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_stands_under_the_mask_never_matters(kind, poison):
    clean = make_batch(dtype=torch.float32, per_token=True)
    dirty = {
        name: t if t.dtype == torch.bool else torch.where(clean["mask"], t, torch.full_like(t, poison))
        for name, t in clean.items()
    }
    options = {**options_of(kind), **FULL, "top_entropy": 0.5}
    a = run(ours_with_noise, clean, kind, with_noise=True, **options)
    b = run(ours_with_noise, dirty, kind, with_noise=True, **options)
    assert a[0].isfinite()
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not b[2][~clean["mask"]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {**FULL, "top_entropy": 0.5}], ids=["plain", "full"])
def test_all_masked(kind, options):
    """Loss 0 that still reaches the graph, zero gradients, finite metrics."""
    batch = make_batch(dtype=torch.float32)
    batch["mask"] = torch.zeros_like(batch["mask"])
    loss, metrics, grad, _ = run(ours_with_noise, batch, kind, with_noise=True, **options_of(kind), **options)
    assert loss == 0
    assert not grad.any()
    assert all(m.isfinite() for m in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    empty = torch.zeros(0)
    logprob = torch.zeros(0, requires_grad=True)
    loss, metrics = policy_loss(
        logprob, empty, empty, kind=kind, cu_seqlens=torch.zeros(1, dtype=torch.int32), **options_of(kind)
    )
    loss.backward()
    assert loss == 0
    assert logprob.grad.shape == (0,)
    assert all(m.isfinite() for m in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(3,), (3, 1), (3, 0)], ids=["(B,)", "(B, 1)", "(B, T)"])
def test_rows_without_a_token(kind, dims):
    """(B, 0): advantages may be one for each row, and no token takes them."""
    logprob = torch.zeros(3, 0, requires_grad=True)
    for mask in (None, torch.ones(3, 0, dtype=torch.bool)):
        given = dict(kind=kind, mask=mask, importance_weight=torch.ones(dims), **options_of(kind))
        loss, metrics = policy_loss(logprob, torch.zeros(3, 0), torch.ones(dims), **given)
        (grad,) = torch.autograd.grad(loss, logprob)
        assert loss == 0
        assert grad.shape == (3, 0)
        assert all(m.isfinite() for m in metrics.values())


# ---- chunks of the fused head ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 11, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_linear_loss_is_the_loss_of_the_whole(kind, chunk):
    """Loss, metrics and the head's gradients by chunks, against linear_logprob and the loss in one piece, fp64."""
    torch.manual_seed(1)
    packed = pack(make_batch((7, 3, 0, 12, 5)))
    n, d, v = packed["logprob"].shape[0], 6, 13
    hidden = torch.randn(n, d, dtype=torch.float64)
    weight = torch.randn(v, d, dtype=torch.float64)
    target = torch.randint(v, (n,))
    target[[1, 9]] = -100
    mask = target != -100
    with torch.no_grad():
        now = linear_logprob(hidden, weight, target).logprob
    base = {name: now + (packed[name] - packed["logprob"]) for name in ("old_logprob", "ref_logprob")}
    base["rollout_logprob"] = now + 0.1 * torch.randn(n, dtype=torch.float64)
    base["advantages"] = packed["advantages"]
    options = {"beta": 0.1, "entropy_coef": 0.02, "correction": "token_truncate", "off_policy_threshold": 0.02}
    loss_fn = PolicyLoss(kind, **options_of(kind), **options)
    base["noise"] = packed["noise"]
    cu = packed["cu_seqlens"]
    if kind in ("clip_cov", "kl_cov"):
        base["logprob"] = now

    h1, w1 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    fused = fused_linear_loss(h1, w1, target, loss_fn, batch=base, segments=cu, chunk_size=chunk)
    fused.loss.backward()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(h2, w2, target, entropy=True)
    loss, metrics = loss_fn(out.logprob, out.entropy, loss_fn.prepare(base, mask, cu))
    loss.backward()
    torch.testing.assert_close(fused.loss, loss.detach(), **EXACT)
    torch.testing.assert_close(h1.grad, h2.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w1.grad, w2.grad, rtol=1e-10, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(
            fused.metrics[name].to(value.dtype), value.detach(), msg=lambda m, k=name: f"{k}: {m}", **EXACT
        )


def test_gradient_is_what_autograd_gives():
    for kind in KINDS:
        batch = make_batch(per_token=True)
        loss_fn = PolicyLoss(kind, **options_of(kind), beta=0.1, entropy_coef=0.02)
        keys = {k: batch[k].reshape(-1) for k in ("old_logprob", "ref_logprob", "advantages", "noise")}
        prepared = loss_fn.prepare(keys, batch["mask"], torch.arange(6) * 12)
        logprob = batch["logprob"].reshape(-1).requires_grad_()
        entropy = batch["entropy"].reshape(-1).requires_grad_()
        result = loss_fn.gradient(logprob, entropy, prepared)
        loss, _ = loss_fn(logprob, entropy, prepared)
        dlogprob, dentropy = torch.autograd.grad(loss, [logprob, entropy])
        torch.testing.assert_close(result.loss, loss.detach(), **EXACT)
        torch.testing.assert_close(result.dlogprob, dlogprob, **EXACT)
        torch.testing.assert_close(result.dentropy, dentropy, **EXACT)
        assert not result.loss.requires_grad
        assert not result.dlogprob.requires_grad
        assert not any(m.requires_grad for m in result.metrics.values())


# ---- any shape, any mask, any options ----------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([k for k in KINDS if k != "clip_cov"]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 10_000),
    per_token=st.booleans(),
    spread=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    beta=st.sampled_from([0.0, 0.3]),
    estimator=st.sampled_from(["k1", "abs", "k2", "k3"]),
    gradient=st.sampled_from([None, "k1", "k2", "k3"]),
    level=st.sampled_from(["token", "sequence", "sequence_token"]),
    correction=st.sampled_from([None, "token_mask", "sequence_truncate", "geometric_mask"]),
    threshold=st.sampled_from([None, 0.0, 0.2]),
    top_entropy=st.sampled_from([None, 0.0, 0.3, 1.0]),
    aggregation=st.sampled_from(["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length"]),
)
def test_any_batch_equals_the_reference(
    kind, lengths, seed, per_token, spread, beta, estimator, gradient, level, correction, threshold, top_entropy,
    aggregation,
):  # fmt: skip
    batch = make_batch(tuple(lengths), 9, seed=seed, spread=spread, per_token=per_token)
    options = {
        "beta": beta, "kl_estimator": estimator, "kl_gradient": gradient, "importance_level": level,
        "correction": correction, "off_policy_threshold": threshold, "top_entropy": top_entropy,
        "aggregation": aggregation, "max_length": 10, "entropy_coef": 0.01,
    }  # fmt: skip
    ours = run(policy_loss, pack(batch) if seed % 2 else batch, kind, **options)
    theirs = run(oracle.policy_loss, pack(batch) if seed % 2 else batch, kind, **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-10, atol=1e-11)

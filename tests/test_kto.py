"""KTO against scalar arithmetic and the reference. Runs on the CPU; no GPU needed (inside the fused head:
test_preference_fused.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import sigmoid

from rlhf_fast import reference
from rlhf_fast.losses import KTO, kto_kl, kto_loss

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # fp64, sums of a few terms of size 1


def scalar(kind, logprob, ref, desirable, kl, beta=0.1, good=1.0, bad=1.0):
    z = max(kl, 0.0) if kind == "kto" else 0.0
    losses = []
    for x, y, d in zip(logprob, ref, desirable, strict=True):
        value = sigmoid(beta * (x - y - z)) if d else sigmoid(-beta * (x - y - z))
        losses.append((good if d else bad) * (1 - value))
    return sum(losses) / len(losses)


def batch(labels, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logprob, ref = (-torch.rand(len(labels), generator=gen, dtype=torch.float64) * 40 for _ in range(2))
    return logprob, ref, torch.tensor(labels, dtype=torch.bool)


LABELS = [[1, 0, 0, 1, 0], [1, 1, 1], [0, 0, 0], [1], [0]]


@pytest.mark.parametrize("kl", [-0.7, 0.0, 2.5])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_equals_scalar_arithmetic_and_the_reference(kind, labels, kl):
    logprob, ref, desirable = batch(labels)
    options = {"kl": kl, "kind": kind, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    loss, metrics = kto_loss(logprob, ref, desirable, **options)
    want = scalar(kind, logprob.tolist(), ref.tolist(), labels, kl, 0.3, 1.5, 0.7)
    assert loss.item() == pytest.approx(want, rel=1e-12)
    want, want_metrics = reference.kto_loss(logprob, ref, desirable, **options)
    torch.testing.assert_close(loss, want, **EXACT)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value.shape == ()
        torch.testing.assert_close(value, want_metrics[name], msg=lambda m, n=name: f"{n}: {m}", **EXACT)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_gradcheck(kind, labels):
    logprob, ref, desirable = batch(labels, seed=1)
    for function in (kto_loss, reference.kto_loss):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, ref, desirable, kl=0.4, kind=kind)[0], logprob.clone().requires_grad_()
        )


def test_a_side_without_sequences_has_metrics_of_zero():
    logprob, ref, desirable = batch([1, 1, 1])
    _, metrics = kto_loss(logprob, ref, desirable, kl=0.0)
    assert metrics["rewards/rejected"] == 0
    assert metrics["logps/rejected"] == 0
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (logprob - ref).mean())


def test_kl_is_clamped_after_the_mean_and_carries_no_gradient():
    """Clamping each estimate before the mean would give 1.5 here and not 0."""
    ref = torch.zeros(3)
    assert kto_kl(torch.tensor([3.0, -4.0, -5.0]), ref) == 0
    up = torch.tensor([3.0, 1.0, -1.0], requires_grad=True)
    kl = kto_kl(up, ref)
    assert kl == 1
    assert not kl.requires_grad
    assert kto_kl(torch.zeros(0), torch.zeros(0)) == 0
    assert reference.kto_kl(up, ref) == 1
    with pytest.raises(ValueError, match=r"ref_logprob must be \(B,\)=\(3,\), got \(2,\)"):
        kto_kl(up, ref[:2])


def test_mask_keeps_nan_out():
    logprob, ref, desirable = batch([1, 0, 1, 0])
    mask = torch.tensor([True, True, False, False])
    bad = torch.where(mask, logprob, torch.nan).requires_grad_()
    loss, metrics = kto_loss(bad, ref, desirable, kl=0.2, mask=mask)
    torch.testing.assert_close(loss.detach(), kto_loss(logprob[:2], ref[:2], desirable[:2], kl=0.2).loss, **EXACT)
    loss.backward()
    assert bad.grad.isfinite().all()
    assert not bad.grad[2:].any()
    assert all(m.isfinite() for m in metrics.values())
    nothing = kto_loss(bad, ref, desirable, kl=0.2, mask=torch.zeros_like(mask))
    assert nothing.loss == 0
    assert nothing.loss.requires_grad
    assert all(m.isfinite() for m in nothing.metrics.values())


def test_nan_is_not_hidden():
    logprob, ref, desirable = batch([1, 0])
    assert kto_loss(logprob * torch.nan, ref, desirable, kl=0.0).loss.isnan()
    assert kto_loss(logprob, ref * torch.nan, desirable, kl=0.0).loss.isnan()
    assert kto_loss(logprob, ref, desirable, kl=torch.nan).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_extreme_log_ratios_stay_finite(kind, dtype):
    logprob = torch.tensor([-1e3, 0.0, -1e3, 0.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([0.0, -1e3, 0.0, -1e3], dtype=dtype)
    loss, metrics = kto_loss(logprob, ref, torch.tensor([True, True, False, False]), kl=1e3, kind=kind)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logprob.grad.isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-200, 0), st.floats(-200, 0), st.booleans()), min_size=1, max_size=9),
    kl=st.floats(-5, 50),
    cut=st.integers(0, 9),
    kind=st.sampled_from(["kto", "apo_zero_unpaired"]),
)
def test_any_batch_and_its_micro_batches(rows, kl, cut, kind):
    logprob, ref = (torch.tensor([r[i] for r in rows], dtype=torch.float64) for i in range(2))
    desirable = torch.tensor([r[2] for r in rows])
    whole = kto_loss(logprob, ref, desirable, kl=kl, kind=kind).loss
    want = scalar(kind, logprob.tolist(), ref.tolist(), desirable.tolist(), kl)
    assert whole.item() == pytest.approx(want, rel=1e-10, abs=1e-13)
    parts = [
        kto_loss(logprob[s], ref[s], desirable[s], kl=kl, kind=kind, normalizer=len(rows)).loss
        for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(sum(parts), whole, **EXACT)


def test_errors():
    x, label = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="kl must be given for kind 'kto'"):
        kto_loss(x, x, label)
    for match, call in {
        r"ref_logprob must be \(B,\)=\(3,\), got \(2,\)": lambda: kto_loss(x, x[:2], label, kl=0.0),
        r"logprob must be \(B,\), got \(3, 1\)": lambda: kto_loss(x[:, None], x, label, kl=0.0),
        "desirable must be bool, got torch.float32": lambda: kto_loss(x, x, x, kl=0.0),
        r"desirable must be \(B,\)=\(3,\), got \(2,\)": lambda: kto_loss(x, x, label[:2], kl=0.0),
        r"mask must be \(B,\)=\(3,\), got \(1,\)": lambda: kto_loss(x, x, label, kl=0.0, mask=label[:1]),
        "kl must be a number or a 0-d": lambda: kto_loss(x, x, label, kl=x),
        "did you mean 'kto'": lambda: kto_loss(x, x, label, kl=0.0, kind="kt0"),
        "beta must be a finite number > 0, got -1": lambda: KTO(beta=-1),
        "undesirable_weight must be a finite number >= 0, got nan": lambda: KTO(undesirable_weight=float("nan")),
        "options must be in the KTO": lambda: kto_loss(x, x, label, kl=0.0, kind=KTO(), beta=0.2),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()

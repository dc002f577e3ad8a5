"""The reward model's loss against scalar arithmetic and the reference. Runs on the CPU; no GPU needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import softplus

from rlhf_fast import reference
from rlhf_fast.losses import reward_loss

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # fp64, sums of a few terms of size 10
SCORE = st.floats(-50, 50)


def scalar(chosen, rejected, margin, center, e):
    losses = []
    for x, y, m in zip(chosen, rejected, margin, strict=True):
        d = x - y - m
        losses.append((1 - e) * softplus(-d) + e * softplus(d) + center * (x + y) ** 2)
    return sum(losses) / len(losses)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(SCORE, SCORE, st.floats(0, 3)), min_size=1, max_size=8),
    center=st.sampled_from([0.0, 0.01, 1.0]),
    e=st.sampled_from([0.0, 0.1]),
    cut=st.integers(0, 8),
)
def test_any_scores(rows, center, e, cut):
    chosen, rejected, margin = torch.tensor(rows, dtype=torch.float64).unbind(1)
    options = {"center": center, "label_smoothing": e}
    whole = reward_loss(chosen, rejected, margin=margin, **options).loss
    want = scalar(chosen.tolist(), rejected.tolist(), margin.tolist(), center, e)
    assert whole.item() == pytest.approx(want, rel=1e-11, abs=1e-13)
    parts = [
        reward_loss(chosen[s], rejected[s], margin=margin[s], normalizer=len(rows), **options).loss
        for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(sum(parts), whole, **EXACT)


def make(seed=0, rows=6):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, generator=gen, dtype=torch.float64) * 3 for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"center": 0.1}, {"margin": 0.7}, {"label_smoothing": 0.2}, {"margin": "B"}])
def test_equals_the_reference_with_its_metrics(options):
    chosen, rejected, margin = make()
    if options.get("margin") == "B":
        options = {"margin": margin.abs()}
    mask = torch.tensor([True, True, False, True, True, True])
    grads = []
    for function in (reward_loss, reference.reward_loss):
        x, y = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        loss, metrics = function(x, y, mask=mask, **options)
        grads.append((loss, *torch.autograd.grad(loss, (x, y)), metrics))
    for ours, theirs in zip(grads[0][:3], grads[1][:3], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for name, value in grads[1][3].items():
        torch.testing.assert_close(grads[0][3][name], value, **EXACT)
    both = torch.cat([chosen[mask], rejected[mask]])
    assert grads[0][3]["rewards_max"] == both.max()
    assert grads[0][3]["rewards_min"] == both.min()


def test_gradcheck():
    chosen, rejected, margin = make(seed=1)
    for function in (reward_loss, reference.reward_loss):
        assert torch.autograd.gradcheck(
            lambda x, y, f=function: f(x, y, margin=margin.abs(), center=0.05, label_smoothing=0.1)[0],
            (chosen.requires_grad_(), rejected.requires_grad_()),
        )


def test_margin_and_centring_do_what_they_say():
    chosen, rejected = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 4.0])
    plain = reward_loss(chosen, rejected).loss
    assert reward_loss(chosen, rejected, margin=1.0).loss.item() == pytest.approx(0.693147, abs=1e-6)
    centred = reward_loss(chosen, rejected, center=0.01).loss
    assert centred.item() == pytest.approx(plain.item() + 0.01 * (9 + 81) / 2, rel=1e-6)
    shifted = reward_loss(chosen - 3, rejected - 3).loss
    assert shifted == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_scores_stay_finite(dtype):
    chosen = torch.tensor([1e3, -1e3, 1e3], dtype=dtype, requires_grad=True)
    loss, metrics = reward_loss(chosen, torch.tensor([-1e3, 1e3, 1e3], dtype=dtype), center=0.01)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert chosen.grad.isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


def test_nan_shows_unless_masked():
    chosen, rejected, _ = make()
    broken = chosen.clone()
    broken[2] = torch.nan
    assert reward_loss(broken, rejected).loss.isnan()
    mask = torch.ones(6, dtype=torch.bool)
    mask[2] = False
    broken.requires_grad_()
    loss, metrics = reward_loss(broken, rejected, margin=torch.where(mask, 0.0, torch.nan), center=0.1, mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert broken.grad.isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


def test_nothing_that_counts():
    chosen, rejected, _ = make()
    chosen.requires_grad_()
    for x, y, mask in ((chosen, rejected, torch.zeros(6, dtype=torch.bool)), (chosen[:0], rejected[:0], None)):
        loss, metrics = reward_loss(x, y, mask=mask, center=0.1)
        loss.backward()
        assert loss == 0
        assert not chosen.grad.any()
        assert all(m == 0 for m in metrics.values())


def test_errors():
    x = torch.zeros(3)
    for match, call in {
        r"rejected must be \(B,\)=\(3,\), got \(2,\)": lambda: reward_loss(x, x[:2]),
        r"chosen must be \(B,\), got \(3, 1\)": lambda: reward_loss(x[:, None], x),
        "chosen must be float32": lambda: reward_loss(x.long(), x),
        r"margin must be \(B,\)=\(3,\), got \(1,\)": lambda: reward_loss(x, x, margin=x[:1]),
        r"mask must be \(B,\)=\(3,\), got \(2,\)": lambda: reward_loss(x, x, mask=x[:2].bool()),
        "center must be a finite number >= 0, got -1": lambda: reward_loss(x, x, center=-1),
        r"label_smoothing must be in \[0, 0.5\), got 0.5": lambda: reward_loss(x, x, label_smoothing=0.5),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()

"""The Triton clip-family loss against the reference in fp64: on the GPU when there is one, otherwise interpreted."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.reference.policy import _clip, kl_estimate

pytest.importorskip("triton", reason="triton is not installed")
policy = importlib.import_module("rlhf_fast.kernels.policy")

VECTORS = (
    "logprob",
    "old_logprob",
    "advantages",
    "weight",
    "policy_weight",
    "ref_logprob",
    "entropy",
    "entropy_weight",
)
NAMES = ("loss", "policy_loss", "clip_low", "clip_high", "clip_far", "ratio", "approx_kl", "kl", "entropy", "count")
OFF = {"delta": None, "dual_clip": None, "beta": 0.0, "kl_estimator": "k3", "kl_gradient": "k3"}
OFF |= {"kl_correction": False, "entropy_coef": 0.0, "clip_low": 0.2, "clip_high": 0.28}


def make(n, device, *, keep=VECTORS, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprob = (-3 * torch.rand(n, generator=g)).to(dtype)
    t = {"logprob": logprob, "old_logprob": (logprob.float() + 0.5 * torch.randn(n, generator=g)).to(dtype)}
    t["advantages"] = torch.randn(n, generator=g)
    t["advantages"][3::7] = 0.0
    t["weight"] = torch.rand(n, generator=g) + 0.1
    t["policy_weight"] = torch.rand(n, generator=g)
    t["ref_logprob"] = (logprob.float() + 0.3 * torch.randn(n, generator=g)).to(dtype)
    t["entropy"] = torch.rand(n, generator=g)
    t["entropy_weight"] = torch.rand(n, generator=g)
    for name, value in t.items():  # rows of weight 0 hold anything
        value[2::5] = 0.0 if name == "weight" else torch.nan
    return {k: (v.to(device) if k in keep else None) for k, v in t.items()}


def expected(t, o):
    """sums by name, dlogprob, dentropy: the reference's formulas over the rows that count, autograd in fp64."""
    valid = t["weight"] != 0
    x = {k: None if v is None else v.double()[valid] for k, v in t.items()}
    logprob = x["logprob"].clone().requires_grad_()
    log_ratio = logprob - (logprob.detach() if x["old_logprob"] is None else x["old_logprob"])
    ratio, adv = log_ratio.clamp(-20, 20).exp(), x["advantages"]
    options = SimpleNamespace(**o)
    loss = _clip(SimpleNamespace(ratio=ratio, advantages=adv), options)
    if x["policy_weight"] is not None:
        loss = loss * x["policy_weight"]
    sums = dict.fromkeys(NAMES, torch.zeros((), dtype=torch.float64))
    sums["policy_loss"] = total = (x["weight"] * loss).sum()
    if o["beta"]:
        kl = kl_estimate(logprob, x["ref_logprob"], estimator=o["kl_estimator"], gradient=o["kl_gradient"])
        sums["kl"] = kl.sum()
        total = total + o["beta"] * (x["weight"] * (kl * ratio if o["kl_correction"] else kl)).sum()
    dentropy = None
    if x["entropy"] is not None:
        sums["entropy"] = x["entropy"].sum()
        if o["entropy_coef"]:
            total = total - o["entropy_coef"] * (x["entropy_weight"] * x["entropy"]).sum()
            dentropy = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
            dentropy[valid] = -o["entropy_coef"] * x["entropy_weight"]
    sums["loss"] = total
    dlogprob = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    dlogprob[valid] = torch.autograd.grad(total, logprob)[0]
    ratio = ratio.detach()
    sums["clip_low"] = ((ratio < 1 - o["clip_low"]) & (adv < 0)).sum()
    sums["clip_high"] = ((ratio > 1 + o["clip_high"]) & (adv > 0)).sum()
    unbounded = _clip(SimpleNamespace(ratio=ratio, advantages=adv), SimpleNamespace(**o | {"dual_clip": None}))
    far = torch.zeros_like(adv, dtype=torch.bool)
    if o["delta"] is not None:
        far |= (ratio > o["delta"]) & (adv < 0)
    if o["dual_clip"] is not None:
        far |= (adv < 0) & (unbounded > -o["dual_clip"] * adv)
    sums["clip_far"] = far.sum()
    sums["ratio"] = ratio.sum()
    bounded = log_ratio.detach().clamp(-20, 20)
    sums["approx_kl"] = (torch.expm1(bounded) - bounded).sum()
    sums["count"] = valid.sum()
    extremes = (ratio.max(), ratio.min()) if ratio.numel() else (1.0, 1.0)
    return {k: float(v.detach()) for k, v in sums.items()}, extremes, dlogprob, dentropy


def check(t, **options):
    o = OFF | options
    sums, dlogprob, dentropy = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **o)
    exact, extremes, dl, dh = expected(t, o)
    n = dlogprob.numel()
    # fp32: about 4 ulp per term (exp, product, subtraction), and sums of n terms of mixed sign in a tree.
    size = max(1.0, float(dl.abs().max()) if n else 1.0)
    assert sums.shape == (12,)
    assert sums.dtype == dlogprob.dtype == torch.float32
    assert ((dlogprob.double() - dl).abs() <= 4e-6 * dl.abs() + 1e-6).all()
    for i, name in enumerate(NAMES):
        scale = 0 if name in ("clip_low", "clip_high", "clip_far", "count") else 1
        error = abs(float(sums[i]) - exact[name])
        assert error <= scale * (1e-6 * abs(exact[name]) + 2e-7 * size * (n + 1)), (name, float(sums[i]), exact[name])
    for got, e in zip(sums[10:], extremes, strict=True):
        assert abs(float(got) - float(e)) <= 4e-6 * float(e)
    if dh is None:
        assert dentropy is None
    else:
        assert ((dentropy.double() - dh).abs() <= 2e-7 * dh.abs()).all()
    return sums, dlogprob, dentropy


PAIR = ("logprob", "old_logprob", "advantages", "weight")
REF = (*PAIR, "ref_logprob")


@pytest.mark.parametrize("n", [1, 37, 1024, 2500])
def test_grpo(n, device):
    check(make(n, device, keep=PAIR))


def test_on_policy_has_ratio_one_and_a_gradient(device):
    t = make(50, device, keep=("logprob", "advantages", "weight"))
    sums, dlogprob, _ = check(t)
    assert sums[5] == sums[9]
    assert sums[10] == sums[11] == 1
    valid = t["weight"] != 0
    assert torch.equal(dlogprob[valid], (-t["advantages"] * t["weight"])[valid])


@pytest.mark.parametrize("delta", [None, 1.5, 1.1])
@pytest.mark.parametrize("dual_clip", [None, 1.2, 3.0])
def test_far_clips(delta, dual_clip, device):
    """delta = 1.1 lies inside the clip range."""
    check(make(400, device, keep=PAIR), delta=delta, dual_clip=dual_clip)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("gradient", ["k1", "abs", "k2", "k3"])
def test_kl(estimator, gradient, device):
    correction = gradient == estimator
    t = make(200, device, keep=REF)
    check(t, beta=0.3, kl_estimator=estimator, kl_gradient=gradient, kl_correction=correction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything(dtype, device):
    t = make(1500, device, dtype=dtype)
    check(t, beta=0.1, delta=2.0, dual_clip=1.5, entropy_coef=0.01, kl_correction=True)


def test_entropy_without_bonus_is_a_metric(device):
    check(make(100, device, keep=(*PAIR, "entropy")))


def test_k3_near_zero_does_not_cancel(device):
    """exp(x) - 1 - x loses everything at 1e-4 in fp32; half of x^2 is what it is."""
    t = make(64, device, keep=REF)
    t = {k: None if v is None else torch.nan_to_num(v) for k, v in t.items()}
    t["weight"] = torch.ones_like(t["weight"])
    t["logprob"] = torch.linspace(-3e-4, 3e-4, 64, device=device)
    t["ref_logprob"] = torch.zeros(64, device=device)
    t["old_logprob"] = torch.zeros(64, device=device)
    sums, dlogprob, _ = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **(OFF | {"beta": 1.0}))
    delta = t["logprob"].double()
    exact = (torch.expm1(-delta) + delta).sum()
    assert abs(sums[7] - exact) <= 1e-6 * exact
    assert abs(sums[6] - (torch.expm1(delta) - delta).sum()) <= 1e-6 * exact
    t["advantages"] = torch.zeros(64, device=device)
    _, dlogprob, _ = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **(OFF | {"beta": 1.0}))
    slope = -torch.expm1(-delta)
    assert ((dlogprob - slope).abs() <= 1e-6 * slope.abs()).all()


def test_far_log_ratios_are_clamped_without_gradient(device):
    logprob = torch.tensor([0.0, 0.0, -60.0, -0.5], device=device)
    old = torch.tensor([-40.0, -50.0, 0.0, -0.5], device=device)
    adv = torch.tensor([-1.0, 1.0, 1.0, 1.0], device=device)
    t = dict.fromkeys(VECTORS) | {"logprob": logprob, "old_logprob": old, "advantages": adv}
    t |= {"weight": torch.ones(4, device=device), "ref_logprob": torch.tensor([40.0, 0, 0, 0], device=device)}
    sums, dlogprob, _ = check(t, beta=0.1)
    assert sums.isfinite().all()
    assert (dlogprob[0], dlogprob[1]) == (0.0, 0.0)


def test_nan_in_a_counted_row_is_not_hidden(device):
    t = make(20, device, keep=REF)
    for name in ("logprob", "old_logprob", "advantages", "ref_logprob"):
        spoilt = t | {name: t[name].clone()}
        spoilt[name][0] = torch.nan
        o = OFF | {"beta": 0.1}
        assert policy.policy_clip_fwd(*(spoilt[v] for v in VECTORS), **o)[0][0].isnan(), name


@pytest.mark.parametrize("n", [0, 30])
def test_nothing_counts(n, device):
    t = make(n, device)
    t["weight"] = torch.zeros(n, device=device)
    o = OFF | {"beta": 0.1, "entropy_coef": 0.1}
    sums, dlogprob, dentropy = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **o)
    assert sums.tolist() == [0.0] * 10 + [1.0, 1.0]
    assert (dlogprob == 0).all()
    assert (dentropy == 0).all()


def test_equal_bits_from_run_to_run(device):
    t = make(5000, device, keep=PAIR)
    first = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **OFF)
    again = policy.policy_clip_fwd(*(t[v] for v in VECTORS), **OFF)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])

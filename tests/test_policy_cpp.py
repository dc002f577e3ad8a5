"""The C++ pass of the clip family: against the torch backend in fp64 under the error budget, every instruction set.

Runs on the CPU. The torch backend is itself judged by the reference in test_policy_kinds.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from _budget import assert_within_budget
from policy_cases import make_batch, options_of, pack

from rlhf_fast import _backend_policy, policy_loss
from rlhf_fast._backend import cpp_available, cpp_module, use_backend
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops.policy import SUMS, ClipTerms, clip_loss, segment_counts

pytestmark = pytest.mark.skipif(not cpp_available(), reason="the C++ extension is not built")

PLAIN = ClipTerms(0.2, 0.28)
TERMS = {
    "plain": PLAIN,
    "bounds": ClipTerms(0.2, 0.3, 1.1, 1.5),
    **{f"{v}-{g}": ClipTerms(0.2, 0.2, beta=0.3, kl_estimator=v, kl_gradient=g)
       for v, g in (("k1", "k3"), ("abs", "abs"), ("k2", "k1"), ("k3", "k2"), ("k3", "k3"))},
    "all": ClipTerms(0.2, 0.3, 1.8, 1.5, 0.1, "k3", "k2", True, 0.02),
}  # fmt: skip


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    before = cpp_module().isa()
    try:
        cpp_module().use_isa(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    cpp_module().use_isa(before)


def inputs(n, seed=0, wide=False):
    """wide: log-ratios up to 50 and KLs up to 100, beyond every clamp."""
    g = torch.Generator().manual_seed(seed)
    spread = 20.0 if wide else 0.4
    logprob = -torch.randn(n, generator=g).abs()
    weight = torch.rand(n, generator=g) + 0.1
    weight[1::5] = 0
    return {
        "logprob": logprob, "old_logprob": logprob + spread * torch.randn(n, generator=g),
        "advantages": torch.randn(n, generator=g), "weight": weight,
        "policy_weight": torch.rand(n, generator=g), "ref_logprob": logprob + 2 * spread * torch.randn(n, generator=g),
        "entropy": torch.rand(n, generator=g), "entropy_weight": weight / 3,
    }  # fmt: skip


def call(tensors, terms, backend, dtype=torch.float32, **place):
    t = {k: None if v is None else v.to(dtype) for k, v in tensors.items()}
    first = [t.pop(k) for k in ("logprob", "old_logprob", "advantages", "weight")]
    with use_backend(backend):
        return clip_loss(*first, terms, **t, **place)


def compare(tensors, terms, **place):
    exact = call(tensors, terms, "torch", torch.float64, **place)
    naive = call(tensors, terms, "torch", **place)
    ours = call(tensors, terms, "cpp", **place)
    n = tensors["logprob"].numel()
    for name, a, b, c in zip(SUMS, ours.sums, naive.sums, exact.sums, strict=True):
        size = max(n, c.abs().item(), 1.0)  # the sum of the sizes of the terms is of this order
        assert_within_budget(a, b, c, torch.float32, scale=size, name=name)
    for name in ("dlogprob", "dentropy"):
        a, b, c = (getattr(x, name) for x in (ours, naive, exact))
        assert (a is None) == (c is None)
        if a is not None and n:
            # Near a clip's edge fp32 may fall on the other side, in both: those rows are left out.
            near = (b.double() - c).abs() > 1e-3 * c.abs().clamp(min=1)
            assert near.double().mean() < 0.01
            scale = max(1.0, c.abs().max().item())
            assert_within_budget(a[~near], b[~near], c[~near], torch.float32, scale=scale, name=name)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 257, 5003, 40_000])
@pytest.mark.parametrize("terms", ["plain", "all"])
def test_sizes(n, terms, isa):
    compare(inputs(n), TERMS[terms])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_terms(terms, wide, isa):
    compare(inputs(997, seed=3, wide=wide), terms)


@pytest.mark.parametrize("present", itertools.product([False, True], repeat=4))
def test_optional_vectors(present):
    t = inputs(301)
    for name, there in zip(("old_logprob", "policy_weight", "ref_logprob", "entropy"), present, strict=True):
        if not there:
            t[name] = None
    if not present[3]:
        t["entropy_weight"] = None
    terms = ClipTerms(0.2, 0.2, beta=0.1 if present[2] else 0.0, entropy_coef=0.02 if present[3] else 0.0)
    compare(t, terms)


LENGTHS = [(5,), (16, 16), (1, 2, 3, 40, 0, 17), (0, 0, 70), (9000, 3, 20_000)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("which", itertools.product(["token", "sequence", "one"], repeat=2))
def test_one_number_per_sequence_is_the_same_as_one_per_token(lengths, which, isa):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    n = int(offsets[-1])
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    t = inputs(n)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.8
    t["logprob"][~mask] = float("nan")
    short = dict(t)
    for name, kind in (("advantages", which[0]), ("weight", which[1]), ("entropy_weight", which[1])):
        if kind == "sequence":
            short[name] = torch.randn(len(lengths)).abs() + 0.1
            t[name] = short[name][tokens]
        elif kind == "one":
            short[name] = torch.tensor([0.7])
            t[name] = short[name].expand(n)
    t["weight"] = t["weight"] * mask
    for backend in ("torch", "cpp"):
        a = call(short, TERMS["all"], backend, mask=mask, offsets=offsets)
        b = call(t, TERMS["all"], backend)
        torch.testing.assert_close(a.sums, b.sums, rtol=1e-5, atol=1e-4)
        assert torch.equal(a.dlogprob, b.dlogprob)
        assert torch.equal(a.dentropy, b.dentropy)
    compare({**t, "logprob": t["logprob"].nan_to_num()}, TERMS["all"])


# ---- other formulas, and the ratio of a sequence -----------------------------------------------------------------

FORMS = ["reinforce", "gpg", "cispo", "sapo", "kl_cov", "dro", "dppo_tv", "geo_mean", "gspo", "luspo"]
OPTIONS = {
    "plain": {},
    "kl": {"beta": 0.2, "kl_gradient": "k2"},
    "kl_corrected": {"beta": 0.2, "kl_correction": True, "entropy_coef": 0.02},
    "sequence_token": {"importance_level": "sequence_token", "beta": 0.2, "kl_correction": True},
    "selected": {"correction": "token_truncate", "off_policy_threshold": 0.1, "top_entropy": 0.5},
    "bounds": {"delta": 1.1, "dual_clip": 1.5},
}
RAGGED = ((700, 0, 33, 1, 16, 250), (20_000, 17_000, 3))


def loss_of(kind, batch, options, dtype, *, fused=False, packed=False):
    """(loss, metrics, dlogprob, dentropy) of `policy_loss`, or of the loss_fn in the way of fused_linear_loss."""
    b = pack(batch) if packed else dict(batch)
    b = {k: t.to(dtype) if t.is_floating_point() else t for k, t in b.items()}
    b.pop("noise")
    logprob, entropy = (b.pop(k).requires_grad_() for k in ("logprob", "entropy"))
    old, advantages = b.pop("old_logprob"), b.pop("advantages")
    if not fused:
        loss, metrics = policy_loss(logprob, old, advantages, kind=kind, entropy=entropy, **b, **options)
        return loss.detach(), metrics, *torch.autograd.grad(loss, [logprob, entropy], allow_unused=True)
    loss_fn = PolicyLoss(kind, **options)
    given = {k: b[k] for k in ("ref_logprob", "rollout_logprob")} | {"old_logprob": old, "advantages": advantages}
    given |= {"logprob": logprob.detach(), "old_entropy": entropy.detach()}
    prepared = loss_fn.prepare(given, None, b["cu_seqlens"])
    result = loss_fn.gradient(logprob, entropy, prepared)
    return result.loss, result.metrics, result.dlogprob, result.dentropy


@pytest.mark.parametrize("how", ["padded", "packed", "fused"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", FORMS)
def test_other_formulas(kind, options, how, isa):
    if "importance_level" in options and kind not in ("gspo", "luspo"):
        pytest.skip("composed in torch")
    wide = {"clip_low": 0.1, "clip_high": 0.1} if kind in ("gspo", "luspo") else {}
    options = {**options_of(kind), **wide, **options}
    for lengths in RAGGED[: 1 if isa == "portable" or how == "fused" else 2]:
        batch = make_batch(lengths, max(lengths), dtype=torch.float32, per_token=kind in ("geo_mean", "kl_cov"))
        layout = {"fused": how == "fused", "packed": how != "padded"}
        if how == "padded":  # what is masked is never looked at
            for name in ("logprob", "old_logprob", "ref_logprob"):
                batch[name][~batch["mask"]] = float("nan")
        results = []
        for backend, dtype in (("cpp", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
            with use_backend(backend):
                results.append(loss_of(kind, batch, options, dtype, **layout))
        (loss, metrics, *ours), (naive_loss, naive_metrics, *naive), (exact_loss, exact_metrics, *exact) = results
        assert metrics.keys() == naive_metrics.keys()
        assert_within_budget(loss, naive_loss, exact_loss, torch.float32, scale=max(1.0, exact_loss.abs().item()))
        for name, value in exact_metrics.items():
            scale = max(1.0, value.abs().item())
            assert_within_budget(metrics[name], naive_metrics[name], value, torch.float32, scale=scale, name=name)
        for name, a, b, c in zip(("dlogprob", "dentropy"), ours, naive, exact, strict=True):
            if c is None:
                assert a is None or not a.any()
                continue
            size = c.abs().max()
            assert size > 0 or name == "dentropy"
            near = (b.double() - c).abs() > 1e-3 * size  # on the other side of a clip's edge, in fp32
            assert near.double().mean() < 0.01
            assert_within_budget(a[~near] / size, b[~near] / size, c[~near] / size, torch.float32, name=name)


@pytest.mark.parametrize("kind", FORMS)
def test_the_pass_is_taken(kind, monkeypatch):
    batch = make_batch(dtype=torch.float32)
    calls = []
    original = _backend_policy.policy_clip
    monkeypatch.setattr(_backend_policy, "policy_clip", lambda *a, **k: (calls.append(k["form"]), original(*a, **k)))
    loss_of(kind, batch, options_of(kind), torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["gspo", "geo_mean", "sapo"])
def test_other_formulas_have_the_same_bits_on_any_number_of_threads(kind):
    batch = make_batch((30_000, 2, 20_000, 9_000), 30_000, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(loss_of(kind, batch, {"beta": 0.1}, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("kind", ["gspo", "cispo", "geo_mean"])
def test_other_formulas_refuse_a_second_derivative_and_leave_tangents_to_torch(kind):
    b = make_batch(dtype=torch.float32)
    x = b["logprob"].clone().requires_grad_()
    loss = lambda x: policy_loss(x, b["old_logprob"], b["advantages"], kind=kind, mask=b["mask"])[0]  # noqa: E731
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    _, tangent = torch.func.jvp(loss, (b["logprob"],), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, grad.detach().sum())


def test_nan_of_one_sequence_stays_in_it():
    b = make_batch((9, 12, 5), dtype=torch.float32)
    b["logprob"][1, 3] = float("nan")
    gradient = loss_of("gspo", b, {"beta": 0.1, "kl_correction": True}, torch.float32)[2]
    assert gradient[1].isnan().any()
    assert not gradient[0].isnan().any()
    assert not gradient[2].isnan().any()
    assert not gradient[~b["mask"]].any()


def test_nan_of_a_counted_token_reaches_the_loss_and_the_extremes(isa):
    t = inputs(100)
    t["weight"][:] = 1.0
    t["logprob"][40] = float("nan")
    result = call(t, PLAIN, "cpp")
    assert result.loss.isnan()
    assert result.sums[SUMS.index("ratio_max")].isnan()
    assert result.sums[SUMS.index("ratio_min")].isnan()


def test_the_same_bits_on_any_number_of_threads():
    t = inputs(200_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(call(t, TERMS["all"], "cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_bf16_inputs_and_strides():
    t = inputs(512)
    half = {k: v.bfloat16() for k, v in t.items()}
    a = call(half, TERMS["all"], "cpp", torch.bfloat16)
    b = call({k: v.float() for k, v in half.items()}, TERMS["all"], "cpp")
    assert torch.equal(a.dlogprob, b.dlogprob)
    strided = {k: v[::2] for k, v in t.items()}
    a, b = call(strided, PLAIN, "cpp"), call({k: v.contiguous() for k, v in strided.items()}, PLAIN, "cpp")
    assert torch.equal(a.sums, b.sums)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_gradient_is_the_callers_own(backend):
    """The buffer is handed over at the last backward: earlier ones, hooks and in-place edits must not see it twice."""
    t = inputs(64)
    want = call(t, PLAIN, backend).dlogprob.clone()
    x = t.pop("logprob").requires_grad_()
    with use_backend(backend):
        loss = policy_loss(x, t["old_logprob"], t["advantages"], clip_high=0.28)[0]
        want = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        for k in range(1, 4):
            loss.backward(retain_graph=True)
            torch.testing.assert_close(x.grad, k * want)
            x.grad.mul_(1.0)  # in place, as gradient clipping does
        x.grad = None
        (3 * loss).backward()
    torch.testing.assert_close(x.grad, 3 * want)
    x.grad.zero_()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_of_one_graph_add_up():
    t = inputs(64)
    x = t["logprob"].clone().requires_grad_()
    losses = [policy_loss(2 * x, t["old_logprob"], a * t["advantages"])[0] for a in (1.0, -0.5)]
    whole = torch.autograd.grad(losses[0] + losses[1], x, retain_graph=True)[0]
    parts = [torch.autograd.grad(l, x)[0] for l in losses]
    torch.testing.assert_close(whole, parts[0] + parts[1])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("lengths", [(3, 0, 9), (8, 8), (0,), (17, 30, 1)])
def test_segment_counts(lengths, backend):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    mask = torch.rand(int(offsets[-1])) < 0.6
    want = [int(mask[a:b].sum()) for a, b in itertools.pairwise(offsets.tolist())]
    with use_backend(backend):
        assert segment_counts(mask, offsets, len(lengths), 0).tolist() == want
        if len(set(lengths)) == 1:
            assert segment_counts(mask, None, len(lengths), lengths[0]).tolist() == want
    torch.library.opcheck(torch.ops.rlhf_fast.segment_counts.default, (mask, offsets, len(lengths), 0))


def test_opcheck_with_numbers_per_sequence():
    t = inputs(12)
    t["advantages"], t["weight"], t["entropy_weight"] = torch.randn(3), torch.rand(3), torch.rand(1)
    t["logprob"].requires_grad_()
    t["entropy"].requires_grad_()
    mask = torch.rand(12) < 0.7
    for place in ((mask, torch.tensor([0, 5, 5, 12]), 0), (None, None, 4)):
        torch.library.opcheck(torch.ops.rlhf_fast.policy_clip, (*t.values(), *TERMS["all"], *place))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprob": torch.zeros(5)}, r"old_logprob must be a contiguous \(12,\)"),
        ({"advantages": torch.zeros(5)}, r"advantages must be a contiguous \(12,\) or \(3,\) or \(1,\)"),
        ({"offsets": torch.tensor([0, 5, 5, 13])}, "offsets must run from 0 to 12, got 0..13"),
    ],
)
def test_memory_is_checked(change, message):
    t = {**inputs(12), "advantages": torch.zeros(3), **change}
    offsets = t.pop("offsets", torch.tensor([0, 5, 5, 12]))
    with pytest.raises(ValueError, match=message):
        call(t, PLAIN, "cpp", offsets=offsets)

"""GAE, discounted returns, shaped rewards, whitening, value loss.

Judged by the reference in fp64 (error budget: no worse than the reference's own expression in fp32, plus 1e-6) and by
formulas written out here in plain Python, so that the reference itself is judged too. Runs on the CPU: C++ and torch.
The CUDA kernel's order of work (tiles, look-back) is emulated in C++ with the header that both share.
"""

from __future__ import annotations

import doctest
import importlib
import math
import random
from itertools import accumulate, pairwise

import pytest
import torch
from _budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import discounted_returns, gae, masked_whiten, reference, shape_rewards, value_loss
from rlhf_fast._backend import cpp_available, cpp_module, use_backend

needs_cpp = pytest.mark.skipif(not cpp_available(), reason="the C++ extension is not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "torch"]
FLOOR = 1e-6


def assert_budget(ours: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor) -> None:
    """|ours - exact| <= |naive - exact| + floor, elementwise; NaN fails."""
    floor = FLOOR * exact.abs().clamp(min=1)
    assert ours.shape == exact.shape
    assert ((ours.double() - exact).abs() <= (naive.double() - exact).abs() + floor).all()


def slow_gae(rewards, values, counts, gamma, lam, mode, bootstrap):
    """One sequence of Python floats: A_t = sum_l (gamma lam)^l delta_{t+l}, every sum from scratch."""
    kept = [t for t, c in enumerate(counts) if c]
    advantages = [0.0] * len(rewards)
    if not kept:
        return advantages
    steps = kept if mode == "carry" else list(range(kept[0], kept[-1] + 1))
    r = [rewards[t] if counts[t] else 0.0 for t in steps]
    v = [values[t] if counts[t] else 0.0 for t in steps] + [bootstrap]
    delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
    for i, t in enumerate(steps):
        if counts[t]:
            advantages[t] = math.fsum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return advantages


def packed_case(seed, lengths, masked=0.3):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    mask = torch.rand(n, generator=g) >= masked
    bootstrap = torch.randn(len(lengths), generator=g)
    terminated = torch.rand(len(lengths), generator=g) < 0.5
    return torch.randn(n, generator=g), 3 * torch.randn(n, generator=g), cu, mask, terminated, bootstrap


lengths_strategy = st.lists(st.integers(0, 13), min_size=1, max_size=6)
unit = st.sampled_from([0.0, 0.37, 0.95, 1.0])
modes = st.sampled_from(["carry", "zero"])


@given(lengths_strategy, st.integers(0, 10**6), unit, unit, modes)
@settings(max_examples=40, deadline=None)
def test_reference_gae_against_the_sum_written_out(lengths, seed, gamma, lam, mode):
    r, v, cu, mask, terminated, boot = packed_case(seed, lengths)
    r, v, boot = r.double(), v.double(), boot.double()
    options = dict(gamma=gamma, lam=lam, cu_seqlens=cu, mask=mask, mask_mode=mode, terminated=terminated)
    got = reference.gae(r, v, bootstrap=boot, **options)
    want = []
    for b, (begin, end) in enumerate(pairwise(cu.tolist())):
        start = 0.0 if terminated[b] else boot[b].item()
        span = slice(begin, end)
        want += slow_gae(r[span].tolist(), v[span].tolist(), mask[span].tolist(), gamma, lam, mode, start)
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.advantages, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.returns, want + v * mask, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths_strategy, st.integers(0, 10**6), unit, unit, modes, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_gae_against_reference(backend, lengths, seed, gamma, lam, mode, with_mask, with_bootstrap):
    r, v, cu, mask, terminated, boot = packed_case(seed, lengths)
    options = dict(gamma=gamma, lam=lam, cu_seqlens=cu, mask_mode=mode, mask=mask if with_mask else None)
    ends = dict(terminated=terminated, bootstrap=boot) if with_bootstrap else {}
    exact = reference.gae(r.double(), v.double(), **options, **ends)
    naive = reference.gae(r, v, **options, **ends)
    with use_backend(backend):
        ours = gae(r, v, **options, **ends)
        wide = gae(r.double(), v.double(), **options, **ends)
        to_go = discounted_returns(r, **{k: x for k, x in options.items() if k != "lam"}, **ends)
    for o, e, n, w in zip(ours, exact, naive, wide, strict=True):
        assert o.dtype == torch.float32
        assert w.dtype == torch.float64
        assert_budget(o, e, n)
        torch.testing.assert_close(w, e, rtol=1e-12, atol=1e-12)
    options.pop("lam")
    exact = reference.discounted_returns(r.double(), **options, **ends)
    assert_budget(to_go, exact, reference.discounted_returns(r, **options, **ends))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_discounted_returns_by_hand(backend):
    def returns(*args, **options):
        if backend == "reference":
            return reference.discounted_returns(*args, **options)
        with use_backend(backend):
            return discounted_returns(*args, **options)

    r = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    mask = torch.tensor([True, False, True, True, False])
    boot = torch.tensor([32.0])
    carry = returns(r, gamma=0.5, mask=mask, bootstrap=boot)
    assert carry.tolist() == [1 + 0.5 * (4 + 0.5 * (8 + 16)), 0, 4 + 0.5 * (8 + 16), 24, 0]
    zero = returns(r, gamma=0.5, mask=mask, bootstrap=boot, mask_mode="zero")
    assert zero.tolist() == [1 + 0.25 * (4 + 0.5 * (8 + 16)), 0, 4 + 0.5 * (8 + 16), 24, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_padded_equals_packed(backend, mode):
    lengths, T = [5, 0, 9, 1], 9
    r, v, cu, mask, terminated, boot = packed_case(3, lengths)
    spots = torch.cat([torch.arange(l) + b * T for b, l in enumerate(lengths)])
    pad_r, pad_v = torch.full((4 * T,), math.nan), torch.full((4 * T,), math.nan)
    pad_m = torch.zeros(4 * T, dtype=torch.bool)
    pad_r[spots], pad_v[spots], pad_m[spots] = r, v, mask
    options = dict(gamma=0.9, lam=0.8, mask_mode=mode, terminated=terminated, bootstrap=boot)
    with use_backend(backend):
        packed = gae(r, v, cu_seqlens=cu, mask=mask, **options)
        padded = gae(pad_r.view(4, T), pad_v.view(4, T), mask=pad_m.view(4, T), **options)
    for a, b in zip(packed, padded, strict=True):
        assert b.shape == (4, T)
        torch.testing.assert_close(a, b.reshape(-1)[spots], rtol=1e-6, atol=1e-6)
        assert torch.equal(b.reshape(-1)[~pad_m], torch.zeros((~pad_m).sum()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_nothing_leaks_from_masked_positions_or_terminated_bootstraps(backend, mode):
    r, v, cu, mask, terminated, boot = packed_case(7, [11, 4, 0, 13, 6])
    clean = dict(gamma=0.97, lam=0.9, cu_seqlens=cu, mask=mask, mask_mode=mode, terminated=terminated)
    poisoned_boot = boot.masked_fill(terminated, math.nan)
    assert terminated.any()
    assert not terminated.all()
    with use_backend(backend):
        want = gae(r * mask, v * mask, bootstrap=boot, **clean)
        for poison in (math.nan, math.inf):
            bad_r, bad_v = r.masked_fill(~mask, poison), v.masked_fill(~mask, poison)
            got = gae(bad_r, bad_v, bootstrap=poisoned_boot, **clean)
            options = {k: x for k, x in clean.items() if k != "lam"}
            to_go = discounted_returns(bad_r, bootstrap=poisoned_boot, **options)
            assert torch.equal(got.advantages, want.advantages)
            assert torch.equal(got.returns, want.returns)
            assert to_go.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_see_its_neighbours(backend):
    r, v, cu, *_ = packed_case(1, [4, 3, 5])
    r[cu[1] : cu[2]] = math.nan
    with use_backend(backend):
        a = gae(r, v, cu_seqlens=cu, lam=0.9).advantages
    assert a[: cu[1]].isfinite().all()
    assert a[cu[1] : cu[2]].isnan().all()
    assert a[cu[2] :].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_one_and_lambda_one_are_exact(backend):
    g = torch.Generator().manual_seed(0)
    r = torch.randint(-4, 5, (3, 700), generator=g).float()
    v = 1e4 * torch.randn(3, 700, generator=g)
    want = r.flip(1).cumsum(1).flip(1)
    with use_backend(backend):
        got = gae(r, v, gamma=1.0, lam=1.0)
        assert torch.equal(got.returns, want)
        assert torch.equal(got.advantages, want - v)
        assert torch.equal(discounted_returns(r), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_bootstraps_and_termination_does_not(backend):
    r, v = torch.zeros(2, 3), torch.zeros(2, 3)
    boot = torch.tensor([8.0, 8.0])
    with use_backend(backend):
        got = gae(r, v, gamma=0.5, lam=1.0, terminated=torch.tensor([True, False]), bootstrap=boot)
    assert got.returns.tolist() == [[0, 0, 0], [1, 2, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_dtypes_empty_and_inputs_untouched(backend):
    r, v, cu, mask, *_ = packed_case(5, [6, 3])
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            low = gae(r.to(dtype), v.to(dtype), cu_seqlens=cu)
            want = gae(r.to(dtype).float(), v.to(dtype).float(), cu_seqlens=cu)
            assert torch.equal(low.advantages, want.advantages)
        kept = r.clone(), v.clone()
        leaf = v.clone().requires_grad_()
        assert not gae(r, leaf, cu_seqlens=cu, mask=mask).advantages.requires_grad
        assert torch.equal(r, kept[0])
        assert torch.equal(v, kept[1])
        strided = torch.randn(7, 2, 2).transpose(0, 1)[..., 0]
        assert torch.equal(gae(strided, strided).returns, gae(strided.contiguous(), strided.contiguous()).returns)
        assert gae(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0])).returns.shape == (0,)
        assert gae(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0, 0])).returns.shape == (0,)
        assert gae(torch.zeros(2, 0), torch.zeros(2, 0)).returns.shape == (2, 0)


@needs_cpp
def test_long_sequences_and_threads():
    g = torch.Generator().manual_seed(2)
    r, v = torch.randn(3, 5_000, generator=g), torch.randn(3, 5_000, generator=g)
    mask = torch.rand(3, 5_000, generator=g) < 0.9
    wide = gae(r.double(), v.double(), mask=mask, gamma=0.999, lam=0.97)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with use_backend("cpp"):
            results.append(gae(r, v, mask=mask, gamma=0.999, lam=0.97).advantages)
    torch.set_num_threads(before)
    with use_backend("torch"):
        doubling = gae(r, v, mask=mask, gamma=0.999, lam=0.97).advantages
    assert torch.equal(*results)
    naive = loop_over_time(r, v, mask, 0.999, 0.97)
    for got in (results[0], doubling):
        assert_budget(got, wide.advantages, naive)


def loop_over_time(r, v, mask, gamma, lam):
    """What the trainers do: a Python loop over T on columns of tensors, carry mode, in the tensors' dtype."""
    running, next_value, columns = torch.zeros(len(r)), torch.zeros(len(r)), []
    for t in reversed(range(r.shape[1])):
        counts = mask[:, t]
        running = torch.where(counts, r[:, t] + gamma * next_value - v[:, t] + gamma * lam * running, running)
        next_value = torch.where(counts, v[:, t], next_value)
        columns.append(torch.where(counts, running, 0.0))
    return torch.stack(columns[::-1], 1)


def tiled(r, v, mask, cu, gamma, lam, carry, boot, tile, lane, published):
    """The C++ emulation of the CUDA kernel's order of work."""
    r, v, mask, cu = r.contiguous(), v.contiguous(), mask.contiguous(), cu.long()
    out = torch.full_like(r, math.nan), torch.full_like(r, math.nan)
    cpp_module().gae_tiled(
        r.data_ptr(), v.data_ptr(), mask.data_ptr(), cu.data_ptr(), len(cu) - 1, 0, gamma, lam, carry,
        boot.data_ptr(), out[0].data_ptr(), out[1].data_ptr(), len(r), tile, lane, published.data_ptr(),
    )  # fmt: skip
    return out


@needs_cpp
@given(
    lengths_strategy,
    st.integers(0, 10**6),
    unit,
    unit,
    st.booleans(),
    st.sampled_from([(4, 1), (6, 3), (8, 2), (3, 5)]),
)
@settings(max_examples=60, deadline=None)
def test_tiles_with_look_back_equal_the_serial_scan(lengths, seed, gamma, lam, carry, shape):
    r, v, cu, mask, _, boot = packed_case(seed, lengths)
    tile, lane = shape
    options = dict(gamma=gamma, lam=lam, cu_seqlens=cu, mask=mask, mask_mode="carry" if carry else "zero")
    want = reference.gae(r.double(), v.double(), bootstrap=boot.double(), **options)
    naive = reference.gae(r, v, bootstrap=boot, **options)
    r, v = r.masked_fill(~mask, math.nan), v.masked_fill(~mask, math.nan)
    results = []
    for pattern in range(3):  # nobody's prefix is seen in time, everybody's, some
        choose = random.Random(seed + pattern)
        seen = [[0, 1, choose.randint(0, 1)][pattern] for _ in range(len(r) + 1)]
        published = torch.tensor(seen, dtype=torch.uint8)
        results.append(tiled(r, v, mask, cu, gamma, lam, carry, boot, tile, lane, published))
    for k in range(2):
        assert torch.equal(results[0][k], results[1][k])  # the same bits, whatever the timing
        assert torch.equal(results[0][k], results[2][k])
        assert_budget(results[0][k], want[k], naive[k])


@needs_cpp
def test_tiles_keep_sequences_apart():
    r, v, cu, mask, _, boot = packed_case(1, [4, 3, 5], masked=0.0)
    r[cu[1] : cu[2]] = math.nan
    advantages, _ = tiled(r, v, mask, cu, 0.9, 0.9, True, boot, 2, 1, torch.zeros(12, dtype=torch.uint8))
    assert advantages[: cu[1]].isfinite().all()
    assert advantages[cu[2] :].isfinite().all()


# ---- shaped rewards ----


@given(lengths_strategy, st.integers(0, 10**6), st.sampled_from(["k1", "abs", "k2", "k3"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_shape_rewards(lengths, seed, estimator, clip):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    logprob, ref = -torch.rand(n, generator=g), -torch.rand(n, generator=g)
    mask = torch.rand(n, generator=g) < 0.6
    scores = 3 * torch.randn(len(lengths), generator=g)
    options = dict(kl_coef=0.1, kl_estimator=estimator, cu_seqlens=cu, mask=mask)
    options |= dict(kl_clip=0.2, score_clip=1.0) if clip else {}
    got = shape_rewards(scores, logprob.masked_fill(~mask, math.nan), ref.masked_fill(~mask, math.nan), **options)
    want = reference.shape_rewards(scores.double(), logprob.double(), ref.double(), **options)
    torch.testing.assert_close(got.rewards.double(), want.rewards, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.kl.double(), want.kl, rtol=1e-6, atol=1e-6)


def test_shape_rewards_by_hand():
    scores = torch.tensor([10.0, 20.0, -30.0])
    logprob = torch.tensor([[-1.0, -2.0, -3.0]]).repeat(3, 1)
    ref = torch.tensor([[-1.5, -1.0, -3.0]]).repeat(3, 1)
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    for module in (shape_rewards, reference.shape_rewards):
        got = module(scores, logprob, ref, kl_coef=0.1, mask=mask, score_clip=15.0, kl_clip=0.75)
        want = torch.tensor([[-0.05, 0.075 + 10, 0], [-0.05, 0, 15.0], [0, 0, 0]])
        torch.testing.assert_close(got.rewards, want)
        torch.testing.assert_close(got.kl, torch.tensor([[0.5, -1, 0], [0.5, 0, 0], [0, 0, 0]]))
    packed = shape_rewards(scores[:2], logprob.view(-1)[:5], ref.view(-1)[:5], cu_seqlens=torch.tensor([0, 2, 5]))
    torch.testing.assert_close(packed.rewards[[1, 4]], torch.tensor([0.05 + 10, 20 + 0.05]), rtol=1e-6, atol=1e-6)


# ---- whitening ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 13, 5000, 40_000])
def test_masked_whiten(backend, shift_mean, unbiased, n):
    g = torch.Generator().manual_seed(n)
    x = 1000.0 + 0.01 * torch.randn(n, generator=g)
    mask = torch.rand(n, generator=g) < 0.7
    options = dict(shift_mean=shift_mean, unbiased=unbiased)
    exact = reference.masked_whiten(x.double(), mask, **options)
    with use_backend(backend):
        ours = masked_whiten(x.masked_fill(~mask, math.nan), mask, **options)
        wide = masked_whiten(x.double(), mask, **options)
    assert_budget(ours, exact, reference.masked_whiten(x, mask, **options))
    torch.testing.assert_close(wide, exact, rtol=1e-9, atol=1e-9)
    assert (ours[~mask] == 0).all()


def test_reference_whiten_by_hand():
    x, mask = torch.tensor([1.0, 9.0, 5.0, 3.0]), torch.tensor([True, False, True, True])
    want = [-2 / 2, 0.0, 2 / 2, 0.0]  # mean 3, unbiased variance 4
    assert reference.masked_whiten(x, mask, eps=0.0).tolist() == want
    biased = reference.masked_whiten(x, mask, eps=0.0, unbiased=False, shift_mean=False).tolist()
    assert biased == pytest.approx([3 - math.sqrt(1.5), 0.0, 3 + math.sqrt(1.5), 3.0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 1e-30, -7e8])
@pytest.mark.parametrize("grad", [False, True])
def test_equal_values_whiten_to_exactly_zero(backend, value, grad):
    with use_backend(backend):
        for dtype in (torch.float32, torch.float64):
            for n in (1, 3, 10_007):
                x = torch.full((n,), value, dtype=dtype, requires_grad=grad)
                assert torch.equal(masked_whiten(x).detach(), torch.zeros(n, dtype=dtype))
                assert torch.equal(masked_whiten(x, shift_mean=False).detach(), x.detach())


def test_whitening_is_differentiable_and_finite_when_degenerate():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    for shift in (True, False):
        assert torch.autograd.gradcheck(lambda t, s=shift: masked_whiten(t, mask, shift_mean=s), x)
        assert torch.autograd.gradgradcheck(lambda t, s=shift: masked_whiten(t, mask, shift_mean=s), x)
        torch.testing.assert_close(
            masked_whiten(x, mask, shift_mean=shift), masked_whiten(x.detach(), mask, shift_mean=shift)
        )
    for keep in (0, 1):
        y = torch.full((4,), math.nan)
        y[:keep] = 3.0
        y.requires_grad_()
        masked_whiten(y, torch.arange(4) < keep).sum().backward()
        assert torch.equal(y.grad, torch.zeros(4))


@needs_cpp
def test_whitening_has_the_same_bits_on_any_number_of_threads():
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(masked_whiten(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- value loss ----


def slow_value_loss(v, old, r, counts, clip, kind, delta):
    """Per-token losses of Python floats; 0 where masked."""

    def h(e):
        return 0.5 * e * e if kind == "mse" or abs(e) <= delta else delta * (abs(e) - 0.5 * delta)

    out = []
    for i in range(len(v)):
        bounded = v[i] if clip is None else min(max(v[i], old[i] - clip), old[i] + clip)
        out.append(max(h(v[i] - r[i]), h(bounded - r[i])) if counts[i] else 0.0)
    return out


AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_and_gradient(aggregation, kind, clip):
    lengths = [5, 0, 9, 3]
    r, v, cu, mask, _, _ = packed_case(11, lengths)
    v = 0.5 * v
    old = v + 0.3 * torch.randn(len(v), generator=torch.Generator().manual_seed(1))
    mask[-3:] = False  # a sequence without a token that counts
    options = dict(clip=clip, kind=kind, huber_delta=0.7, aggregation=aggregation, max_length=16, cu_seqlens=cu)
    leaf = v.masked_fill(~mask, math.nan).requires_grad_()
    got = value_loss(leaf, old.masked_fill(~mask, math.nan), r.masked_fill(~mask, math.nan), mask=mask, **options)
    got.loss.backward()
    wide = v.double().requires_grad_()
    want = reference.value_loss(wide, old.double(), r.double(), mask=mask, **options)
    want.loss.backward()
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)
    assert (leaf.grad[~mask] == 0).all()
    torch.testing.assert_close(got.metrics["clip_fraction"].double(), want.metrics["clip_fraction"])
    if clip is not None:
        assert got.metrics["clip_fraction"] > 0

    slow = slow_value_loss(v.tolist(), old.tolist(), r.tolist(), mask.tolist(), clip, kind, 0.7)
    spans = [slice(a, b) for a, b in pairwise(cu.tolist())]
    tokens = [int(mask[s].sum()) for s in spans]
    by_hand = {
        "token_mean": sum(slow) / sum(tokens),
        "seq_mean_token_mean": sum(sum(slow[s]) / max(t, 1) for s, t in zip(spans, tokens, strict=True)) / 4,
        "seq_mean_token_sum": sum(slow) / 4,
        "fixed_length": sum(slow) / (4 * 16),
    }
    assert want.loss.item() == pytest.approx(by_hand[aggregation], rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_loss_micro_batches_add_up_and_padding_does_not_matter(aggregation):
    g = torch.Generator().manual_seed(4)
    v, old, r = (torch.randn(6, 8, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(6, 8, generator=g) < 0.6
    options = dict(aggregation=aggregation, max_length=8)
    whole = value_loss(v, old, r, mask=mask, **options).loss
    count = mask.sum() if aggregation == "token_mean" else 6
    parts = [
        value_loss(v[i : i + 2], old[i : i + 2], r[i : i + 2], mask=mask[i : i + 2], normalizer=count, **options).loss
        for i in range(0, 6, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    cu = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    packed = value_loss(v[mask], old[mask], r[mask], cu_seqlens=cu, **options).loss
    torch.testing.assert_close(packed, whole)


@needs_cpp
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("options", [{}, {"kind": "huber", "huber_delta": 0.3}, {"clip": None}], ids=str)
@pytest.mark.parametrize("lengths", [(5, 0, 33, 1, 700), (40_000,), (0,)], ids=str)
def test_value_loss_in_one_pass(lengths, options, aggregation, isa):
    before = cpp_module().isa()
    try:
        cpp_module().use_isa(isa)
    except ValueError:
        pytest.skip(f"no {isa} here")
    try:
        n = sum(lengths)
        g = torch.Generator().manual_seed(n)
        v, old, r = (torch.randn(n, generator=g) for _ in range(3))
        old, r = v + 0.3 * old, v + 0.5 * r
        mask = torch.rand(n, generator=g) < 0.8
        cu = torch.tensor([0, *accumulate(lengths)])
        results = []
        for backend, dtype in (("cpp", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
            leaf = v.to(dtype).requires_grad_()
            with use_backend(backend):
                out = value_loss(leaf, old.to(dtype), r.to(dtype), mask=mask, cu_seqlens=cu, aggregation=aggregation,
                                 **options)  # fmt: skip
            results.append((out.loss, torch.autograd.grad(out.loss, leaf)[0] * n, *out.metrics.values()))
        for ours, naive, exact in zip(*results, strict=True):
            assert ours.shape == exact.shape
            if exact.numel():
                assert_within_budget(ours, naive, exact, torch.float32)
    finally:
        cpp_module().use_isa(before)


def test_the_gradient_of_the_value_loss_is_the_callers_own_and_has_a_derivative():
    v = torch.randn(4, 9, requires_grad=True)
    old, r = v.detach() + 0.3 * torch.randn(4, 9), torch.randn(4, 9)
    loss = value_loss(v, old, r).loss
    (want,) = torch.autograd.grad(loss, v, retain_graph=True)
    want = want.clone()
    for k in (1, 2, 3):
        (2 * loss).backward(retain_graph=True)
        torch.testing.assert_close(v.grad, 2 * k * want)
    (grad,) = torch.autograd.grad(loss, v, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), v)
    torch.testing.assert_close(second, (want != 0) / 36)


def test_value_loss_all_masked_and_gradcheck():
    v = torch.full((2, 3), math.nan, requires_grad=True)
    got = value_loss(v, v.detach(), v.detach(), mask=torch.zeros(2, 3, dtype=torch.bool))
    got.loss.backward()
    assert got.loss == 0
    assert torch.equal(v.grad, torch.zeros(2, 3))
    assert all(m.isfinite() for m in got.metrics.values())
    g = torch.Generator().manual_seed(9)
    v = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    old, r = torch.randn(7, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64)
    for kind in ("mse", "huber"):
        assert torch.autograd.gradcheck(lambda t, k=kind: value_loss(t, old, r, kind=k).loss, v)
    # Identical values inside the interval: the whole gradient, not half of it.
    v = torch.zeros(1, requires_grad=True)
    value_loss(v, torch.zeros(1), torch.ones(1)).loss.backward()
    assert v.grad.item() == -1.0


# ---- torch.library, torch.compile, errors, docs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    r, v, cu, mask, _, boot = packed_case(0, [4, 3, 6])
    r, v, boot, cu = r.to(dtype), v.to(dtype), boot.to(dtype), cu.long()
    ops = torch.ops.rlhf_fast
    torch.library.opcheck(ops.gae.default, (r, v, cu, 3, 0, mask, boot, 0.9, 0.8, True))
    torch.library.opcheck(ops.gae.default, (r[:12], v[:12], None, 3, 4, None, None, 0.9, 0.8, False))
    torch.library.opcheck(ops.discounted_returns.default, (r, cu, 3, 0, mask, boot, 0.9, False))
    torch.library.opcheck(ops.moments.default, (r, mask))
    torch.library.opcheck(ops.whiten.default, (r, mask, torch.tensor([5.0, 1, 2], dtype=torch.float64), True, 1, 1e-8))


def test_compile_fullgraph_with_changing_length():
    def step(scores, logprob, ref, values, cu, mask):
        rewards, _ = shape_rewards(scores, logprob, ref, cu_seqlens=cu, mask=mask)
        advantages, returns = gae(rewards, values.detach(), cu_seqlens=cu, mask=mask)
        return masked_whiten(advantages, mask), value_loss(values, values.detach() + 0.1, returns, mask=mask).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, lengths in enumerate([[3, 5], [7, 2], [4, 9]]):
        r, v, cu, mask, _, boot = packed_case(seed, lengths)
        arguments = (boot, -r.abs(), -v.abs(), v.clone().requires_grad_(), cu, mask)
        for a, b in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(a, b)


B, T = 4, 6
BAD = [
    (lambda x: gae(x, x[:, :5]), r"values must be rewards' shape =\(4, 6\), got \(4, 5\)"),
    (lambda x: gae(x.long(), x), "rewards must be float32"),
    (lambda x: gae(x, x, gamma=1.1), r"gamma must be a number in \[0, 1\], got 1.1"),
    (lambda x: gae(x, x, lam=math.nan), "lam must be a number"),
    (lambda x: gae(x, x, mask=torch.ones(4)), "mask must be"),
    (lambda x: gae(x, x, mask_mode="skip"), "mask_mode must be one of carry, zero, got 'skip'"),
    (lambda x: gae(x, x, terminated=torch.ones(4, dtype=torch.bool)), "bootstrap must be given with terminated"),
    (lambda x: gae(x, x, bootstrap=torch.ones(3)), r"bootstrap must be \(B,\)=\(4,\), got \(3,\)"),
    (lambda x: gae(x, x, cu_seqlens=torch.tensor([0, 24])), r"rewards must be \(N,\) with cu_seqlens, got \(4, 6\)"),
    (lambda x: gae(x[0], x[0], cu_seqlens=torch.tensor([0, 7])), "cu_seqlens must run from 0 to N=6, got 0..7"),
    (lambda x: gae(x[0], x[0], cu_seqlens=torch.tensor([0, 5, 3, 6])), "cu_seqlens must not fall"),
    (lambda x: gae(x[0], x[0], cu_seqlens=torch.tensor([0.0, 6.0])), r"cu_seqlens must be \(B\+1,\) int32 or int64"),
    (lambda x: masked_whiten(x, torch.ones(4, 5)), "mask must be"),
    (lambda x: masked_whiten(x, eps=0.0), "eps must be a finite number > 0"),
    (lambda x: shape_rewards(x[:, 0], x), "logprob and ref_logprob must be given together"),
    (lambda x: shape_rewards(x[:, 0]), "mask must be given when there is no logprob"),
    (lambda x: shape_rewards(x[:3, 0], x, x), r"scores must be \(B,\)=\(4,\), got \(3,\)"),
    (lambda x: value_loss(x, x, x, kind="l1"), "kind must be one of mse, huber, got 'l1'"),
    (lambda x: value_loss(x, x, x[:, :2]), "returns must be"),
    (lambda x: value_loss(x, x, x, clip=-1.0), "clip must be a finite number > 0"),
    (lambda x: value_loss(x, x, x, aggregation="mean"), "aggregation must be one of token_mean"),
    (lambda x: value_loss(x, x, x, aggregation="fixed_length"), "max_length must be > 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(B, T))


@pytest.mark.parametrize("module", ["value", "value_loss"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"rlhf_fast.ops.{module}"))
    assert result.attempted > 0
    assert result.failed == 0

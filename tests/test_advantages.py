"""Group advantages: against the reference in fp64, and against formulas in plain Python (the `statistics` module),
among them TRL 1.16's own: (r - mean) / (unbiased std + 1e-4) over the finite rewards of the group. Runs on the CPU,
C++ and torch."""

from __future__ import annotations

import doctest
import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast.ops.advantages as module
from rlhf_fast import group_advantages, reference
from rlhf_fast._backend import cpp_available, use_backend
from rlhf_fast.ops.advantages import BASELINES as ALL_BASELINES
from rlhf_fast.ops.advantages import ESTIMATORS, SCALES, advantage_options

BACKENDS = [pytest.param("cpp", marks=pytest.mark.skipif(not cpp_available(), reason="no C++ extension")), "torch"]
NAN = math.nan
BASELINES = [name for name in ALL_BASELINES if name != "pass_at_k"]  # that one: test_pass_at_k.py


def case(seed, sizes, nan=0.15, spread=1.0):
    """Rewards, ids (shuffled, not contiguous, negative ones too) and lengths of groups of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((n,), 1_000_003 * ((k * 7) % 5 - 2) + k) for k, n in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids), generator=g)]
    rewards = spread * torch.randint(-3, 4, (len(ids),), generator=g).float() / 3
    rewards[torch.rand(len(ids), generator=g) < nan] = NAN
    return rewards, ids, torch.randint(1, 100, (len(ids),), generator=g)


def rows_of(ids):
    return [[i for i, x in enumerate(ids) if x == one] for one in dict.fromkeys(ids)]


def slow(rewards, ids, baseline, scale, ddof, eps, lengths):
    """Every estimator on Python floats."""
    have = [r for r in rewards if math.isfinite(r)]
    out = [0.0] * len(rewards)
    batch_mean = statistics.fmean(have) if have else 0.0

    def std(values):
        if len(values) <= ddof or len(set(values)) <= 1:
            return 0.0
        return statistics.stdev(values) if ddof else statistics.pstdev(values)

    for rows in rows_of(ids):
        good = [i for i in rows if math.isfinite(rewards[i])]
        for i in good:
            others = [rewards[j] for j in good if j != i]
            r = [rewards[j] for j in good]
            b = {
                "none": lambda: 0.0,
                "batch": lambda: batch_mean,
                "mean": lambda r=r: statistics.fmean(r),
                "loo": lambda i=i, o=others: statistics.fmean(o) if o else rewards[i],
                "opo": lambda g=good: sum(lengths[j] * rewards[j] for j in g) / sum(lengths[j] for j in g),
                "best_other": lambda i=i, o=others: min(rewards[i], max(o)) if o else rewards[i],
            }[baseline]()
            out[i] = rewards[i] - b
            if baseline == "best_other" and others and rewards[i] <= max(others):
                out[i] = 0.0
    divisors = {"none": None, "batch": std(have)}
    divisors["centered"] = std([a for a, r in zip(out, rewards, strict=True) if math.isfinite(r)])
    for rows in rows_of(ids):
        r = [rewards[i] for i in rows if math.isfinite(rewards[i])]
        own = {"group": lambda r=r: std(r), "mean": lambda r=r: statistics.fmean(r) if r else 0.0}
        d = own[scale]() if scale in own else divisors[scale]
        for i in rows:
            if d is not None:
                out[i] = out[i] / (d + eps) if d > 0 else 0.0
    return out


sizes_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    sizes_strategy, st.integers(0, 10**6), st.sampled_from(BASELINES), st.sampled_from(SCALES), st.integers(0, 1),
    st.sampled_from([1e-4, 1e-6]), st.sampled_from([1.0, 1e-6, 1e5]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_every_baseline_and_scale(backend, sizes, seed, baseline, scale, ddof, eps, spread):
    rewards, ids, lengths = case(seed, sizes, spread=spread)
    options = dict(group_ids=ids, baseline=baseline, scale=scale, ddof=ddof, eps=eps, lengths=lengths)
    exact = reference.group_advantages(rewards.double(), **options)
    naive = reference.group_advantages(rewards, **options)
    with use_backend(backend):
        got = group_advantages(rewards, **options)
    floor = 1e-6 * exact.advantages.abs().clamp(min=1)
    error = (got.advantages.double() - exact.advantages).abs()
    if scale != "centered":  # there the spread of centred fp32 numbers may be pure rounding
        assert (error <= (naive.advantages.double() - exact.advantages).abs() + floor).all()
    for field in ("mean", "std"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(exact, field), rtol=1e-6, atol=1e-7 * spread)
    for field in ("count", "zero_std", "valid", "num_invalid"):
        assert torch.equal(getattr(got, field), getattr(exact, field)), field
    by_hand = slow(rewards.tolist(), ids.tolist(), baseline, scale, ddof, eps, lengths.tolist())
    by_hand = torch.tensor(by_hand, dtype=torch.float64)
    # A quotient of rounding errors has no meaning: compare where the divisor is more than that.
    meaningful = exact.advantages.abs() < 1e6
    if scale != "centered" or by_hand.abs().max() < 10:
        torch.testing.assert_close(exact.advantages[meaningful], by_hand[meaningful], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trl_numbers(backend):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 8, generator=g)
    want = torch.tensor(
        [[(x - statistics.fmean(r)) / (statistics.stdev(r) + 1e-4) for x in r] for r in rewards.tolist()]
    ).flatten()
    with use_backend(backend):
        got = group_advantages(rewards.flatten(), group_size=8)
        batch = group_advantages(rewards.flatten(), group_size=8, scale="batch")
    torch.testing.assert_close(got.advantages, want, rtol=1e-6, atol=1e-6)
    spread = statistics.stdev(rewards.flatten().tolist()) + 1e-4
    want = (rewards - rewards.mean(1, keepdim=True)).flatten() / spread
    torch.testing.assert_close(batch.advantages, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_in_any_order_equal_sizes(backend):
    g = torch.Generator().manual_seed(1)
    rewards = torch.randn(24, generator=g)
    shuffle = torch.randperm(24, generator=g)
    ids = torch.tensor([-(2**62), 2**62, 5, 5**20, 0, -1]).repeat_interleave(4)
    with use_backend(backend):
        by_size = group_advantages(rewards, group_size=4)
        by_id = group_advantages(rewards[shuffle], group_ids=ids[shuffle])
        whole = group_advantages(rewards, scale="group")
        one = group_advantages(rewards, group_size=24)
    for a, b in zip(by_size[:6], by_id[:6], strict=True):
        torch.testing.assert_close(a[shuffle], b, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole.advantages, one.advantages)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e-38, -7.7e8, 16777217.3])
@pytest.mark.parametrize("baseline", ["mean", "loo", "opo", "best_other", "batch"])
def test_equal_rewards_give_exactly_zero(backend, value, baseline):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for size in (1, 3, 7, 1000):
            rewards = torch.full((2 * size,), value, dtype=dtype)
            lengths = torch.arange(1, 2 * size + 1)
            for scale in SCALES:
                with use_backend(backend):
                    got = group_advantages(
                        rewards, group_size=size, baseline=baseline, scale=scale, lengths=lengths, eps=0.0
                    )
                assert torch.equal(got.advantages, torch.zeros_like(got.advantages))
                assert torch.equal(got.std, torch.zeros_like(got.std))
                assert got.zero_std.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_spreads_far_from_zero_are_not_lost(backend):
    tiny = torch.tensor([1.0, 2.0, 3.0]) * 1e-30
    near = torch.tensor([1e4, 1e4 + 2**-9, 1e4 + 2**-8])
    for rewards in (tiny, near):
        with use_backend(backend):
            got = group_advantages(rewards, group_size=3, eps=0.0).advantages
        torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_that_are_not_finite_leave_their_group_intact(backend):
    rewards = torch.tensor([1.0, NAN, 3.0, 4.0, math.inf, NAN, 5.0, 7.0, -math.inf])
    with use_backend(backend):
        got = group_advantages(rewards, group_size=3)
        alone = group_advantages(torch.tensor([1.0, 3.0]), group_size=2)
    assert torch.equal(got.advantages[[0, 2]], alone.advantages)
    assert (got.advantages[[1, 3, 4, 5, 8]] == 0).all()
    assert got.valid.tolist() == [True, False, True, True, False, False, True, True, False]
    assert got.count.tolist() == [2, 2, 2, 1, 1, 1, 2, 2, 2]
    assert got.num_invalid == 4
    assert all(x.isfinite().all() for x in (got.advantages, got.mean, got.std))
    empty = group_advantages(torch.full((4,), NAN), group_size=2, scale="batch", baseline="batch")
    assert torch.equal(empty.advantages, torch.zeros(4))
    assert group_advantages(torch.zeros(0), group_size=4).advantages.shape == (0,)
    assert group_advantages(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.int64)).advantages.shape == (0,)


def test_zero_std_mask_and_keep():
    rewards = torch.tensor([1.0, 1.0, 0.0, 2.0, 3.0, NAN])
    greedy = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    keep = group_advantages(rewards, group_size=2, baseline=greedy, scale="none")
    mask = group_advantages(rewards, group_size=2, baseline=greedy, scale="none", zero_std="mask")
    assert keep.advantages.tolist() == [0.5, 0.5, -0.5, 1.5, 2.5, 0.0]
    assert mask.advantages.tolist() == [0.0, 0.0, -0.5, 1.5, 0.0, 0.0]
    assert keep.valid.tolist() == [True] * 5 + [False]
    assert mask.valid.tolist() == [False, False, True, True, False, False]
    assert keep.zero_std.tolist() == mask.zero_std.tolist() == [True, True, False, False, True, True]
    want = reference.group_advantages(rewards, group_size=2, baseline=greedy, scale="none", zero_std="mask")
    assert torch.equal(mask.valid, want.valid)
    bad = group_advantages(rewards, group_size=2, baseline=torch.full((6,), NAN), scale="none")
    assert torch.equal(bad.advantages, torch.zeros(6))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_std_and_eps_of_several_rewards(combine, scale, ddof):
    rewards = torch.randn(9, 2, dtype=torch.float64)
    options = dict(group_size=3, combine=combine, scale=scale, ddof=ddof, eps=0.1)
    want = reference.group_advantages(rewards, **options).advantages
    torch.testing.assert_close(group_advantages(rewards, **options).advantages, want)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_rewards(combine, backend):
    g = torch.Generator().manual_seed(3)
    rewards = torch.randn(12, 3, generator=g)
    rewards[4:8, 2] = 0.3
    rewards[2, 1], rewards[7] = NAN, NAN
    weights = torch.tensor([1.0, 0.5, 2.0])
    options = dict(group_size=4, weights=weights, combine=combine)
    with use_backend(backend):
        got = group_advantages(rewards, **options)
    want = reference.group_advantages(rewards.double(), **options)
    torch.testing.assert_close(got.advantages.double(), want.advantages, rtol=1e-6, atol=1e-6)
    assert got.num_invalid == 1

    # TRL's formulas, column by column.
    def normal(values, eps=1e-4):
        have = [x for x in values if not math.isnan(x)]
        return [(x - statistics.fmean(have)) / (statistics.stdev(have) + eps) for x in values]

    columns = rewards.T.tolist()
    if combine == "normalize_then_sum":
        columns = [sum((normal(c[i : i + 4]) for i in range(0, 12, 4)), []) for c in columns]
    total = [
        sum(w * x for w, x in zip(weights.tolist(), row, strict=True) if not math.isnan(x)) if i != 7 else NAN
        for i, row in enumerate(zip(*columns, strict=True))
    ]
    if combine == "normalize_then_sum":
        by_hand = normal(total)
    else:
        by_hand = sum((normal(total[a:b]) for a, b in pairwise(range(0, 13, 4))), [])
    by_hand[7] = 0.0
    torch.testing.assert_close(got.advantages, torch.tensor(by_hand), rtol=1e-5, atol=1e-5)
    assert group_advantages(rewards, **options | {"scale": "none"}).advantages.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["ops", "reference"])
def test_a_combined_reward_that_is_constant_but_for_rounding(how, backend):
    """Exactly 0 and marked, whatever the sizes; what is small but there stays."""
    call = group_advantages if how == "ops" else reference.group_advantages
    opposed = torch.tensor([[0, 1], [0, 1], [1, 0]]).double()
    orders = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]]).double()
    orders = (orders * 10).round() / 10
    assert orders.sum(1).unique().numel() > 1  # 0.6 and its neighbour
    g = torch.Generator().manual_seed(3)
    first = torch.rand(3, 7, generator=g, dtype=torch.float64)
    mirrored = torch.stack([first, 0.3 - 2 * first], 2)
    normal, plain = "normalize_then_sum", "sum_then_normalize"
    cases = [
        *((opposed * scale, [1.0, 1.0], normal, eps) for scale in (1.0, 1e-9, 1e9) for eps in (0.0, 1e-4)),
        *((orders * scale, [1.0, 1.0, 1.0], plain, eps) for scale in (1.0, 1e-9, 1e9) for eps in (0.0, 1e-4)),
        *((group, [2.0, 2.0], normal, 0.0) for group in mirrored),  # with an eps their scales differ
        *((group, [2.0, 1.0], plain, eps) for group in mirrored for eps in (0.0, 1e-4)),
    ]
    with use_backend(backend):
        for rewards, weights, combine, eps in cases:
            options = dict(combine=combine, weights=torch.tensor(weights), eps=eps, zero_std="mask")
            got = call(rewards, **options)
            assert got.zero_std.all()
            assert not got.valid.any()
            assert not got.advantages.any()
            some = rewards.clone()
            some[0, 0] += 1e-6 * rewards.abs().max()
            assert not call(some, **options).zero_std.any()
        both = call(torch.cat([opposed, opposed.flip(1)[[0, 0, 2]] * torch.tensor([1.0, 0.0])]), group_size=3,
                    combine="normalize_then_sum", eps=0.0)  # fmt: skip
    assert both.zero_std.tolist() == [True] * 3 + [False] * 3
    assert not both.advantages[:3].any()


def test_named_estimators_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0, 0.0])
    lengths = torch.tensor([1, 2, 3, 1, 1, 2])

    def run(name, **more):
        return group_advantages(r, group_size=3, **(advantage_options(name) | more)).advantages.tolist()

    assert run("dr_grpo") == pytest.approx([2 / 3, -1 / 3, -1 / 3, 2, 0, -2])
    assert run("rloo") == pytest.approx([1, -0.5, -0.5, 3, 0, -3])
    assert run("opo", lengths=lengths) == pytest.approx([5 / 6, -1 / 6, -1 / 6, 2.5, 0.5, -1.5])
    assert run("pass_at_k", scale="none") == pytest.approx([1, 0, 0, 2, 0, 0])
    assert run("remax", baseline=torch.full((6,), 0.5)) == pytest.approx([0.5, -0.5, -0.5, 3.5, 1.5, -0.5])
    mean, std = statistics.fmean(r.tolist()), statistics.stdev(r.tolist())
    assert run("reinforce_plus_plus") == pytest.approx([(x - mean) / (std + 1e-4) for x in r.tolist()])
    centred = [2 / 3, -1 / 3, -1 / 3, 2, 0, -2]
    want = [x / (statistics.stdev(centred) + 1e-4) for x in centred]
    assert run("reinforce_plus_plus_baseline") == pytest.approx(want)
    solved = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # MaxRL: the one that passes of k, k - 1; nothing of none
    got = group_advantages(solved, group_size=3, eps=0.0, **advantage_options("maxrl")).advantages
    torch.testing.assert_close(got, torch.tensor([2.0, -1.0, -1.0, 0.0, 0.0, 0.0]))
    assert set(ESTIMATORS) >= {"grpo", "dr_grpo", "rloo", "opo", "remax", "pass_at_k"}
    with pytest.raises(ValueError, match="estimator must be one of grpo"):
        advantage_options("grppo")


def test_ties_for_the_best_earn_nothing():
    r = torch.tensor([2.0, 2.0, 1.0, NAN, 5.0, 3.0, 0.0, 9.0])
    got = group_advantages(r, group_size=4, baseline="best_other", scale="none").advantages
    assert got.tolist() == [0, 0, 0, 0, 0, 0, 0, 4]


def test_dtypes_gradient_and_inputs_untouched():
    r = torch.randn(8, requires_grad=True)
    before = r.detach().clone()
    got = group_advantages(r, group_size=4)
    assert not got.advantages.requires_grad
    assert torch.equal(r.detach(), before)
    assert got.advantages.dtype == torch.float32
    assert group_advantages(r.double(), group_size=4).advantages.dtype == torch.float64
    low = group_advantages(r.to(torch.bfloat16), group_size=4).advantages
    assert torch.equal(low, group_advantages(r.to(torch.bfloat16).float(), group_size=4).advantages)


def test_views_that_are_not_contiguous():
    """One reward of several, in fp64 (no conversion copies it), or all of them, one function after another."""
    table = torch.randn(8, 2, dtype=torch.float64)
    ids = torch.tensor([[3, 0], [3, 0], [3, 0], [1, 0], [1, 0], [1, 0], [1, 0], [3, 0]])[:, 0]
    for rewards, combine in ((table[:, 1], "sum_then_normalize"), (table.t().contiguous().t(), "normalize_then_sum")):
        got = group_advantages(rewards, group_ids=ids, combine=combine)
        want = group_advantages(rewards.contiguous(), group_ids=ids.contiguous(), combine=combine)
        torch.testing.assert_close(got, want)
    got = group_advantages(table, group_ids=ids, combine="normalize_then_sum")
    torch.testing.assert_close(got, want)


def test_opcheck_and_compile():
    values = torch.randn(6, dtype=torch.float64)
    order, offsets = torch.tensor([5, 0, 1, 4, 2, 3]), torch.tensor([0, 2, 2, 6])
    torch.library.opcheck(torch.ops.rlhf_fast.group_stats.default, (values, order, offsets))
    torch.library.opcheck(torch.ops.rlhf_fast.group_stats.default, (values, None, offsets))

    def by_id(r, ids):
        return group_advantages(r, group_ids=ids).advantages

    compiled = torch.compile(by_id, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 20, 36):
        r, ids = torch.randn(n), torch.randint(0, 4, (n,))
        torch.testing.assert_close(compiled(r, ids), by_id(r, ids))


BAD = [
    (lambda r: group_advantages(r, group_size=5), "group_size must be an int >= 1 that divides B=6, got 5"),
    (lambda r: group_advantages(r, group_size=0), "group_size must be an int >= 1"),
    (lambda r: group_advantages(r.long()), "rewards must be float32"),
    (lambda r: group_advantages(r.view(1, 2, 3)), r"rewards must be \(B,\) or \(B, K\), got \(1, 2, 3\)"),
    (lambda r: group_advantages(r, group_ids=torch.zeros(5, dtype=torch.int64)), r"group_ids must be \(B,\)=\(6,\)"),
    (lambda r: group_advantages(r, group_ids=r), "group_ids must be int64 or int32, got torch.float32"),
    (lambda r: group_advantages(r, group_size=2, group_ids=torch.zeros(6)), "must not be given together"),
    (lambda r: group_advantages(r, scale="std"), "scale must be one of group, batch, centered, mean, none, got 'std'"),
    (lambda r: group_advantages(r, baseline="median"), "baseline must be one of mean, loo"),
    (lambda r: group_advantages(r, baseline=torch.ones(5)), r"baseline must be \(B,\)=\(6,\), got \(5,\)"),
    (lambda r: group_advantages(r, baseline="opo"), "lengths must be given with baseline opo"),
    (lambda r: group_advantages(r, ddof=2), "ddof must be 0 or 1, got 2"),
    (lambda r: group_advantages(r, eps=-1.0), "eps must be a finite number >= 0"),
    (lambda r: group_advantages(r, zero_std="drop"), "zero_std must be one of keep, mask"),
    (lambda r: group_advantages(r, weights=torch.ones(2)), r"weights go with rewards \(B, K\)"),
    (lambda r: group_advantages(r.view(3, 2), weights=torch.ones(3)), r"weights must be \(K,\)=\(2,\), got \(3,\)"),
    (lambda r: group_advantages(r, combine="normalize_then_sum"), r"needs rewards \(B, K\)"),
    (
        lambda r: group_advantages(r.view(3, 2), combine="normalize_then_sum", baseline="loo"),
        "needs baseline mean and scale group or none",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6))


def test_docstring_examples():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("estimator", "passes"), [("grpo", 1), ("dr_grpo", 1), ("rloo", 1), ("reinforce_plus_plus", 2)]
)
def test_the_batch_is_read_as_one_group_only_where_that_counts(estimator, passes, monkeypatch):
    """It is another pass over all rewards, by one block of a GPU."""
    calls, stats = [], module._scans.group_stats
    monkeypatch.setattr(module._scans, "group_stats", lambda *args: calls.append(args) or stats(*args))
    with use_backend("torch"):
        group_advantages(torch.arange(8.0), group_size=4, **advantage_options(estimator))
    assert len(calls) == passes

"""Baseline "pass_at_k": against draws of k written out one by one, and the reference. CPU: C++ and torch."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from rlhf_fast import advantage_options, group_advantages, reference
from rlhf_fast._backend import cpp_available, use_backend

BACKENDS = [pytest.param("cpp", marks=pytest.mark.skipif(not cpp_available(), reason="no C++ extension")), "torch"]


def by_draws(rewards, k):
    """(advantages, std): every draw of k answers gets 1 if one passes; an answer gets the mean over its draws."""
    rows = range(len(rewards))
    draws = [(d, float(any(rewards[i] > 0 for i in d))) for d in itertools.combinations(rows, min(k, len(rewards)))]
    mean = statistics.fmean(value for _, value in draws)
    own = [statistics.fmean(value for d, value in draws if i in d) for i in rows]
    return [x - mean for x in own], statistics.pstdev([value for _, value in draws])


def groups():
    for size in (1, 2, 5, 7):
        for passed in range(size + 1):
            yield [1.0] * passed + [0.0] * (size - passed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 9])
def test_against_all_draws(k, backend):
    for rewards in groups():
        want, std = by_draws(rewards, k)
        r = torch.tensor(rewards, dtype=torch.float64)
        with use_backend(backend):
            plain = group_advantages(r, baseline="pass_at_k", k=k, scale="none")
            scaled = group_advantages(r, k=k, **advantage_options("pass_at_k_training"))
        assert plain.advantages.tolist() == pytest.approx(want, abs=1e-12)
        wanted = [a / std if std > 1e-9 else 0.0 for a in want]
        assert scaled.advantages.tolist() == pytest.approx(wanted, abs=1e-9)
        assert scaled.zero_std.tolist() == [std < 1e-9] * len(rewards)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "none"])
def test_against_reference_with_ids_and_missing_rewards(scale, backend):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (60,), generator=g)
    rewards = torch.randint(0, 2, (60,), generator=g).float() * 2 - 1  # -1 and 1: passing is > 0
    rewards[torch.rand(60, generator=g) < 0.15] = math.nan
    for k in (1, 3, 20):
        options = dict(group_ids=ids, baseline="pass_at_k", k=k, scale=scale, zero_std="mask")
        want = reference.group_advantages(rewards.double(), **options)
        with use_backend(backend):
            ours = group_advantages(rewards, **options)
        for name, a, b in zip(ours._fields, ours, want, strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not ours.advantages[~torch.isfinite(rewards)].any()


@pytest.mark.parametrize("size", [3, 49, 98, 103, 107, 196])
def test_groups_that_all_fail_or_pass_have_no_spread(size):
    """Also where (1 / n) n is not 1 in fp64."""
    for value in (0.0, 1.0):
        for k in (1, 2, 7):
            got = group_advantages(torch.full((size,), value), baseline="pass_at_k", k=k, eps=0.0, zero_std="mask")
            assert got.zero_std.all(), (value, k)
            assert not got.valid.any()
            assert not got.advantages.any()


def test_k_of_one_is_the_mean_with_biased_std():
    r = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]).double()
    a = group_advantages(r, group_size=4, baseline="pass_at_k", k=1, eps=0.0).advantages
    b = group_advantages(r, group_size=4, ddof=0, eps=0.0).advantages
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "pass_at_k"}, "k must be an int >= 1 with baseline pass_at_k, got None"),
        ({"baseline": "pass_at_k", "k": 0}, "k must be an int >= 1"),
        ({"baseline": "pass_at_k", "k": 2, "scale": "batch"}, "scale must be group or none with baseline pass_at_k"),
        ({"k": 2}, "k goes with baseline pass_at_k, got k=2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), **options)

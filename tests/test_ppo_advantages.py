"""`ppo_advantages`: the composition of shape_rewards, gae and masked_whiten, and the reference in fp64.

Runs on the CPU, C++ and torch. The CUDA kernel is compiled by test_cuda_build.py; it runs only where there is a GPU.
"""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast.ops.ppo as module
from rlhf_fast import gae, masked_whiten, ppo_advantages, reference, shape_rewards
from rlhf_fast._backend import cpp_available, use_backend

BACKENDS = [pytest.param("cpp", marks=pytest.mark.skipif(not cpp_available(), reason="no C++ extension")), "torch"]
SHAPING = ("kl_coef", "kl_estimator", "kl_clip", "score_clip")


def case(seed, lengths, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    logprob = -torch.randn(n, generator=g).abs()
    tensors = dict(
        scores=3 * torch.randn(len(lengths), generator=g), values=torch.randn(n, generator=g), logprob=logprob,
        ref_logprob=logprob + torch.randn(n, generator=g), cu_seqlens=cu, mask=torch.rand(n, generator=g) < 0.7,
        terminated=torch.rand(len(lengths), generator=g) < 0.5, bootstrap=torch.randn(len(lengths), generator=g),
    )  # fmt: skip
    return {k: v.to(device) for k, v in tensors.items()}


def composed(scores, values, logprob, ref_logprob, *, whiten, cu_seqlens, mask, **options):
    shaping = {k: options.pop(k) for k in SHAPING if k in options}
    where = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rewards, kl = shape_rewards(scores, logprob, ref_logprob, cu_seqlens=cu_seqlens, mask=where, **shaping)
    advantages, returns = gae(rewards, values, cu_seqlens=cu_seqlens, mask=mask, **options)
    return masked_whiten(advantages, mask) if whiten else advantages, returns, rewards, kl


def same(a, b, **tolerance):
    for name, x, y in zip(("advantages", "returns", "rewards", "kl"), a, b, strict=True):
        if x is None:
            assert name == "kl"
            assert y is None or not y.any()
        else:
            torch.testing.assert_close(x, y, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=6), seed=st.integers(0, 10**6),
    gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]),
    mode=st.sampled_from(["carry", "zero"]), estimator=st.sampled_from(["k1", "abs", "k2", "k3"]),
    clip=st.sampled_from([None, 0.3]), masked=st.booleans(), with_kl=st.booleans(), whiten=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_is_the_three_functions(backend, lengths, seed, gamma, lam, mode, estimator, clip, masked, with_kl, whiten):
    t = case(seed, lengths)
    if not masked:
        t["mask"] = None
    if not with_kl:
        t["logprob"] = t["ref_logprob"] = None
    options = dict(gamma=gamma, lam=lam, mask_mode=mode, kl_coef=0.2, kl_estimator=estimator, kl_clip=clip)
    options.update(score_clip=clip and 2.0, whiten=whiten)
    with use_backend(backend):
        ours = ppo_advantages(**t, **options)
        theirs = composed(**t, **options)
    # Whitening divides by the spread, which may be small: then one rounding of an advantage is large.
    advantages = composed(**t, **{**options, "whiten": False})[0]
    kept = advantages if t["mask"] is None else advantages[t["mask"]]
    spread = kept.std().item() if kept.numel() > 1 else 0.0
    if whiten and spread < 1e-3:
        ours, theirs = ours._replace(advantages=theirs[0]), theirs
    same(ours, theirs, rtol=2e-6, atol=2e-6 * (1 + (10 / spread if whiten and spread >= 1e-3 else 0)))
    as64 = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in t.items()}
    exact = reference.ppo_advantages(**as64, **options)
    with use_backend(backend):
        same(ppo_advantages(**as64, **options), exact, rtol=1e-6 if whiten else 1e-9, atol=1e-6 if whiten else 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_what_stands_under_the_mask_never_matters(backend, poison, mode):
    t = case(3, [7, 0, 12, 5, 1])
    t["mask"][19:24] = False  # a sequence without a token that counts
    bad = dict(t)
    for name in ("values", "logprob", "ref_logprob"):
        bad[name] = t[name].masked_fill(~t["mask"], poison)
    with use_backend(backend):
        a, b = ppo_advantages(**t, mask_mode=mode), ppo_advantages(**bad, mask_mode=mode)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert (x[~t["mask"]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_far_log_ratios(backend, estimator):
    """k3 is bounded where its exponential would run away: 40 nats above the policy, and 200."""
    t = case(4, [6, 3])
    t["ref_logprob"] = t["logprob"] + torch.tensor([40.0, 200, -40, -200, 19, 21, 0, 1, -1])
    t["mask"] = torch.ones(9, dtype=torch.bool)
    options = dict(kl_coef=1e-6, kl_estimator=estimator, whiten=False)
    with use_backend(backend):
        same(ppo_advantages(**t, **options), composed(**t, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_is_packed(backend):
    lengths, width = [5, 9, 1, 7], 9
    t = case(5, lengths)
    t["mask"] = torch.ones(sum(lengths), dtype=torch.bool)
    real = torch.arange(width)[None] < torch.tensor(lengths)[:, None]

    def pad(tensor):
        return torch.full((4, width), math.nan).masked_scatter(real, tensor)

    per_token = ("values", "logprob", "ref_logprob")
    padded = {**t, **{k: pad(t[k]) for k in per_token}, "mask": real, "cu_seqlens": None}
    with use_backend(backend):
        a, b = ppo_advantages(**padded), ppo_advantages(**t)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[real], y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_batches(backend):
    with use_backend(backend):
        empty = ppo_advantages(torch.zeros(0), torch.zeros(0, 4))
        assert empty.advantages.shape == (0, 4)
        assert empty.kl is None
        t = case(0, [4, 3])
        masked = ppo_advantages(**{**t, "mask": torch.zeros(7, dtype=torch.bool)})
        assert not any(x.any() for x in masked)
        one = ppo_advantages(torch.tensor([2.0]), torch.zeros(1, 1))
        assert one.advantages.item() == 0.0  # one token has no spread
        assert one.returns.item() == 2.0
        flat = ppo_advantages(torch.tensor([0.1]), torch.zeros(1, 5), lam=1.0)
        assert not flat.advantages.any()  # equal advantages: exactly 0


@pytest.mark.skipif(not cpp_available(), reason="no C++ extension")
def test_the_same_bits_on_any_number_of_threads():
    t = case(1, [3000, 9000, 1, 20_000, 5000])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ppo_advantages(**t))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    with use_backend("torch"):
        same(results[0], ppo_advantages(**t), rtol=1e-5, atol=1e-5)


def test_opcheck():
    t = case(2, [4, 0, 5])
    cu = t["cu_seqlens"].long()
    for kl in (True, False):
        pair = (t["logprob"], t["ref_logprob"]) if kl else (None, None)
        options = (0.9, 0.95, True, 0.1, "k1", None, 1.0, True)
        arguments = (t["values"], t["scores"], *pair, cu, 3, 0, t["mask"], t["bootstrap"], *options)
        torch.library.opcheck(torch.ops.rlhf_fast.ppo_advantages.default, arguments)


def test_compile_fullgraph_with_changing_length():
    compiled = torch.compile(ppo_advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, lengths in enumerate([[3, 5], [7, 2], [4, 9]]):
        t = case(seed, lengths)
        same(compiled(**t), ppo_advantages(**t), rtol=0, atol=0)


X = torch.zeros(2, 3)
BAD = [
    (lambda: ppo_advantages(torch.zeros(3), X), r"scores must be \(B,\)=\(2,\), got \(3,\)"),
    (lambda: ppo_advantages(torch.zeros(2), X, X), "logprob and ref_logprob must be given together"),
    (lambda: ppo_advantages(torch.zeros(2), X, X, X[:, :2]), "ref_logprob must be values' shape"),
    (lambda: ppo_advantages(torch.zeros(2), X, X, X, kl_estimator="k4"), "kl_estimator must be one of"),
    (lambda: ppo_advantages(torch.zeros(2), X, X, X, kl_clip=-1.0), "kl_clip must be a finite number > 0"),
    (lambda: ppo_advantages(torch.zeros(2), X, gamma=2.0), r"gamma must be a number in \[0, 1\]"),
    (lambda: ppo_advantages(torch.zeros(2), X, mask_mode="skip"), "mask_mode must be one of carry, zero"),
    (lambda: ppo_advantages(torch.zeros(2), X, terminated=torch.ones(2)), "bootstrap must be given with terminated"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_docstring_example():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_rewards_of_every_token(padded, clip):
    """NaN under the mask goes nowhere; a score on the last token alone is the score of the sequence."""
    t = case(3, [4, 4, 4])
    t["mask"][3::4] = True
    scores = torch.randn(12)
    scores[~t["mask"]] = torch.nan
    per_sequence, last = t.pop("scores"), torch.zeros(12)
    last[3::4] = per_sequence
    if padded:
        del t["cu_seqlens"]
        for name in ("values", "logprob", "ref_logprob", "mask"):
            t[name] = t[name].view(3, 4)
        scores, last = scores.view(3, 4), last.view(3, 4)
    options = dict(score_clip=clip, kl_clip=0.5, gamma=0.9, **t)
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    same(ppo_advantages(scores, **options), reference.ppo_advantages(scores.double(), **wide), check_dtype=False)
    same(ppo_advantages(last, **options), ppo_advantages(per_sequence, **options))
    with pytest.raises(ValueError, match=r"scores must be .*\(B,\)=\(3,\), got \(5,\)"):
        ppo_advantages(torch.zeros(5), **options)


def test_small_advantages_are_whitened_with_the_eps_of_masked_whiten():
    scores = 1e-4 * torch.randn(6)
    got = ppo_advantages(scores, torch.zeros(6, 3), lam=1.0)
    want = masked_whiten(gae(shape_rewards(scores, mask=torch.ones(6, 3)).rewards, torch.zeros(6, 3), lam=1.0)[0])
    torch.testing.assert_close(got.advantages, want)

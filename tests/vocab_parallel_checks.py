"""What every rank of a gloo group asserts about the sharded head; `test_vocab_parallel.py` starts the ranks.

A check is a function of (group, sizes of shards). All ranks run the same checks in the same order, each in turn against
the unsharded op, which has tests of its own.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
from _budget import assert_within_budget
from ranks import registry
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from rlhf_fast import _backend, fused_linear_loss, linear_logprob, reference, vocab_parallel_logprob
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops import _head, _shards
from rlhf_fast.ops.vocab_parallel import _vocab_parallel_logprob

LAYOUTS = {  # V = 50 and 97 divide by neither 2 nor 3 evenly
    2: [(17, 33), (49, 48), (0, 50), (97, 0), (1, 49)],
    3: [(17, 17, 16), (33, 33, 31), (20, 0, 30), (0, 0, 97), (96, 1, 0)],
}
OPTIONS = [
    dict(),
    dict(entropy=True, temperature=0.6),
    dict(entropy=True, temperature=1.7, logit_scale=0.4, softcap=3.0),
    dict(entropy=True, logit_scale=-0.5, softcap=2.0, chunk_size=5),
    dict(entropy=True, chunk_size=1),
    dict(entropy=True, memory_budget=2000),  # 7 rows of the largest shard, more of any other
]
CHECKS, check = registry()


def head(sizes, n=23, d=8, dtype=torch.float64, seed=0):
    """(hidden, weight, bias, target): ignored rows that hold NaN, a near one-hot row, targets at every shard's ends."""
    g = torch.Generator().manual_seed(seed)
    v = sum(sizes)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, d), (v, d), (v,)))
    target = torch.randint(0, v, (n,), generator=g)
    ends = torch.tensor(sizes).cumsum(0)
    edges = torch.cat([ends - 1, ends, torch.tensor([0, v - 1])]).clamp(0, v - 1)
    target[: len(edges)] = edges
    hidden[1] *= 20
    target[10:12] = -100
    hidden[10] = torch.nan
    return *(x.to(dtype) for x in (hidden, weight, bias)), target


def mine(x, sizes, group):
    """This rank's rows of x."""
    return x.split(list(sizes))[dist.get_rank(group)]


def leaf(x):
    return None if x is None else x.detach().clone().requires_grad_()


def both(group, sizes, hidden, weight, bias, target, *, loss, **options):
    """(results, gradients) of the sharded op and of the unsharded one, cut to this rank's rows."""
    out = []
    for spread in (True, False):
        h = leaf(hidden)
        w, b = (leaf(None if x is None else mine(x, sizes, group) if spread else x) for x in (weight, bias))
        result = linear_logprob(h, w, target, bias=b, group=group if spread else None, **options)
        loss(result).backward()
        cut = (lambda g: g) if spread else (lambda g: mine(g, sizes, group))
        out.append((result, [h.grad, cut(w.grad)] + ([] if b is None else [cut(b.grad)])))
    return out


def weighted(n, seed=3):
    """A loss with another cotangent for every output and row."""
    weights = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda out: sum((o * w).sum() for o, w in zip(out, weights, strict=True) if o is not None)


def close(got, want, tolerance=1e-10):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"item {i}: {m}")


def same_bits(group, *tensors):
    """Every rank holds the same bits."""
    for x in tensors:
        copies = _shards.gather(x.detach(), group)
        assert all(torch.equal(copies[0], c) for c in copies)


def raises(kind, message=""):
    return pytest.raises(kind, match=re.escape(message))


@check()
def equals_the_unsharded_op_in_fp64(group):
    for sizes in LAYOUTS[group.size()]:
        hidden, weight, bias, target = head(sizes)
        for i, options in enumerate(OPTIONS):
            if i in (0, 2, 4) and sizes != LAYOUTS[group.size()][0]:
                continue
            b = bias if i % 2 else None
            ours, ref = both(group, sizes, hidden, weight, b, target, loss=weighted(23), **options)
            close(ours[0], ref[0])
            close(ours[1], ref[1])
            same_bits(group, *(x for x in (*ours[0], ours[1][0]) if x is not None))
            assert not ours[1][0][10:12].any()
            assert not any(o[10:12].any() for o in ours[0] if o is not None)


@check()
def equals_the_formula(group):
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, bias, target = head(sizes)
    safe = hidden.nan_to_num(0)
    shards, biases = weight.split(list(sizes)), bias.split(list(sizes))
    want = reference.vocab_parallel_logprob(safe, shards, target, bias=biases, entropy=True, softcap=5.0)
    rank = dist.get_rank(group)
    options = dict(group=group, bias=biases[rank], entropy=True, softcap=5.0)
    close(vocab_parallel_logprob(hidden, shards[rank], target, **options), want)
    pairs = vocab_parallel_logprob(hidden[:22].view(2, 11, 8), shards[rank], target[:22].view(2, 11).int(), **options)
    close(pairs, [x[:22].view(2, 11) for x in want])


@check()
def error_budget(group):
    """No further from fp64 than the formula in the same dtype; where the CPU's bf16 products hand bf16 back, plus one
    rounding of each shard's part."""
    sizes = LAYOUTS[group.size()][1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, _, target = head(sizes, dtype=dtype)
        hidden = hidden.nan_to_num(0)
        truth, naive = [], []
        for kind, store in ((torch.float64, truth), (dtype, naive)):
            h, w = leaf(hidden.to(kind)), leaf(weight.to(kind))
            out = reference.linear_logprob(h, w, target, entropy=True, temperature=0.8)
            weighted(23)(out).backward()
            store += [*out, h.grad, mine(w.grad, sizes, group)]
        z = leaf(hidden.double() @ weight.double().T)
        weighted(23)(reference.logprob_from_logits(z, target, entropy=True, temperature=0.8)).backward()
        parts = [p @ w for p, w in zip(z.grad.split(sizes, 1), weight.double().split(sizes), strict=True)]
        logits = float(z.detach().abs().max()) / 0.8
        sizes_of = [logits] * 3 + [sum(float(p.abs().max()) for p in parts), float(truth[4].abs().max())]
        for chunk_size in (None, 6):
            h, w = leaf(hidden), leaf(mine(weight, sizes, group))
            out = linear_logprob(h, w, target, group=group, entropy=True, temperature=0.8, chunk_size=chunk_size)
            weighted(23)(out).backward()
            assert all(o.dtype == torch.float32 for o in out)
            assert h.grad.dtype == w.grad.dtype == dtype
            for i, (a, b, c, size) in enumerate(zip([*out, h.grad, w.grad], naive, truth, sizes_of, strict=True)):
                rounding = size * 2**-8 if dtype == torch.bfloat16 else 0.0
                scale = max(1.0, float(c.detach().abs().max()))
                assert_within_budget(a, b, c, dtype, scale=scale, rounding=rounding, name=f"{chunk_size} item {i}")


@check()
def large_logits_keep_their_differences(group):
    """Near 1e4 one fp32 step is 1e-3; differences of shards' maxima are exact, so nothing of the kind is lost."""
    v = 50
    weight = torch.stack([torch.ones(v), torch.arange(v) % 7 - 3.0], 1)
    hidden = torch.tensor([[1e4, 1.0], [-1e4, 1.0], [1e4, 0.25]])
    sizes = LAYOUTS[group.size()][0]
    target = torch.tensor([3, 20, 49])
    out = vocab_parallel_logprob(hidden, mine(weight, sizes, group), target, group=group, entropy=True)
    truth = reference.linear_logprob(hidden.double(), weight.double(), target, entropy=True)
    torch.testing.assert_close(out.logprob.double(), truth.logprob, rtol=0, atol=4e-6)  # 4 steps of 5..8
    torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=0, atol=4e-6)


@check()
def minus_infinity(group):
    """A shard without any mass, rows of it, and a target in it."""
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, bias, target = head(sizes)
    bias[: sizes[0]] = -torch.inf
    bias[-3:] = -torch.inf
    target[2:6] = torch.tensor([5, sizes[0], sizes[0] + 4, sum(sizes) - 1])
    finite = torch.tensor([t == -100 or bool(bias[t].isfinite()) for t in target.tolist()])
    loss = lambda out: out.logprob[finite].sum() + out.entropy.sum() + out.lse.sum()  # noqa: E731
    for backend in ["torch"] + ["cpp"] * _backend.cpp_available():
        with _backend.use_backend(backend):
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
                inputs = (x.to(dtype) for x in (hidden, weight, bias))
                ours, ref = both(group, sizes, *inputs, target, loss=loss, entropy=True)
                assert bool((ours[0].logprob[~finite] == -torch.inf).all())
                assert bool(ours[0].entropy.isfinite().all())
                assert all(bool(g.isfinite().all()) for g in ours[1])
                close(ours[0], ref[0], tolerance)
                close(ours[1], ref[1], tolerance)


@check()
def backends_agree(group):
    kinds = ["torch"] + ["cpp"] * _backend.cpp_available()
    for sizes in LAYOUTS[group.size()][:3]:
        hidden, weight, bias, target = head(sizes, n=9 + 3, dtype=torch.float32)
        for backend in kinds:
            with _backend.use_backend(backend):
                args = (group, sizes, hidden, weight, bias, target)
                ours, ref = both(*args, loss=weighted(12), entropy=True, temperature=0.7, chunk_size=5)
            for a, b in zip((*ours[0], *ours[1]), (*ref[0], *ref[1]), strict=True):
                size = max([1.0, *b.detach().abs().flatten().tolist()])
                torch.testing.assert_close(a, b, rtol=0, atol=4e-6 * size)


@check()
def rows_of_zero_gradient_cost_nothing(group):
    """Neither products nor collectives: 23 rows, 2 ignored, 4 with a gradient."""
    sizes = LAYOUTS[group.size()][2]
    hidden, weight, _, target = head(sizes)
    seen = []
    original = _head.Head.backward
    _head.Head.backward = lambda self, z, *args: (seen.append(z.shape[0]), original(self, z, *args))[1]
    try:
        h, w = leaf(hidden), leaf(mine(weight, sizes, group))
        out = linear_logprob(h, w, target, group=group, chunk_size=3)
        out.logprob[4:8].sum().backward()
        assert seen == [3, 1], seen
        assert h.grad[4:8].abs().sum(-1).gt(0).all()
        assert not h.grad[:4].any()
        assert not h.grad[8:].any()
        seen.clear()
        h.grad = None
        (linear_logprob(h, w, target, group=group).logprob.sum() * 0).backward()
        assert seen == []
        assert h.grad is not None
        assert not h.grad.any()
    finally:
        _head.Head.backward = original


@check()
def upstream_that_differs_in_its_last_bits(group):
    """Zero on one rank, 1e-30 on another: the first rank's word counts, and nobody waits for anybody."""
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, _, target = head(sizes)
    upstream = torch.zeros(23, dtype=torch.float64)
    upstream[5:8] = 1.0
    results = []
    for noise in (0.0, 1e-30 * dist.get_rank(group)):
        h, w = leaf(hidden), leaf(mine(weight, sizes, group))
        linear_logprob(h, w, target, group=group, chunk_size=4).logprob.backward(upstream + noise)
        results.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def noisy(logprob, entropy, batch):
        return (logprob * (batch["w"] + 1e-30 * dist.get_rank(group))).sum()

    h, w = leaf(hidden), leaf(mine(weight, sizes, group))
    fused_linear_loss(h, w, target, noisy, batch={"w": upstream}, group=group, chunk_size=4).loss.backward()
    close((h.grad, w.grad), results[0])
    assert not h.grad[8:].any()


@check()
def which_gradients_are_wanted(group):
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, bias, target = head(sizes)
    shard = mine(weight, sizes, group)
    h, w = leaf(hidden), leaf(weight)
    linear_logprob(h, w, target).logprob.sum().backward()
    frozen = leaf(hidden)
    linear_logprob(frozen, shard, target, group=group).logprob.sum().backward()
    close([frozen.grad], [h.grad])
    only = leaf(shard)
    linear_logprob(hidden, only, target, group=group).logprob.sum().backward()
    close([only.grad], [mine(w.grad, sizes, group)])
    with torch.no_grad():
        assert not linear_logprob(h, only, target, group=group).logprob.requires_grad
        assert not fused_linear_loss(h, only, target, nll, batch={"w": 1.0}, group=group).loss.requires_grad
    into, h = torch.ones_like(shard), leaf(hidden)
    loss = fused_linear_loss(h, shard, target, nll, batch={"w": -1.0}, group=group, weight_grad=into).loss
    loss.backward()
    close([into - 1, h.grad], [only.grad, frozen.grad])
    b = leaf(mine(bias, sizes, group))
    linear_logprob(hidden, shard, target, bias=b, group=group).logprob.sum().backward()
    assert b.grad.shape == b.shape


def nll(logprob, entropy, batch):
    return -(logprob * batch["w"]).sum()


@check()
def nothing_scored_and_nothing_at_all(group):
    sizes = LAYOUTS[group.size()][2]
    _, weight, _, _ = head(sizes)
    for n in (3, 0):
        for call in ("op", "fused"):
            h, w = leaf(torch.randn(n, 8, dtype=torch.float64)), leaf(mine(weight, sizes, group))
            target = torch.full((n,), -100)
            if call == "op":
                loss = linear_logprob(h, w, target, group=group, entropy=True).logprob.sum()
            else:
                loss = fused_linear_loss(h, w, target, nll, batch={"w": 1.0}, group=group).loss
            loss.backward()
            assert loss == 0
            assert h.grad is not None
            assert w.grad is not None
            assert not h.grad.any()
            assert not w.grad.any()


def bonus(logprob, entropy, batch):
    """A user's clipped loss with an entropy bonus, over whole sequences."""
    ratio = torch.exp(logprob - batch["old"])
    loss = -torch.min(ratio * batch["adv"], ratio.clamp(0.8, 1.2) * batch["adv"]) - 0.01 * entropy
    zeros = logprob.new_zeros(batch["num_segments"])
    per_sequence = zeros.index_add(0, batch["segment_ids"], loss)
    return (per_sequence * batch["w"]).sum(), {"ratio_max": ratio.detach().max(), "tokens": float(len(logprob))}


def both_fused(group, sizes, loss_fn, **options):
    """(result, tensors to compare) of the sharded loss and of the unsharded one."""
    hidden, weight, bias, target = head(sizes)
    out = []
    for spread in (True, False):
        h = leaf(hidden)
        w, b = (leaf(mine(x, sizes, group) if spread else x) for x in (weight, bias))
        options |= dict(bias=b, group=group if spread else None)
        result = fused_linear_loss(h, w, target, loss_fn, entropy=True, temperature=0.9, softcap=6.0, **options)
        (result.loss * 0.5).backward()
        own = [x.grad if spread else mine(x.grad, sizes, group) for x in (w, b)]
        out.append((result, [result.loss, result.logprob, result.entropy, h.grad, *own]))
    return out


@check()
def fused_losses(group):
    """GRPO with a KL term, GSPO (whole sequences) and a user's loss: loss, gradients, metrics, products saved."""
    cu = torch.tensor([0, 6, 13, 23])
    g = torch.Generator().manual_seed(5)
    adv = torch.randn(23, generator=g, dtype=torch.float64)
    adv[14:18] = 0
    old, ref = (torch.randn(23, generator=g, dtype=torch.float64) * 0.1 - 4 for _ in range(2))
    ready = dict(advantages=adv, old_logprob=old)
    cases = [
        (PolicyLoss("grpo"), ready),
        (PolicyLoss("grpo", beta=0.1, entropy_coef=0.01), ready | {"ref_logprob": ref}),
        (PolicyLoss("gspo"), ready | {"advantages": torch.tensor([1.0, -0.5, 0.0])}),
        (bonus, dict(old=old, adv=adv, w=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))),
    ]
    for sizes in LAYOUTS[group.size()][:3]:
        for loss_fn, batch in cases:
            for tiles in (dict(), dict(chunk_size=4), dict(memory_budget=2000)):
                (ours, got), (want, expected) = both_fused(group, sizes, loss_fn, batch=batch, segments=cu, **tiles)
                close(got, expected)
                assert ours.metrics.keys() == want.metrics.keys()
                # a budget buys more rows of a shard: fewer segments exceed a tile, fewer rows are computed twice
                names = [k for k in want.metrics if k != "rows_forward" or "memory_budget" not in tiles]
                close([ours.metrics[k] for k in names], [want.metrics[k] for k in names])
                same_bits(group, ours.loss, *got[1:4])


@check()
def walked_twice_recomputed_and_deterministic(group):
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, _, target = head(sizes, dtype=torch.float32)
    h, w = leaf(hidden), leaf(mine(weight, sizes, group))
    before = h.detach().clone()

    def call(x):
        out = linear_logprob(x, w, target, group=group, entropy=True, chunk_size=6)
        return out.logprob.sum() + out.entropy.sum()

    loss = call(h) + call(h)
    loss.backward(retain_graph=True)
    once = h.grad.clone(), w.grad.clone()
    loss.backward()
    close((h.grad, w.grad), [2 * x for x in once])
    assert torch.equal(before.nan_to_num(0), h.detach().nan_to_num(0))
    for again in (lambda: call(h) + call(h), lambda: sum(checkpoint(call, h, use_reentrant=False) for _ in range(2))):
        h.grad = w.grad = None
        again().backward()
        assert torch.equal(h.grad, once[0])
        assert torch.equal(w.grad, once[1])
    (grad,) = torch.autograd.grad(call(h), h, create_graph=True)
    with raises(RuntimeError):
        grad.sum().backward()


@check()
def one_collective_less_for_every_tile(group):
    """The forward gathers once, however many tiles there are."""
    sizes = LAYOUTS[group.size()][0]
    hidden, weight, _, target = head(sizes)
    calls, original = [], dist.all_gather
    dist.all_gather = lambda out, x, **options: (calls.append(tuple(x.shape)), original(out, x, **options))[1]
    try:
        linear_logprob(hidden, mine(weight, sizes, group), target, group=group, entropy=True, chunk_size=4)
    finally:
        dist.all_gather = original
    assert calls == [(len(_shards.Agreement._fields),), (4, 21)], calls


@check()
def bad_arguments_raise_on_every_rank(group):
    """Also when one rank alone was called wrongly; afterwards the group still works."""
    sizes = LAYOUTS[group.size()][2]
    hidden, weight, bias, target = head(sizes)
    shard, rank, last = mine(weight, sizes, group), dist.get_rank(group), group.size() - 1
    at_last = lambda bad, good: bad if rank == last else good  # noqa: E731

    def fused(h, w, t, **options):
        batch = {"w": options.pop("per_row", 1.0)}
        return fused_linear_loss(h, w, t, nll, batch=batch, **options)

    outside, other = target.clone(), target.clone()
    outside[4], other[3] = 50, 7
    negative = target.clone()
    negative[7] = -1
    refused = f"rank {last} of the group got bad arguments"
    cases = [
        ((hidden, shard, outside), {}, "target[4] = 50 is outside the vocabulary [0, 50)"),
        ((hidden, shard, negative), {}, "target[7] = -1 is outside the vocabulary [0, 50)"),
        ((hidden, shard, at_last(outside, target)), {}, f"ids on every rank of the group, but ranks 0 and {last}"),
        ((hidden, shard, at_last(other, target)), {}, f"ids on every rank of the group, but ranks 0 and {last}"),
        ((hidden, at_last(shard[:, :7], shard), target), {}, at_last("weight must be (V, D)", refused)),
        ((hidden, shard, target), dict(temperature=at_last(0.0, 1.0)), at_last("temperature must be", refused)),
        ((hidden, shard, target), dict(temperature=at_last(2.0, 1.0)), "scalars, chunk sizes and segments"),
        ((hidden, shard, target), dict(chunk_size=at_last(3, 4)), "scalars, chunk sizes and segments"),
        (
            (hidden, shard, target),
            dict(bias=at_last(mine(bias, sizes, group), None)),
            "bias must be given, or be None,",
        ),
        ((hidden[: at_last(20, 23)], shard, target[: at_last(20, 23)]), {}, "tokens on every rank"),
        (
            (hidden.to(at_last(torch.float32, torch.float64)), shard.to(at_last(torch.float32, torch.float64)), target),
            {},
            "the same dtype on every rank",
        ),
        ((hidden.clone().requires_grad_(rank == last), shard, target), {}, "gradients must be wanted"),
        ((hidden, shard[:0], target), {}, "weight_shard must have rows on some rank"),
    ]
    for args, options, message in cases:
        for op in (linear_logprob, fused):
            with raises(ValueError, message):
                op(*args, group=group, **options)
    with raises(ValueError, at_last("batch['w'] requires grad", refused)):
        fused(hidden, shard, target, per_row=torch.ones(23, requires_grad=rank == last), group=group)
    for op in (linear_logprob, fused, vocab_parallel_logprob):
        with raises(
            TypeError, "group must be a torch.distributed.ProcessGroup or a dimension of a DeviceMesh, got int"
        ):
            op(hidden, shard, target, group=3)
    low = (weight[:2], shard[:, :2], at_last(1.0, 2.0))
    for op in (linear_logprob, fused):
        with raises(ValueError, "scalars, chunk sizes and segments"):
            op(hidden, shard, target, group=group, lora=low)
    ours, ref = both(group, sizes, hidden, weight, bias, target, loss=weighted(23))
    close(ours[1], ref[1])


@check()
def low_rank_addition(group):
    """a whole on every rank, b cut like the head; frozen heads and any mix of trained tensors; both ops."""
    loss_fn = PolicyLoss("dapo", entropy_coef=0.1)
    for sizes in LAYOUTS[group.size()]:
        hidden, weight, bias, target = head(sizes)
        g = torch.Generator().manual_seed(7)
        a, b = (torch.randn(s, generator=g, dtype=torch.float64) / 2 for s in ((3, 8), (sum(sizes), 3)))
        advantages = torch.randn(23, generator=g, dtype=torch.float64)
        for trained in ("hwbar", "har", "r", "a"):
            results = []
            for spread in (True, False):
                cut = (lambda x: mine(x, sizes, group)) if spread else (lambda x: x)  # noqa: B023
                given = dict(h=hidden, w=cut(weight), b=cut(bias), a=a, r=cut(b))
                given = {k: leaf(x) if k in trained else x for k, x in given.items()}
                arguments = (given["h"], given["w"], target)
                options = dict(bias=given["b"], lora=(given["a"], given["r"], 0.7), group=group if spread else None)
                options |= dict(temperature=0.8, softcap=3.0, chunk_size=6)
                out = linear_logprob(*arguments, **options, entropy=True)
                batch = {"advantages": advantages}
                fused = fused_linear_loss(*arguments, loss_fn, **options, batch=batch)
                (weighted(23)(out) + 2 * fused.loss).backward()
                grads = [given[k].grad for k in trained]
                if not spread:
                    grads = [mine(x, sizes, group) if k in "wbr" else x for k, x in zip(trained, grads, strict=True)]
                results.append((*out, fused.loss.detach(), *grads))
            close(*results)


@check(3)
def a_group_within_the_world(group):
    """Ranks 0 and 2 share a head; rank 1 is told that it is not concerned."""
    part = dist.new_group([0, 2])
    sizes = (20, 30)
    hidden, weight, bias, target = head(sizes)
    if dist.get_rank() == 1:
        with raises((TypeError, ValueError), "group must"):
            linear_logprob(hidden, weight, target, group=part)
        return
    ours, ref = both(part, sizes, hidden, weight, bias, target, loss=weighted(23), entropy=True)
    close((*ours[0], *ours[1]), (*ref[0], *ref[1]))


@check(2)
def registered_and_compiled_whole(group):
    sizes = (17, 33)
    hidden, weight, bias, target = head(sizes, n=14, dtype=torch.float32)
    hidden = hidden.nan_to_num(0)
    shard = leaf(mine(weight, sizes, group))
    args = (leaf(hidden), shard, leaf(mine(bias, sizes, group)))
    opcheck(
        _vocab_parallel_logprob,
        (*args, None, None, target, group.group_name, 3, 1.0, 1.0, None, 1.0, -100, True, 4, None),
    )
    low = leaf(torch.randn(2, hidden.shape[1])), leaf(mine(torch.randn(50, 2), sizes, group))
    opcheck(
        _vocab_parallel_logprob, (*args, *low, target, group.group_name, 7, 0.5, 1.0, None, 1.0, -100, True, 4, None)
    )

    loss_fn = PolicyLoss("dapo")  # a mean over tokens needs no sequences

    def step(h, t):
        out = linear_logprob(h, shard, t, temperature=0.9, entropy=True, group=group)
        return (out.logprob + 0.1 * out.entropy).sum()

    def fused(h, t):
        advantages = torch.arange(t.shape[0]) - 3.0
        return fused_linear_loss(h, shard, t, loss_fn, batch={"advantages": advantages}, group=group).loss

    for fn in (step, fused):
        compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (4, 9):
            results = []
            for f in (fn, compiled):
                h, shard.grad = leaf(hidden[:n]), None
                loss = f(h, target[:n])
                loss.backward()
                results.append((loss.detach(), h.grad, shard.grad))
            close(*results, 1e-5)


@check(2)
def triton_agrees(group):
    """In the interpreter, which there is where there is no GPU; the smallest shapes."""
    import importlib.util

    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return  # ranks on the CPU: compiled kernels have no place in them
    sizes = (3, 4)
    hidden, weight, _, target = head(sizes, n=13, d=4, dtype=torch.float32)
    with _backend.use_backend("triton"):
        ours, ref = both(group, sizes, hidden, weight, None, target, loss=weighted(13), entropy=True)
    close((*ours[0], *ours[1]), (*ref[0], *ref[1]), 1e-5)

"""Logits kept from the forward to the backward of `linear_logprob` on the CPU: products saved, results unchanged."""

import pytest
import torch
from test_linear_logprob import inputs, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rlhf_fast import fused_linear_loss, linear_logprob, reference
from rlhf_fast.ops import _head, _kept

N, D, V = 200, 16, 507


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_kept, "BLOCK", 40 << 10)  # some ten blocks of columns


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def products(n, d, v, **options):
    """Products with the head, in units of one, of a forward and a backward over n rows."""
    h, w = (torch.randn(*s, requires_grad=True) for s in ((n, d), (v, d)))
    with Multiplications() as seen:
        linear_logprob(h, w, torch.randint(v, (n,)), **options).logprob.sum().backward()
    return seen.count / (n * d * v)


def test_kept_rows_cost_three_products_and_the_others_four():
    assert products(N, D, V) == 3
    assert products(N, D, V, memory_budget=128 * V * 4) == pytest.approx(3 + (N - 128) / N)


@pytest.mark.parametrize("held", [0, 64, 128, 192, 1000], ids="{}-rows".format)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_share_gives_the_same(dtype, bias, held):
    hidden, weight, target, b = inputs(N, D, V, dtype=dtype, bias=bias)
    hidden[4:6] = 0
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(N, generator=g, dtype=torch.float64) for _ in range(3)]
    for u in upstream:
        u[torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.3] = 0  # rows without a gradient, everywhere
    options = dict(temperature=0.7, softcap=5.0, entropy=True)
    budget = max(1, held * V * _head.tile_dtype(dtype, torch.device("cpu")).itemsize)
    truth = run(reference.linear_logprob, hidden, weight, target, b, upstream, torch.float64, **options)
    again = run(linear_logprob, hidden, weight, target, b, upstream, dtype, chunk_size=50, **options)
    got = run(linear_logprob, hidden, weight, target, b, upstream, dtype, memory_budget=budget, **options)
    floor = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}[dtype]
    for ours, recomputed, right in zip(got[0] + got[1], again[0] + again[1], truth[0] + truth[1], strict=True):
        right = right.double()
        error, allowed = (ours.double() - right).abs().max(), (recomputed.double() - right).abs().max()
        assert error <= 2 * allowed + floor * max(1.0, float(right.abs().max()))


def test_gradcheck_over_blocks(monkeypatch):
    monkeypatch.setattr(_kept, "BLOCK", 8 * 7 * 4)  # four columns each
    hidden, weight, target, bias = inputs(7, 3, 11, dtype=torch.float64, bias=True, outliers=False)
    hidden[4] = 0

    def f(h, w, b):
        return tuple(linear_logprob(h, w, target, bias=b, temperature=0.7, softcap=4.0, entropy=True))

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("budget", [None, 128 * V * 4])
def test_a_graph_walked_twice_gives_the_same_bits(budget):
    hidden, weight, target, _ = inputs(N, D, V, outliers=False)
    hidden[4:6] = 0
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_logprob(h, w, target, memory_budget=budget).logprob.sum()
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_checkpointing_and_saved_tensor_hooks():
    hidden, weight, target, _ = inputs(N, D, V, outliers=False)
    hidden[4:6] = 0
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = lambda h, w: linear_logprob(h * 2, w, target).logprob.sum()  # noqa: E731
    want = torch.autograd.grad(loss(h, w), (h, w))
    got = torch.autograd.grad(checkpoint(loss, h, w, use_reentrant=False), (h, w))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autograd.graph.save_on_cpu():
        total = loss(h, w)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(total, (h, w)), want, strict=True))


def test_minus_infinity_in_whole_blocks():
    """A mask over the vocabulary: blocks of columns without any mass."""
    hidden, weight, target, _ = inputs(N, D, V, dtype=torch.float64, outliers=False)
    hidden[4:6] = 0
    bias = torch.zeros(V, dtype=torch.float64)
    bias[50:] = -torch.inf
    target = target.clamp(max=49)
    upstream = [torch.ones(N, dtype=torch.float64)] * 3
    got = run(linear_logprob, hidden, weight, target, bias, upstream, torch.float64, entropy=True)
    hidden, weight = hidden[:, :], weight[:50]
    want = run(reference.linear_logprob, hidden, weight, target, None, upstream, torch.float64, entropy=True)
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got[1][0], want[1][0])
    torch.testing.assert_close(got[1][1][:50], want[1][1])
    assert not got[1][1][50:].any()


@pytest.mark.parametrize("call", ["linear_logprob", "entropy", "fused_linear_loss"])
def test_a_second_derivative_is_an_error_and_not_a_zero(call):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (6,))
    if call == "fused_linear_loss":
        loss = fused_linear_loss(hidden, weight, target, lambda logprob, entropy, batch: -logprob.sum()).loss
    else:
        out = linear_logprob(hidden, weight, target, entropy=True)
        loss = (out.entropy if call == "entropy" else out.logprob).sum()
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert dhidden.abs().sum() > 0
    penalty = dhidden.square().sum()
    for of, at in ((penalty, hidden), (penalty + hidden.sum(), hidden), (penalty + weight.sum(), weight)):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(of, at, retain_graph=True)

"""A low-rank adapter on the head: W + s b a is never formed, nor a gradient of W's size when W is frozen."""

import pytest
import torch
from _budget import assert_within_budget

from rlhf_fast import fused_linear_loss, linear_logprob, reference
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops import _head

N, D, V, R = 21, 12, 70, 3


def case(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (R, D), (V, R))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    target = torch.randint(0, V, (N,), generator=g)
    target[3:5] = -100
    return tensors, target


def leaves(tensors, dtype, frozen=False):
    hidden, weight, a, b = (t.to(dtype, copy=True).requires_grad_() for t in tensors)
    return hidden, weight.requires_grad_(not frozen), a, b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_linear_logprob(dtype, frozen):
    tensors, target = case(dtype)
    results = []
    for fn, kind in (
        (reference.linear_logprob, torch.float64),
        (reference.linear_logprob, dtype),
        (linear_logprob, dtype),
    ):
        hidden, weight, a, b = leaves(tensors, kind, frozen)
        extra = dict(chunk_size=8) if fn is linear_logprob else {}
        out = fn(hidden, weight, target, lora=(a, b, 0.5), temperature=0.8, softcap=20.0, entropy=True, **extra)
        (out.logprob.sum() + 0.3 * out.entropy.sum() + 0.1 * out.lse.sum()).backward()
        grads = [hidden.grad, a.grad, b.grad] + ([] if frozen else [weight.grad])
        results.append([out.logprob, out.entropy, *grads])
        assert (weight.grad is None) == frozen
    for i, (truth, naive, ours) in enumerate(zip(*results, strict=True)):
        size = max(1.0, float(truth.abs().max()))
        # narrow products of rank r and of the head each round once where the naive expression rounds W + s b a
        rounding = 2 * torch.finfo(dtype).eps * size if dtype.itemsize == 2 else 0.0
        assert_within_budget(ours, naive, truth, dtype, scale=size, rounding=rounding, name=str(i))


@pytest.mark.parametrize("chunk_size", [1, 6, None])
def test_fused(chunk_size):
    tensors, target = case()
    advantages = torch.randn(N, dtype=torch.float64)
    advantages[8:12] = 0
    batch = dict(advantages=advantages, old_logprob=torch.full((N,), -4.0, dtype=torch.float64))
    results = []
    for fn in (fused_linear_loss, reference.fused_linear_loss):
        hidden, weight, a, b = leaves(tensors, torch.float64)
        extra = dict(chunk_size=chunk_size) if fn is fused_linear_loss else {}
        loss = fn(hidden, weight, target, PolicyLoss("dapo"), batch=batch, lora=(a, b, 0.5), **extra).loss
        (loss * 1.5).backward()
        results.append([loss.detach(), hidden.grad, weight.grad, a.grad, b.grad])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_a_frozen_head_has_no_product_of_its_size(monkeypatch):
    tensors, target = case(torch.float32)

    def refuse(*args):
        raise AssertionError("a gradient of the frozen weight was formed")

    monkeypatch.setattr(_head.Head, "_add_weight", refuse)
    hidden, weight, a, b = leaves(tensors, torch.float32, frozen=True)
    linear_logprob(hidden, weight, target, lora=(a, b, 2.0)).logprob.sum().backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    fused_linear_loss(hidden, weight, target, lambda lp, h, batch: lp.sum(), lora=(a, b, 2.0)).loss.backward()


def test_compiles_whole():
    tensors, target = case(torch.float32)
    loss_fn = PolicyLoss("grpo")

    def step(hidden, weight, a, b):
        out = linear_logprob(hidden, weight, target, lora=(a, b, 0.5))
        fused = fused_linear_loss(
            hidden,
            weight,
            target,
            loss_fn,
            batch=dict(advantages=torch.ones(N)),
            lora=(a, b, 0.5),
            segments=torch.tensor([0, 9, N]),
        )
        return out.logprob.sum() + fused.loss

    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = leaves(tensors, torch.float32)
        fn(*inputs).backward()
        grads.append([t.grad for t in inputs])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:, 1:], b, 1.0), r"lora a must be \(r, D\) with D=12, got \(3, 11\)"),
        (lambda a, b: (a, b[1:], 1.0), r"lora b must be \(V, r\) with V=70, got \(69, 3\)"),
        (lambda a, b: (a[:2], b, 1.0), "share r, got 2 and 3"),
        (lambda a, b: (a, b, 0.0), "lora scaling must be a finite number other than 0"),
        (lambda a, b: (a.bfloat16(), b, 1.0), "lora a must have weight's dtype"),
    ],
)
def test_bad_input(change, message):
    (hidden, weight, a, b), target = case(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, target, lora=change(a, b))


def test_not_a_triple():
    (hidden, weight, a, b), target = case(torch.float32)
    with pytest.raises(TypeError, match=r"lora must be \(a, b, scaling\)"):
        linear_logprob(hidden, weight, target, lora=(a, b))

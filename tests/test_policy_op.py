"""The fused clip op: opcheck, torch.compile with changing N, backends, second derivatives, determinism.

The Triton kernel runs on the GPU when there is one, in Triton's interpreter otherwise; the rest runs on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from policy_cases import KINDS, make_batch, options_of, pack

from rlhf_fast import _backend
from rlhf_fast.losses import PolicyLoss, policy_loss
from rlhf_fast.ops.policy import SUMS, ClipTerms, clip_loss

ALL_TERMS = ClipTerms(0.2, 0.3, 1.8, 1.5, 0.1, "k1", "k3", True, 0.02)


def op_inputs(n=23, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.randn(n, generator=g).abs()
    weight = torch.rand(n, generator=g) + 0.1
    weight[::5] = 0
    tensors = {
        "logprob": logprob, "old_logprob": logprob + 0.4 * torch.randn(n, generator=g),
        "advantages": torch.randn(n, generator=g), "weight": weight,
        "policy_weight": torch.rand(n, generator=g), "ref_logprob": logprob + torch.randn(n, generator=g),
        "entropy": torch.rand(n, generator=g), "entropy_weight": weight / 3,
    }  # fmt: skip
    return {k: t.to(device, dtype if k in ("logprob", "entropy") else torch.float32) for k, t in tensors.items()}


def call(tensors, terms):
    tensors = dict(tensors)
    first = [tensors.pop(k) for k in ("logprob", "old_logprob", "advantages", "weight")]
    return clip_loss(*first, terms, **tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full, dtype):
    t = op_inputs(dtype=dtype)
    t["logprob"].requires_grad_()
    terms = ALL_TERMS
    if full:
        t["entropy"].requires_grad_()
    else:
        t |= {"old_logprob": None, "policy_weight": None, "ref_logprob": None, "entropy": None, "entropy_weight": None}
        terms = ClipTerms(0.2, 0.2)
    torch.library.opcheck(torch.ops.rlhf_fast.policy_clip, (*t.values(), *terms))


def test_opcheck_of_the_backward():
    x = torch.randn(5)
    torch.library.opcheck(torch.ops.rlhf_fast.policy_clip_scale, (torch.tensor(2.0), x, x.bfloat16()))


def test_upstream_gradient_is_honoured():
    """Loss scaling and accumulation: any scalar, zero too, retained graphs, and inputs left as they were."""
    t = op_inputs()
    before = {k: v.clone() for k, v in t.items()}
    t["logprob"].requires_grad_()
    t["entropy"].requires_grad_()
    result = call(t, ALL_TERMS)
    for scale in (1.0, 0.0, -3.5, 65536.0):
        grads = torch.autograd.grad(result.loss * scale, [t["logprob"], t["entropy"]], retain_graph=True)
        torch.testing.assert_close(grads[0], result.dlogprob * scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(grads[1], result.dentropy * scale, rtol=1e-6, atol=0)
    for name, value in before.items():
        assert torch.equal(value, t[name].detach())


def test_second_derivative_is_an_error():
    t = op_inputs()
    t["logprob"].requires_grad_()
    (grad,) = torch.autograd.grad(call(t, ALL_TERMS).loss, t["logprob"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_no_gradient_where_none_is_wanted():
    t = op_inputs()
    assert not call(t, ALL_TERMS).loss.requires_grad
    t["logprob"].requires_grad_()
    loss = call(t, ALL_TERMS).loss
    loss.backward()
    assert t["entropy"].grad is None


@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo", "vespo", "geo_mean"])
def test_compile_fullgraph_with_changing_length(kind):
    torch._dynamo.reset()
    options = {"beta": 0.1, "entropy_coef": 0.01, "off_policy_threshold": 0.5}
    loss_fn = PolicyLoss(kind, **options)
    frames = torch._dynamo.testing.CompileCounter()

    def loss_of(logprob, old, advantages, mask, ref, entropy):
        return policy_loss(logprob, old, advantages, kind=loss_fn, mask=mask, ref_logprob=ref, entropy=entropy)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=frames)
    for width in (9, 12, 17, 33):
        b = make_batch((7, 3, 5, 9), width, dtype=torch.float32, seed=width)
        args = [b[k] for k in ("old_logprob", "advantages", "mask", "ref_logprob", "entropy")]
        results = []
        for function in (compiled, loss_of):
            logprob = b["logprob"].clone().requires_grad_()
            loss, metrics = function(logprob, *args)
            loss.backward()
            results.append((loss.detach(), logprob.grad, metrics["ratio_mean"].detach()))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert frames.frame_count == 1


@pytest.mark.parametrize("n", [0, 1, 23, 1024, 2500])
@pytest.mark.parametrize("full", [True, False])
def test_triton_agrees_with_torch(n, full, device):
    pytest.importorskip("triton")
    t = op_inputs(n, device=device)
    terms = ALL_TERMS if full else ClipTerms(0.2, 0.28)
    if not full:
        t |= {"old_logprob": None, "policy_weight": None, "ref_logprob": None, "entropy": None, "entropy_weight": None}
    results = []
    for name in ("torch", "triton"):
        with _backend.use_backend(name):
            results.append(call(t, terms))
    for name, a, b in zip(SUMS, results[0].sums, results[1].sums, strict=True):
        # n terms of size up to 10 in two orders of summation, fp32
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * max(n, 1), msg=lambda m, k=name: f"{k}: {m}")
    torch.testing.assert_close(results[1].dlogprob, results[0].dlogprob, rtol=1e-5, atol=1e-6)
    assert (results[0].dentropy is None) == (results[1].dentropy is None)
    if full:
        torch.testing.assert_close(results[1].dentropy, results[0].dentropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [64, 65, 200])
def test_blocks_of_the_cpu_change_nothing(n, monkeypatch):
    t = op_inputs(n, dtype=torch.float64)
    t = {k: v.double() for k, v in t.items()}
    t["weight"][64:128] = 0  # a block without a valid row
    t["logprob"][64:128] = float("nan")
    whole = call(t, ALL_TERMS)
    monkeypatch.setattr("rlhf_fast.ops._policy_torch.CPU_BLOCK", 64)
    blocks = call(t, ALL_TERMS)
    torch.testing.assert_close(blocks.sums, whole.sums, rtol=1e-12, atol=1e-13)
    assert torch.equal(blocks.dlogprob, whole.dlogprob)
    assert torch.equal(blocks.dentropy, whole.dentropy)


def test_bitwise_repeatable():
    batch = pack(make_batch(dtype=torch.float32, per_token=True))
    for kind in KINDS:
        if kind == "clip_cov":
            continue
        losses = [
            policy_loss(
                batch["logprob"], batch["old_logprob"], batch["advantages"], kind=kind,
                cu_seqlens=batch["cu_seqlens"], **options_of(kind),
            )[0]
            for _ in range(2)
        ]  # fmt: skip
        assert torch.equal(*losses)


def test_strided_inputs():
    t = op_inputs(46)
    strided = {k: v[::2] for k, v in t.items()}
    solid = {k: v[::2].contiguous() for k, v in t.items()}
    a, b = call(strided, ALL_TERMS), call(solid, ALL_TERMS)
    assert torch.equal(a.sums, b.sums)
    assert torch.equal(a.dlogprob, b.dlogprob)

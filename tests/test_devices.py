"""Deterministic mode, and a second GPU in one process: the main ops again, with the same bits."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import (
    fused_linear_loss,
    gae,
    group_advantages,
    kl_estimate,
    linear_divergence,
    linear_logprob,
    logprob_from_logits,
    masked_whiten,
    policy_loss,
)
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops import _shards

N, D, V = 100, 32, 500


def _inputs(device, dtype):
    """hidden, weight, logits (leaves), then constants; the same numbers on every device."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    leaves = [draw(N, D), draw(V, D) / D**0.5, 3 * draw(N, V)]
    leaves = [x.to(dtype).to(device).requires_grad_() for x in leaves]
    target = torch.randint(0, V, (N,), generator=g)
    target[5:9] = -100
    advantages = draw(N).masked_fill(torch.rand(N, generator=g) < 0.5, 0)
    cu, ids = torch.tensor([0, 40, 40, N], dtype=torch.int32), torch.randint(0, 20, (N,), generator=g)
    old, mask = draw(N) - 7, torch.rand(N, generator=g) < 0.8
    return leaves, [x.to(device) for x in (target, advantages, cu, ids, old, mask)]


def _head_ops(leaves, target, advantages, cu, ids, old, mask):
    hidden, weight, logits = leaves
    batch = dict(advantages=advantages, old_logprob=old)
    yield linear_logprob(hidden, weight, target, entropy=True, chunk_size=48)[:2]
    for kind in ("grpo", "gspo"):
        options = dict(batch=dict(batch), segments=cu, chunk_size=48)
        yield (fused_linear_loss(hidden, weight, target, PolicyLoss(kind), **options).loss,)
    yield linear_divergence(hidden, weight, hidden.detach() * 0.9, weight.detach(), kind="jsd", chunk_size=48)[None]
    yield logprob_from_logits(logits, target, entropy=True)[:2]
    logprob = lambda: logprob_from_logits(logits, target.clamp(min=0)).logprob  # noqa: E731
    yield (policy_loss(logprob(), old, advantages, kind="gspo", cu_seqlens=cu)[0],)
    yield (policy_loss(logprob(), old, advantages, mask=mask)[0],)
    yield (kl_estimate(logprob(), old),)


def _bits(device, dtype):
    """Outputs and gradients of the main ops, on the CPU."""
    leaves, constants = _inputs(device, dtype)
    found = []
    for outputs in _head_ops(leaves, *constants):
        grads = torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves, allow_unused=True)
        found += [*outputs, *(x for x in grads if x is not None)]
    target, advantages, cu, ids, old, mask = constants
    found += gae(advantages, old, cu_seqlens=cu, mask=mask)
    found += [masked_whiten(advantages, mask), group_advantages(advantages, group_ids=ids).advantages]
    assert all(x.device == leaves[0].device for x in found)
    return [x.detach().cpu() for x in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_mode_gives_the_same_bits(dtype, device):
    """Nothing refuses to run, and fresh memory, which torch then fills with NaN, is read by nobody."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = _bits(device, dtype), _bits(device, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # NaN differs from itself


def test_compiled_with_cuda_graphs(device):
    """A head op between pieces that become CUDA graphs: each replay sees its own numbers."""
    if "FAKE_GPU" in os.environ:
        pytest.skip("inductor would compile Triton for the simulated GPU")

    def step(hidden, weight, target):
        out = linear_logprob(hidden * 2, weight, target, entropy=True, chunk_size=48)
        return (out.logprob * 0.5 + out.entropy).sum()

    (_, weight, _), (target, *_) = _inputs(device, torch.float32)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        hidden = torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
        found = []
        for fn in (compiled, step):
            loss = fn(hidden, weight, target)
            found.append([loss.detach().clone(), *(g.clone() for g in torch.autograd.grad(loss, (hidden, weight)))])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_gpus_in_one_process(dtype, device):
    """On the second GPU while the first one is current."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    torch.use_deterministic_algorithms(True)
    try:
        here, there = _bits(torch.device("cuda", 0), dtype), _bits(torch.device("cuda", 1), dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_ranks_talk_on_the_gpu_of_the_call(device, monkeypatch):
    """A group without a CPU side: on the tensors' GPU, not on the current one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lines = []
    monkeypatch.setattr(_shards, "gather", lambda line, group: lines.append(line) or line[None])
    group = SimpleNamespace(_device_types=[torch.device("cuda")])
    mine = _shards.Agreement(rows=7)
    for near in (torch.ones(1, device="cuda:1"), torch.ones(1, device="cuda:0"), None):
        assert _shards.exchange(group, mine, near) == [mine]
    assert [line.get_device() for line in lines] == [1, 0, 0]

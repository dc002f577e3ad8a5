"""Every ready-made policy loss through the fused op: against the reference formula over the whole logits tensor."""

import math

import pytest
import torch
from torch.library import opcheck

from rlhf_fast import fused_linear_loss, reference
from rlhf_fast.losses import PolicyLoss, policy_loss_kinds
from rlhf_fast.ops._fused_run import merge_metrics
from rlhf_fast.ops.fused import _fused_linear_loss
from rlhf_fast.reference.policy import policy_loss as reference_policy_loss

LENGTHS = (4, 1, 6, 3, 5)
N, D, V = sum(LENGTHS), 5, 23
NEEDS = {"dr_grpo": dict(max_length=8)}
OPTIONS = {
    "defaults": {},
    "kl and entropy": dict(beta=0.1, entropy_coef=0.02),
    "sequence level": dict(importance_level="sequence"),
}


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, D, generator=g, dtype=torch.float64) for s in (N, V))
    target = torch.randint(0, V, (N,), generator=g)
    target[[1, 7, 8]] = -100
    target[4] = -100  # the sequence of one token has none left
    logprob = reference.linear_logprob(hidden, weight, target, temperature=0.8).logprob
    old = logprob + 0.3 * torch.randn(N, generator=g, dtype=torch.float64)
    ref = logprob + 0.3 * torch.randn(N, generator=g, dtype=torch.float64)
    advantages = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return hidden, weight, target, old, ref, advantages, cu


def by_reference(kind, options, hidden, weight, target, old, ref, advantages, cu):
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    out = reference.linear_logprob(h, w, target, temperature=0.8, entropy=True)
    needs = {
        k: v for k, v in (("ref_logprob", ref), ("entropy", out.entropy)) if options.get("beta") or k != "ref_logprob"
    }
    loss, _ = reference_policy_loss(
        out.logprob, old, advantages, kind=kind, mask=target != -100, cu_seqlens=cu, **needs, **options
    )
    loss.backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", sorted(set(policy_loss_kinds()) - {"clip_cov"}))  # clip_cov draws tokens at random
def test_against_the_reference(kind, options, chunk_size):
    hidden, weight, target, old, ref, advantages, cu = case()
    options = NEEDS.get(kind, {}) | options
    want = by_reference(kind, options, hidden, weight, target, old, ref, advantages, cu)
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    batch = dict(advantages=advantages, old_logprob=old)
    if options.get("beta"):
        batch["ref_logprob"] = ref
    if kind in ("clip_cov", "kl_cov"):  # these select tokens by the current log-prob
        batch["logprob"] = reference.linear_logprob(hidden, weight, target, temperature=0.8).logprob
    loss_fn = PolicyLoss(kind, **options)
    out = fused_linear_loss(h, w, target, loss_fn, batch=batch, segments=cu, temperature=0.8, chunk_size=chunk_size)
    out.loss.backward()
    for name, a, b in zip(("loss", "hidden", "weight"), (out.loss.detach(), h.grad, w.grad), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert all(bool(torch.isfinite(m.double())) for m in out.metrics.values())


def test_zero_advantages_skip_two_products_and_keep_the_normaliser():
    hidden, weight, target, old, _, advantages, cu = case()
    advantages[2] = 0
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    out = fused_linear_loss(
        h,
        w,
        target,
        PolicyLoss("grpo"),
        batch=dict(advantages=advantages, old_logprob=old),
        segments=cu,
        temperature=0.8,
    )
    out.loss.backward()
    want = by_reference("grpo", {}, hidden, weight, target, old, None, advantages, cu)
    torch.testing.assert_close(w.grad, want[2], rtol=1e-8, atol=1e-11)
    scored = int((target != -100).sum())
    idle = int((target[5:11] != -100).sum())
    assert int(out.metrics["rows_forward"]) == scored
    assert int(out.metrics["rows_backward"]) <= scored - idle


def test_on_policy_ratio_is_exactly_one():
    hidden, weight, target, _, _, advantages, cu = case()
    out = fused_linear_loss(
        hidden.requires_grad_(), weight, target, PolicyLoss("ppo"), batch=dict(advantages=advantages), segments=cu
    )
    assert float(out.metrics["ratio_max"]) == float(out.metrics["ratio_min"]) == 1.0
    assert float(out.metrics["approx_kl"]) == 0.0
    out.loss.backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("cu", [[0, 2, 3], [0, 1, 3], [0, 1, 1, 3, 3]], ids=str)
@pytest.mark.parametrize("kind", ["gspo", "geo_mean", "vespo", "grpo"])
def test_segments_without_a_scored_row_have_no_extremes(kind, cu):
    """Neither in chunks of their own, nor when micro-batches are added up."""
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    target = torch.tensor([1, 2, -100]) if cu == [0, 2, 3] else torch.tensor([-100, 2, 1])
    now = reference.linear_logprob(hidden, weight, target).logprob
    batch = dict(advantages=torch.ones(len(cu) - 1).double(), old_logprob=now - 0.55)

    def metrics_of(target, chunk_size):
        out = fused_linear_loss(
            hidden, weight, target, PolicyLoss(kind), batch=batch, segments=torch.tensor(cu), chunk_size=chunk_size
        )
        return {name: value.double() for name, value in out.metrics.items()}

    empty = metrics_of(torch.full_like(target, -100), 1)
    assert all(bool(value.isfinite()) for value in empty.values())
    for chunk_size in (1, None):
        metrics = metrics_of(target, chunk_size)
        total = {}
        for part in (empty, metrics, empty):
            merge_metrics(total, part)
        for found in (metrics, total):
            for name in ("ratio_max", "ratio_min"):
                assert float(found[name]) == pytest.approx(math.exp(0.55))
            assert float(found["rows_forward"]) == 2


@pytest.mark.parametrize(
    "loss_fn", [PolicyLoss("grpo"), PolicyLoss("ppo", dual_clip=3.0), PolicyLoss("dapo", beta=0.1, entropy_coef=0.01)]
)
def test_compiles_whole_with_a_changing_length(loss_fn):
    weight = torch.randn(31, 8, requires_grad=True)

    def step(hidden, target, advantages, old, cu):
        batch = dict(advantages=advantages, old_logprob=old)
        if loss_fn.beta:
            batch["ref_logprob"] = old + 0.1
        out = fused_linear_loss(hidden, weight, target, loss_fn, batch=batch, segments=cu)
        return out.loss, out.metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9, 13):
        target = torch.randint(0, 31, (n,))
        target[1] = -100
        inputs = (target, torch.randn(3), torch.randn(n) - 3, torch.tensor([0, 2, 5, n]))
        hidden, results = torch.randn(n, 8), []
        for fn in (step, compiled):
            h = hidden.clone().requires_grad_()
            weight.grad = None
            loss, metrics = fn(h, *inputs)
            (2 * loss).backward()
            results.append((loss.detach(), h.grad, weight.grad, {k: float(v) for k, v in metrics.items()}))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss_fn = PolicyLoss("grpo")
    target = torch.tensor([0, 3, -100, 8, 2, 5])
    cu = torch.tensor([0, 2, 6])
    batch = loss_fn.prepare(dict(advantages=torch.tensor([1.0, -1.0])), target != -100, cu)
    tensors = {k: v for k, v in batch.items() if torch.is_tensor(v)}
    _, metrics = loss_fn(torch.empty(0), None, {k: v[:0] if v.dim() else v for k, v in tensors.items()})
    args = (target, None, list(tensors.values()), ",".join(tensors), ",".join(metrics), None, 0.5)
    options = (loss_fn._ready_key, False, 1.0, None, 1.0, -100, 2, None)
    opcheck(_fused_linear_loss, (hidden, weight, None, None, None, *args, *options, [True, True, False, False, False]))
    low = [torch.randn(s, requires_grad=True) for s in ((2, 4), (9, 2))]
    opcheck(_fused_linear_loss, (hidden, weight, None, *low, *args, *options, [True, True, False, True, True]))

"""The engine on the device that is there: on a GPU cuBLAS products and Triton row passes, otherwise the CPU's.

The other engine tests make their tensors on the CPU; these are the ones that a run on a GPU adds to.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import fused_linear_loss, linear_divergence, linear_logprob, logprob_from_logits, reference
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops import _head

SHAPES = [(300, 64, 1000), (130, 32, 50257)]  # the second one: a vocabulary that is a multiple of nothing
OPTIONS = {"plain": {}, "all": dict(temperature=0.7, logit_scale=0.8, softcap=20.0, entropy=True)}


def case(shape, dtype, device):
    n, d, v = shape
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) / d**0.5).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    target[5:9] = -100
    hidden[6] = torch.nan
    return [x.to(device) for x in (hidden, weight, target)]


def truth_of(fn, hidden, weight, target, **options):
    """fp64 on the CPU, from the inputs as they were rounded."""
    h = hidden.detach().cpu().double().nan_to_num(0).requires_grad_()
    w = weight.detach().cpu().double().requires_grad_()
    return h, w, fn(h, w, target.cpu(), **options)


def tolerance(dtype, device):
    """Of a log-prob: fp32 everywhere on a GPU; on the CPU a narrow tile rounds each logit (of size about 5) once."""
    if dtype == torch.float32:
        return 2e-5  # sums of 50,257 terms, and TF32 stays off
    return 2e-5 if device.type == "cuda" else 10 * torch.finfo(dtype).eps


def close(got, want, dtype, *, narrow=4.0):
    """Gradients: `narrow` roundings of the working dtype at the size of the largest entry."""
    atol = max(narrow * torch.finfo(dtype).eps, 1e-5) * float(want.abs().max())
    torch.testing.assert_close(got.detach().cpu().double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logprob(shape, dtype, options, device):
    hidden, weight, target = case(shape, dtype, device)
    h, w, want = truth_of(reference.linear_logprob, hidden, weight, target, **options)
    hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logprob(hidden, weight, target, chunk_size=128, **options)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            atol = tolerance(dtype, device)
            torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-5, atol=atol)
    sum(o.sum() for o in got if o is not None).backward()
    sum(o.sum() for o in want if o is not None).backward()
    close(hidden.grad.nan_to_num(0), h.grad, dtype)
    close(weight.grad, w.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_policy_loss(shape, dtype, device):
    """Zero advantages and clipped rows are compacted away; the loss is scaled as a GradScaler would."""
    hidden, weight, target = case(shape, dtype, device)
    n = shape[0]
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(n, generator=g)
    advantages[torch.rand(n, generator=g) < 0.5] = 0
    old = reference.linear_logprob(hidden.cpu().float().nan_to_num(0), weight.cpu().float(), target.cpu()).logprob
    old = old + 0.02 * torch.randn(n, generator=g)
    cu = torch.tensor([0, n // 3, n])
    results = []
    for fn, where in ((reference.fused_linear_loss, torch.device("cpu")), (fused_linear_loss, device)):
        batch = {"advantages": advantages.to(where), "old_logprob": old.to(where)}
        options = dict(batch=batch, segments=cu.to(where))
        if fn is fused_linear_loss:
            h, w = hidden.requires_grad_(), weight.requires_grad_()
            out = fn(h, w, target, PolicyLoss("grpo", clip_low=5.0), chunk_size=128, **options)
            assert 0 < int(out.metrics["rows_backward"]) < int(out.metrics["rows_forward"]) == n - 4
        else:
            h, w, out = truth_of(fn, hidden, weight, target, loss_fn=PolicyLoss("grpo", clip_low=5.0), **options)
        (out.loss * 1024).backward()
        results.append((h.grad, w.grad))
    (dh, dw), (got_h, got_w) = results
    close(got_h.nan_to_num(0), dh, dtype, narrow=8.0)  # the ratio carries the log-prob's rounding on the CPU
    close(got_w, dw, dtype, narrow=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprob_from_logits(dtype, device):
    logits = (torch.randn(70, 50257) * 3).to(dtype).to(device).requires_grad_()
    target = torch.randint(0, 50257, (70,)).to(device)
    got = logprob_from_logits(logits, target, temperature=0.8, entropy=True)
    x = logits.detach().cpu().double().requires_grad_()
    want = reference.logprob_from_logits(x, target.cpu(), temperature=0.8, entropy=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-5, atol=2e-5)
    (got.logprob.sum() + got.entropy.sum()).backward()
    (want.logprob.sum() + want.entropy.sum()).backward()
    close(logits.grad, x.grad, dtype)


def nll(logprob, entropy, batch):
    return -logprob.sum()


def test_strided_inputs(device):
    """A column of a matrix of targets, every other entry of a bias, a slice of hidden states, a transposed head."""
    n, d, v = 70, 16, 500
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g).to(device)  # noqa: E731
    hidden, weight, bias = draw(n, 2 * d)[:, ::2], draw(d, v).t(), draw(2 * v)[::2]
    target = torch.randint(0, v, (n, 3), generator=g).to(device)[:, 1]
    truth = [x.cpu().double().requires_grad_() for x in (hidden, weight, bias)]
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    assert not any(x.is_contiguous() for x in (*leaves, target))
    want = reference.fused_linear_loss(truth[0], truth[1], target.cpu(), nll, bias=truth[2])
    want = torch.autograd.grad(want.loss, truth)
    fused = fused_linear_loss(leaves[0], leaves[1], target, nll, bias=leaves[2], chunk_size=32).loss
    plain = -linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], chunk_size=32).logprob.sum()
    for loss in (fused, plain):
        for got, right in zip(torch.autograd.grad(loss, leaves), want, strict=True):
            close(got, right, torch.float32)
    found = []
    for fn, (h, w, b) in ((linear_divergence, leaves), (reference.linear_divergence, truth)):
        ref = (x.detach() for x in (h * 0.5, w))
        kl = fn(h, w, *ref, kind="reverse", bias=b, ref_bias=b.detach())
        found.append([kl, *torch.autograd.grad(kl.sum(), (h, w, b))])
    for got, right in zip(*found, strict=True):
        close(got, right.detach(), torch.float32)


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_compaction_moves_every_row_at_most_once(share, device):
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 64, 300):
        live = (torch.rand(n, generator=g) < share).to(device)
        with Syncs() as syncs:
            order, kept = _head.compaction(live)
        assert syncs.count == 1
        rows = live.nonzero().squeeze(1)
        assert kept == len(rows)
        if order is None:
            assert kept in (0, n)
            continue
        assert torch.equal(order.sort().values, rows)
        stays = order == torch.arange(kept, device=device)
        assert torch.equal(stays, live[:kept])
        assert bool((order[~stays] >= kept).all())  # what moves comes from where no row is written


def test_peak_memory_on_a_gpu(gpu):
    """DESIGN's bound: 1.5 GiB beyond inputs and gradients, here at 16384 tokens of Qwen2.5-0.5B's head."""
    n, d, v = 16384, 896, 151936
    hidden = torch.randn(n, d, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, d, device=gpu, dtype=torch.bfloat16) / 30).requires_grad_()
    target = torch.randint(0, v, (n,), device=gpu)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_loss(hidden, weight, target, lambda lp, h, b: -lp.sum() / n).loss.backward()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5 * 2**30

"""logprob_from_logits and entropy_from_logits against fp64, under the error budget of the naive expression."""

import pytest
import torch
from _budget import assert_within_budget
from torch.library import opcheck

from rlhf_fast import _backend, entropy_from_logits, logprob_from_logits, reference
from rlhf_fast.ops.from_logits import _logits_logprob

OPTIONS = {
    "plain": {},
    "entropy": dict(entropy=True),
    "all": dict(temperature=0.6, logit_scale=1.4, softcap=8.0, entropy=True),
}


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if request.param == "cpp" and not _backend.cpp_available():
        pytest.skip("the C++ extension was not built")
    with _backend.use_backend(request.param):
        yield request.param


def naive(logits, target, *, temperature=1.0, logit_scale=1.0, softcap=None, entropy=False):
    s = logits * logit_scale
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    log_p = torch.log_softmax(s, -1)
    picked = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return picked, -(log_p.exp() * log_p).sum(-1) if entropy else None, torch.logsumexp(s, -1)


def run(fn, logits, target, dtype, **options):
    x = logits.to(dtype, copy=True).requires_grad_()
    out = fn(x, target, **options)
    g = torch.Generator().manual_seed(1)
    total = 0
    for o in out:
        if o is not None:
            total = total + (o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum()
    total.backward()
    return [o for o in out if o is not None] + [x.grad]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 7, 252, 4099])
def test_error_budget(backend, v, dtype, options):
    logits = (torch.randn(2, 6, v) * 3).to(dtype)
    logits[0, 0, 0] = 200.0  # near one-hot
    logits[1, 1] = 0  # uniform
    target = torch.randint(0, v, (2, 6))
    target[0, 0], target[1, 1] = 0, v - 1
    truth = run(reference.logprob_from_logits, logits, target, torch.float64, **options)
    ref = run(naive, logits, target, dtype, **options)
    ours = run(logprob_from_logits, logits, target, dtype, **options)
    assert ours[0].dtype == torch.float32
    assert ours[-1].dtype == dtype
    for i, triple in enumerate(zip(ours, ref, truth, strict=True)):
        assert_within_budget(*triple, dtype, scale=max(1.0, float(triple[2].abs().max())), name=str(i))


@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_and_opcheck(entropy):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 8, -100, 3])

    def f(x):
        return tuple(
            o for o in logprob_from_logits(x, target, temperature=0.7, softcap=3.0, entropy=entropy) if o is not None
        )

    assert torch.autograd.gradcheck(f, logits)
    opcheck(_logits_logprob, (logits.detach().float().requires_grad_(), target, 1.0, 3.0, 1.3, -100, entropy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_several_targets_for_each_row(backend, dtype):
    """(..., K) targets: repeated ones, ignored ones, and a row of which nothing counts."""
    logits = (torch.randn(2, 4, 507) * 3).to(dtype)
    target = torch.randint(0, 507, (2, 4, 6))
    target[0, 0, 3] = target[0, 0, 2]
    target[0, 1, 1:3] = -100
    target[1, 3] = -100
    options = dict(temperature=0.6, softcap=8.0, entropy=True)
    truth = run(reference.logprob_from_logits, logits, target, torch.float64, **options)
    ours = run(logprob_from_logits, logits, target, dtype, **options)
    assert ours[0].shape == target.shape
    assert ours[1].shape == ours[2].shape == target.shape[:-1]
    relative = 1e-12 if dtype == torch.float64 else 1e-6  # fp32 outputs whatever the logits' dtype
    for a, b in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=relative, atol=relative)
    # the gradient is in the logits' dtype, and rounded once for the row's term and once for each of the 6 targets
    rounding = max(relative, 7 * torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(ours[3].double(), truth[3], rtol=0, atol=rounding * float(truth[3].abs().max()))
    one = logprob_from_logits(logits, target[..., 0], **options).logprob
    torch.testing.assert_close(ours[0][..., 0].detach(), one, rtol=1e-6, atol=1e-6)
    opcheck(_logits_logprob, (torch.randn(3, 9, requires_grad=True), target[0, :3] % 9, 1.0, None, 1.3, -100, True))


def test_ignored_rows_are_not_read(backend):
    logits = torch.randn(4, 9)
    logits[2] = torch.nan
    x = logits.requires_grad_()
    out = logprob_from_logits(x, torch.tensor([0, 8, -100, 3]), entropy=True)
    sum(o.sum() for o in out).backward()
    assert not out.logprob[2].any()
    assert not out.entropy[2].any()
    assert not x.grad[2].any()
    assert torch.isfinite(x.grad).all()


def test_minus_infinity(backend):
    """Masked-out tokens of a constrained sampler: finite log-probs, zero gradient there."""
    logits = torch.randn(3, 9)
    logits[:, 4:] = -torch.inf
    x = logits.requires_grad_()
    out = logprob_from_logits(x, torch.tensor([0, 1, 3]), entropy=True)
    (out.logprob.sum() + out.entropy.sum() + out.lse.sum()).backward()
    want = reference.logprob_from_logits(logits[:, :4].detach().double(), torch.tensor([0, 1, 3]), entropy=True)
    torch.testing.assert_close(out.logprob.double(), want.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(x.grad).all()
    assert not x.grad[:, 4:].any()


def test_a_row_without_any_finite_logit_harms_no_other(backend):
    logits = torch.randn(3, 9)
    logits[1] = -torch.inf
    clean = logprob_from_logits(logits[[0, 2]], torch.tensor([0, 3]))
    out = logprob_from_logits(logits, torch.tensor([0, 1, 3]))
    assert torch.isnan(out.logprob[1])
    torch.testing.assert_close(out.logprob[[0, 2]], clean.logprob, rtol=0, atol=0)


def test_strides_and_caller_tensor(backend):
    logits = torch.randn(9, 6, 5)
    for view in (logits.transpose(0, 1), logits[:, :, ::2], logits.permute(2, 1, 0), logits[::2]):
        before = view.clone()
        x = view.detach().requires_grad_()
        target = torch.randint(0, view.shape[-1], view.shape[:-1])
        out = logprob_from_logits(x, target)
        out.logprob.sum().backward()
        want = torch.log_softmax(view, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(out.logprob, want)
        assert torch.equal(view, before)


def test_identical_policies_have_ratio_one():
    logits, target = torch.randn(5, 100), torch.randint(0, 100, (5,))
    a, b = (logprob_from_logits(logits, target, temperature=0.7).logprob for _ in range(2))
    assert torch.equal(torch.exp(a - b), torch.ones(5))


def test_entropy_from_logits(backend):
    logits = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    got = entropy_from_logits(logits, temperature=0.5, softcap=2.0)
    want = reference.entropy_from_logits(logits, temperature=0.5, softcap=2.0)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), logits), torch.autograd.grad(want.sum(), logits), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("empty", [(0, 5), (2, 0, 5)])
def test_empty(empty):
    logits = torch.randn(empty, requires_grad=True)
    out = logprob_from_logits(logits, torch.zeros(empty[:-1], dtype=torch.long), entropy=True)
    assert out.logprob.shape == empty[:-1]
    out.logprob.sum().backward()
    assert logits.grad.shape == empty


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (
            torch.randn(3, 5),
            torch.zeros(4, dtype=torch.long),
            r"target must be logits' leading shape=\(3,\), got \(4,\)",
        ),
        (torch.randn(3, 5), torch.zeros(4, 2, dtype=torch.long), r"target must be logits' leading shape and K, "),
        (torch.randn(2, 5), torch.tensor([[0, 1], [2, 7]]), r"target\[1, 1\] = 7 is outside the vocabulary \[0, 5\)"),
        (torch.randn(3, 5), torch.tensor([0, 5, 1]), r"target\[1\] = 5 is outside the vocabulary \[0, 5\)"),
        (torch.randn(3, 0), torch.zeros(3, dtype=torch.long), r"logits must be \(..., V\) with V > 0, got \(3, 0\)"),
        (torch.ones(3, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.long), "logits must be float32"),
    ],
)
def test_bad_input(logits, target, message):
    with pytest.raises(ValueError, match=message):
        logprob_from_logits(logits, target)

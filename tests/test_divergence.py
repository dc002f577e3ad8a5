"""linear_divergence against fp64, under the error budget of the naive expression, and against TRL and Liger."""

import math

import pytest
import torch
from _budget import assert_within_budget
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import _backend, linear_divergence, reference
from rlhf_fast.ops import _divergence_run, _head
from rlhf_fast.ops._divergence_run import Call, Operands, Pair
from rlhf_fast.ops._rows import Transform
from rlhf_fast.ops.divergence import KINDS, _linear_divergence, _linear_divergence_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias")
OPTIONS = {
    "plain": {},
    "all": dict(temperature=1.7, logit_scale=0.4, softcap=3.0, ref_share=0.2),
    "apart": dict(temperature=0.8, softcap=4.0, ref_options=dict(softcap=None, logit_scale=0.5)),
}


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if request.param == "cpp" and not _backend.cpp_available():
        pytest.skip("the C++ extension was not built")
    with _backend.use_backend(request.param):
        yield request.param


def inputs(n=23, d=16, e=9, v=252, dtype=torch.float32, bias=False, seed=0, outliers=True):
    """The six tensors in the order of NAMES (biases None without `bias`), in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    tensors = [new(n, d), new(v, d), new(n, e), new(v, e)]
    tensors += [new(v), new(v)] if bias else [None, None]
    if outliers and n > 3:
        tensors[0][1] *= 20  # near one-hot
        tensors[2][2] *= 20
        tensors[0][3] = 0  # uniform
    return [None if x is None else x.to(dtype) for x in tensors]


def run(fn, tensors, dtype, upstream, *, train=range(6), weights=None, **options):
    """(divergence, gradients of the tensors named by `train`) of sum(upstream * divergence), or of the fused sum."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_(i in train) for i, x in enumerate(tensors)]
    if weights is not None:
        options["weights"] = weights
    out = fn(*leaves[:4], bias=leaves[4], ref_bias=leaves[5], **options)
    if weights is None:
        (out * upstream.to(out.dtype)).sum().backward()
    else:
        (out.loss * upstream).backward()
        out = out.divergence
    return out.detach(), [leaves[i].grad for i in train if leaves[i] is not None]


def naive(hidden, weight, ref_hidden, ref_weight, *, kind, mask=None, bias=None, ref_bias=None, ref_share=0.5,
          temperature=1.0, logit_scale=1.0, softcap=None, ref_options=None):  # fmt: skip
    """What a user writes: every step in the working dtype."""

    def log_p(h, w, b, temperature, logit_scale, softcap):
        s = torch.nn.functional.linear(torch.where(mask.unsqueeze(-1), h, torch.zeros_like(h)), w, b) * logit_scale
        return torch.log_softmax((s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature, -1)

    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    own = log_p(hidden, weight, bias, **options)
    ref = log_p(ref_hidden, ref_weight, ref_bias, **options | (ref_options or {}))
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if kind != "jsd":
        return (kl(ref, own) if kind == "forward" else kl(own, ref)) * mask
    mixed = torch.logaddexp(ref + math.log(ref_share), own + math.log(1 - ref_share))
    return (ref_share * kl(ref, mixed) + (1 - ref_share) * kl(own, mixed)) * mask


def logit_rounding(tensors, dtype, kind, mask, options):
    """(value, relative error of the gradient) that one rounding of every logit can cause, to first order.

    The products are ours and the naive expression's alike, but their errors may by luck cancel in one of the two. In
    bf16 a CPU product hands bf16 back, and the tile holds the gradient too; fp16 is computed in fp32.
    """
    if dtype == torch.float16:
        return 0.0, 0.0
    eps = 2**-24 if dtype == torch.float32 else 2**-8
    h, w, rh, rw, b, rb = (None if x is None else x.double() for x in tensors)
    zs = [torch.nn.functional.linear(x[mask], y, c).requires_grad_() for x, y, c in ((h, w, b), (rh, rw, rb))]
    eye = torch.eye(zs[0].shape[1], dtype=torch.float64)
    dz = torch.autograd.grad(reference.linear_divergence(zs[0], eye, zs[1], eye, kind=kind, **options).sum(), zs)
    tops = [float(z.detach().abs().max()) for z in zs]
    value = sum(float(d.abs().sum(-1).max()) * top * eps for d, top in zip(dz, tops, strict=True))
    return value, eps * (max(tops) if dtype == torch.float32 else 1.0)  # a logit off by d changes p by the factor 1 + d


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(backend, dtype, kind, options):
    """Values and all six gradients, per token and fused, two hidden sizes, ragged V, rows masked that hold NaN."""
    tensors = inputs(dtype=dtype, bias=options != {}, v=507 if options else 252)
    mask = torch.ones(23, dtype=torch.bool)
    mask[4:6] = False
    upstream = torch.randn(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth, truth_grads = run(
        reference.linear_divergence, tensors, torch.float64, upstream, kind=kind, mask=mask, **options
    )
    ref, ref_grads = run(naive, tensors, dtype, upstream, kind=kind, mask=mask, **options)
    rounding, relative = logit_rounding(tensors, dtype, kind, mask, options)
    tensors[0][4] = tensors[2][5] = torch.nan
    weights = upstream * mask
    for fused, chunk_size in ((False, 5), (False, None), (True, 5), (True, None)):
        form = dict(weights=weights.float()) if fused else dict(mask=mask)
        cotangent = torch.tensor(1.0) if fused else upstream
        ours, grads = run(
            linear_divergence, tensors, dtype, cotangent, kind=kind, chunk_size=chunk_size, **form, **options
        )
        assert ours.dtype == torch.float32
        assert not ours[4:6].any()
        size = max(1.0, float(truth.abs().max()))
        assert_within_budget(ours, ref, truth, dtype, scale=size, rounding=rounding, name="divergence")
        for name, g, r, t in zip(NAMES, grads, ref_grads, truth_grads, strict=False):
            assert g.dtype == dtype
            size = max(1.0, float(t.abs().max()))
            assert_within_budget(g, r, t, dtype, scale=size, rounding=size * relative, name=f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = [x.requires_grad_() for x in inputs(5, 3, 4, 7, torch.float64, bias=True, outliers=False)]
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    options = dict(kind=kind, ref_share=0.3, temperature=0.7, softcap=4.0, chunk_size=2)

    def per_token(h, w, rh, rw, b, rb):
        return linear_divergence(h, w, rh, rw, bias=b, ref_bias=rb, **options)

    def fused(h, w, rh, rw, b, rb):
        return linear_divergence(h, w, rh, rw, bias=b, ref_bias=rb, weights=weights, **options).loss

    assert torch.autograd.gradcheck(per_token, tensors)
    assert torch.autograd.gradcheck(fused, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_heads_give_exactly_nothing(backend, kind):
    for dtype in DTYPES:
        h, w, *_, b, _ = inputs(7, dtype=dtype, bias=True)
        value, grads = run(linear_divergence, [h, w, h, w, b, b], dtype, torch.ones(7), kind=kind, softcap=5.0)
        assert not value.any()
        assert not any(g.any() for g in grads)


def test_scaling_both_heads_alike_changes_nothing_but_the_weights():
    """ref_options defaults to the policy's options, temperature included."""
    h, w, rh, rw, *_ = inputs(4, dtype=torch.float64)
    scaled = linear_divergence(h, w, rh, rw, temperature=2.0)
    torch.testing.assert_close(scaled, linear_divergence(h / 2, w, rh / 2, rw))
    apart = linear_divergence(h, w, rh, rw, temperature=2.0, ref_options=dict(temperature=1.0))
    torch.testing.assert_close(apart, linear_divergence(h / 2, w, rh, rw))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_and_rows_of_weight_0_never_leak(backend, kind):
    tensors = inputs(8)
    clean = torch.tensor([0, 1, 2, 5, 7])
    weights = torch.tensor([1.0, 0.5, -1, 0, torch.inf, 2, 0, 1])
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1]).bool()  # beside an infinite weight
    want, want_grads = run(
        linear_divergence, [tensors[0][clean], tensors[1], tensors[2][clean], tensors[3], None, None], torch.float32,
        torch.tensor(2.0), kind=kind, weights=weights[clean],
    )  # fmt: skip
    for x, row in ((tensors[0], 3), (tensors[0], 4), (tensors[2], 6)):
        x[row] = torch.nan
    value, grads = run(
        linear_divergence,
        tensors,
        torch.float32,
        torch.tensor(2.0),
        kind=kind,
        weights=weights,
        mask=mask,
        chunk_size=2,
    )
    torch.testing.assert_close(value[clean], want, rtol=1e-6, atol=1e-6)
    assert not value[[3, 4, 6]].any()
    for i in (0, 2):
        # products of other heights sum in another order
        torch.testing.assert_close(grads[i][clean], want_grads[i], rtol=1e-4, atol=1e-4)
        assert not grads[i][[3, 4, 6]].any()
        torch.testing.assert_close(grads[i + 1], want_grads[i + 1], rtol=1e-4, atol=1e-4)


def test_nothing_counts_and_nothing_at_all():
    _, w, _, rw, *_ = inputs()
    for n, extra in ((3, dict(weights=torch.zeros(3))), (3, dict(mask=torch.zeros(3).bool())), (0, {})):
        h, rh = torch.randn(n, 16, requires_grad=True), torch.randn(n, 9)
        out = linear_divergence(h, w, rh, rw, **extra)
        loss = out.loss if "weights" in extra else out.sum()
        loss.backward()
        assert loss == 0
        assert not h.grad.any()  # attached to the graph, and zero


def test_vocabulary_entries_that_are_ruled_out(backend):
    """-inf biases: in both heads the entry does not exist; in the policy alone the forward KL is infinite, as it is."""
    h, w, rh, rw, *_ = inputs(6)
    out = torch.zeros(252)
    out[200:] = -torch.inf
    for kind in KINDS:
        value, grads = run(
            linear_divergence, [h, w, rh, rw, out, out], torch.float32, torch.ones(6), kind=kind, train=[0, 1]
        )
        short = [h, w[:200], rh, rw[:200], None, None]
        want, want_grads = run(linear_divergence, short, torch.float32, torch.ones(6), kind=kind, train=[0, 1])
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[0], want_grads[0], rtol=1e-4, atol=1e-4)
        assert not grads[1][200:].any()
    assert linear_divergence(h, w, rh, rw, bias=out, kind="forward").isinf().all()
    assert linear_divergence(h, w, rh, rw, bias=out, kind="reverse").isfinite().all()
    assert linear_divergence(h, w, rh, rw, bias=out, kind="jsd").isfinite().all()


@pytest.fixture
def products(monkeypatch):
    """Rows that went through the three kinds of products, for both heads together."""
    seen = {"logits": 0, "hidden": 0, "weight": 0}
    for key, name in (("logits", "logits"), ("hidden", "_add_hidden"), ("weight", "_add_weight")):
        original = getattr(_head.Head, name)

        def spy(self, x, *args, _key=key, _original=original):
            seen[_key] += x.shape[0]
            return _original(self, x, *args)

        monkeypatch.setattr(_head.Head, name, spy)
    return seen


def test_products(products):
    """Two without gradients, 2 + 2 when the loss is known, else 2 + 2 + 2; two more for a reference that trains."""

    def count(*, train, fused, upstream=None):
        products.update(logits=0, hidden=0, weight=0)
        weights = torch.ones(20) if fused else None
        cotangent = torch.tensor(1.0) if fused else torch.ones(20) if upstream is None else upstream
        run(linear_divergence, inputs(20), torch.float32, cotangent, train=train, weights=weights, chunk_size=6)
        return {k: v / 20 for k, v in products.items()}

    assert count(train=[0, 1], fused=True) == {"logits": 2, "hidden": 1, "weight": 1}
    assert count(train=[0], fused=True) == {"logits": 2, "hidden": 1, "weight": 0}
    assert count(train=range(4), fused=True) == {"logits": 2, "hidden": 2, "weight": 2}
    assert count(train=[0, 1], fused=False) == {"logits": 4, "hidden": 1, "weight": 1}
    half = torch.arange(20) % 2.0
    assert count(train=[0, 1], fused=False, upstream=half) == {"logits": 3, "hidden": 0.5, "weight": 0.5}
    products.update(logits=0, hidden=0, weight=0)
    tensors = [x.requires_grad_() for x in inputs(20)[:4]]
    with torch.no_grad():
        linear_divergence(*tensors, weights=torch.arange(20.0) - 3)
    assert products == {"logits": 38, "hidden": 0, "weight": 0}  # one row has weight 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_the_size_of_the_logits(kind):
    h, w, rh, rw, *_ = inputs(64, v=300)
    call = Call(kind, 0.5, Transform(), Transform(), 8, None)
    on = _head.Wanted(True, True, True)
    with Largest() as largest:
        _divergence_run.fused(Operands(h, w, None, on), Operands(rh, rw, None, on), None, torch.ones(64), call)
    assert 0 < largest.numel <= 300 * 16  # the weight's gradient; the logits would have 64 * 300, a tile 8 * 300


def test_the_memory_budget_holds_both_tiles():
    h, w, rh, rw, *_ = inputs(64, v=300)
    for chunk_size, budget, rows in ((None, 16 * 300 * 4, 8), (7, None, 7), (None, None, 64)):
        call = Call("jsd", 0.5, Transform(), Transform(), chunk_size, budget)
        assert Pair(Operands(h, w, None), Operands(rh, rw, None), None, call).step == rows


def test_upstream_scalar_and_a_graph_walked_twice():
    tensors = [x.requires_grad_() for x in inputs(6)[:4]]
    before = [x.detach().clone() for x in tensors]
    weights = torch.rand(6)
    loss = linear_divergence(*tensors, weights=weights, chunk_size=4).loss
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    scaled = torch.autograd.grad(loss * -3.5, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors)
    per_token = torch.autograd.grad((linear_divergence(*tensors, chunk_size=4) * weights).sum(), tensors)
    for a, b, c, d, x, y in zip(once, scaled, again, per_token, tensors, before, strict=True):
        torch.testing.assert_close(b, -3.5 * a)
        assert torch.equal(a, c)
        torch.testing.assert_close(d, a)
        assert torch.equal(x, y)  # inputs untouched


def test_second_derivatives_are_errors():
    tensors = inputs(3)
    h = tensors[0].requires_grad_()
    for out in (linear_divergence(*tensors[:4]).sum(), linear_divergence(*tensors[:4], weights=torch.ones(3)).loss):
        scale = torch.full((), 2.0, requires_grad=True)  # upstream with a graph of its own
        (grad,) = torch.autograd.grad(out * scale, h, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


def test_weights_are_constants():
    tensors = inputs(3)[:4]
    weights = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="weights requires grad"):
        linear_divergence(*tensors, weights=weights)


def test_tied_head_and_reference():
    """One weight in both heads: it gathers both gradients, unless the reference's is detached."""
    h, w, *_ = inputs(5, dtype=torch.float64)
    rh = torch.randn_like(h)
    for tie in (lambda x: x, torch.Tensor.detach):
        grads = []
        for fn in (linear_divergence, reference.linear_divergence):
            leaf = w.clone().requires_grad_()
            fn(h, leaf, rh, tie(leaf), kind="jsd").sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    own = inputs(5, 3, 4, 11, bias=bias, outliers=False)
    h, w, rh, rw, b, rb = (None if x is None else x.requires_grad_() for x in own)
    keep = torch.tensor([1, 1, 0, 1, 1]).bool()
    scalars = ("jsd", 0.3, 1.0, None, 1.0, 1.0, 2.0, 1.0, 2, None)
    opcheck(_linear_divergence, (h, w, b, rh, rw, rb, keep, *scalars))
    opcheck(
        _linear_divergence_loss, (h, w, b, rh, rw, rb, keep, torch.rand(5), *scalars, [True] * 2 + [bias] + [False] * 3)
    )


def test_compiles_whole_with_a_changing_length():
    w, rw = torch.randn(31, 8, requires_grad=True), torch.randn(31, 5)

    def step(h, rh, weights):
        per_token = linear_divergence(h, w, rh, rw, kind="forward", temperature=0.9, mask=weights > 0.3)
        return (per_token * weights).sum() + linear_divergence(h, w, rh, rw, kind="jsd", weights=weights).loss * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7, 12):
        h, rh, weights = torch.randn(n, 8), torch.randn(n, 5), torch.rand(n)
        grads = []
        for fn in (step, compiled):
            leaf = h.clone().requires_grad_()
            w.grad = None
            fn(leaf, rh, weights).backward()
            grads += [leaf.grad, w.grad]
        torch.testing.assert_close(grads[0], grads[2])
        torch.testing.assert_close(grads[1], grads[3])


def test_autocast_in_forward_only():
    tensors = inputs(6, outliers=False)
    low = [None if x is None else x.bfloat16() for x in tensors]
    for fused in (False, True):
        weights = torch.rand(6) if fused else None
        h, w = (x.clone().requires_grad_() for x in tensors[:2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_divergence(h, w, *tensors[2:4], weights=weights)
        (out.loss if fused else out.sum()).backward()  # outside
        upstream = torch.tensor(1.0) if fused else torch.ones(6)
        value, grads = run(linear_divergence, low, torch.bfloat16, upstream, train=[0, 1], weights=weights)
        torch.testing.assert_close(out.divergence if fused else out.detach(), value)
        assert h.grad.dtype == torch.float32
        torch.testing.assert_close(h.grad, grads[0].float(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(w.grad, grads[1].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind):
    tensors = inputs(6, bias=True, outliers=False)
    layouts = tensors, [torch.stack([x, x], -1)[..., 0] for x in tensors]
    plain, apart = (run(linear_divergence, x, torch.float32, torch.ones(6), kind=kind) for x in layouts)
    torch.testing.assert_close(apart, plain)


def test_two_dtypes_and_leading_shapes():
    """The reference may be narrower than the policy, in any leading shape, strided."""
    h, w, rh, rw, *_ = inputs(6, outliers=False)
    rh, rw = rh.bfloat16(), rw.bfloat16()
    flat = linear_divergence(h, w, rh, rw)
    out = linear_divergence(h.reshape(2, 3, 16), w, rh.t().contiguous().t().reshape(2, 3, 9), rw)
    assert out.shape == (2, 3)
    assert torch.equal(out.reshape(-1), flat)
    fused = linear_divergence(h.reshape(2, 3, 16), w, rh.reshape(2, 3, 9), rw, weights=torch.ones(2, 3))
    assert torch.equal(fused.divergence, out)
    want = reference.linear_divergence(h.double(), w.double(), rh.double(), rw.double())
    torch.testing.assert_close(flat.double(), want, rtol=1e-2, atol=1e-2)  # bf16 logits of the reference


def test_deterministic():
    tensors = inputs(64, v=507)
    results = [
        run(
            linear_divergence,
            tensors,
            torch.float32,
            torch.tensor(1.0),
            kind="jsd",
            weights=torch.ones(64),
            chunk_size=10,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*([r[0], *r[1]] for r in results), strict=True))


def test_logits_of_1e4():
    for kind in KINDS:
        tensors = inputs(6, dtype=torch.float32)
        tensors[0] *= 1e3
        options = dict(upstream=torch.ones(6), kind=kind, train=[0])
        value, (grad,) = run(linear_divergence, tensors, torch.float32, **options)
        truth, (truth_grad,) = run(reference.linear_divergence, tensors, torch.float64, **options)
        all_rows = torch.ones(6, dtype=torch.bool)
        _, (naive_grad,) = run(naive, tensors, torch.float32, **options, mask=all_rows)
        # an fp32 product of 16 terms near 5e4 is off by some 2e-2, and so is every logit
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0.05)
        size = float(tensors[1].abs().max())
        assert_within_budget(grad, naive_grad, truth_grad, torch.float32, scale=size, name=f"gradient of {kind}")


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("jsd", 0.3), ("reverse", 1.0)])
def test_same_as_trl(kind, beta):
    trl = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL with its fused divergence is not installed")
    h, w, rh, rw, *_ = inputs(9)
    options = dict(temperature=0.7, logit_scale=0.5, softcap=8.0)
    w = w.requires_grad_()
    theirs, _ = trl.ChunkedDivergenceFunction.apply(h, w, None, rh, rw, None, beta, 0.7, 0.5, 8.0, 0.5, 8.0)
    ours = linear_divergence(h, w, rh, rw, kind=kind, ref_share=beta if kind == "jsd" else 0.5, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(x.sum(), w)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("jsd", 0.3), ("reverse", 1.0)])
def test_same_as_liger(kind, beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="Liger is not installed")
    h, w, rh, rw, *_ = inputs(9)
    theirs = liger.LigerFusedLinearJSDFunction.distillation_loss_fn(h @ w.T, rh @ rw.T, beta=beta)
    ours = linear_divergence(h, w, rh, rw, kind=kind, ref_share=beta if kind == "jsd" else 0.5)
    torch.testing.assert_close(ours.sum(), theirs, rtol=1e-4, atol=1e-4)


H, W, RH, RW = torch.randn(4, 8), torch.randn(11, 8), torch.randn(4, 6), torch.randn(11, 6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((H, W, RH[:3], RW), {}, r"ref_hidden must be \(4, D'\) as hidden, got \(3, 6\)"),
        ((H, W, RH, RW[:9]), {}, r"ref_weight must have weight's V=11 rows, got \(9, 6\)"),
        ((H, W, RH, W), {}, r"ref_weight must be \(V, D\) with V > 0 and D=6 as in ref_hidden \(4, 6\)"),
        ((H, W.bfloat16(), RH, RW), {}, "weight must have hidden's dtype torch.float32, got torch.bfloat16"),
        ((H, W, RH.long(), RW), {}, "ref_hidden must be float32"),
        ((H, W, RH, RW), dict(kind="kl"), "kind must be one of forward, reverse, jsd, got 'kl'"),
        ((H, W, RH, RW), dict(kind="jsd", ref_share=1.0), "ref_share must lie between 0 and 1"),
        ((H, W, RH, RW), dict(kind="jsd", ref_share=0), "ref_share must be a finite number > 0"),
        ((H, W, RH, RW), dict(ref_options=dict(soft_cap=1.0)), "got 'soft_cap': did you mean 'softcap'"),
        ((H, W, RH, RW), dict(ref_options=dict(temperature=0.0)), "temperature must be a finite number > 0"),
        ((H, W, RH, RW), dict(weights=torch.ones(3)), r"weights must be hidden's leading shape=\(4,\), got \(3,\)"),
        ((H, W, RH, RW), dict(ref_bias=torch.ones(4)), r"ref_bias must be \(V,\)=\(11,\), got \(4,\)"),
        ((H, W, RH, RW), dict(memory_budget=0), "memory_budget must be a positive integer or None, got 0"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(*args, **options)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_teacher_from_inference_mode(weighted):
    with torch.inference_mode():
        teacher = torch.randn(6, 8), torch.randn(11, 8)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    grads = []
    for ref in (teacher, [t.clone() for t in teacher]):
        out = linear_divergence(hidden, weight, *ref, **(dict(weights=torch.ones(6)) if weighted else {}))
        grads += torch.autograd.grad(out.loss if weighted else out.sum(), hidden)
    assert torch.equal(*grads)

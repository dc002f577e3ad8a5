"""linear_logprob against fp64, under the error budget of the naive expression."""

import pytest
import torch
from _budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from rlhf_fast import _backend, linear_logprob, reference
from rlhf_fast.ops import _head
from rlhf_fast.ops.linear import _linear_logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "entropy": dict(entropy=True),
    "temperature": dict(temperature=0.6, entropy=True),
    "all": dict(temperature=1.7, logit_scale=0.4, softcap=3.0, entropy=True),
}
BACKENDS = ["torch", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpp" and not _backend.cpp_available():
        pytest.skip("the C++ extension was not built")
    with _backend.use_backend(request.param):
        yield request.param


def inputs(n=23, d=16, v=252, dtype=torch.float32, bias=False, seed=0, outliers=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64)
    if outliers and n > 4:
        hidden[1] *= 20  # near one-hot
        hidden[2] = 0  # uniform
    target = torch.randint(0, v, (n,), generator=g)
    target[0], target[-1] = 0, v - 1
    if n > 6:
        target[4:6] = -100
        hidden[4] = torch.nan  # an ignored row may hold anything
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), target, b


def run(fn, hidden, weight, target, bias, upstream, dtype, **options):
    """Outputs and gradients of fn in `dtype`, for non-uniform cotangents of every output."""
    h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    b = None if bias is None else bias.to(dtype, copy=True).requires_grad_()
    out = fn(h, w, target, bias=b, **options)
    total = sum((o.to(u.dtype) * u).sum() for o, u in zip(out, upstream, strict=True) if o is not None)
    total.backward()
    scored = (target != -100).unsqueeze(-1)
    grads = [torch.where(scored, h.grad, 0), w.grad] + ([] if b is None else [b.grad])
    return [o for o in out if o is not None], grads


def naive(hidden, weight, target, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, entropy=False):
    """What a user writes: every step in the working dtype."""
    safe = torch.where((target != -100).unsqueeze(-1), hidden, torch.zeros_like(hidden))
    s = torch.nn.functional.linear(safe, weight, bias) * logit_scale
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    log_p = torch.log_softmax(s, -1)
    mask = target != -100
    picked = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    return picked, -(log_p.exp() * log_p).sum(-1) * mask if entropy else None, torch.logsumexp(s, -1) * mask


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(23, 16, 252), (9, 33, 507)], ids=str)
def test_error_budget(backend, shape, dtype, options, bias):
    hidden, weight, target, b = inputs(*shape, dtype=dtype, bias=bias)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(target.shape, generator=g, dtype=torch.float64) for _ in range(3)]
    safe = torch.where((target != -100).unsqueeze(-1), hidden, torch.zeros_like(hidden))
    truth, truth_grads = run(reference.linear_logprob, safe, weight, target, b, upstream, torch.float64, **options)
    scale = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    logits = (safe.double() @ weight.double().T + (0 if b is None else b.double())) * scale
    ref, ref_grads = run(naive, hidden, weight, target, b, upstream, dtype, **options)
    for chunk_size in (5, None):
        ours, grads = run(linear_logprob, hidden, weight, target, b, upstream, dtype, chunk_size=chunk_size, **options)
        assert all(o.dtype == torch.float32 for o in ours)
        assert all(x.dtype == dtype for x in grads)
        for i, triple in enumerate(zip(ours, ref, truth, strict=True)):
            size = max(1.0, float(triple[2].abs().max()))
            assert_within_budget(*triple, dtype, scale=size, rounding=tile_rounding(dtype, logits), name=f"output {i}")
        for i, triple in enumerate(zip(grads, ref_grads, truth_grads, strict=True)):
            size = max(1.0, float(triple[2].abs().max()))
            rounding = tile_rounding(dtype, triple[2])
            assert_within_budget(*triple, dtype, scale=size, rounding=rounding, name=f"gradient {i}")


def tile_rounding(dtype, values):
    """On the CPU a bf16 product hands bf16 back, to us as to the naive expression: one rounding of the largest value,
    which by luck may cancel in one of the two."""
    return float(values.abs().max()) * 2**-8 if dtype == torch.bfloat16 else 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, dict(temperature=0.6, logit_scale=-0.4), dict(temperature=1.7, softcap=3.0), dict(logit_scale=2.0)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_token_stats(backend, dtype, options, bias):
    hidden, weight, target, b = inputs(150, 16, 252, dtype=dtype, bias=bias)
    hidden[4] = 0
    weight[7] = weight[3]  # equal logits: the first argmax counts
    if bias:
        b[7] = b[3]
    truth = reference.linear_logprob(
        hidden.double(), weight.double(), target, bias=b if b is None else b.double(), token_stats=True, **options
    )
    best = truth.is_top1.clone()
    target[10:60] = linear_logprob_argmax(hidden, weight, b, **options)[10:60]
    arguments = dict(bias=b, entropy=True, token_stats=True, **options)
    truth = reference.linear_logprob(
        *(x.double() for x in (hidden, weight)), target, **(arguments | {"bias": b if b is None else b.double()})
    )
    got = linear_logprob(hidden, weight, target, chunk_size=40, **arguments)
    assert truth.is_top1[10:60].all()
    assert not best.all()
    assert torch.equal(got.is_top1, truth.is_top1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name in ("logprob", "entropy", "lse", "log_sum_sq", "mean_logit"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(truth, name), rtol=tolerance, atol=tolerance * 10, msg=name
        )


def linear_logprob_argmax(hidden, weight, bias, *, temperature=1.0, logit_scale=1.0, softcap=None):
    """The first token of the highest logit."""
    z = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return (z * logit_scale).argmax(-1)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    v=st.integers(1, 70),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    masked=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_any_chunk(n, d, v, chunk, masked, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, d, generator=g, dtype=torch.float64) for s in (n, v))
    target = torch.randint(0, v, (n,), generator=g)
    target[torch.rand(n, generator=g) < masked] = -100
    upstream = [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3)]
    options = dict(temperature=0.8, softcap=2.0, entropy=True)
    want = run(reference.linear_logprob, hidden, weight, target, None, upstream, torch.float64, **options)
    got = run(linear_logprob, hidden, weight, target, None, upstream, torch.float64, chunk_size=chunk, **options)
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    hidden, weight, target, bias = inputs(7, 3, 11, dtype=torch.float64, bias=True, outliers=False)
    hidden[4] = 0

    def f(h, w, b):
        out = linear_logprob(h, w, target, bias=b, temperature=0.7, softcap=4.0, entropy=True, chunk_size=3)
        return tuple(out)

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy):
    hidden, weight, target, bias = inputs(7, 4, 11, bias=True, outliers=False)
    hidden[4] = 0
    args = [x.requires_grad_() for x in (hidden, weight, bias)]
    opcheck(_linear_logprob, (*args, None, None, target, 1.0, 1.0, None, 1.0, -100, entropy, False, 4, None))
    low = [torch.randn(s, requires_grad=True) for s in ((2, 4), (11, 2))]
    opcheck(_linear_logprob, (*args, *low, target, 0.5, 1.0, None, 1.0, -100, entropy, True, 4, None))


def test_compiles_whole_with_a_changing_length():
    weight = torch.randn(31, 8, requires_grad=True)

    def step(hidden, target):
        out = linear_logprob(hidden, weight, target, temperature=0.9, entropy=True)
        return (out.logprob + 0.1 * out.entropy).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7, 12):
        hidden, target = torch.randn(n, 8), torch.randint(0, 31, (n,))
        grads = []
        for fn in (step, compiled):
            h = hidden.clone().requires_grad_()
            weight.grad = None
            fn(h, target).backward()
            grads += [h.grad, weight.grad]
        torch.testing.assert_close(grads[0], grads[2])
        torch.testing.assert_close(grads[1], grads[3])


def test_shapes_follow_the_target():
    out = linear_logprob(torch.randn(2, 3, 8), torch.randn(11, 8), torch.zeros(2, 3, dtype=torch.int32))
    assert out.logprob.shape == out.lse.shape == (2, 3)
    assert out.entropy is None


def test_nothing_scored_and_nothing_at_all():
    weight = torch.randn(11, 8, requires_grad=True)
    for hidden, target in (
        (torch.randn(3, 8, requires_grad=True), torch.full((3,), -100)),
        (torch.randn(0, 8, requires_grad=True), torch.zeros(0, dtype=torch.long)),
    ):
        weight.grad = None
        out = linear_logprob(hidden, weight, target, entropy=True)
        out.logprob.sum().backward()
        assert out.logprob.shape == target.shape
        assert not out.logprob.any()
        assert hidden.grad.abs().sum() == 0  # attached to the graph, and zero
        assert weight.grad.abs().sum() == 0


def count_products(monkeypatch):
    """Rows that went through `Head.logits`, and calls of the two other products."""
    seen = {"logits": 0, "hidden": 0, "weight": 0}
    for key, name in (("logits", "logits"), ("hidden", "_add_hidden"), ("weight", "_add_weight")):
        original = getattr(_head.Head, name)

        def spy(self, x, *args, _key=key, _original=original):
            seen[_key] += x.shape[0]
            return _original(self, x, *args)

        monkeypatch.setattr(_head.Head, name, spy)
    return seen


def test_rows_without_upstream_gradient_are_not_recomputed(monkeypatch):
    hidden, weight, target, _ = inputs(20, outliers=False)
    hidden[4] = 0
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    seen = count_products(monkeypatch)
    out = linear_logprob(h, w, target, chunk_size=6)
    assert seen == {"logits": 18, "hidden": 0, "weight": 0}  # two of the twenty are ignored
    out.logprob[6:9].sum().backward()
    assert seen == {"logits": 18 + 3, "hidden": 3, "weight": 3}
    assert h.grad[6:9].abs().sum(-1).gt(0).all()
    assert not h.grad[:6].any()
    assert not h.grad[9:].any()


def test_a_frozen_head_costs_no_third_product(monkeypatch):
    hidden, weight, target, _ = inputs(8, outliers=False)
    hidden[4] = 0
    seen = count_products(monkeypatch)
    linear_logprob(hidden.requires_grad_(), weight, target, chunk_size=8).logprob.sum().backward()
    assert seen["weight"] == 0
    assert seen["hidden"] == 6


def test_any_cotangent():
    hidden, weight, target, _ = inputs(6, 4, 9, dtype=torch.float64, outliers=False)
    for upstream in (torch.zeros(6), torch.ones(()).expand(6), torch.tensor([0.0, 1, 0, -3, 2, 0])):
        grads = []
        for fn in (linear_logprob, reference.linear_logprob):
            h = hidden.clone().requires_grad_()
            fn(h, weight, target).logprob.backward(upstream.double())
            grads.append(h.grad)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_inputs_untouched_graph_walked_twice_two_heads():
    hidden, weight, target, _ = inputs(6, 4, 9, outliers=False)
    other = torch.randn(9, 4, requires_grad=True)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    before = h.detach().clone(), w.detach().clone()
    loss = linear_logprob(h, w, target).logprob.sum() + linear_logprob(h, other, target).logprob.sum()
    loss.backward(retain_graph=True)
    once = h.grad.clone(), w.grad.clone()
    loss.backward()
    torch.testing.assert_close(h.grad, 2 * once[0])
    torch.testing.assert_close(w.grad, 2 * once[1])
    assert torch.equal(before[0], h)
    assert torch.equal(before[1], w)


def test_tied_weights_gather_both_gradients():
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 5, 8, 1])
    grads = []
    for fn in (linear_logprob, reference.linear_logprob):
        table.grad = None
        fn(torch.nn.functional.embedding(ids, table), table, ids.roll(1)).logprob.sum().backward()
        grads.append(table.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_second_derivative_is_an_error():
    hidden, weight, target, _ = inputs(3, 4, 9)
    h = hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprob(h, weight, target).logprob.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_large_logits_keep_their_differences():
    """Logits near 1e4: m and log-sum stay apart, so the log-prob does not round at the logits' size."""
    hidden = torch.tensor([[1e4, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -2.0]])
    truth = torch.log_softmax(hidden.double() @ weight.double().T, -1)[0]
    got = torch.stack([linear_logprob(hidden, weight, torch.tensor([i])).logprob[0] for i in range(3)])
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-3)  # one fp32 step at 1e4 is 1e-3
    h = hidden.clone().requires_grad_()
    linear_logprob(h, weight, torch.tensor([0])).logprob.sum().backward()
    d = hidden.double().requires_grad_()
    reference.linear_logprob(d, weight.double(), torch.tensor([0])).logprob.sum().backward()
    torch.testing.assert_close(h.grad.double(), d.grad, rtol=2e-3, atol=2e-3)


def strided(x):
    """x with every element of the last dimension followed by another in memory."""
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", [lambda x: x.t().contiguous().t(), strided], ids=["transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strided_inputs(dtype, layout, chunk_size):
    hidden, weight, target, bias = inputs(10, 8, 12, dtype, bias=True, outliers=False)
    results = []
    for change in (layout, lambda x: x):
        leaves = [change(x).requires_grad_() for x in (hidden, weight, bias)]
        out = linear_logprob(*leaves[:2], change(target), bias=leaves[2], chunk_size=chunk_size)
        results.append([out.logprob, *torch.autograd.grad(out.logprob.sum(), leaves)])
    torch.testing.assert_close(*results)


def test_autocast_in_forward_only():
    hidden, weight, target, _ = inputs(6, 8, 12, outliers=False)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_logprob(h, w, target).logprob.sum()
    loss.backward()  # outside
    low = hidden.detach().bfloat16().requires_grad_()
    linear_logprob(low, weight.detach().bfloat16(), target).logprob.sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32
    torch.testing.assert_close(h.grad, low.grad.float())


def test_deterministic():
    hidden, weight, target, _ = inputs(64, 16, 507, outliers=False)
    hidden[4] = 0
    results = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(h, w, target, entropy=True, chunk_size=10)
        (out.logprob.sum() + out.entropy.sum()).backward()
        results.append([out.logprob, h.grad, w.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_budget_sizes_the_tile():
    cpu = torch.device("cpu")
    assert _head.tile_rows(1 << 20, 32000, torch.float32, cpu, None, 64 << 20) <= (64 << 20) // (32000 * 4)
    assert _head.tile_rows(10, 32000, torch.float32, cpu, None, None) == 10
    assert _head.tile_rows(100, 1 << 30, torch.float32, cpu, None, 1) == 1
    assert _head.tile_rows(2048, 32000, torch.float32, cpu, 77, None) == 77


H, W, T = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((H, W, T[:3]), {}, r"target must be hidden's leading shape=\(4,\), got \(3,\)"),
        ((H, W[:, :7], T), {}, r"weight must be \(V, D\) with V > 0 and D=8"),
        ((H, W.bfloat16(), T), {}, "weight must have hidden's dtype torch.float32, got torch.bfloat16"),
        ((H, W, T.float()), {}, "target must be int64 or int32, got torch.float32"),
        ((H.long(), W, T), {}, "hidden must be float32"),
        ((H, W, torch.tensor([0, 1, 11, 2])), {}, r"target\[2\] = 11 is outside the vocabulary \[0, 11\)"),
        ((H, W, torch.tensor([0, -1, 3, 2])), {}, r"target\[1\] = -1 is outside"),
        ((H, W, T), dict(temperature=0.0), "temperature must be a finite number > 0, got 0.0"),
        ((H, W, T), dict(temperature=float("nan")), "temperature must be a finite number > 0"),
        ((H, W, T), dict(softcap=-1.0), "softcap must be a finite number > 0"),
        ((H, W, T), dict(bias=torch.randn(10)), r"bias must be \(V,\)=\(11,\), got \(10,\)"),
        ((H, W, T), dict(chunk_size=0), "chunk_size must be a positive integer or None, got 0"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(*args, **options)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"hidden must be a torch.Tensor, got list"):
        linear_logprob([[1.0]], W, T)


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["kept", "recomputed"])
def test_gradient_through_lse_alone(chunk_size):
    """A z-loss: rows without a gradient of the log-probability are not dropped."""
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, -100, 3, 2])
    losses = [
        f(hidden, weight, target, **kw).lse.square().sum()
        for f, kw in ((linear_logprob, {"chunk_size": chunk_size}), (reference.linear_logprob, {}))
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


def test_what_composes_with_lse():
    """Label smoothing with a z-loss, given ids and a temperature for each token, as the notes on the engine say."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    leaves = [new(6, 5).requires_grad_(), new(11, 5).requires_grad_()]
    target, ids = torch.randint(0, 11, (6,), generator=g), torch.randint(0, 11, (6, 3), generator=g)
    hidden, weight = leaves
    logits = hidden @ weight.t()
    warmth = 0.5 + torch.rand(6, generator=g, dtype=torch.float64)

    out = linear_logprob(hidden, weight, target)
    uniform = out.lse - hidden @ weight.mean(0)
    smooth = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    pairs = [
        (0.9 * -out.logprob + 0.1 * uniform + 1e-2 * out.lse**2, smooth + 1e-2 * logits.logsumexp(-1) ** 2),
        ((hidden.unsqueeze(1) * weight[ids]).sum(-1) - out.lse.unsqueeze(1), logits.log_softmax(-1).gather(1, ids)),
        (
            linear_logprob(hidden / warmth[:, None], weight, target).logprob,
            (logits / warmth[:, None]).log_softmax(-1).gather(1, target[:, None])[:, 0],
        ),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*grads)

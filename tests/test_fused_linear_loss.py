"""fused_linear_loss against autograd over the whole logits tensor."""

import pytest
import torch
from _budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import _backend, fused_linear_loss, reference
from rlhf_fast.ops import _head
from rlhf_fast.types import LossGrad

BACKENDS = ["torch", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpp" and not _backend.cpp_available():
        pytest.skip("the C++ extension was not built")
    with _backend.use_backend(request.param):
        yield request.param


def clipped(logprob, entropy, batch):
    """A user's PPO loss: ratio, clip, an entropy bonus when there is one, metrics."""
    ratio = torch.exp(logprob - batch["old"])
    loss = -torch.min(ratio * batch["adv"], ratio.clamp(0.8, 1.2) * batch["adv"])
    if entropy is not None:
        loss = loss - batch["coef"] * entropy
    detached = ratio.detach()
    return (loss * batch["w"]).sum(), {"ratio": detached.sum(), "ratio_max": detached.max()}


def head(n, d, v, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, d, generator=g, dtype=torch.float64).to(dtype) for s in (n, v))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,), generator=g)


def ppo_batch(n, seed=0, zero=0.0):
    g = torch.Generator().manual_seed(seed + 1)
    adv = torch.randn(n, generator=g)
    adv[torch.rand(n, generator=g) < zero] = 0
    return dict(old=torch.randn(n, generator=g) - 4, adv=adv, w=torch.rand(n, generator=g) / n, coef=0.01)


def both(loss_fn, hidden, weight, target, *, upstream=1.0, chunk_size=None, **options):
    """(result, gradients) of the fused op and of the reference."""
    out = []
    for fn in (fused_linear_loss, reference.fused_linear_loss):
        h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        extra = dict(chunk_size=chunk_size) if fn is fused_linear_loss else {}
        result = fn(h, w, target, loss_fn, **options, **extra)
        (result.loss * upstream).backward()
        out.append((result, (h.grad, w.grad)))
    return out


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    v=st.integers(1, 50),
    chunk_size=st.one_of(st.none(), st.integers(1, 40)),
    masked=st.floats(0, 0.9),
    zero=st.floats(0, 1),
    entropy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_user_loss_any_shape_any_chunk(n, d, v, chunk_size, masked, zero, entropy, seed):
    hidden, weight, target = head(n, d, v, seed=seed)
    target[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < masked] = -100
    if not bool((target != -100).any()):
        target[0] = 0
    options = dict(batch=ppo_batch(n, seed, zero), entropy=entropy, temperature=0.7, softcap=3.0)
    (got, grads), (want, expected) = both(clipped, hidden, weight, target, chunk_size=chunk_size, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-9, atol=1e-12)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    for name in ("ratio", "ratio_max"):
        torch.testing.assert_close(got.metrics[name], want.metrics[name], rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=2, max_size=10).filter(lambda x: len(x) % 2 == 0 and sum(x)),
    chunk_size=st.one_of(st.none(), st.integers(1, 12)),
    masked=st.floats(0, 0.6),
    seed=st.integers(0, 99),
)
def test_segments_are_never_cut(lengths, chunk_size, masked, seed):
    """Pairs as segments: whatever the chunk size, and with segments larger than a tile, the loss is the same."""
    n = sum(lengths)
    hidden, weight, target = head(n, 4, 13, seed=seed)
    target[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < masked] = -100
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    pairs = cu[::2]  # a chunk must hold both sequences of a pair
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def dpo(logprob, entropy, batch):
        side = batch["side"]
        zeros = logprob.new_zeros(batch["num_segments"])
        chosen = zeros.index_add(0, batch["segment_ids"], logprob * (side == 0))
        rejected = zeros.index_add(0, batch["segment_ids"], logprob * (side == 1))
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - batch["margin"])).sum()

    batch = dict(side=sequence % 2, margin=torch.linspace(-1, 1, len(lengths) // 2, dtype=torch.float64))
    (got, grads), (want, expected) = both(
        dpo, hidden, weight, target, chunk_size=chunk_size, batch=batch, segments=pairs
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(backend, dtype, entropy):
    hidden, weight, target = head(40, 16, 507, dtype)
    target[5:9] = -100
    hidden.data[6] = torch.nan
    batch = ppo_batch(40, zero=0.3)
    results = []
    for fn, kind in (
        (reference.fused_linear_loss, torch.float64),
        (reference.fused_linear_loss, dtype),
        (fused_linear_loss, dtype),
    ):
        clean = hidden.detach() if fn is fused_linear_loss else hidden.detach().nan_to_num(0)
        h, w = clean.to(kind).requires_grad_(), weight.detach().to(kind).requires_grad_()
        extra = dict(chunk_size=16) if fn is fused_linear_loss else {}
        out = fn(h, w, target, clipped, batch=batch, entropy=entropy, **extra)
        out.loss.backward()
        results.append((out.loss, out.logprob, h.grad, w.grad))
    for i, (truth, naive, ours) in enumerate(zip(*results, strict=True)):
        # a bf16 product on the CPU hands bf16 back, and every chunk's share of the head's gradient is such a product
        rounding = float(truth.abs().max()) * 2**-8 if dtype == torch.bfloat16 else 0.0
        assert_within_budget(ours, naive, truth, dtype, rounding=rounding, name=str(i))


def test_rows_of_zero_gradient_skip_two_products():
    """Counted, and exact: 6 ignored, 10 with zero advantage, of 40."""
    hidden, weight, target = head(40, 8, 31)
    target[:6] = -100
    batch = ppo_batch(40)
    batch["adv"][20:30] = 0
    batch["old"] = torch.zeros(40) - 3
    batch["adv"][30] = 5.0  # and one clipped row: ratio far above 1.2 with a positive advantage
    batch["old"][30] = -50.0
    (got, grads), (_, expected) = both(clipped, hidden, weight, target, chunk_size=7, batch=batch)
    counts = {k: int(v) for k, v in got.metrics.items() if k.startswith("rows")}
    ratio = torch.exp(got.logprob - batch["old"])
    still = (ratio > 1.2) & (batch["adv"] > 0) | (ratio < 0.8) & (batch["adv"] < 0) | (batch["adv"] == 0)
    moving = int((~still & (target != -100)).sum())
    assert moving < 24
    assert counts == {"rows_total": 40, "rows_forward": 34, "rows_backward": moving}
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert not grads[0][20:31].any()


def test_all_gradients_zero():
    hidden, weight, target = head(12, 8, 31)
    batch = ppo_batch(12) | {"adv": torch.zeros(12)}
    out = fused_linear_loss(hidden, weight, target, clipped, batch=batch)
    out.loss.backward()
    assert int(out.metrics["rows_backward"]) == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_nothing_scored_stays_on_the_graph():
    hidden, weight, target = head(5, 4, 7)
    out = fused_linear_loss(hidden, weight, torch.full_like(target, -100), clipped, batch=ppo_batch(5))
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert all(bool(torch.isfinite(m.double())) for m in out.metrics.values())
    empty = fused_linear_loss(hidden[:0], weight, target[:0], clipped, batch=ppo_batch(0))
    assert float(empty.loss) == 0


@pytest.mark.parametrize("upstream", [0.0, -2.5, 1024.0])
def test_upstream_scalar(upstream):
    hidden, weight, target = head(9, 4, 7)
    (_, grads), (_, expected) = both(clipped, hidden, weight, target, upstream=upstream, batch=ppo_batch(9))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_graph_walked_twice_and_inputs_untouched():
    hidden, weight, target = head(9, 4, 7, torch.float32)
    before = hidden.detach().clone(), weight.detach().clone()
    loss = fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(9)).loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    (loss * 3).backward()
    torch.testing.assert_close(hidden.grad, 4 * once[0])
    torch.testing.assert_close(weight.grad, 4 * once[1])
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def test_second_derivative_is_an_error():
    hidden, weight, target = head(9, 4, 7)
    loss = fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(9)).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_no_grad_is_one_product():
    hidden, weight, target = head(9, 4, 7)
    with torch.no_grad():
        out = fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(9))
    assert not out.loss.requires_grad
    assert int(out.metrics["rows_forward"]) == 9
    assert int(out.metrics["rows_backward"]) == 0


def test_frozen_head_and_frozen_trunk():
    hidden, weight, target = head(9, 4, 7)
    batch = ppo_batch(9)
    fused_linear_loss(hidden, weight, target, clipped, batch=batch).loss.backward()
    for frozen in ("hidden", "weight"):
        h = hidden.detach().requires_grad_(frozen != "hidden")
        w = weight.detach().requires_grad_(frozen != "weight")
        fused_linear_loss(h, w, target, clipped, batch=batch).loss.backward()
        if frozen == "hidden":
            assert h.grad is None
            torch.testing.assert_close(w.grad, weight.grad)
        else:
            assert w.grad is None
            torch.testing.assert_close(h.grad, hidden.grad)


def test_bias_gradient():
    hidden, weight, target = head(9, 4, 7)
    bias = torch.randn(7, dtype=torch.float64)
    grads = []
    for fn in (fused_linear_loss, reference.fused_linear_loss):
        b = bias.clone().requires_grad_()
        extra = dict(chunk_size=4) if fn is fused_linear_loss else {}
        fn(hidden, weight, target, clipped, batch=ppo_batch(9), bias=b, **extra).loss.backward()
        grads.append(b.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_small_fp16_gradients_survive():
    """A mean over many tokens has gradients below fp16's range; the scale of a GradScaler comes only afterwards."""
    hidden, weight, target = head(6, 4, 7, torch.float16)

    def tiny(logprob, entropy, batch):
        return -1e-9 * logprob.sum()

    out = fused_linear_loss(hidden, weight, target, tiny)
    (out.loss * 1e9).backward()
    want = hidden.detach().double().requires_grad_()
    (-reference.linear_logprob(want, weight.detach().double(), target).logprob.sum()).backward()
    torch.testing.assert_close(hidden.grad.double(), want.grad, rtol=2e-3, atol=2e-3)


def test_leading_dims():
    hidden, weight, target = head(12, 4, 7)
    batch = ppo_batch(12)
    flat = fused_linear_loss(hidden, weight, target, clipped, batch=batch)
    boxed = {k: v.reshape(3, 4) if torch.is_tensor(v) else v for k, v in batch.items()}
    out = fused_linear_loss(hidden.reshape(3, 4, 4), weight, target.reshape(3, 4), clipped, batch=boxed)
    assert out.logprob.shape == (3, 4)
    torch.testing.assert_close(out.loss, flat.loss)


def test_masked_entries_of_the_batch_never_leak():
    hidden, weight, target = head(12, 4, 7)
    target[3:7] = -100
    batch = ppo_batch(12)
    clean = fused_linear_loss(hidden, weight, target, clipped, batch=batch).loss
    for key in ("old", "adv", "w"):
        batch[key][3:7] = torch.nan
    assert torch.equal(fused_linear_loss(hidden, weight, target, clipped, batch=batch).loss, clean)


def test_nan_that_counts_is_not_hidden():
    hidden, weight, target = head(12, 4, 7)
    batch = ppo_batch(12)
    batch["adv"][2] = torch.nan
    out = fused_linear_loss(hidden, weight, target, clipped, batch=batch)
    out.loss.backward()
    assert torch.isnan(out.loss)
    assert torch.isnan(hidden.grad[2]).all()


def test_micro_batches_add_up():
    """Weights formed from the global count: three parts give what the whole gives."""
    hidden, weight, target = head(12, 4, 7)
    batch = ppo_batch(12)
    whole = fused_linear_loss(hidden, weight, target, clipped, batch=batch).loss
    parts = 0
    for s in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = {k: v[s] if torch.is_tensor(v) else v for k, v in batch.items()}
        parts = parts + fused_linear_loss(hidden[s], weight, target[s], clipped, batch=part).loss
    torch.testing.assert_close(parts, whole)
    g_whole = torch.autograd.grad(whole, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(parts, (hidden, weight)), g_whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_straight_into_a_buffer(dtype, frozen):
    """Two micro-batches and an upstream scalar add up in the buffer; autograd gets no gradient for the head."""
    hidden, weight, target = head(12, 4, 7, dtype)
    batch = ppo_batch(12)
    (2.5 * fused_linear_loss(hidden, weight, target, clipped, batch=batch, chunk_size=5).loss).backward()
    want, dhidden = weight.grad, hidden.grad
    hidden.grad = weight.grad = None
    weight.requires_grad_(not frozen)
    buffer = torch.ones(7, 4, dtype=torch.promote_types(dtype, torch.float32))
    for rows in (slice(0, 5), slice(5, 12)):
        part = {k: v[rows] if torch.is_tensor(v) else v for k, v in batch.items()}
        out = fused_linear_loss(hidden[rows], weight, target[rows], clipped, batch=part, weight_grad=buffer)
        (2.5 * out.loss).backward()
    assert weight.grad is None
    rounding = torch.finfo(dtype).eps * float(want.abs().max()) * 2
    torch.testing.assert_close(buffer - 1, want.to(buffer.dtype), rtol=0, atol=max(rounding, 1e-12))
    torch.testing.assert_close(hidden.grad, dhidden, rtol=0, atol=max(rounding, 1e-12))
    with torch.no_grad():
        fused_linear_loss(hidden, weight, target, clipped, batch=batch, weight_grad=buffer)
    torch.testing.assert_close(buffer - 1, want.to(buffer.dtype), rtol=0, atol=max(rounding, 1e-12))
    with pytest.raises(ValueError, match=r"weight_grad must be \(V, D\)=\(7, 4\), got \(4, 7\)"):
        fused_linear_loss(hidden, weight, target, clipped, batch=batch, weight_grad=buffer.t())


def test_weight_grad_itself():
    hidden, weight, target = head(12, 4, 7)
    fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(12)).loss.backward()
    once = weight.grad.clone()
    fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(12), weight_grad=weight.grad).loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_deterministic():
    hidden, weight, target = head(64, 16, 507, torch.float32)
    results = []
    for _ in range(2):
        out = fused_linear_loss(hidden, weight, target, clipped, batch=ppo_batch(64, zero=0.4), chunk_size=10)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class WithGradient:
    """A ready-made loss: prepared once, its own gradient, may be cut anywhere."""

    needs_entropy = True
    needs_segments = False

    def __init__(self):
        self.prepared = 0

    def prepare(self, batch, mask, cu_seqlens):
        self.prepared += 1
        lengths = cu_seqlens.diff().long()
        return {"w": torch.repeat_interleave(batch["w"], lengths) / mask.sum()}

    def __call__(self, logprob, entropy, batch):
        return ((logprob**2 - entropy) * batch["w"]).sum()

    def gradient(self, logprob, entropy, batch):
        loss = self(logprob, entropy, batch)
        return LossGrad(loss, 2 * logprob * batch["w"], -batch["w"], {"n": torch.tensor(float(len(logprob)))})


def test_ready_made_loss_with_its_own_gradient():
    hidden, weight, target = head(12, 4, 7)
    target[2] = -100
    batch = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
    cu = torch.tensor([0, 3, 8, 12])
    loss_fn = WithGradient()
    (got, grads), (want, expected) = both(loss_fn, hidden, weight, target, chunk_size=2, batch=batch, segments=cu)
    assert loss_fn.prepared == 2  # once by each of the two, not once a chunk
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    assert float(got.metrics["n"]) == 11
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def total(logprob, entropy, batch):
    return logprob.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch={"old": torch.zeros(5)}), r"batch\['old'\] must have N=9 entries, got \(5,\)"),
        (
            dict(batch={"old": torch.zeros(5)}, segments=torch.tensor([0, 4, 9])),
            r"batch\['old'\] must have N=9 or S=2 entries, got \(5,\)",
        ),
        (dict(batch={"old": torch.zeros(9, requires_grad=True)}), r"batch\['old'\] requires grad.*detach"),
        (dict(segments=torch.tensor([0, 4, 8])), r"segments must run from 0 to N=9, got 0..8"),
        (dict(segments=torch.tensor([0, 5, 4, 9])), r"segments must not fall, got segments\[2\] = 4 after 5"),
        (dict(segments=torch.tensor([0.0, 9.0])), r"segments must be \(S\+1,\) int32 or int64"),
    ],
)
def test_bad_input(options, message):
    hidden, weight, target = head(9, 4, 7)
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(hidden, weight, target, total, **options)


def test_bad_loss_fn():
    hidden, weight, target = head(9, 4, 7)
    with pytest.raises(ValueError, match=r"loss_fn must return a 0-d tensor summed over the chunk, got shape \(9,\)"):
        fused_linear_loss(hidden, weight, target, lambda lp, h, b: lp)
    with pytest.raises(ValueError, match=r"got float"):
        fused_linear_loss(hidden, weight, target, lambda lp, h, b: 1.0)
    with pytest.raises(ValueError, match=r"metric 'x' must be a 0-d tensor, got \(9,\)"):
        fused_linear_loss(hidden, weight, target, lambda lp, h, b: (lp.sum(), {"x": lp}))
    with pytest.raises(TypeError, match="loss_fn must be callable, got str"):
        fused_linear_loss(hidden, weight, target, "grpo")
    with pytest.raises(KeyError, match="old"):
        fused_linear_loss(hidden, weight, target, clipped)


@pytest.fixture(params=["torch", "cpp", "triton"])
def like_cuda(request, monkeypatch):
    """The road of a GPU on the CPU: an fp32 tile from narrow inputs, its gradient narrowed in the same bytes.

    Only the product with an fp32 result is made up here (the CPU has none); tile, compaction, rescaling, views and
    the row passes are the ones a GPU runs.
    """
    if request.param == "cpp" and not _backend.cpp_available():
        pytest.skip("the C++ extension was not built")
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted: test_engine_device.py runs this road itself")

    def mm(self, left, right, dtype, out=None):
        product = (left.double() @ right.double()).to(dtype)
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(_head, "work_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(_head, "tile_dtype", lambda dtype, device: torch.float32)
    padded = _head.tile_stride(70, torch.device("cuda"))
    assert padded == 80
    monkeypatch.setattr(_head, "tile_stride", lambda vocab, device: padded)
    monkeypatch.setattr(_head.Head, "_mm", mm)
    with _backend.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiny", [1.0, 1e-9], ids=["", "tiny"])
def test_fp32_tile_narrowed_in_place(like_cuda, dtype, tiny):
    hidden, weight, target = head(20, 8, 70, dtype)
    target[3:5] = -100
    batch = ppo_batch(20, zero=0.4)
    batch["w"] = batch["w"] * (tiny if dtype == torch.float16 else 1)
    results = []
    for kind, fn in ((torch.float64, reference.fused_linear_loss), (dtype, fused_linear_loss)):
        h, w = (x.detach().to(kind).requires_grad_() for x in (hidden, weight))
        extra = dict(chunk_size=7) if fn is fused_linear_loss else {}
        out = fn(h, w, target, clipped, batch=batch, entropy=True, softcap=9.0, **extra)
        (out.loss / batch["w"].abs().max()).backward()
        results.append((out.logprob, out.entropy, h.grad, w.grad))
    want, got = results
    for a, b in zip(got[:2], want[:2], strict=True):  # nothing is rounded below fp32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    rounding = torch.finfo(dtype).eps
    for a, b in zip(got[2:], want[2:], strict=True):  # dlogits and the result are narrow: two roundings
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * rounding * float(b.abs().max()))


def test_what_a_walk_gives_is_the_callers_while_the_graph_is_kept():
    """A leaf's .grad is the tensor that the backward returns: the next walk must not read what was written there."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = fused_linear_loss(hidden, weight, torch.randint(11, (6,)), lambda logprob, *_: -logprob.sum()).loss
    first = [grad.clone() for grad in torch.autograd.grad(loss, (hidden, weight), retain_graph=True)]
    for grad in torch.autograd.grad(loss, (hidden, weight), retain_graph=True):
        grad.zero_()
    for grad, want in zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True):
        assert torch.equal(grad, want)

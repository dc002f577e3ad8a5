"""A head's epilogue roads, through the interpreter, against fp64 and against the tiles.

fp16 in the interpreter, which multiplies the bit patterns of bf16 matrices; on a GPU bf16 where the road asks for its
range. `test_triton_aot.py` compiles both.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from rlhf_fast import _backend, fused_linear_loss, linear_logprob, reference
from rlhf_fast.ops import _epilogue
from rlhf_fast.ops._rows import Transform

pytest.importorskip("triton", reason="triton is not installed")
head_stats = importlib.import_module("rlhf_fast.kernels.head_stats")

SMALL = head_stats.Config(16, 32, 16, 4, 2)
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""Of the gradients by epilogue: exponentials want bf16's range."""
FORMS = {
    "plain": dict(),
    "all": dict(bias=True, logit_scale=0.9, softcap=5.0, temperature=0.8),
}


@pytest.fixture(autouse=True)
def road(monkeypatch):
    """The epilogue road, with blocks that small matrices fill more than once."""
    monkeypatch.setenv("RLHF_FAST_HEAD", "epilogue")
    monkeypatch.setenv("RLHF_FAST_BACKEND", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(head_stats, "CONFIGS", {90: SMALL})


def make(n, d, v, device, *, bias=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).half()
    weight = (3 * torch.randn(v, d, generator=g) / d**0.5).half()
    target = torch.randint(0, v, (n,), generator=g)
    own = torch.randn(v, generator=g).half() if bias else None
    return [x if x is None else x.to(device) for x in (hidden, weight, target, own)]


def check(got, hidden, weight, target, bias, **form):
    """Every output to fp32's rounding of sums of this size."""
    wide = [x if x is None else x.double() for x in (hidden, weight, bias)]
    want = reference.linear_logprob(wide[0], wide[1], target, bias=wide[2], **form)
    for ours, truth in zip(got, want, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("entropy", [False, True])
def test_against_fp64(form, entropy, device):
    """Rows, columns and depth are multiples of no block; targets stand at the edges of blocks and of the vocabulary."""
    form = dict(form)
    hidden, weight, target, bias = make(37, 40, 301, device, bias=form.pop("bias", False))
    target[:6] = torch.tensor([0, 31, 32, 299, 300, -100], device=device)
    options = dict(form, entropy=entropy)
    with torch.no_grad():
        got = linear_logprob(hidden, weight, target, bias=bias, **options)
    check(got, hidden, weight, target, bias, **options)
    assert got.logprob[5] == got.lse[5] == 0


def test_no_tile_is_made(device, monkeypatch):
    """With the switch off the same call makes its logits."""
    from rlhf_fast.ops import _linear_run

    def refuse(*_):
        raise AssertionError("a tile")

    monkeypatch.setattr(_linear_run, "_head", refuse)
    hidden, weight, target, _ = make(5, 16, 50, device)
    with torch.no_grad():
        linear_logprob(hidden, weight, target)
        monkeypatch.setenv("RLHF_FAST_HEAD", "tiles")
        with pytest.raises(AssertionError, match="a tile"):
            linear_logprob(hidden, weight, target)


def test_launches_of_some_rows_each_are_one_launch(device, monkeypatch):
    hidden, weight, target, _ = make(37, 40, 301, device)
    monkeypatch.setenv("RLHF_FAST_HEAD", "epilogue")
    row = head_stats.partial_bytes(301, head_stats.config_for(90))
    with torch.no_grad():
        whole = linear_logprob(hidden, weight, target, entropy=True)
        parts = linear_logprob(hidden, weight, target, entropy=True, memory_budget=16 * row)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("programs", [1, 3, 500])
def test_bits_depend_neither_on_programs_nor_on_groups(programs, device, monkeypatch):
    hidden, weight, target, _ = make(70, 24, 200, device)
    config = head_stats.config_for(90)
    results = []
    for count, group_bytes in ((2, 16 << 20), (programs, 1), (programs, 2 * config.block_n * 24 * 2)):
        monkeypatch.setattr(head_stats, "GROUP_BYTES", group_bytes)
        out = torch.full((4, 70), torch.nan, device=device)
        names = dict(zip(("logprob", "row_max", "log_sum", "entropy"), out, strict=True))
        form = Transform()._asdict()
        head_stats.head_stats(hidden, weight, target, None, **form, **names, config=config, programs=count)
        results.append(out)
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_extremes(device):
    """A target that takes everything has log-probability 0, never above; NaN and infinity stay in their row."""
    hidden, weight, target, _ = make(20, 16, 100, device)
    hidden[3] = 200 * weight[7]
    target[3] = int((hidden[3].float() @ weight.float().T).argmax())
    hidden[4] = torch.nan
    hidden[5, 0], weight[9, 0] = torch.inf, 1.0
    with torch.no_grad():
        got = linear_logprob(hidden, weight, target, entropy=True)
    fine = torch.ones(20, dtype=torch.bool, device=device)
    fine[4:6] = False
    check([x[fine] for x in got], hidden[fine], weight, target[fine], None, entropy=True)
    assert got.logprob[3] == 0
    assert got.logprob[4:6].isnan().all()


def test_target_beyond_the_vocabulary_is_nan_not_what_memory_held(device):
    hidden, weight, target, _ = make(4, 16, 50, device)
    target[0], target[1], target[2] = 50, 10**6, -1
    out = _epilogue.stats(hidden, weight, None, target, Transform(), entropy=False)
    assert out.logprob[:2].isnan().all()
    assert out.logprob[2] == out.row_max[2] == out.log_sum[2] == 0
    assert out.logprob[3].isfinite()


def test_rows_that_tma_could_not_read_are_copied(device):
    hidden, weight, target, _ = make(9, 16, 50, device)
    hidden = torch.nn.functional.pad(hidden, (0, 3))[:, :16]
    assert hidden.stride(0) == 19
    with torch.no_grad():
        check(linear_logprob(hidden, weight, target), hidden, weight, target, None)


def test_what_cannot_take_this_road_takes_the_tiles(device):
    hidden, weight, target, _ = make(9, 12, 50, device)  # rows of 24 bytes
    assert not _epilogue.applies(hidden, weight)
    with torch.no_grad():
        check(linear_logprob(hidden, weight, target), hidden, weight, target, None)
    padded = torch.nn.functional.pad(weight, (0, 4))[:, :12]  # its rows start on 16 bytes, those of `hidden` cannot
    assert _epilogue.aligned(padded)
    assert not _epilogue.applies(hidden, padded)
    with torch.no_grad():
        check(linear_logprob(hidden, padded, target), hidden, weight, target, None)
    hidden, weight, *_ = make(9, 16, 50, device)
    assert _epilogue.applies(hidden, weight)
    assert not _epilogue.applies(hidden.float(), weight.float())


@pytest.mark.parametrize(("capability", "served"), [(80, False), (90, True), (100, True), (103, True), (120, False)])
def test_processors_that_take_this_road(capability, served, device, monkeypatch):
    hidden, weight, *_ = make(9, 16, 50, device)
    monkeypatch.setattr(_epilogue, "_processor", lambda _: (capability, 2))
    assert _epilogue.applies(hidden, weight) == served


def test_a_backward_follows(device):
    """The forward's statistics serve the tiles of the backward."""
    hidden, weight, target, _ = make(40, 16, 60, device)
    hidden.requires_grad_(), weight.requires_grad_()
    options = dict(chunk_size=16, token_stats=False)
    grads = []
    for on in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RLHF_FAST_HEAD", "epilogue" if on else "tiles")
            out = linear_logprob(hidden, weight, target, entropy=True, **options)
            grads.append(torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), (hidden, weight)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_a_misspelt_road_is_an_error(device, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_HEAD", "epilog")
    hidden, weight, target, _ = make(4, 16, 50, device)
    with pytest.raises(ValueError, match=r"RLHF_FAST_HEAD must be one of tiles, epilogue, got 'epilog'"):
        linear_logprob(hidden, weight, target)
    assert _backend.HEAD_ROADS[0] == "tiles"


# ---- the gradient by epilogue -------------------------------------------------------------------------------


def fused(n, d, v, device, weights, *, spread=1.0, chunk=None, row=None, **form):
    """(ours, truth): loss and the gradients of hidden, weight and bias of a weighted sum of log-probabilities."""
    hidden, weight, target, bias = make(n, d, v, device, bias=True)
    hidden, weight, bias = (x.to(NARROW) for x in (hidden * spread, weight, bias))
    target[2] = -100
    if row is not None:
        hidden[4] = row
    results = []
    for fn, wide in ((fused_linear_loss, False), (reference.fused_linear_loss, True)):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (hidden, weight, bias)]
        loss = lambda lp, h, batch: -(lp * batch["w"].to(lp)).sum()  # noqa: E731
        options = dict(bias=leaves[2], batch={"w": weights}, **form) | ({} if wide else dict(chunk_size=chunk))
        out = fn(leaves[0], leaves[1], target, loss, **options)
        results.append([out.loss, out.logprob, *torch.autograd.grad(out.loss, leaves)])
    return results


@pytest.fixture
def no_pass(monkeypatch):
    """The ordinary road's passes are out of order."""
    from rlhf_fast.ops import _head

    def refuse(*_, **__):
        raise AssertionError("a pass over the tile")

    monkeypatch.setattr(_head, "row_dlogits", refuse)
    monkeypatch.setattr(_head, "row_stats", refuse)


def agree(ours, truth):
    """The gradients within two roundings of their dtype of their largest entry."""
    loss, logprob, *grads = ours
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logprob.double(), truth[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, truth[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=torch.finfo(NARROW).eps * float(b.abs().max()))


@pytest.mark.parametrize("form", [{}, dict(temperature=0.8, logit_scale=0.7)], ids=["plain", "scaled"])
def test_fused_gradients_without_a_pass_over_the_tile(form, device, no_pass):
    """Several tiles; half of the rows have no gradient and are dropped, with holes on either side."""
    weights = torch.randn(37, device=device) * (torch.arange(37, device=device) % 2)
    agree(*fused(37, 40, 301, device, weights, chunk=16, **form))


def test_fused_gradient_of_a_near_certain_target(device, no_pass):
    """1 - p is not the difference of two rounded numbers."""
    weights = torch.zeros(9, device=device)
    weights[4] = 100
    _, weight, target, _ = make(9, 16, 50, device, bias=True)
    row = 5 * weight[int(target[4])].float() / weight[int(target[4])].float().norm()
    ours, truth = fused(9, 16, 50, device, weights, row=row.to(NARROW))
    assert -2e-2 < truth[1][4] < -1e-4
    agree(ours, truth)


def test_a_tile_that_overflows_takes_the_ordinary_road(device):
    """A target a hundred below the maximum: exp(100) is not a number for fp32's products."""
    weights = torch.randn(20, device=device)
    ours, truth = fused(20, 16, 50, device, weights, spread=30.0, chunk=16)
    assert truth[1].min() < -100
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=1e-5, atol=1e-3)
    for a, b in zip(ours[2:], truth[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(NARROW).eps * float(b.abs().max()))


def test_entropy_softcap_and_adapters_take_the_ordinary_road(device):
    from rlhf_fast.ops._epilogue_head import serves
    from rlhf_fast.ops._head import Lora, Wanted

    hidden, weight, *_ = make(9, 16, 50, device)
    if hidden.is_cuda:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    want, lora = Wanted(True, True, False), Lora(weight[:2], weight[:, :2])
    assert serves(hidden, weight, Transform(), want, None, False)
    assert not serves(hidden, weight, Transform(), want, None, True)
    assert not serves(hidden, weight, Transform(softcap=5.0), want, None, False)
    assert not serves(hidden, weight, Transform(), want, lora, False)
    assert not serves(hidden, weight, Transform(), Wanted(False, False, False), None, False)

"""The divergence row passes of every backend against fp64: torch, C++ on each instruction set, Triton.

Triton runs on the GPU when there is one and through its interpreter otherwise, which shows neither races nor registers:
`test_triton_aot.py` reads those off the machine code.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from _budget import assert_within_budget

from rlhf_fast import _backend
from rlhf_fast.ops._divergence_rows import KINDS, RowKl, Side, divergence_dlogits, row_divergence
from rlhf_fast.ops._rows import Transform, row_stats
from rlhf_fast.reference.divergence import divergence_from_log_probs

PLAIN = Transform()
SHARE = 0.3
ISAS = ("portable", "avx2", "avx512")
BACKENDS = ["torch", *(f"cpp-{isa}" for isa in ISAS), "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Name of the backend in use; its tensors belong on `where(backend, device)`."""
    name, _, isa = request.param.partition("-")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if name == "cpp":
        if not _backend.cpp_available():
            pytest.skip("the C++ extension is not built")
        module = _backend.cpp_module()
        best = module.isa()
        try:
            module.use_isa(isa)
        except ValueError:
            pytest.skip(f"no {isa} on this machine")
    with _backend.use_backend(name):
        yield name
    if name == "cpp":
        module.use_isa(best)


def where(backend, device):
    """The device that the backend runs on here."""
    return device if backend == "triton" else torch.device("cpu")


def tiles(n, v, device, dtype=torch.float32, spread=3.0):
    g = torch.Generator().manual_seed(1)
    return tuple((torch.randn(n, v, generator=g) * spread).to(device, dtype) for _ in range(2))


def shaped(z, bias, tf):
    x = (z if bias is None else z + bias.to(z.dtype)) * tf.scale
    return (x if tf.softcap is None else tf.softcap * torch.tanh(x / tf.softcap)) * tf.inv_temperature


def formulas(z, y, kind, grad, dtype, biases=(None, None), tfs=(PLAIN, PLAIN)):
    """Divergence and both gradients by autograd over the reference's formula, in `dtype`."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (z, y)]
    logs = [torch.log_softmax(shaped(x, b, tf), -1) for x, b, tf in zip(leaves, biases, tfs, strict=True)]
    value = divergence_from_log_probs(*logs, kind=kind, ref_share=SHARE)
    value.backward(grad.to(dtype))
    return value.detach(), leaves[0].grad, leaves[1].grad


def ours(z, y, kind, grad, biases=(None, None), tfs=(PLAIN, PLAIN), out=None, ref_out=None):
    """The same by the row passes of the backend in use."""
    sides = []
    for x, bias, tf in zip((z, y), biases, tfs, strict=True):
        target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        stats = row_stats(x, target, bias, tf, entropy=False)
        sides.append(Side(x, bias, tf, stats.row_max, stats.log_sum))
    kl = row_divergence(*sides, kind=kind, ref_share=SHARE)
    assert (kl.own is None) == (kind == "forward")
    assert (kl.ref is None) == (kind == "reverse")
    out = torch.full_like(z, torch.nan, dtype=torch.float32) if out is None else out
    ref_out = torch.full_like(y, torch.nan, dtype=torch.float32) if ref_out is None else ref_out
    divergence_dlogits(*sides, kl, grad, out, ref_out, kind=kind, ref_share=SHARE)
    return kl.value(kind, SHARE), out, ref_out


FORMS = {
    "plain": (PLAIN, PLAIN, False),
    "both": (Transform(0.5, 3.0, 1.4), Transform(2.0, 20.0, 0.8), True),
    "one": (Transform(0.5, None, 1.4), Transform(1.0, 5.0, 1.0), False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("v", [1, 37, 4099])
def test_values_and_gradients(backend, device, v, form, kind):
    """4099: a whole block, and a ragged one."""
    if backend == "triton" and (v == 1) != (form == "plain"):
        pytest.skip("the interpreter takes its time")
    device = where(backend, device)
    z, y = tiles(4, v, device)
    *tfs, biased = FORMS[form]
    biases = tuple(torch.randn(v, device=device) for _ in range(2)) if biased else (None, None)
    grad = torch.tensor([1.0, -2.5, 0.0, 1e-3], device=device)
    truth = formulas(z, y, kind, grad, torch.float64, biases, tfs)
    naive = formulas(z, y, kind, grad, torch.float32, biases, tfs)
    got = ours(z, y, kind, grad, biases, tfs)
    for name, a, b, t in zip(("value", "gradient", "ref gradient"), got, naive, truth, strict=True):
        assert_within_budget(a, b, t, torch.float32, scale=max(1.0, float(t.abs().max())), name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_close_distributions_keep_their_digits(backend, device, kind):
    """KL near 1e-7: a plain sum of a (log a - log b) is wrong by 1e-7 and may be negative."""
    device = where(backend, device)
    z, _ = tiles(8, 2500, device)
    y = z + 5e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(device)
    grad = torch.ones(8, device=device)
    truth, *_ = formulas(z, y, kind, grad, torch.float64)
    value, *_ = ours(z, y, kind, grad)
    assert truth.max() < 3e-7
    # u = log p - log q carries the rounding of log p, 2^-24 * 16, beside its size of 5e-4: 0.2% of u, 0.4% of u^2
    torch.testing.assert_close(value.double(), truth, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tiles_give_exact_zeros(backend, device, kind):
    z, _ = tiles(3, 333, where(backend, device), spread=8.0)
    value, dz, dy = ours(z, z.clone(), kind, torch.ones(3, device=z.device))
    assert not value.any()
    assert not dz.any()
    assert not dy.any()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_1e4(backend, device, kind):
    z, y = tiles(3, 333, where(backend, device), spread=1e4)
    grad = torch.ones(3, device=z.device)
    got = ours(z, y, kind, grad)
    truth = formulas(z, y, kind, grad, torch.float64)
    for a, t in zip(got, truth, strict=True):
        assert a.isfinite().all()
        # one fp32 step of a logit near 3e4 is 2e-3, and it enters values and gradients as an error of that size
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=4e-3)


def test_a_token_that_both_rule_out_does_not_exist(backend, device):
    device = where(backend, device)
    z, y = tiles(3, 70, device)
    keep = torch.arange(70, device=device) % 3 != 0
    grad = torch.ones(3, device=device)
    masked = [x.masked_fill(~keep, -torch.inf) for x in (z, y)]
    for kind in KINDS:
        got = ours(*masked, kind, grad)
        want = ours(z[:, keep].contiguous(), y[:, keep].contiguous(), kind, grad)
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=1e-6)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert not a[:, ~keep].any()
            torch.testing.assert_close(a[:, keep], b, rtol=2e-6, atol=1e-6)


def test_a_token_that_one_side_rules_out(backend, device):
    """0 log 0 = 0 on the side that has none of it; infinite for the other, as it is; JSD stays finite."""
    device = where(backend, device)
    z, y = tiles(2, 70, device)
    z[0, 5] = y[1, 6] = -torch.inf
    grad = torch.ones(2, device=device)
    finite = {"forward": [False, True], "reverse": [True, False], "jsd": [True, True]}
    for kind in KINDS:
        value, dz, dy = ours(z, y, kind, grad)
        truth, tz, ty = formulas(z, y, kind, grad, torch.float64)
        assert value.isfinite().tolist() == finite[kind]
        assert (value[~value.isfinite()] == torch.inf).all()
        rows = torch.tensor(finite[kind], device=device)
        for a, t in ((value, truth), (dz, tz), (dy, ty)):
            torch.testing.assert_close(a[rows].double(), t[rows], rtol=2e-6, atol=2e-6)
    _, dz, _ = ours(z, y, "forward", grad)
    assert dz.isfinite().all()  # p - q, however large the loss


def test_nan_is_not_hidden_and_harms_no_other_row(backend, device):
    device = where(backend, device)
    z, y = tiles(4, 70, device)
    clean = [ours(z, y, kind, torch.ones(4, device=device)) for kind in KINDS]
    z[1, 69] = torch.nan
    y[2, 0] = torch.nan
    for kind, before in zip(KINDS, clean, strict=True):
        got = ours(z, y, kind, torch.ones(4, device=device))
        assert got[0][1:3].isnan().all()
        assert got[1][1:3].isnan().any(1).all()
        for a, b in zip(got, before, strict=True):
            assert torch.equal(a[[0, 3]], b[[0, 3]])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_dtypes_of_the_tiles_are_independent(backend, device, dtypes):
    z, y = (x.to(d) for x, d in zip(tiles(3, 100, where(backend, device)), dtypes, strict=True))
    grad = torch.ones(3, device=z.device)
    got, want = ours(z, y, "jsd", grad), ours(z.float(), y.float(), "jsd", grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [100, 4099])
def test_in_place(backend, device, v, narrow):
    """Each gradient over its own tile, in strided rows, at full width or as a narrower view of the same bytes."""
    device = where(backend, device)
    z, y = tiles(3, v, device)
    grad = torch.tensor([1.0, -2.0, 0.5], device=device)
    want = ours(z, y, "jsd", grad)
    wide = [torch.full((3, v + 13), torch.nan, device=device) for _ in range(2)]
    for big, x in zip(wide, (z, y), strict=True):
        big[:, :v] = x
    tiles_, outs = [w[:, :v] for w in wide], [(w if narrow is None else w.view(narrow))[:, :v] for w in wide]
    value, dz, dy = ours(*tiles_, "jsd", grad, out=outs[0], ref_out=outs[1])
    assert torch.equal(value, want[0])
    for a, b in ((dz, want[1]), (dy, want[2])):
        # the interpreter truncates to bf16 where the hardware rounds
        eps = {None: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}[narrow]
        torch.testing.assert_close(a.float(), b, rtol=eps, atol=0.0 if narrow != torch.float16 else 2.0**-24)
    assert all(w[:, v:].isnan().all() for w in wide)  # a narrower row ends earlier


def test_one_side_alone_leaves_the_other_tile(backend, device):
    z, y = tiles(3, 100, where(backend, device))
    before = y.clone()
    grad = torch.ones(3, device=z.device)
    want = ours(z, y, "reverse", grad)[1]
    sides = []
    for x in (z, y):
        stats = row_stats(x, torch.zeros(3, dtype=torch.int64, device=x.device), None, PLAIN, entropy=False)
        sides.append(Side(x, None, PLAIN, stats.row_max, stats.log_sum))
    kl = row_divergence(*sides, kind="reverse", ref_share=SHARE)
    divergence_dlogits(*sides, kl, grad, z, None, kind="reverse", ref_share=SHARE)
    assert torch.equal(z, want)
    assert torch.equal(y, before)


def test_triton_splits_wide_rows(device):
    """Triton cuts a row of 40000 into three programs; their sums are added in order."""
    pytest.importorskip("triton", reason="triton is not installed")
    z, y = tiles(2, 40000, device)
    grad = torch.ones(2, device=device)
    with _backend.use_backend("triton"):
        got = ours(z, y, "jsd", grad)
        again = ours(z, y, "jsd", grad)
    truth = formulas(z, y, "jsd", grad, torch.float64)
    naive = formulas(z, y, "jsd", grad, torch.float32)
    for a, b, n, t in zip(got, again, naive, truth, strict=True):
        assert torch.equal(a, b)
        assert_within_budget(a, n, t, torch.float32)


def test_narrowing_in_place_keeps_a_row_in_one_program(device):
    """The interpreter runs programs one after another, so no value would show the race."""
    pytest.importorskip("triton", reason="triton is not installed")
    from rlhf_fast.kernels import divergence

    z, y = torch.empty(1, 40000, device=device), torch.empty(1, 40000, device=device)
    assert divergence.dlogits_split(40000, (z, None), (y, y))[0] == 3
    assert divergence.dlogits_split(40000, (z, None), (y, y.view(torch.bfloat16)[:, :40000]))[0] == 1
    assert divergence.dlogits_split(40000, (z, torch.empty_like(z, dtype=torch.bfloat16)), (y, None))[0] == 3


@pytest.mark.skipif(not _backend.cpp_available(), reason="the C++ extension is not built")
def test_bits_do_not_depend_on_threads():
    z, y = tiles(50, 999, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with _backend.use_backend("cpp"):
                results.append(ours(z, y, "jsd", torch.ones(50)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not _backend.cpp_available(), reason="the C++ extension is not built")
def test_the_door_refuses_what_would_read_beyond():
    z, y = tiles(3, 10, "cpu")
    f = torch.zeros(3)
    side = Side(z, None, PLAIN, f, f)
    with _backend.use_backend("cpp"):
        with pytest.raises(ValueError, match=r"ref_logits must be \(n, V\)=\(3, 10\), got \(3, 9\)"):
            row_divergence(side, Side(y[:, :9], None, PLAIN, f, f), kind="jsd", ref_share=SHARE)
        with pytest.raises(ValueError, match=r"ref_row_max must be a contiguous \(3,\)"):
            row_divergence(side, Side(y, None, PLAIN, f[:2], f), kind="jsd", ref_share=SHARE)
        with pytest.raises(ValueError, match=r"out must be \(n, V\)=\(3, 10\), got \(2, 10\)"):
            divergence_dlogits(side, side, RowKl(f, f), f, z[:2], None, kind="jsd", ref_share=SHARE)
        with pytest.raises(ValueError, match="needs sums that were not given"):
            divergence_dlogits(side, side, RowKl(None, f), f, z, None, kind="jsd", ref_share=SHARE)

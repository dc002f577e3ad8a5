"""Triton row passes against fp64: on the GPU when there is one, otherwise through the interpreter.

What the interpreter cannot show: races between warps. `test_triton_aot.py` reads the barriers off the machine code.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from rlhf_fast._backend import use_backend
from rlhf_fast.ops._rows import Transform, row_stats

pytest.importorskip("triton", reason="triton is not installed")
row_pass = importlib.import_module("rlhf_fast.kernels.row_pass")

IGNORED = -100
PLAIN = {"scale": 1.0, "softcap": None, "temperature": 1.0}
# Half an ulp, relative; a whole one for bf16 in the interpreter, which truncates where the hardware rounds.
BF16 = 2.0**-8 if torch.cuda.is_available() else 2.0**-7
EPS = {torch.float32: 2.0**-24, torch.bfloat16: BF16, torch.float16: 2.0**-11}
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half of the least subnormal


def squashed(z, bias, *, scale, softcap, temperature):
    """s and ds/dz, in z's dtype."""
    x = (z if bias is None else z + bias.to(z.dtype)) * scale
    if softcap is None:
        return x / temperature, torch.full_like(x, scale / temperature)
    t = torch.tanh(x / softcap)
    return softcap * t / temperature, scale / temperature * (1 - t * t)


def statistics(z, target, bias, **form):
    """logprob, row_max, log_sum, entropy in z's dtype; zeros where the target is negative."""
    scored = torch.ones_like(z[:, 0], dtype=torch.bool) if target is None else target >= 0
    s, _ = squashed(z, bias, **form)
    m = s.max(-1).values
    log_p = torch.log_softmax(s, -1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    out = [m, torch.logsumexp(s, -1) - m, entropy]
    if target is not None:
        out.insert(0, log_p.gather(1, target.clamp(min=0)[:, None])[:, 0])
    return [torch.where(scored, t, 0.0) for t in out]


def gradient(z, target, bias, d, a, b, **form):
    """jac_j (d [j == target] + p_j (a + b log p_j)) in z's dtype; zero rows where d = a = b = 0."""
    s, jac = squashed(z, bias, **form)
    log_p = torch.log_softmax(s, -1)
    p = log_p.exp()
    factor = a[:, None] if b is None else a[:, None] + b[:, None] * log_p
    g = torch.where(p == 0, 0.0, p * factor)
    g = g + torch.where(torch.arange(z.shape[1], device=z.device) == target[:, None], d[:, None], 0.0)
    nothing = (d == 0) & (a == 0) & (True if b is None else b == 0)
    return torch.where(nothing[:, None], 0.0, jac * g)


def run_stats(z, target, bias, *, scale, softcap, temperature, entropy=True):
    n = z.shape[0]
    out = torch.full((4, n), torch.nan, device=z.device)
    logprob, row_max, log_sum, h = out
    row_pass.row_stats(
        z,
        target,
        bias,
        scale=scale,
        softcap=softcap,
        inv_temperature=1 / temperature,
        logprob=None if target is None else logprob,
        row_max=row_max,
        log_sum=log_sum,
        entropy=h if entropy else None,
    )
    return out


def run_gradient(z, out, order, target, bias, stats, d, a, b, *, scale, softcap, temperature):
    row_pass.row_dlogits(
        z,
        out,
        order,
        target,
        bias,
        scale=scale,
        softcap=softcap,
        inv_temperature=1 / temperature,
        row_max=stats[1],
        log_sum=stats[2],
        d_target=d,
        a=a,
        b=b,
    )
    return out


def within(ours, exact, naive, floor):
    """Error against fp64 no larger than the naive expression's worst, plus a floor. NaN fails."""
    allowed = torch.nan_to_num((naive.double() - exact).abs(), nan=0.0).max() + floor
    wrong = ~((ours.double() - exact).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}: {(ours.double() - exact).abs().max()} > {allowed}"


def make(n, v, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, v, generator=g) * 4).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    target[-1], target[0] = v - 1, 0
    z[1 % n, int(target[1 % n])] += 8  # a likely target
    if n > 2:
        target[2] = IGNORED
        z[2] = torch.nan
    return z.to(device), target.to(device)


def cotangents(n, device, seed=1):
    g = torch.Generator().manual_seed(seed)
    d, a, b = torch.randn(3, n, generator=g)
    if n > 2:
        d[2] = a[2] = b[2] = 0.0
    return d.to(device), a.to(device), b.to(device)


def check(z, target, bias, form, *, out=None, order=None, use_b=True):
    """Both passes against fp64; returns the gradient."""
    dtype = z.dtype
    zd, bd = z.double(), None if bias is None else bias.double()
    exact = statistics(zd, target, bd, **form)
    naive = statistics(z.float(), target, bias, **form)
    got = run_stats(z, target, bias, **form)
    largest = squashed(zd, bd, **form)[0][target >= 0].abs()
    largest = largest[largest.isfinite()].max()
    for ours, e, n in zip(got, exact, naive, strict=True):
        within(ours, e, n, 1e-6 + 2 * EPS[torch.float32] * largest)  # s_target and max are rounded once each
    d, a, b = cotangents(z.shape[0], z.device)
    b = b if use_b else None
    e = gradient(zd, target, bd, d.double(), a.double(), None if b is None else b.double(), **form)
    n = gradient(z.float(), target, bias, d, a, b, **form)
    if order is not None:
        e, n = e[order], n[order]
    out = torch.full(e.shape, torch.nan, dtype=dtype, device=z.device) if out is None else out
    run_gradient(z, out, order, target, bias, got, d, a, b, **form)
    floor = 1e-6 + 2 * EPS[torch.float32] * largest * e.abs().max() + EPS[out.dtype] * e.abs() + TINY[out.dtype]
    within(out, e, n, floor)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 7, 252, 507, 4099])
def test_ragged_widths(v, dtype, device):
    z, target = make(6, v, dtype, device)
    check(z, target, None, PLAIN)


@pytest.mark.parametrize(
    "form",
    [
        {"scale": 1.0, "softcap": None, "temperature": 0.7},
        {"scale": 0.25, "softcap": 30.0, "temperature": 1.3},
        {"scale": 1.5, "softcap": 5.0, "temperature": 1.0},
        {"scale": 1.0, "softcap": 50.0, "temperature": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_scale_softcap_temperature_bias(form, biased, device):
    z, target = make(5, 507, torch.float32, device)
    bias = torch.randn(507, generator=torch.Generator().manual_seed(3)).to(device) if biased else None
    check(z, target, bias, form)


def test_softcap_near_zero_and_saturated(device):
    """tanh by exponentials cancels for small arguments, 1 - tanh^2 for large ones."""
    z = torch.cat([torch.linspace(-1e-3, 1e-3, 200), torch.linspace(-60, 60, 300)]).repeat(2, 1).to(device)
    form = {"scale": 1.0, "softcap": 10.0, "temperature": 1.0}
    target = torch.tensor([3, 450], device=device)
    stats = run_stats(z, target, None, **form)
    zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)
    out = run_gradient(z, torch.empty_like(z), None, target, None, stats, zero, one, None, **form)
    exact = gradient(z.double(), target, None, zero.double(), one.double(), None, **form)
    # relative: p carries the error of its exponent (about 20 ulp of 20), sech^2 that of its own
    assert ((out - exact).abs() <= 4e-6 * exact.abs() + 1e-12).all()


def test_wide_rows_are_split(device):
    """Several segments per row, a block-aligned and a ragged end, ignored rows among them."""
    for v, dtype in ((32768 + 4096, torch.float32), (70001, torch.bfloat16)):
        z, target = make(4, v, dtype, device)
        assert row_pass.split_row(v, row_pass.STATS_SEGMENT, 4096)[0] > 1
        check(z, target, None, PLAIN)


def test_segments_cover_a_row_once():
    for v in (1, 4095, 4096, 32768, 32769, 50257, 151936, 256000, 262144):
        count, size = row_pass.split_row(v, 32768, 4096)
        assert size % 4096 == 0
        assert (count - 1) * size < v <= count * size
        assert size <= 32768


def test_bits_do_not_depend_on_the_number_of_rows(device):
    z, target = make(5, 40000, torch.float32, device)
    whole = run_stats(z, target, None, **PLAIN)
    alone = torch.cat([run_stats(z[i : i + 1], target[i : i + 1], None, **PLAIN) for i in range(5)], 1)
    assert torch.equal(whole, alone)
    assert torch.equal(whole, run_stats(z, target, None, **PLAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outliers(dtype, device):
    z, target = make(5, 507, dtype, device)
    z[0, 5], z[0, 6] = 1e4, -1e4
    z[1, 100], target[1] = 1e4, 100  # the target takes it all
    z[3, int(target[3])] = -1e4
    check(z, target, None, PLAIN)
    stats = run_stats(z, target, None, **PLAIN)
    assert stats[0, 1].item() == 0.0
    assert stats[3, 1].item() == 0.0


def test_outliers_under_scale_leave_no_positive_logprob(device):
    """s_target and max must be the same bits, or (s_target - max) is off by an ulp of 1e4."""
    z = torch.randn(4, 100, device=device)
    z[:, 7] = torch.tensor([9999.0, 1234.567, 8191.77, 1e4], device=device)
    target = torch.full((4,), 7, device=device)
    stats = run_stats(z, target, None, scale=0.377, softcap=None, temperature=0.9)
    assert (stats[0] == 0).all()


def test_near_one_hot(device):
    z = torch.full((3, 252), -3.0, device=device)
    z[:, 11] = torch.tensor([14.0, 18.0, 40.0], device=device)
    check(z, torch.tensor([11, 11, 12], device=device), None, PLAIN)


def test_minus_infinity_in_part_of_a_row(device):
    z, target = make(4, 4200, torch.float32, device)
    z[0, ::2] = -torch.inf
    z[1, :4190] = -torch.inf  # whole blocks
    z[3, 4100:] = -torch.inf
    target[0], target[1], target[3] = 1, 4195, 0
    check(z, target, None, PLAIN)
    target[0] = 2
    assert run_stats(z, target, None, **PLAIN)[0, 0].item() == -torch.inf


def test_row_of_minus_infinity_harms_no_other(device):
    z, target = make(4, 40000, torch.float32, device)
    clean = run_stats(z, target, None, **PLAIN)
    for width in (40000, 300):  # split and whole rows
        zw, tw = z[:, :width].clone(), target.clamp(max=width - 1)
        clean = run_stats(zw, tw, None, **PLAIN)
        zw[1] = -torch.inf
        got = run_stats(zw, tw, None, **PLAIN)
        assert got[0, 1].isnan()
        assert got[1, 1] + got[2, 1] == -torch.inf  # lse
        assert torch.equal(got[:, [0, 2, 3]], clean[:, [0, 2, 3]])


def test_nan_is_not_hidden(device):
    for width in (300, 40000):
        z, target = make(4, width, torch.float32, device)
        z[1, 17] = torch.nan
        got = run_stats(z, target, None, **PLAIN)
        assert got[0, 1].isnan()
        assert got[:, [0, 2, 3]].isfinite().all()


def test_target_beyond_the_vocabulary_is_nan_not_a_stray_read(device):
    for width in (300, 40000):
        z, target = make(4, width, torch.float32, device)
        target[0] = width
        got = run_stats(z, target, None, **PLAIN)
        assert got[0, 0].isnan()
        assert got[1:, 0].isfinite().all()


def test_options_left_out(device):
    z, target = make(4, 507, torch.float32, device)
    full = run_stats(z, target, None, **PLAIN)
    assert torch.equal(run_stats(z, target, None, **PLAIN, entropy=False)[:3], full[:3])
    z[2] = 1.0
    bare = run_stats(z, None, None, **PLAIN)
    for got, e in zip(bare[1:], statistics(z.double(), None, None, **PLAIN), strict=True):
        assert ((got - e).abs() <= 2e-6 + 2e-7 * e.abs()).all()
    z[2] = torch.nan
    check(z, target, None, PLAIN, use_b=False)


def test_ignored_rows_are_zero(device):
    for width in (300, 40000):
        z, target = make(4, width, torch.float32, device)
        stats = run_stats(z, target, None, **PLAIN)
        assert (stats[:, 2] == 0).all()
        d, a, b = cotangents(4, device)
        out = run_gradient(z, torch.full_like(z, 9.0), None, target, None, stats, d, a, b, **PLAIN)
        assert (out[2] == 0).all()


def test_only_rows_without_any_gradient_are_skipped(device):
    z, target = make(8, 300, torch.float32, device)
    z, target[2] = torch.nan_to_num(z), 17
    d, a, b = (torch.tensor([float(k >> bit & 1) for k in range(8)], device=device) for bit in range(3))
    stats = run_stats(z, target, None, **PLAIN)
    exact = gradient(z.double(), target, None, d.double(), a.double(), b.double(), **PLAIN)
    z[0] = torch.nan  # d = a = b = 0: not read
    out = run_gradient(z, torch.full_like(z, 9.0), None, target, None, stats, d, a, b, **PLAIN)
    assert ((out - exact).abs() <= 1e-5).all()
    assert (exact[1:].abs().sum(1) > 0.1).all()


def test_empty(device):
    z = torch.empty(0, 64, device=device)
    target = torch.empty(0, dtype=torch.long, device=device)
    stats = run_stats(z, target, None, **PLAIN)
    assert run_gradient(z, z, None, target, None, stats, *torch.empty(3, 0, device=device), **PLAIN).shape == (0, 64)
    with use_backend("triton"):
        assert [x.shape for x in row_stats(z, target, None, Transform(), entropy=True)] == 4 * [(0,)]


def test_row_strides(device):
    z, target = make(5, 507, torch.float32, device)
    wide = torch.full((5, 700), torch.nan, device=device)
    wide[:, 100:607] = z
    view = wide[:, 100:607]
    out = torch.full((5, 640), 7.0, device=device)
    check(view, target, None, PLAIN, out=out[:, :507])
    assert (out[:, 507:] == 7).all()
    assert torch.equal(run_stats(view, target, None, **PLAIN), run_stats(z, target, None, **PLAIN))


@pytest.mark.parametrize("v", [507, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(v, dtype, device):
    z, target = make(4, v, dtype, device)
    elsewhere = check(z, target, None, PLAIN)
    stats = run_stats(z, target, None, **PLAIN)
    assert torch.equal(run_gradient(z, z, None, target, None, stats, *cotangents(4, device), **PLAIN), elsewhere)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [6, 508, 4096, 20004])
def test_narrowing_in_place(v, dtype, device):
    z, target = make(5, v, torch.float32, device)
    separate = check(z, target, None, PLAIN, out=torch.empty(5, v, dtype=dtype, device=device))
    stats = run_stats(z, target, None, **PLAIN)
    out = z.view(dtype)[:, :v]  # the same rows, from their first byte on
    assert out.data_ptr() == z.data_ptr()
    assert out.stride(0) == 2 * v
    run_gradient(z, out, None, target, None, stats, *cotangents(5, device), **PLAIN)
    assert torch.equal(out, separate)


def test_narrowing_in_place_keeps_a_row_in_one_program(device):
    """The interpreter runs programs one after another, so no value would show the race."""
    z = torch.empty(2, 100000, device=device)
    assert row_pass.dlogits_split(z, z.view(torch.bfloat16)[:, :100000])[0] == 1
    assert row_pass.dlogits_split(z, z)[0] == 7
    assert row_pass.dlogits_split(z, torch.empty(2, 100000, dtype=torch.bfloat16, device=device))[0] == 7


@pytest.mark.parametrize("narrow", [False, True])
def test_compaction_by_order(narrow, device):
    """Dropped rows are filled with kept ones from beyond K; what is kept below K stays."""
    v = 5000
    z, target = make(6, v, torch.float32, device)
    order = torch.tensor([0, 1, 5, 3], device=device)  # rows 2 and 4 are dropped, row 5 fills hole 2
    separate = torch.empty(4, v, dtype=torch.bfloat16 if narrow else torch.float32, device=device)
    check(z, target, None, PLAIN, order=order, out=separate)
    stats = run_stats(z, target, None, **PLAIN)
    out = z.view(torch.bfloat16)[:4, :v] if narrow else z[:4]
    run_gradient(z, out, order, target, None, stats, *cotangents(6, device), **PLAIN)
    assert torch.equal(out, separate)


def test_the_formulas_of_this_file_are_the_derivative(device):
    """`gradient` above equals autograd of the reference, through d_target, a and b as a caller forms them."""
    from rlhf_fast import reference

    z, target = make(5, 252, torch.float64, device)
    z.requires_grad_(True)
    dlogprob, dentropy = torch.randn(2, 5, dtype=torch.float64, device=device)
    dlogprob[2] = dentropy[2] = 0.0
    form = {"scale": 0.5, "softcap": 20.0, "temperature": 0.8}
    out = reference.logprob_from_logits(z, target, temperature=0.8, logit_scale=0.5, softcap=20.0, entropy=True)
    auto = torch.autograd.grad((dlogprob * out.logprob + dentropy * out.entropy).sum(), z)[0]
    a, b = -dlogprob - dentropy * out.entropy.detach(), -dentropy
    ours = gradient(z.detach(), target, None, dlogprob, a, b, **form)
    torch.testing.assert_close(ours, auto, rtol=1e-10, atol=1e-12)

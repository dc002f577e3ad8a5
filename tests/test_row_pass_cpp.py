"""The C++ row passes, on every instruction set of this machine, against the formulas in fp64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_fast import _backend

pytestmark = pytest.mark.skipif(not _backend.cpp_available(), reason="the C++ extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = 2.0**-23  # of an fp32 number near 1


def _isas() -> list[str]:
    if not _backend.cpp_available():
        return ["portable"]
    module, found = _backend.cpp_module(), []
    best = module.isa()
    for name in ("portable", "avx2", "avx512"):
        try:
            module.use_isa(name)
        except ValueError:
            continue
        found.append(name)
    module.use_isa(best)
    return found


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest):
    module = _backend.cpp_module()
    best = module.isa()
    module.use_isa(request.param)
    yield request.param
    module.use_isa(best)


class Transform(NamedTuple):
    scale: float = 1.0
    softcap: float | None = None
    inv_temperature: float = 1.0


PLAIN = Transform()


def stats(z: Tensor, target: Tensor | None, bias: Tensor | None = None, tf: Transform = PLAIN, entropy=True):
    """(logprob, row_max, log_sum, entropy), outputs filled with NaN first so that an unwritten one shows."""
    out = {name: torch.full((len(z),), torch.nan) for name in ("logprob", "row_max", "log_sum", "entropy")}
    asked = dict(out, logprob=out["logprob"] if target is not None else None)
    asked["entropy"] = out["entropy"] if entropy else None
    _backend.row_stats(z, target, bias, **tf._asdict(), **asked)
    return tuple(out.values())


def formula(z: Tensor, target: Tensor, bias: Tensor | None, tf: Transform, dtype: torch.dtype):
    """logprob, entropy, row maximum and log-sum in `dtype`, differentiable by z."""
    x = z.to(dtype)
    x = (x if bias is None else x + bias.to(dtype)) * tf.scale
    if tf.softcap is not None:
        x = tf.softcap * torch.tanh(x / tf.softcap)
    s = x * tf.inv_temperature
    log_p = torch.log_softmax(s, -1)
    safe = log_p.masked_fill(log_p == -torch.inf, 0)
    h = -(log_p.exp() * safe).sum(-1)
    m = s.amax(-1)
    lp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return lp, h, m, (s - m.unsqueeze(-1)).exp().sum(-1).log(), s


def logits_of(kind: str, n: int, v: int, dtype: torch.dtype, scale: float) -> Tensor:
    z = torch.randn(n, v) * 3
    if kind == "outliers":
        z[:, ::7] *= -3000 if dtype != torch.float16 else -2000
        z[0, v // 2] = 1e4
    elif kind == "one_hot":
        z[torch.arange(n), torch.randint(v, (n,))] += 40
    elif kind == "minus_inf":
        z[:, : 2 * v // 3] = -torch.inf if scale > 0 else torch.inf
    elif kind == "rising":  # a new maximum in every block: the online rescaling at work
        z += torch.arange(v) * (60.0 / v)
    return z.to(dtype)


TRANSFORMS = {
    "plain": (PLAIN, False),
    "temperature": (Transform(inv_temperature=1 / 0.7), False),
    "negative_scale": (Transform(scale=-0.5), False),
    "bias": (PLAIN, True),
    "all": (Transform(scale=0.25, softcap=5.0, inv_temperature=1.3), True),
}


def assert_close(ours: Tensor, naive: Tensor, truth: Tensor, allowed: Tensor | float, name: str) -> None:
    """The error is within that of the naive fp32 expression plus `allowed`; NaN fails."""
    error = (ours.double() - truth).abs()
    limit = (naive.double() - truth).abs().max() + allowed
    assert (error <= limit).all(), f"{name}: worst error {error.max():.3e}, naive {limit.max():.3e}"


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "one_hot", "minus_inf", "rising"])
@pytest.mark.parametrize("v", [1, 7, 252, 507, 4099, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, dtype, v, kind, transform):
    tf, with_bias = TRANSFORMS[transform]
    n = 5
    z = logits_of(kind, n, v, dtype, tf.scale)
    bias = torch.randn(v) if with_bias else None
    target = torch.randint(v, (n,))
    if v > 20:
        target[:2] = torch.tensor([0, v - 1])  # the first lane and the tail
    target[2] = formula(z, target, bias, tf, torch.float64)[4][2].argmax()
    if kind == "minus_inf":
        target.clamp_(min=2 * v // 3)

    wide = z.double().requires_grad_()
    lp, h, m, log_sum, s = formula(wide, target, bias, tf, torch.float64)
    # A score goes through at most four roundings of half an ulp of its size.
    largest = s.detach()[s.detach().isfinite()].abs().max()
    rounding = 2 * ULP * float(largest)
    with torch.no_grad():
        naive = formula(z, target, bias, tf, torch.float32)
    ours = stats(z, target, bias, tf)
    for name, got, plain, true in zip(
        ("logprob", "entropy", "row_max", "log_sum"), (ours[0], ours[3], ours[1], ours[2]), naive, (lp, h, m, log_sum),
        strict=False,
    ):  # fmt: skip
        assert_close(got, plain, true.detach(), 1e-6 + rounding, name)

    g, w = torch.randn(n), torch.randn(n)
    (truth,) = torch.autograd.grad((g * lp + w * h).sum(), wide)
    # Autograd puts NaN where a logit is infinite; its gradient there is 0.
    truth = torch.where(z.isinf(), torch.zeros_like(truth), truth)
    narrow = z.float().requires_grad_()
    plain = formula(narrow, target, bias, tf, torch.float32)
    (naive_grad,) = torch.autograd.grad((g * plain[0] + w * plain[1]).sum(), narrow)
    naive_grad = torch.where(z.isinf(), torch.zeros_like(naive_grad), naive_grad)
    a = (-g - w * h.detach()).float()
    for out_dtype in {dtype, torch.float32, torch.bfloat16}:
        out = torch.full((n, v), torch.nan, dtype=out_dtype)
        _backend.row_dlogits(
            z, out, None, target, bias, **tf._asdict(), row_max=ours[1], log_sum=ours[2], d_target=g, a=a, b=-w
        )
        # p (|a| + |b log p|) <= |a| + |b| / e, times the relative error of p; then the rounding of the output.
        size = (a.abs() + w.abs()).unsqueeze(-1) * abs(tf.scale * tf.inv_temperature)
        allowed = (2e-6 + 2 * rounding) * size + truth.abs() * torch.finfo(out_dtype).eps / 2
        allowed = allowed + torch.finfo(out_dtype).smallest_normal * torch.finfo(out_dtype).eps
        assert_close(out, naive_grad, truth, allowed, f"dlogits in {out_dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_right(isa, dtype):
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = z[~z.isnan()]
    for width in (1, 37):  # scalar and vector loads
        rows = z.unsqueeze(-1).expand(-1, width).contiguous()
        assert torch.equal(stats(rows, None)[1], z.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_rounds_to_nearest_even_and_keeps_nan(isa, dtype):
    # With z = m = L = 0 and d_target = b = 0 the output is `a` itself, rounded.
    exponents = torch.randint(0, 255, (20000,), dtype=torch.int32) << 23
    bits = exponents | torch.randint(0, 2**23, (20000,), dtype=torch.int32)
    ties = (torch.arange(0, 2**15, dtype=torch.int32) << 16) | 0x8000
    half_ties = ((torch.arange(0x38000000 >> 12, 0x47800000 >> 12, dtype=torch.int32)) << 12)[::3]
    special = torch.tensor([torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 3.4e38, 6e-8, 2.98e-8, 1e-45, 6.1e-5])
    a = torch.cat([bits.view(torch.float32), ties.view(torch.float32), half_ties.view(torch.float32), special])
    a = torch.cat([a, -a])
    a = a[a != 0]
    zero = torch.zeros_like(a)
    for width in (1, 33):
        out = torch.empty(len(a), width, dtype=dtype)
        z = torch.zeros(len(a), width, dtype=torch.float32)
        _backend.row_dlogits(
            z, out, None, None, None, **PLAIN._asdict(), row_max=zero, log_sum=zero, d_target=zero, a=a, b=None
        )
        expected = a.to(dtype).unsqueeze(-1).expand(-1, width)
        nan = expected.isnan()
        assert torch.equal(out.isnan(), nan)
        assert torch.equal(out.masked_fill(nan, 0), expected.masked_fill(nan, 0))


def test_exp_is_accurate_to_two_ulp(isa):
    d = torch.cat([-torch.logspace(-8, 1.93, 200000), torch.linspace(-87, 0, 200001)]).reshape(1, -1)
    out, one, zero = torch.empty_like(d), torch.ones(1), torch.zeros(1)
    _backend.row_dlogits(
        d, out, None, None, None, **PLAIN._asdict(), row_max=zero, log_sum=zero, d_target=zero, a=one, b=None
    )
    truth = d.double().exp()
    assert ((out.double() - truth).abs() <= 2 * ULP * truth).all()
    d[0, :3] = torch.tensor([-torch.inf, -1e30, -120.0])
    _backend.row_dlogits(
        d, out, None, None, None, **PLAIN._asdict(), row_max=zero, log_sum=zero, d_target=zero, a=one, b=one
    )
    assert torch.equal(out[0, :3], torch.zeros(3))


def test_softcap_is_accurate_from_denormals_to_saturation(isa):
    x = torch.logspace(-30, 5, 50000)
    x = torch.cat([x, -x, torch.tensor([0.0, torch.inf, -torch.inf])])
    truth = 30 * torch.tanh(x.double() / 30)
    for width in (1, 35):
        got = stats(x.unsqueeze(-1).expand(-1, width).contiguous(), None, None, Transform(softcap=30.0))[1]
        assert ((got.double() - truth).abs() <= 1e-6 * truth.abs()).all()
    # The slope keeps its relative accuracy where 1 - tanh^2 would have cancelled to 0.
    zero, one = torch.zeros(1), torch.ones(1)
    z = torch.linspace(0, 900, 4001).unsqueeze(0)
    s = 30 * torch.tanh(z.double() / 30)
    out = torch.empty_like(z)
    _backend.row_dlogits(
        z, out, None, None, None, scale=1.0, softcap=30.0, inv_temperature=1.0, row_max=zero + 30, log_sum=zero,
        d_target=zero, a=one, b=None,
    )  # fmt: skip
    truth = (s - 30).exp() / torch.cosh(z.double() / 30) ** 2
    assert ((out.double() - truth).abs() <= 1e-5 * truth).all()  # s rounds at 30: 4e-6 in its exp


@pytest.mark.parametrize("entropy", [True, False])
def test_ignored_rows_are_zero_and_never_read(isa, entropy):
    z = torch.randn(4, 100)
    z[1] = torch.nan
    target = torch.tensor([3, -100, 99, 0])
    got = stats(z, target, entropy=entropy)
    for values in got[:3] + got[3:] * entropy:
        assert values[1] == 0
        assert values.isfinite().all()
    if not entropy:
        assert got[3].isnan().all()  # untouched


def test_rows_without_weights_become_zeros_unread(isa):
    n, v = 6, 300
    z = torch.randn(n, v)
    _, m, log_sum, _ = stats(z, None)
    z[2] = torch.nan
    weights = torch.ones(n)
    weights[2] = 0
    for b in (None, weights):
        out = torch.full((n, v), torch.nan, dtype=torch.bfloat16)
        _backend.row_dlogits(
            z, out, None, None, None, **PLAIN._asdict(), row_max=m, log_sum=log_sum, d_target=weights * 0,
            a=weights, b=b,
        )  # fmt: skip
        assert torch.equal(out[2], torch.zeros(v, dtype=torch.bfloat16))
        assert out[[0, 1, 3, 4, 5]].isfinite().all()
        assert (out[[0, 1, 3, 4, 5]] != 0).any(-1).all()


def test_bad_rows_stay_in_their_row(isa):
    z = torch.randn(5, 2100)
    z[1] = -torch.inf
    z[2, 1500] = torch.nan
    z[3, 1500] = torch.inf
    z[4] = torch.nan
    clean = stats(z[:1], torch.tensor([7]))
    got = stats(z, torch.full((5,), 7))
    for ours, alone in zip(got, clean, strict=True):
        assert ours[0] == alone[0]
    assert got[0][1:].isnan().all()
    assert got[3][1:].isnan().all()


def test_target_outside_the_row_is_not_read(isa):
    logprob, row_max, *_ = stats(torch.randn(2, 9), torch.tensor([9, 2**40]))
    assert logprob.isnan().all()
    assert row_max.isfinite().all()


def _weights(n: int):
    return {"d_target": torch.randn(n), "a": torch.randn(n), "b": torch.randn(n)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 7, 507, 4099])
def test_in_place_and_strided_equal_out_of_place(isa, dtype, v):
    n = 7
    base = torch.randn(n, v + 13).to(dtype)
    z = base[:, 5 : 5 + v]
    target = torch.randint(v, (n,))
    _, m, log_sum, _ = stats(z, target)
    assert torch.equal(m, stats(z.contiguous(), target)[1])
    args = dict(PLAIN._asdict(), row_max=m, log_sum=log_sum, **_weights(n))
    expected = torch.empty(n, v, dtype=dtype)
    _backend.row_dlogits(z.contiguous(), expected, None, target, None, **args)
    around = base.clone()
    around[:, 5 : 5 + v] = expected
    _backend.row_dlogits(z, z, None, target, None, **args)
    assert torch.equal(base, around)  # the columns beside the view are untouched


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 7, 508, 4099])
def test_narrowing_in_place(isa, narrow, v):
    n = 9
    z = torch.randn(n, v)
    target = torch.randint(v, (n,))
    target[:2] = torch.tensor([0, v - 1])
    _, m, log_sum, _ = stats(z, target)
    args = dict(Transform(softcap=4.0)._asdict(), row_max=m, log_sum=log_sum, **_weights(n))
    expected = torch.empty(n, v, dtype=narrow)
    _backend.row_dlogits(z, expected, None, target, None, **args)
    view = z.view(narrow)[:, :v]
    assert view.data_ptr() == z.data_ptr()
    _backend.row_dlogits(z, view, None, target, None, **args)
    assert torch.equal(view, expected)


def test_kept_rows_move_into_holes_in_place(isa):
    n, v = 64, 1500
    z = torch.randn(n, v)
    target = torch.randint(v, (n,))
    _, m, log_sum, _ = stats(z, target)
    args = dict(PLAIN._asdict(), row_max=m, log_sum=log_sum, **_weights(n))
    expected = torch.empty_like(z)
    _backend.row_dlogits(z, expected, None, target, None, **args)
    keep = torch.rand(n) < 0.6
    k = int(keep.sum())
    order = torch.arange(k)
    order[~keep[:k]] = torch.arange(k, n)[keep[k:]]
    _backend.row_dlogits(z, z[:k], order, target, None, **args)
    assert torch.equal(z[:k], expected[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_threads(isa, dtype):
    before = torch.get_num_threads()
    n, v = 100, 5003
    z = torch.randn(n, v).to(dtype)
    target = torch.randint(v, (n,))
    weights, results = _weights(n), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = stats(z, target)
            out = torch.empty_like(z)
            _backend.row_dlogits(
                z, out, None, target, None, **PLAIN._asdict(), row_max=found[1], log_sum=found[2], **weights
            )
            results.append((*found, out))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_offsets_beyond_2_31_elements():
    # Two rows 2^31 + 64 elements apart; the pages between them are never touched.
    stride, v = 2**31 + 64, 100
    flat = torch.empty(stride + v, dtype=torch.bfloat16)
    z = flat.as_strided((2, v), (stride, 1))
    z.copy_(torch.randn(2, v))
    expected = stats(z.contiguous(), torch.tensor([1, 99]))
    assert all(torch.equal(x, y) for x, y in zip(stats(z, torch.tensor([1, 99])), expected, strict=True))


def test_empty_and_wrong_arguments():
    assert all(len(x) == 0 for x in stats(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)))
    z = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"target must be a contiguous \(3,\) torch.int64"):
        stats(z, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="logits must be float32, bfloat16 or float16"):
        stats(z.double(), None)
    with pytest.raises(ValueError, match="logits must be a CPU matrix"):
        stats(z.T, None)
    one = torch.zeros(3)
    with pytest.raises(ValueError, match=r"out must be \(K, 8\)"):
        _backend.row_dlogits(
            z, torch.empty(4, 8), None, None, None, **PLAIN._asdict(), row_max=one, log_sum=one,
            d_target=one, a=one, b=None,
        )  # fmt: skip


def test_one_openmp_runtime():
    if not _backend.cpp_module().openmp:
        pytest.skip("built without OpenMP")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1, f"a second thread pool competes with torch's: {runtimes}"


def test_backend_choice(monkeypatch):
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    assert _backend.backend("cpu", "row_pass") == "cpp"
    with _backend.use_backend("torch"):
        assert _backend.backend("cpu", "row_pass") == "torch"
        with _backend.use_backend("triton"):
            assert _backend.backend("cpu", "gae") != "triton"  # gae has no such version: its own choice stands
            monkeypatch.setenv("TRITON_INTERPRET", "0")
            with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
                _backend.backend("cpu", "row_pass")
        assert _backend.backend("cpu", "row_pass") == "torch"
    monkeypatch.setenv("RLHF_FAST_BACKEND", "torch")
    assert _backend.backend("cpu", "row_pass") == "torch"
    with _backend.use_backend("cpp"), pytest.raises(RuntimeError, match="does not run on cuda"):
        _backend.backend("cuda", "row_pass")
    monkeypatch.setenv("RLHF_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        _backend.backend("cpu", "row_pass")
    with pytest.raises(ValueError, match="backend must be one of"), _backend.use_backend("fast"):
        pass


def test_missing_extension_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda name: (None, "not built in this installation"))
    assert not _backend.cpp_available()
    assert _backend.backend("cpu", "row_pass") == "torch"
    with _backend.use_backend("cpp"), pytest.raises(RuntimeError, match="not built"):
        _backend.backend("cpu", "row_pass")

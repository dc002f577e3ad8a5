"""Preference losses against scalar arithmetic, the reference and autograd's checks. Runs on the CPU; no GPU needed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import BATCH_KINDS, DIFFERENCE_KINDS, NEEDED, make_pairs, scalar_batch_loss, scalar_loss

from rlhf_fast import reference
from rlhf_fast.losses import preference_loss, preference_loss_kinds, register_preference_loss
from rlhf_fast.losses.preference_kinds import _VARIANTS
from rlhf_fast.reference import preference as oracle

# fp64 on both sides, some 10 terms of size up to 100 (IPO's and SPPO's squares).
EXACT = {"rtol": 1e-12, "atol": 1e-12}
KINDS = sorted([*oracle.KINDS, *oracle.BATCH_KINDS])
ALPHA = 0.5
SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js": lambda x: math.log(2 * math.exp(x) / (math.exp(x) + 1)),
    "alpha": lambda x: (math.exp((ALPHA - 1) * x) - 1) / (ALPHA - 1),
}


def mean_of_scalars(kind, sums, lengths, **options):
    rows = zip(*(x.tolist() for x in (*sums, *lengths)), strict=True)
    losses = [scalar_loss(kind, *row, **options) for row in rows]
    return sum(losses) / len(losses)


def needed(kind):
    return NEEDED.get(kind, {})


def test_every_kind_is_tested():
    assert set(KINDS) == set(preference_loss_kinds())


@pytest.mark.parametrize("beta", [0.05, 2.5])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in BATCH_KINDS])
def test_sequence_level_equals_scalar_arithmetic(kind, beta):
    pairs = make_pairs(seed=3)
    sums, lengths = pairs.sums(), pairs.lengths()
    options = {"sft_average": "sequence"} if kind in ("sft", "cpo", "orpo") else {}
    loss, _ = preference_loss(*sums, kind=kind, lengths=lengths, beta=beta, **needed(kind), **options)
    e = needed(kind).get("label_smoothing", 0.0)
    assert loss.item() == pytest.approx(mean_of_scalars(kind, sums, lengths, beta=beta, e=e), rel=1e-11)


@pytest.mark.parametrize("kind", BATCH_KINDS)
@pytest.mark.parametrize("e", [0.0, 0.2])
def test_sorting_kinds_equal_scalar_arithmetic(kind, e):
    sums = make_pairs(pairs=6, seed=4).sums()
    loss, _ = preference_loss(*sums, kind=kind, beta=0.7, label_smoothing=e)
    want = scalar_batch_loss(kind, *(x.tolist() for x in sums), beta=0.7, e=e)
    assert loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "cpo", "simpo"])
def test_label_smoothing(kind):
    pairs = make_pairs(seed=5)
    options = {"sft_average": "sequence"} if kind == "cpo" else {}
    loss, _ = preference_loss(*pairs.sums(), kind=kind, lengths=pairs.lengths(), label_smoothing=0.3, **options)
    assert loss.item() == pytest.approx(mean_of_scalars(kind, pairs.sums(), pairs.lengths(), e=0.3), rel=1e-12)


@pytest.mark.parametrize("divergence", SCORES)
@pytest.mark.parametrize("kind", DIFFERENCE_KINDS)
def test_f_divergences(kind, divergence):
    pairs = make_pairs(seed=6)
    sums = [x / 2 for x in pairs.sums()]
    options = {"sft_average": "sequence"} if kind == "sft" else {}
    loss, _ = preference_loss(
        *sums, kind=kind, lengths=pairs.lengths(), f_divergence=divergence, f_alpha=ALPHA, **needed(kind), **options
    )
    e = needed(kind).get("label_smoothing", 0.0)
    want = mean_of_scalars(kind, sums, pairs.lengths(), e=e, score=SCORES[divergence])
    assert loss.item() == pytest.approx(want, rel=1e-9)


def test_f_divergence_names_of_trl_and_the_limit_of_alpha():
    sums = make_pairs().sums()
    for ours, theirs in (("forward", "forward_kl"), ("js", "js_divergence"), ("alpha", "alpha_divergence")):
        assert preference_loss(*sums, f_divergence=ours).loss == preference_loss(*sums, f_divergence=theirs).loss
    plain = preference_loss(*sums).loss
    assert preference_loss(*sums, f_divergence="alpha", f_alpha=1.0).loss == plain
    near = preference_loss(*sums, f_divergence="alpha", f_alpha=1 + 2e-6).loss
    torch.testing.assert_close(near, plain, rtol=1e-3, atol=0)


def test_ipo_on_sums_and_on_means():
    pairs = make_pairs(seed=7)
    on_sums = preference_loss(*pairs.sums(), kind="ipo", length_average=False).loss
    assert on_sums.item() == pytest.approx(mean_of_scalars("ipo_sum", pairs.sums(), pairs.lengths()), rel=1e-12)
    on_means = preference_loss(*pairs.sums(), kind="ipo", lengths=pairs.lengths()).loss
    assert on_means.item() != pytest.approx(on_sums.item(), rel=1e-3)


def test_parameters_of_kinds():
    pairs = make_pairs(seed=8)
    sums, lengths = pairs.sums(), pairs.lengths()
    simpo = preference_loss(*sums, kind="simpo", lengths=lengths, simpo_gamma=1.5).loss
    assert simpo.item() == pytest.approx(mean_of_scalars("simpo", sums, lengths, gamma=1.5), rel=1e-12)
    bco = preference_loss(*sums, kind="bco_pair", bco_delta=torch.tensor(0.37, dtype=torch.float64)).loss
    assert bco.item() == pytest.approx(mean_of_scalars("bco_pair", sums, lengths, delta=0.37), rel=1e-12)
    cpo = preference_loss(*sums, kind="cpo", lengths=lengths, nll_weight=0.0).loss
    assert cpo.item() == pytest.approx(preference_loss(*sums, reference_free=True).loss.item(), rel=1e-12)


def test_sft_averages_over_tokens_or_sequences():
    pairs = make_pairs(seed=9)
    chosen, lengths = pairs.sums()[0], pairs.lengths()
    token = preference_loss(*pairs.sums(), kind="sft", lengths=lengths).loss
    assert token.item() == pytest.approx(float(-chosen.sum() / lengths[0].sum()), rel=1e-12)
    sequence = preference_loss(*pairs.sums(), kind="sft", lengths=lengths, sft_average="sequence").loss
    assert sequence.item() == pytest.approx(float(-(chosen / lengths[0]).mean()), rel=1e-12)


# ---- per-token input against the reference ----

TOKEN_OPTIONS = {
    "plain": {},
    "ld": {"ld_alpha": 0.3},
    "ld_0": {"ld_alpha": 0.0},
    "average": {"average_logprob": True},
    "ld_average": {"ld_alpha": 0.3, "average_logprob": True},
    "wpo": {"weighting": "wpo"},
    "reference_free": {"reference_free": True},
    "normalizers": {"normalizer": 11.0, "chosen_tokens": 40.0},
}


def run(function, pairs, kind, **options):
    chosen, rejected = (x.clone().requires_grad_() for x in pairs[:2])
    loss, metrics = function(chosen, rejected, *pairs[2:4], kind=kind, mask=pairs.mask, **options)
    grads = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    return loss, [torch.zeros_like(chosen) if g is None else g for g in grads], metrics


WITH_OPTIONS = [(k, o) for k in KINDS for o in TOKEN_OPTIONS if o != "wpo" or k not in BATCH_KINDS]
WITH_DIVERGENCES = [(k, f) for k in KINDS for f in SCORES if f == "reverse_kl" or k in DIFFERENCE_KINDS]


@pytest.mark.parametrize(("kind", "options"), WITH_OPTIONS)
def test_per_token_input_equals_the_reference(kind, options):
    pairs = make_pairs(seed=len(kind))
    options = {**TOKEN_OPTIONS[options], **needed(kind)}
    loss, grads, metrics = run(preference_loss, pairs, kind, **options)
    want, want_grads, want_metrics = run(reference.preference_loss, pairs, kind, **options)
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(grads[0], want_grads[0].nan_to_num(nan=0.0), **EXACT)
    if kind != "sft":
        torch.testing.assert_close(grads[1], want_grads[1].nan_to_num(nan=0.0), **EXACT)
        assert grads[1].any()
    assert grads[0].isfinite().all()
    assert grads[0].any()
    for name, value in metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        torch.testing.assert_close(value, want_metrics[name], msg=lambda m, n=name: f"{n}: {m}", **EXACT)
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"} <= set(metrics)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", {"sigmoid": 1.0, "sft": 0.5}, "orpo"])
def test_per_token_weights(kind):
    pairs = make_pairs(pairs=6, seed=2)
    lss = tuple(-torch.rand_like(x) for x in pairs[:2])
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3], dtype=torch.float64)
    options = {"pair_weight": weight, "weighting": "wpo", "log_sum_sq": lss}
    loss, grads, _ = run(preference_loss, pairs, kind, **options)
    want, want_grads, _ = run(reference.preference_loss, pairs, kind, **options)
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(grads[0], want_grads[0].nan_to_num(nan=0.0), **EXACT)
    assert not grads[0][2].any()


def test_sequence_and_token_level_agree():
    pairs = make_pairs(seed=11)
    for kind in KINDS:
        tokens = preference_loss(*pairs[:4], kind=kind, mask=pairs.mask, **needed(kind))
        sums = preference_loss(*pairs.sums(), kind=kind, lengths=pairs.lengths(), **needed(kind))
        torch.testing.assert_close(tokens.loss, sums.loss, **EXACT)
    wpo = [
        preference_loss(*pairs[:4], mask=pairs.mask, weighting="wpo").loss,
        preference_loss(*pairs.sums(), lengths=pairs.lengths(), weighting="wpo").loss,
    ]
    torch.testing.assert_close(*wpo, **EXACT)


def test_reference_given_as_sums():
    pairs = make_pairs(seed=12)
    by_token = preference_loss(*pairs[:4], mask=pairs.mask).loss
    by_sum = preference_loss(*pairs[:2], *pairs.sums()[2:], mask=pairs.mask).loss
    torch.testing.assert_close(by_token, by_sum, **EXACT)


def test_ld_alpha_1_is_plain_and_0_drops_the_tail():
    pairs = make_pairs(seed=13)
    plain = preference_loss(*pairs[:4], mask=pairs.mask).loss
    torch.testing.assert_close(preference_loss(*pairs[:4], mask=pairs.mask, ld_alpha=1.0).loss, plain, **EXACT)
    cut = [m & (m.cumsum(1) <= torch.minimum(*pairs.lengths())[:, None]) for m in pairs.mask]
    short = preference_loss(*pairs[:4], mask=tuple(cut)).loss
    torch.testing.assert_close(preference_loss(*pairs[:4], mask=pairs.mask, ld_alpha=0.0).loss, short, **EXACT)
    assert short != plain


def test_average_logprob_is_the_loss_of_means():
    """Sums and counts, or means: the same. Kinds that average on their own stay as they are, and so does the NLL."""
    pairs = make_pairs(seed=15)
    lengths = pairs.lengths()
    means = [x / n for x, n in zip(pairs.sums(), lengths * 2, strict=True)]
    for kind in set(KINDS) - {"sigmoid_norm", "ipo", "simpo", "orpo", "cpo", "sft"}:
        averaged = preference_loss(*pairs.sums(), kind=kind, lengths=lengths, average_logprob=True, **needed(kind))
        torch.testing.assert_close(averaged.loss, preference_loss(*means, kind=kind, **needed(kind)).loss, **EXACT)
    for kind in ("sigmoid_norm", "ipo", "simpo", "orpo", "sft"):
        averaged = preference_loss(*pairs[:4], mask=pairs.mask, kind=kind, average_logprob=True)
        torch.testing.assert_close(averaged.loss, preference_loss(*pairs[:4], mask=pairs.mask, kind=kind).loss, **EXACT)


# ---- mixes and registration ----


def test_mixes_add_up_and_name_their_parts():
    pairs = make_pairs(seed=14)
    args = dict(lengths=pairs.lengths())
    parts = {k: preference_loss(*pairs.sums(), kind=k, **args).loss for k in ("sigmoid", "bco_pair", "sft")}
    want = 0.8 * parts["sigmoid"] + 0.2 * parts["bco_pair"] + parts["sft"]
    by_dict = preference_loss(*pairs.sums(), kind={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, **args)
    by_list = preference_loss(*pairs.sums(), kind=list(parts), loss_weights=[0.8, 0.2, 1.0], **args)
    for loss, metrics in (by_dict, by_list):
        torch.testing.assert_close(loss, want, **EXACT)
        for name, value in parts.items():
            torch.testing.assert_close(metrics[f"loss/{name}"], value, **EXACT)


def test_rpo_alpha_is_an_sft_term():
    pairs = make_pairs(seed=15)
    ours = preference_loss(*pairs.sums(), lengths=pairs.lengths(), rpo_alpha=0.7).loss
    mixed = preference_loss(*pairs.sums(), lengths=pairs.lengths(), kind={"sigmoid": 1.0, "sft": 0.7}).loss
    assert ours == mixed
    assert ours != preference_loss(*pairs.sums()).loss


def test_registered_loss_of_a_user():
    @register_preference_loss("squared_hinge", difference=True, params={"target": 1.0})
    def squared_hinge(terms, options):
        margin = options.beta * (terms.chosen_score - terms.rejected_score)
        return (options.params["target"] - margin).relu().square()

    try:
        w, l, rw, rl = make_pairs(seed=16).sums()  # noqa: E741
        loss = preference_loss(w, l, rw, rl, kind="squared_hinge", beta=0.2, target=0.5).loss
        want = [max(0.0, 0.5 - 0.2 * float(x)) ** 2 for x in (w - rw) - (l - rl)]
        assert loss.item() == pytest.approx(sum(want) / len(want), rel=1e-12)
        with pytest.raises(ValueError, match="already registered"):
            register_preference_loss("squared_hinge")(squared_hinge)
    finally:
        del _VARIANTS["squared_hinge"]


# ---- gradients, extremes, NaN ----


@pytest.mark.parametrize(("kind", "f_divergence"), WITH_DIVERGENCES)
def test_gradcheck(kind, f_divergence):
    pairs = make_pairs(pairs=4, seed=17)
    w, l, rw, rl = (x / 2 for x in pairs.sums())  # noqa: E741
    for function in (preference_loss, oracle.preference_loss):
        assert torch.autograd.gradcheck(
            lambda a, b, f=function: f(
                a, b, rw, rl, kind=kind, lengths=pairs.lengths(), f_divergence=f_divergence, **needed(kind)
            )[0],
            (w.clone().requires_grad_(), l.clone().requires_grad_()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "divergence"), WITH_DIVERGENCES)
def test_extreme_log_ratios_stay_finite(kind, divergence, dtype):
    w = torch.tensor([-1e3, 0.0, -1e3, 0.0, -5.0], dtype=dtype, requires_grad=True)
    l = torch.tensor([0.0, -1e3, -1e3, 0.0, -5.0], dtype=dtype, requires_grad=True)  # noqa: E741
    rw = torch.tensor([0.0, -1e3, -1e3, 0.0, -5.0], dtype=dtype)
    lengths = (torch.full((5,), 1), torch.full((5,), 2))
    loss, metrics = preference_loss(w, l, rw, rw.flip(0), kind=kind, lengths=lengths, f_divergence=divergence,
                                    **needed(kind))  # fmt: skip
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert w.grad.isfinite().all()
    assert l.grad is None or l.grad.isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


def test_log1p_exp_is_exact_at_both_ends():
    """-log sigmoid(x) at x = -1000 is 1000, at 30 it is exp(-30): neither inf nor 0."""
    zero = torch.zeros(1, dtype=torch.float64)
    for x, want in ((-1000.0, 1000.0), (30.0, math.log1p(math.exp(-30)))):
        loss = preference_loss(zero + x, zero, zero, zero, beta=1.0).loss
        assert loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden_and_stays_in_its_pair(kind):
    pairs = make_pairs(seed=18)
    sums = pairs.sums()
    for side in range(2):
        broken = [x.clone() for x in sums]
        broken[side][1] = torch.nan
        loss = preference_loss(*broken, kind=kind, lengths=pairs.lengths(), **needed(kind)).loss
        assert loss.isnan() or (kind == "sft" and side == 1)
        if kind in BATCH_KINDS:
            continue
        weight = torch.ones(5).scatter_(0, torch.tensor([1]), 0.0)  # the pair taken out: the rest intact
        leaves = [x.requires_grad_() for x in broken[:2]]
        out, metrics = preference_loss(*broken, kind=kind, lengths=pairs.lengths(), pair_weight=weight, **needed(kind))
        for grad in torch.autograd.grad(out, leaves, allow_unused=True):
            assert grad is None or grad.isfinite().all()
        assert all(m.isfinite() for m in metrics.values())
        keep = [0, 2, 3, 4]
        rest = preference_loss(
            *(x[keep] for x in sums), kind=kind, lengths=tuple(n[keep] for n in pairs.lengths()), **needed(kind)
        ).loss
        torch.testing.assert_close(out.detach(), rest, **EXACT)


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_sorting_leaves_out_pairs_that_do_not_count_and_keeps_their_nan_out(kind):
    pairs = make_pairs(pairs=6, seed=19)
    mask = tuple(m.clone() for m in pairs.mask)
    mask[0][2] = False
    mask[1][4] = False
    loss, grads, _ = run(preference_loss, pairs._replace(mask=mask), kind)
    keep = [0, 1, 3, 5]
    rest = [x[keep] for x in pairs.sums()]
    torch.testing.assert_close(loss, preference_loss(*rest, kind=kind).loss, **EXACT)
    assert grads[0].isfinite().all()
    assert not grads[0][[2, 4]].any()
    poisoned = pairs.chosen.clone()
    poisoned[0, 1] = torch.nan
    assert run(preference_loss, pairs._replace(mask=mask, chosen=poisoned), kind)[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_counts_gives_zero(kind):
    pairs = make_pairs(seed=20)
    nothing = pairs._replace(mask=tuple(torch.zeros_like(m) for m in pairs.mask))
    loss, grads, metrics = run(preference_loss, nothing, kind, **needed(kind))
    assert loss == 0
    assert loss.requires_grad
    assert not grads[0].any()
    assert all(m.isfinite() for m in metrics.values())
    empty = [x[:0].requires_grad_() for x in pairs.sums()]
    loss, metrics = preference_loss(*empty, kind=kind, lengths=tuple(n[:0] for n in pairs.lengths()), **needed(kind))
    loss.backward()
    assert loss == 0
    assert all(m.isfinite() for m in metrics.values())


def test_inputs_are_not_written_and_low_precision_is_computed_in_fp32():
    sums = [x.bfloat16() for x in make_pairs(seed=21).sums()]
    before = [x.clone() for x in sums]
    ours = preference_loss(*sums, kind="sigmoid").loss
    truth = preference_loss(*(x.double() for x in sums), kind="sigmoid").loss
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(sums, before, strict=True))


# ---- properties ----

numbers = st.floats(-300, 0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers, numbers, st.integers(1, 50), st.integers(1, 50)), min_size=1),
    kind=st.sampled_from([k for k in KINDS if k not in (*BATCH_KINDS, "orpo", "exo_pair")]),
    beta=st.floats(0.01, 5),
)
def test_any_pairs_equal_scalar_arithmetic(rows, kind, beta):
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    sums, lengths = columns[:4], tuple(columns[4:])
    e = needed(kind).get("label_smoothing", 0.0)
    if kind == "discopop" and any(beta * (r[0] - r[2] - r[1] + r[3]) < -30 for r in rows):
        return  # exp(-x) * sigmoid(x / tau) overflows in the scalar formula, not in ours
    want = mean_of_scalars(kind, sums, lengths, beta=beta, e=e)
    options = {"sft_average": "sequence"} if kind in ("sft", "cpo") else {}
    loss = preference_loss(*sums, kind=kind, lengths=lengths, beta=beta, **needed(kind), **options).loss
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    cut=st.integers(1, 6),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([k for k in KINDS if k not in BATCH_KINDS]),
    ld_alpha=st.sampled_from([None, 0.4]),
)
def test_micro_batches_add_up_to_the_batch(cut, seed, kind, ld_alpha):
    pairs = make_pairs(pairs=7, seed=seed)
    options = {"mask": pairs.mask, "kind": kind, "ld_alpha": ld_alpha, **needed(kind)}
    whole = preference_loss(*pairs[:4], **options)
    counts = {"normalizer": 7, "chosen_tokens": int(pairs.mask[0].sum())}
    parts = []
    for rows in (slice(0, cut), slice(cut, 7)):
        options["mask"] = tuple(m[rows] for m in pairs.mask)
        parts.append(preference_loss(*(x[rows] for x in pairs[:4]), **options, **counts))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, **EXACT)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value, **EXACT)


# ---- errors ----

B = torch.zeros(3)
BAD_CALLS = {
    "unknown kind": (dict(kind="sigmiod"), "did you mean 'sigmoid'"),
    "unknown option": (dict(betta=0.1), "did you mean 'beta'"),
    "unknown parameter": (dict(kind="simpo", params={"gama": 1}), "parameter of preference loss"),
    "another kind's parameter": (dict(kind="hinge", simpo_gamma=1.0), "option of preference loss"),
    "beta 0": (dict(beta=0.0), "beta must be a finite number > 0, got 0.0"),
    "robust at 0.5": (dict(kind="robust", label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\) for 'robust'"),
    "smoothing 0.6": (dict(label_smoothing=0.6), r"label_smoothing must be in \[0, 0.5\], got 0.6"),
    "smoothing nan": (dict(label_smoothing=math.nan), "label_smoothing must be"),
    "smoothing unused": (dict(kind="hinge", label_smoothing=0.1), "label_smoothing must be 0 for hinge"),
    "exo without smoothing": (dict(kind="exo_pair"), "label_smoothing must be > 0 for 'exo_pair'"),
    "f-divergence": (dict(f_divergence="jss"), "did you mean 'js'"),
    "unsound f-divergence": (dict(kind="apo_zero", f_divergence="js"), "got 'apo_zero'"),
    "ld_alpha": (dict(ld_alpha=1.5), r"ld_alpha must be in \[0, 1\], got 1.5"),
    "ld_alpha on sums": (dict(ld_alpha=0.5), r"ld_alpha needs per-token chosen \(B, T\), got chosen \(3,\)"),
    "average without lengths": (dict(average_logprob=True), "lengths must be two .* for average_logprob, got None"),
    "weighting": (dict(weighting="wop"), "weighting must be None or 'wpo', got 'wop'"),
    "wpo without lengths": (dict(weighting="wpo"), "lengths must be two .* for weighting 'wpo', got None"),
    "wpo of aot": (dict(kind="aot", weighting="wpo"), "weighting must be None for aot"),
    "ipo without lengths": (dict(kind="ipo"), r"lengths must be two \(B,\)=\(3,\) tensors for kind 'ipo', got None"),
    "mask on sums": (dict(mask=(B, B)), r"mask goes with per-token chosen \(B, T\), got chosen \(3,\)"),
    "weights": (dict(kind=["sigmoid", "hinge"], loss_weights=[1.0]), "one number per kind, 2, got 1"),
    "weights twice": (dict(kind={"sigmoid": 1.0}, loss_weights=[1.0]), "loss_weights goes with a list"),
    "nan weight": (dict(kind={"sigmoid": math.nan}), "the weight of 'sigmoid' must be a number"),
    "same twice": (dict(kind=["sft", "sigmoid"], rpo_alpha=1.0), "each once"),
    "no kind": (dict(kind=[]), "at least one"),
    "sft_average": (dict(kind="sft", sft_average="tokens"), "sft_average must be"),
    "tau": (dict(kind="discopop", discopop_tau=0.0), "discopop_tau must be"),
    "pair_weight": (dict(pair_weight=torch.ones(4)), r"pair_weight must be \(B,\)=\(3,\), got \(4,\)"),
}


@pytest.mark.parametrize(("options", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(B, B, B, B, **options)


def test_errors_of_shapes():
    with pytest.raises(ValueError, match=r"rejected must be \(B,\)=\(3,\), got \(4,\)"):
        preference_loss(B, torch.zeros(4), B, B)
    with pytest.raises(ValueError, match=r"ref_chosen must be \(B,\)=\(3,\), got \(1,\)"):
        preference_loss(B, B, torch.zeros(1), B)
    with pytest.raises(ValueError, match=r"ref_chosen must be \(B,\)=\(3,\) for kind 'sigmoid', got None"):
        preference_loss(B, B)
    with pytest.raises(ValueError, match="given together"):
        preference_loss(B, B, B)
    with pytest.raises(ValueError, match="chosen must be float32"):
        preference_loss(B.long(), B, B, B)
    with pytest.raises(ValueError, match=r"chosen must be \(B,\) or \(B, T\), got \(\)"):
        preference_loss(torch.zeros(()), B, B, B)
    tokens, mask = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of rejected must be \(B, T\)=\(3, 5\), got \(3, 4\)"):
        preference_loss(tokens, torch.zeros(3, 5), B, B, mask=(mask, mask))
    with pytest.raises(ValueError, match=r"ref_chosen must be \(P,\)=\(3,\), got \(2,\)"):
        preference_loss(tokens, tokens, B[:2], B[:2])
    with pytest.raises(ValueError, match="lengths goes with"):
        preference_loss(tokens, tokens, B, B, lengths=(B, B))
    with pytest.raises(ValueError, match="pair_weight must be absent"):
        preference_loss(tokens, tokens, B, B, kind="aot", pair_weight=B)
    for kind in ("aot", "aot_unpaired", ["sigmoid", "aot"]):
        with pytest.raises(ValueError, match="pair_weight must be absent for losses that sort"):
            preference_loss(B, B, B, B, kind=kind, pair_weight=B)

"""DPO's family and KTO inside `fused_linear_loss`, against autograd over whole logits. Runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import BATCH_KINDS, NEEDED

from rlhf_fast import fused_linear_loss
from rlhf_fast.losses import DPO, KTO, PreferenceLoss, kto_loss, pair_segments, preference_loss_kinds
from rlhf_fast.reference import kto_loss as ref_kto_loss
from rlhf_fast.reference import linear_logprob as ref_linear_logprob
from rlhf_fast.reference import preference_loss as ref_preference_loss

# fp64: products over D = 6, sums over some 40 tokens, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
KINDS = preference_loss_kinds()
SCALE = {"beta": 0.3}


class Problem:
    """Interleaved sequences chosen, rejected, chosen, ... under a linear head, with prompts that are not scored."""

    def __init__(self, sequences: int, seed: int = 0, vocab: int = 13, dtype=torch.float64):
        gen = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 8, (sequences,), generator=gen)
        self.cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        n = int(self.cu[-1])
        self.hidden = torch.randn(n, 6, generator=gen, dtype=dtype)
        self.weight = torch.randn(vocab, 6, generator=gen, dtype=dtype)
        self.target = torch.randint(vocab, (n,), generator=gen)
        drop = torch.rand(n, generator=gen) < 0.25
        drop[self.cu[:-1]] = False
        self.target[drop] = -100
        self.ref = torch.where(drop, torch.nan, -torch.rand(n, generator=gen, dtype=dtype) * 4)
        self.lss = torch.where(drop, torch.nan, -torch.rand(n, generator=gen, dtype=dtype))

    def fused(self, loss_fn, batch, segments, **kwargs):
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        out = fused_linear_loss(hidden, weight, self.target, loss_fn, batch=batch, segments=segments, **kwargs)
        out.loss.backward()
        return out.loss.detach(), hidden.grad, weight.grad, out.metrics

    def naive(self, loss_of):
        """loss_of(logprob (N,)) with the logits formed and autograd through everything."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        logprob = ref_linear_logprob(hidden, weight, self.target).logprob
        loss, metrics = loss_of(logprob)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad, metrics

    def padded(self, values: torch.Tensor):
        """(N,) -> chosen (P, T), rejected (P, T), NaN where nothing is scored; and the masks."""
        rows = [values[a:b] for a, b in zip(self.cu[:-1], self.cu[1:], strict=True)]
        masks = [self.target[a:b] != -100 for a, b in zip(self.cu[:-1], self.cu[1:], strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        values = pad(rows, batch_first=True, padding_value=torch.nan)
        mask = pad(masks, batch_first=True, padding_value=False)
        return (values[0::2], values[1::2]), (mask[0::2], mask[1::2])


def assert_same(ours, theirs, **tolerance):
    for name, a, b in zip(("loss", "dhidden", "dweight"), ours, theirs, strict=False):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}", **(tolerance or EXACT))
    shared = ours[3].keys() & theirs[3].keys()
    assert len(shared) >= 6
    for key in shared:
        torch.testing.assert_close(ours[3][key], theirs[3][key], msg=lambda m, k=key: f"{k}: {m}", **EXACT)


def both(problem, kind, *, chunk_size=None, batch=None, by_sum=False, **options):
    """(fused, naive) for a preference loss."""
    batch = dict(batch or {})
    segments, is_chosen = pair_segments(problem.cu, problem.target.numel())
    loss_fn = PreferenceLoss(kind, **SCALE, **options)
    given = {"is_chosen": is_chosen, "ref_logprob": problem.ref, **batch}
    (ref_c, ref_r), masks = problem.padded(problem.ref)
    refs = (ref_c, ref_r)
    if by_sum:
        refs = [torch.where(m, r, 0).sum(1) for r, m in zip(refs, masks, strict=True)]
        del given["ref_logprob"]
        given.update(ref_chosen=refs[0], ref_rejected=refs[1])
    ours = problem.fused(loss_fn, given, segments, chunk_size=chunk_size)
    more = {k: v for k, v in batch.items() if k != "log_sum_sq"}
    if "log_sum_sq" in batch:
        more["log_sum_sq"] = problem.padded(problem.lss)[0]

    def naive(logprob):
        (chosen, rejected), _ = problem.padded(logprob)
        return ref_preference_loss(chosen, rejected, *refs, kind=kind, mask=masks, **SCALE, **options, **more)

    return ours, problem.naive(naive)


@pytest.mark.parametrize("chunk_size", [1, 9, None])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_autograd_over_logits(kind, chunk_size):
    """Chunks of single pairs (wider than the tile: recomputed), of a few pairs, of all."""
    assert_same(*both(Problem(10, seed=len(kind)), kind, chunk_size=chunk_size, **NEEDED.get(kind, {})))


OPTIONS = {
    "mix": {"kind": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
    "rpo": {"kind": "sigmoid", "rpo_alpha": 0.5},
    "ipo_sum": {"kind": "ipo", "length_average": False},
    "ld": {"kind": "sigmoid", "ld_alpha": 0.3},
    "ld_sft": {"kind": {"ipo": 1.0, "sft": 1.0}, "ld_alpha": 0.0},
    "average": {"kind": {"apo_zero": 1.0, "sft": 0.5}, "average_logprob": True},
    "average_by_sum": {"kind": "hinge", "average_logprob": True, "by_sum": True},
    "forward_kl": {"kind": "sigmoid", "f_divergence": "forward_kl"},
    "js": {"kind": "hinge", "f_divergence": "js"},
    "smoothing": {"kind": "sigmoid", "label_smoothing": 0.2},
    "reference_free": {"kind": "sigmoid", "reference_free": True},
    "wpo": {"kind": "sigmoid", "weighting": "wpo"},
    "mix_with_aot": {"kind": {"aot": 0.5, "sigmoid": 0.5}},
    "by_sum": {"kind": "sigmoid", "by_sum": True},
}


@pytest.mark.parametrize("chunk_size", [8, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_autograd_over_logits(options, chunk_size):
    assert_same(*both(Problem(12, seed=1), chunk_size=chunk_size, **options))


@pytest.mark.parametrize("chunk_size", [8, None])
def test_weights_and_numbers_of_the_batch(chunk_size):
    problem = Problem(8, seed=2)
    weight = torch.tensor([1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    batch = {"pair_weight": weight, "normalizer": 9.0, "chosen_tokens": 50}
    assert_same(*both(problem, {"sigmoid": 1.0, "sft": 0.3}, chunk_size=chunk_size, batch=batch))
    assert_same(*both(problem, "sigmoid", weighting="wpo", batch={"log_sum_sq": problem.lss}, chunk_size=chunk_size))
    ours, theirs = both(problem, "bco_pair", batch={"bco_delta": torch.tensor(0.4, dtype=torch.float64)})
    assert_same(ours, theirs)
    assert ours[0] != both(problem, "bco_pair")[0][0]


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    chunk_size=st.integers(1, 60),
    kind=st.sampled_from(["sigmoid", "ipo", "aot", "simpo"]),
    ld_alpha=st.sampled_from([None, 0.5]),
)
def test_any_chunking_of_any_pairs(pairs, seed, chunk_size, kind, ld_alpha):
    assert_same(*both(Problem(2 * pairs, seed=seed), kind, chunk_size=chunk_size, ld_alpha=ld_alpha))


def test_three_products_and_one_chunk_only_where_the_loss_sorts():
    problem = Problem(10, seed=3)
    scored = int((problem.target != -100).sum())
    for kind in ("sigmoid", "aot"):
        ours, _ = both(problem, kind)
        assert ours[3]["rows_forward"] == scored  # nothing recomputed: all pairs in one tile
        assert ours[3]["rows_backward"] == scored
    assert both(problem, "aot", chunk_size=9)[0][3]["rows_forward"] == 2 * scored


def test_a_pair_without_weight_costs_no_second_product():
    problem = Problem(8, seed=4)
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    ours, _ = both(problem, "sigmoid", batch={"pair_weight": weight})
    segments, _ = pair_segments(problem.cu, problem.target.numel())
    counted = torch.repeat_interleave(weight != 0, segments.diff()) & (problem.target != -100)
    assert ours[3]["rows_backward"] == counted.sum()


def test_padded_rows_with_a_batch_dimension():
    """(2P, T) targets as a model hands them over; segments are the rows, two by two."""
    problem = Problem(6, seed=5)
    packed, _ = both(problem, "sigmoid")
    pad = torch.nn.utils.rnn.pad_sequence

    def rows(x, fill):
        parts = [x[a:b] for a, b in zip(problem.cu[:-1], problem.cu[1:], strict=True)]
        return pad(parts, batch_first=True, padding_value=fill)

    hidden = rows(problem.hidden, 9.0).requires_grad_()
    target, ref = rows(problem.target, -100), rows(problem.ref, torch.nan)
    segments, is_chosen = pair_segments(torch.arange(7) * target.shape[1], target.numel())
    batch = {"is_chosen": is_chosen, "ref_logprob": ref}
    out = fused_linear_loss(hidden, problem.weight, target, DPO(**SCALE), batch=batch, segments=segments)
    torch.testing.assert_close(out.loss.detach(), packed[0], **EXACT)
    out.loss.backward()
    assert not hidden.grad[target == -100].any()


def test_pairs_with_an_empty_side_do_not_count():
    problem = Problem(8, seed=6)
    for kind in ("sigmoid", "aot", "sft"):
        problem.target[problem.cu[2] : problem.cu[3]] = -100  # chosen side of pair 1
        problem.target[problem.cu[7] : problem.cu[8]] = -100  # rejected side of pair 3
        ours, theirs = both(problem, kind)
        assert_same(ours, theirs)
        assert not ours[1][problem.cu[2] : problem.cu[4]].any()


def test_as_many_tokens_as_pairs():
    """N = P, most pairs empty: per-token and per-pair tensors have one size, and only their names tell them apart."""
    problem = Problem(6, seed=14)
    problem.cu = torch.tensor([0, 0, 0, 1, 3, 3, 3])
    for name in ("hidden", "target", "ref"):
        setattr(problem, name, getattr(problem, name)[:3].clone())
    problem.target[:] = torch.tensor([3, 5, 2])
    problem.ref = torch.linspace(-3, -1, 3, dtype=torch.float64)
    for chunk_size in (1, None):
        ours, theirs = both(problem, {"sigmoid": 1.0, "simpo": 0.5}, chunk_size=chunk_size)
        assert_same(ours, theirs)
        assert ours[1].any()


def test_nothing_scored():
    problem = Problem(4, seed=7)
    problem.target[:] = -100
    segments, is_chosen = pair_segments(problem.cu, problem.target.numel())
    for kind in ("sigmoid", "aot", {"ipo": 1.0, "sft": 1.0}):
        batch = {"is_chosen": is_chosen, "ref_logprob": problem.ref}
        ours = problem.fused(DPO(kind), batch, segments)
        assert ours[0] == 0
        assert not ours[1].any()
        assert not ours[2].any()
        assert all(m.isfinite() for m in ours[3].values())


def test_pair_segments():
    segments, is_chosen = pair_segments(torch.tensor([0, 3, 5, 5, 6], dtype=torch.int32), 6)
    assert segments.tolist() == [0, 5, 6]
    assert is_chosen.tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(2P\+1,\), got \(4,\)"):
        pair_segments(torch.arange(4), 3)


def test_errors_of_the_batch():
    problem = Problem(4, seed=8)
    n = problem.target.numel()
    segments, is_chosen = pair_segments(problem.cu, n)
    good = {"is_chosen": is_chosen, "ref_logprob": problem.ref}

    def call(match, *, drop=(), kind="sigmoid", segments=segments, **batch):
        batch = {k: v for k, v in {**good, **batch}.items() if k not in drop}
        with pytest.raises(ValueError, match=match):
            problem.fused(DPO(kind), batch, segments)

    call("segments must be given", segments=None)
    call("batch must hold 'is_chosen'", drop=["is_chosen"])
    call("batch must hold 'ref_logprob'", drop=["ref_logprob"])
    call(r"is_chosen must be \(N,\) bool", is_chosen=is_chosen.long())
    call(rf"ref_logprob must be \(N,\)=\({n},\), got \(3,\)", ref_logprob=problem.ref[:3])
    call(r"pair_weight must be \(P,\)=\(2,\), got \(4,\)", pair_weight=torch.ones(4))
    call("pair_weight must be absent for losses that sort", kind="aot", pair_weight=torch.ones(2))
    call("unknown batch key 'ref_logprobs'; did you mean 'ref_logprob'", ref_logprobs=problem.ref)
    call(r"normalizer must be a number or a 0-d tensor, got \(2,\)", normalizer=torch.ones(2))
    with pytest.raises(ValueError, match="must come from prepare"):
        DPO()(problem.ref, None, {})


# ---- KTO ----


def kto_both(problem, loss_fn, desirable, kl, *, chunk_size=None, **numbers):
    batch = {"desirable": desirable, "ref_logprob": problem.ref, "kl": kl, **numbers}
    ours = problem.fused(loss_fn, batch, problem.cu, chunk_size=chunk_size)
    kept = problem.target != -100
    ids = torch.repeat_interleave(torch.arange(len(problem.cu) - 1), problem.cu.diff())

    def sums(x):
        return torch.zeros(len(problem.cu) - 1, dtype=x.dtype).index_add(0, ids[kept], x[kept])

    options = {"beta": loss_fn.beta, "desirable_weight": loss_fn.desirable_weight}
    options["undesirable_weight"] = loss_fn.undesirable_weight

    def naive(logprob):
        length = sums(kept.double())
        share = 1 / length.clamp(min=1) if loss_fn.average_logprob else 1.0
        refs = share * sums(problem.ref)
        return ref_kto_loss(share * sums(logprob), refs, desirable, kl=kl, kind=loss_fn.kind, mask=length > 0,
                            **options, **numbers)  # fmt: skip

    return ours, problem.naive(naive)


@pytest.mark.parametrize("chunk_size", [1, 9, None])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0], [1] * 5, [0] * 5], ids=["both", "desirable", "undesirable"])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_equals_autograd_over_logits(kind, labels, chunk_size):
    loss_fn = KTO(kind, beta=0.4, desirable_weight=1.0, undesirable_weight=1.3)
    problem = Problem(5, seed=9)
    desirable = torch.tensor(labels, dtype=torch.bool)
    for kl in (0.7, torch.tensor(-0.3)):
        assert_same(*kto_both(problem, loss_fn, desirable, kl, chunk_size=chunk_size))
    assert_same(*kto_both(problem, loss_fn, desirable, 0.7, chunk_size=chunk_size, normalizer=8))
    averaged = KTO(kind, beta=0.4, undesirable_weight=1.3, average_logprob=True)
    assert_same(*kto_both(problem, averaged, desirable, 0.1, chunk_size=chunk_size))
    with pytest.raises(ValueError, match="average_logprob needs tokens"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), kl=0.0, kind=averaged)


def test_kto_leaves_out_sequences_that_are_not_scored():
    problem = Problem(5, seed=10)
    problem.target[problem.cu[1] : problem.cu[2]] = -100
    assert_same(*kto_both(problem, KTO(), torch.tensor([True, False, True, False, True]), 0.1, chunk_size=6))


def test_kto_with_one_token_per_sequence_some_of_them_not_scored():
    """N = S: per-token and per-sequence tensors have one size, and only their names tell them apart."""
    problem = Problem(6, seed=11)
    problem.cu = torch.arange(7)
    for name in ("hidden", "target", "ref"):
        setattr(problem, name, getattr(problem, name)[:6].clone())
    problem.target[:] = torch.tensor([-100, 3, 5, -100, 2, 1])
    problem.ref = torch.linspace(-3, -1, 6, dtype=torch.float64)
    for chunk_size in (1, 2, None):
        desirable = torch.tensor([True, False, False, True, True, False])
        assert_same(*kto_both(problem, KTO(beta=0.5), desirable, 0.1, chunk_size=chunk_size))


def test_kto_errors_of_the_batch():
    problem = Problem(3, seed=12)
    good = {"desirable": torch.ones(3, dtype=torch.bool), "ref_logprob": problem.ref, "kl": 0.0}

    def call(match, *, drop=(), segments=problem.cu, **batch):
        batch = {k: v for k, v in {**good, **batch}.items() if k not in drop}
        with pytest.raises(ValueError, match=match):
            problem.fused(KTO(), batch, segments)

    call("segments must be given", segments=None)
    call("batch must hold 'desirable'", drop=["desirable"])
    call("batch must hold", drop=["ref_logprob"])
    call("kl must be given for kind 'kto'", drop=["kl"])
    call(r"desirable must be \(S,\)=\(3,\), got \(2,\)", desirable=good["desirable"][:2])
    call("desirable must be bool, got torch.int64", desirable=torch.ones(3, dtype=torch.long))
    call(r"kl must be a number or a 0-d tensor, got \(3,\)", kl=torch.zeros(3))
    call("did you mean 'kl'", kll=0.0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in BATCH_KINDS])
def test_chunks_in_fp32_stay_close_to_fp64(kind):
    """Chunk sums in fp32 against the same in fp64: log-probabilities of size 10 round at 1e-6."""
    exact, rounded = Problem(8, seed=13), Problem(8, seed=13)
    for name in ("hidden", "weight", "ref"):
        setattr(rounded, name, getattr(exact, name).float())
        setattr(exact, name, getattr(rounded, name).double())
    ours, _ = both(rounded, kind, chunk_size=9, **NEEDED.get(kind, {}))
    truth, _ = both(exact, kind, chunk_size=9, **NEEDED.get(kind, {}))
    size = 1 + truth[0].abs()
    assert (ours[0] - truth[0]).abs() <= 2e-6 * size
    assert (ours[1] - truth[1]).abs().max() <= 1e-5 * size

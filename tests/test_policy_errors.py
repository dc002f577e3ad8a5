"""What bad input gets: the name, what was expected, what came. And registering a loss of one's own. CPU."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlhf_fast import fused_linear_loss
from rlhf_fast.losses import PolicyLoss, policy_loss, register_policy_loss
from rlhf_fast.losses.registry import _VARIANTS
from rlhf_fast.losses.segments import Segments
from rlhf_fast.losses.weights import largest, masked_quantile, rollout_correction

B, T = 4, 6
X = torch.zeros(B, T)
A = torch.zeros(B)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"advantages": torch.zeros(T, B)}, r"advantages must be \(B, T\)=\(4, 6\) or \(B,\)=\(4,\), got \(6, 4\)"),
        ({"advantages": torch.zeros(3)}, r"advantages must be .* got \(3,\)"),
        ({"old_logprob": torch.zeros(B, T + 1)}, r"old_logprob must be \(B, T\)=\(4, 6\), got \(4, 7\)"),
        ({"ref_logprob": torch.zeros(B * T)}, r"ref_logprob must be \(B, T\)=\(4, 6\), got \(24,\)"),
        ({"mask": torch.ones(T, B).bool()}, r"mask must be \(B, T\)=\(4, 6\), got \(6, 4\)"),
        ({"entropy": torch.zeros(B)}, r"entropy must be \(B, T\)"),
        ({"rollout_logprob": torch.zeros(B)}, r"rollout_logprob must be \(B, T\)"),
        (
            {"logprob": torch.zeros(B, T).long()},
            "logprob must be float32, .*, got torch.int64",
        ),
        ({"logprob": torch.zeros(1, B, T)}, r"logprob must be \(N,\) or \(B, T\), got \(1, 4, 6\)"),
        ({"cu_seqlens": torch.tensor([0, 24])}, r"cu_seqlens goes with \(N,\) input"),
        ({"kind": "gropo"}, "unknown policy loss 'gropo'; did you mean 'grpo'"),
        ({"clip_lo": 0.1}, "unknown option of policy loss 'ppo': 'clip_lo'; did you mean 'clip_low'"),
        ({"temperature_pos": 1.0}, "unknown option of policy loss 'ppo': 'temperature_pos'"),
        ({"params": {"coef": 1.0}}, "unknown parameter of policy loss 'ppo': 'coef'"),
        ({"beta": 0.1}, "ref_logprob must be given for beta=0.1, got None"),
        ({"entropy_coef": 0.1}, "entropy must be given for entropy_coef or top_entropy, got None"),
        ({"top_entropy": 0.2}, "top_entropy needs old_entropy"),
        ({"top_entropy": 1.2}, r"top_entropy must be in \[0, 1\], got 1.2"),
        ({"kind": "dr_grpo"}, "max_length must be > 0 for aggregation 'fixed_length', got None"),
        ({"aggregation": "mean"}, "aggregation must be one of token_mean, .*, got 'mean'"),
        ({"importance_level": "batch"}, "importance_level must be one of .*, got 'batch'"),
        ({"correction": "mask"}, "correction must be one of .*, got 'mask'"),
        ({"correction": "token_mask"}, "rollout_logprob must be given for correction='token_mask', got None"),
        ({"importance_weight": X[:1]}, r"importance_weight must be \(B, T\)"),
        ({"importance_weight": X, "correction": "token_mask", "rollout_logprob": X}, "takes the place of a correction"),
        ({"correction": "token_mask", "correction_min": 5.0}, "correction_min must be < correction_max=3.0, got 5.0"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, abs, k2, k3, got 'k4'"),
        ({"kl_gradient": "k4"}, "kl_gradient must be one of"),
        ({"clip_low": -0.1}, "clip_low must be >= 0, got -0.1"),
        ({"clip_low": math.nan}, "clip_low must be >= 0, got nan"),
        ({"delta": 0.0}, "delta must be > 0, got 0.0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1, got 1.0"),
        ({"kind": PolicyLoss("ppo"), "beta": 0.0}, "options must be in the PolicyLoss given as kind, got beta"),
    ],
)
def test_messages(arguments, message):
    call = {"logprob": X, "old_logprob": X, "advantages": A} | arguments
    with pytest.raises(ValueError, match=message):
        policy_loss(**call)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("grpo", {}, r"cu_seqlens must be given with \(N,\) input for policy loss 'grpo'"),
        ("vespo", {}, "cu_seqlens must be given"),
        ("ppo", {"importance_level": "sequence"}, "cu_seqlens must be given"),
        ("ppo", {"off_policy_threshold": 0.1}, "cu_seqlens must be given"),
        ("ppo", {"correction": "sequence_mask"}, "cu_seqlens must be given"),
        ("dr_grpo", {"max_length": 4}, "cu_seqlens or normalizer must be given"),
    ],
)
def test_flat_input_without_sequences(kind, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(5), torch.zeros(5), torch.zeros(5), kind=kind, **options)


@pytest.mark.parametrize("cu", [[0, 3], [1, 5], [0, 4, 3, 5], [[0, 5]]])
def test_bad_cu_seqlens(cu):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        policy_loss(torch.zeros(5), None, torch.zeros(5), kind="grpo", cu_seqlens=torch.tensor(cu))


def test_prepare_names_bad_keys():
    loss_fn = PolicyLoss("ppo")
    good = {"advantages": torch.zeros(5)}
    with pytest.raises(ValueError, match="unknown batch key 'old_logprobs'; did you mean 'old_logprob'"):
        loss_fn.prepare(good | {"old_logprobs": torch.zeros(5)}, None, None)
    with pytest.raises(ValueError, match=r"old_logprob must be \(N,\)=\(5,\), got \(4,\)"):
        loss_fn.prepare(good | {"old_logprob": torch.zeros(4)}, torch.ones(5).bool(), None)
    with pytest.raises(ValueError, match="advantages"):
        loss_fn.prepare({}, torch.ones(5).bool(), None)
    with pytest.raises(ValueError, match=r"advantages must be \(N,\)=\(5,\) or \(S,\)=\(2,\), got \(3,\)"):
        loss_fn.prepare({"advantages": torch.zeros(3)}, torch.ones(5).bool(), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="batch must come from prepare"):
        loss_fn(torch.zeros(5), None, good)
    with pytest.raises(ValueError, match="old_logprob must be given for policy loss 'kl_cov'"):
        PolicyLoss("kl_cov").prepare(good, torch.ones(5).bool(), None)
    outer = PolicyLoss("grpo", entropy_coef=0.1, normalizer=8)
    with pytest.raises(ValueError, match="entropy_normalizer"):
        outer.prepare(good, torch.ones(5).bool(), torch.tensor([0, 5]))


def test_options_resolve_by_kind():
    assert (PolicyLoss("dapo").clip_low, PolicyLoss("dapo").clip_high) == (0.2, 0.28)
    assert PolicyLoss("ppo", clip_low=0.1).clip_high == 0.1
    assert PolicyLoss("gspo").importance_level == "sequence"
    assert PolicyLoss("cispo").clip_high == PolicyLoss("cispo", clip_low=0.1).clip_high == 5.0
    assert PolicyLoss("sapo", temperature_neg=2.0).params == {"temperature_pos": 1.0, "temperature_neg": 2.0}
    assert PolicyLoss("sapo", params={"temperature_neg": 2.0}) == PolicyLoss("sapo", temperature_neg=2.0)
    assert PolicyLoss("dapo", clip_high=None) == PolicyLoss("dapo")
    assert pickle.loads(pickle.dumps(PolicyLoss("grpo", beta=0.1))) == PolicyLoss("grpo", beta=0.1)
    copy = copy_of(PolicyLoss("gspo", beta=0.1, normalizer=3.0))
    assert copy == PolicyLoss("gspo", beta=0.1, normalizer=3.0)
    one = PolicyLoss("ppo")
    assert copy_of(one)._ready_key != one._ready_key  # a compiled graph must not take one for the other
    with pytest.raises(AttributeError):
        PolicyLoss("ppo").beta = 1.0


def copy_of(loss_fn: PolicyLoss) -> PolicyLoss:
    return pickle.loads(pickle.dumps(loss_fn))


def test_a_loss_of_ones_own():
    """One small function gets aggregation, KL, masks and corrections from the composition around it."""

    @register_policy_loss("own", aggregation="seq_mean_token_mean", params={"pull": 0.5})
    def own(terms, options):
        return -terms.advantages * terms.ratio + options.params["pull"] * (terms.ratio - 1).square(), {"r": terms.ratio}

    try:
        logprob = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]], requires_grad=True)
        old, ref = torch.tensor([[-1.2, -1.9], [-0.9, 0.0]]), torch.tensor([[-1.0, -1.0], [-1.0, 0.0]])
        mask = torch.tensor([[True, True], [True, False]])
        loss, metrics = policy_loss(
            logprob, old, torch.tensor([1.0, -1.0]), kind="own", mask=mask, ref_logprob=ref, beta=0.1,
            kl_estimator="k2", pull=2.0,
        )  # fmt: skip
        r = [[math.exp(0.2), math.exp(-0.1)], [math.exp(0.4)]]
        k = [[0.0, 0.5], [0.125]]
        first = sum(-x + 2 * (x - 1) ** 2 + 0.1 * y for x, y in zip(r[0], k[0], strict=True)) / 2
        second = r[1][0] + 2 * (r[1][0] - 1) ** 2 + 0.1 * k[1][0]
        assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
        assert metrics["r"].item() == pytest.approx((sum(r[0]) + r[1][0]) / 3, rel=1e-6)
        loss.backward()
        assert logprob.grad[1, 1] == 0
        with pytest.raises(ValueError, match="policy loss 'own' is already registered"):
            register_policy_loss("own")(own)
    finally:
        del _VARIANTS["own"]


def test_a_loss_of_the_wrong_shape():
    @register_policy_loss("scalar", aggregation="token_mean")
    def scalar(terms, options):
        return terms.ratio.sum()

    try:
        with pytest.raises(ValueError, match=r"the loss of kind 'scalar' must be \(n,\)=\(24,\), got \(\)"):
            policy_loss(X, X, A, kind="scalar")
    finally:
        del _VARIANTS["scalar"]


# ---- weights, in plain Python ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_rollout_correction(level, how):
    gaps = [[0.4, -1.0, 0.3], [0.9, 0.5]]
    flat = torch.tensor([*gaps[0], *gaps[1], 0.0], dtype=torch.float64)
    valid = torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64)
    segments = Segments.from_cu_seqlens(torch.tensor([0, 3, 6]), valid)
    weight, log_weight, metrics = rollout_correction(f"{level}_{how}", 0.5, 1.5, flat, valid, segments)
    pooled = {
        "token": [g for row in gaps for g in row],
        "sequence": [sum(row) for row in gaps for _ in row],
        "geometric": [sum(row) / len(row) for row in gaps for _ in row],
    }[level]
    ratios = [math.exp(x) for x in pooled]
    clamped = [min(max(r, 0.5), 1.5) for r in ratios]
    expected = clamped if how == "truncate" else [r if 0.5 <= r <= 1.5 else 0.0 for r in ratios]
    assert weight[:5].tolist() == pytest.approx(expected)
    outside = sum(not 0.5 <= r <= 1.5 for r in ratios) / 5
    assert 0 < outside < 1
    assert metrics["rollout_dropped"].item() == pytest.approx(outside if how == "mask" else 0.0)
    assert metrics["rollout_truncated"].item() == pytest.approx(outside if how == "truncate" else 0.0)
    units = expected if level == "token" else [expected[0], expected[3]]
    assert metrics["rollout_ess"].item() == pytest.approx(sum(units) ** 2 / (len(units) * sum(u * u for u in units)))
    if how == "truncate":
        whole = sum(map(math.log, expected[:3])) if level == "token" else math.log(expected[0])
        assert segments.sum(log_weight)[0].item() == pytest.approx(whole)


def test_effective_sample_size_is_one_on_policy():
    valid = torch.ones(7)
    _, _, metrics = rollout_correction("token_truncate", None, 2.0, torch.zeros(7), valid, None)
    assert metrics["rollout_ess"] == 1.0
    assert metrics["rollout_truncated"] == 0.0


@pytest.mark.parametrize("q", [0.0, 0.25, 0.6, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9, 20])
def test_masked_quantile(q, count):
    values = torch.randn(20, dtype=torch.float64)
    valid = torch.zeros(20, dtype=torch.float64)
    valid[torch.randperm(20)[:count]] = 1
    expected = torch.quantile(values[valid.bool()], q)
    torch.testing.assert_close(masked_quantile(values, valid, q), expected, rtol=1e-12, atol=1e-12)
    assert masked_quantile(values, torch.zeros(20), q) == 0


@pytest.mark.parametrize("count", [1, 7, 30, 1000])
def test_largest_takes_the_first_among_equals(count):
    scores, eligible = torch.randint(0, 9, (400,)).double(), torch.rand(400) < 0.6
    order = sorted(eligible.nonzero().flatten().tolist(), key=lambda i: (-scores[i].item(), i))
    want = torch.zeros(400, dtype=torch.bool)
    want[order[:count]] = True
    assert torch.equal(largest(scores, eligible, torch.tensor(count)), want)


def test_largest():
    scores = torch.tensor([3.0, 9.0, 5.0, 7.0, 1.0])
    eligible = torch.tensor([True, False, True, True, True])
    assert largest(scores, eligible, torch.tensor(2)).tolist() == [False, False, True, True, False]
    assert largest(scores, eligible, torch.tensor(99)).tolist() == eligible.tolist()
    assert not largest(scores, ~eligible & False, torch.tensor(2)).any()
    with FakeTensorMode() as fake:  # no look at a count that is not there
        given = map(fake.from_tensor, (scores, eligible, torch.tensor(2)))
        assert largest(*given).shape == (5,)


def test_top_entropy_by_threshold_of_the_current_entropy():
    """Where only the chunk knows its entropy, the threshold comes from outside."""
    loss_fn = PolicyLoss("ppo", top_entropy=0.5, entropy_coef=0.1)
    entropy = torch.tensor([0.1, 0.9, 0.5, 0.7], requires_grad=True)
    logprob = torch.zeros(4, requires_grad=True)
    keys = {"advantages": torch.ones(4), "entropy_threshold": 0.5, "entropy_normalizer": 3}
    loss, _ = loss_fn(logprob, entropy, loss_fn.prepare(keys, torch.ones(4).bool(), None))
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([0.0, -0.25, -0.25, -0.25])
    assert entropy.grad.tolist() == pytest.approx([0.0, -0.1 / 3, -0.1 / 3, -0.1 / 3])


def test_unknown_rollout_logprobs_count_as_agreeing():
    old, rollout = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, float("nan")]])
    options = {"correction": "token_truncate", "correction_max": 9.0, "off_policy_threshold": 0.1}
    loss, metrics = policy_loss(old, old, torch.tensor([1.0]), rollout_logprob=rollout, **options)
    assert loss.item() == pytest.approx(-(math.exp(0.5) + 1.0) / 2)
    assert metrics["rollout_ratio_mean"].item() == pytest.approx((math.exp(0.5) + 1.0) / 2)


def test_a_drift_equal_to_the_threshold_is_kept():
    """On-policy the drift is exactly 0: a threshold of 0 drops what drifted, not everything."""
    logprob, bad = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([-1.0])
    for old, dropped in ((logprob.detach(), 0.0), (logprob.detach() + 0.1, 1.0)):
        loss, metrics = policy_loss(logprob, old, bad, off_policy_threshold=0.0)
        assert metrics["off_policy_dropped"] == dropped
        assert (loss == 0) == bool(dropped)


def test_a_weight_equal_to_its_bound_is_kept():
    logprob, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([1.0])
    options = dict(rollout_logprob=logprob, correction="token_mask", correction_min=0.5, correction_max=1.0)
    loss, metrics = policy_loss(logprob, logprob, advantages, **options)
    assert (loss, metrics["rollout_dropped"]) == (-1.0, 0.0)


def test_top_entropy_by_threshold_asks_the_fused_head_for_entropy():
    hidden, weight = torch.eye(2), torch.tensor([[0.0, 9.0], [0.0, 0.0]])  # row 0 is uniform, row 1 nearly certain
    batch = {"advantages": torch.ones(2), "entropy_threshold": 0.5}
    loss_fn = PolicyLoss("ppo", top_entropy=0.5)
    out = fused_linear_loss(hidden, weight, torch.zeros(2, dtype=torch.long), loss_fn, batch=batch)
    assert out.loss == -0.5

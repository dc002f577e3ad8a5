"""The reference itself: every kind against plain Python on a few tokens, and gradcheck. Runs on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from policy_cases import KINDS, make_batch, options_of

from rlhf_fast.losses import policy_loss
from rlhf_fast.reference import policy as oracle

# Two sequences: log-probs now and then, and one advantage each. Ratios fall on both sides of every clip below.
NOW = [[-1.0, -0.4, -2.0], [-0.7, -1.1]]
OLD = [[-1.6, -0.5, -1.4], [-0.65, -2.0]]
REF = [[-1.2, -0.9, -1.0], [-0.1, -1.2]]
ADV = [1.5, -0.8]
LEN = [3, 2]


def ratio(i, t):
    return math.exp(NOW[i][t] - OLD[i][t])


def seq_ratio(i):
    return math.exp(sum(NOW[i][t] - OLD[i][t] for t in range(LEN[i])) / LEN[i])


def ppo_term(r, a, low, high):
    return -min(r * a, min(max(r, 1 - low), 1 + high) * a)


def tokens(f):
    return [[f(i, t) for t in range(LEN[i])] for i in range(2)]


def token_mean(x):
    return sum(map(sum, x)) / 5


def grpo_mean(x):
    return sum(sum(row) / len(row) for row in x) / 2


def seq_sum(x):
    return sum(map(sum, x)) / 2


def vespo_term(i, t):
    w = math.exp(sum(NOW[i][u] - OLD[i][u] for u in range(LEN[i])))
    k, lam = (2.0, 3.0) if ADV[i] >= 0 else (3.0, 2.0)
    return -(w**k) * math.exp(lam * (1 - w)) * ADV[i] * NOW[i][t]


def sapo_term(i, t):
    tau = 1.0 if ADV[i] > 0 else 1.05
    return -ADV[i] * 4 / tau / (1 + math.exp(-tau * (ratio(i, t) - 1)))


def geo_mean_term(i):
    logs = [NOW[i][t] - OLD[i][t] for t in range(LEN[i])]
    kept = [min(x, 0.4) if ADV[i] > 0 else max(x, -0.4) for x in logs]
    return -ADV[i] * math.exp(sum(kept) / LEN[i])


def covariances():
    adv = [ADV[i] for i in range(2) for _ in range(LEN[i])]
    now = NOW[0] + NOW[1]
    return [(a - sum(adv) / 5) * (x - sum(now) / 5) for a, x in zip(adv, now, strict=True)]


def kl_cov_value():
    best = max(range(5), key=lambda k: covariances()[k])
    flat = [(i, t) for i in range(2) for t in range(LEN[i])]
    x = [-ratio(i, t) * ADV[i] for i, t in flat]
    i, t = flat[best]
    x[best] += abs(NOW[i][t] - OLD[i][t])
    return sum(x) / 5


def clip_cov_value():
    """The only token with a covariance in (0.3, 50) that the clip leaves alone is cut; noise has no choice."""
    flat = [(i, t) for i in range(2) for t in range(LEN[i])]
    x = [ppo_term(ratio(i, t), ADV[i], 0.2, 0.2) for i, t in flat]
    free = [
        k
        for k, (i, t) in enumerate(flat)
        if 0.3 < covariances()[k] < 50
        and not (ratio(i, t) > 1.2 and ADV[i] > 0)
        and not (ratio(i, t) < 0.8 and ADV[i] < 0)
    ]
    assert len(free) == 1
    x[free[0]] = 0.0
    return sum(x) / 5


def total_variation(p, q):
    return abs(p - q)


def binary_kl(p, q):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def dppo_term(i, t, distance):
    """Sequence 0 wants its tokens likelier, sequence 1 less likely; a token that went too far that way is dropped."""
    p, q = math.exp(NOW[i][t]), math.exp(OLD[i][t])
    onwards = p > q if ADV[i] > 0 else p < q
    dropped = onwards and distance(p, q) > DPPO["clip_high" if ADV[i] > 0 else "clip_low"]
    return 0.0 if dropped else -min(p / q, DPPO["ratio_max"]) * ADV[i] * NOW[i][t]


def clip_tokens(low, high):
    return tokens(lambda i, t: ppo_term(ratio(i, t), ADV[i], low, high))


def clip_sequences(low, high):
    return tokens(lambda i, t: ppo_term(seq_ratio(i), ADV[i], low, high))


EXPECTED = {
    "ppo": lambda: token_mean(clip_tokens(0.2, 0.2)),
    "grpo": lambda: grpo_mean(clip_tokens(0.2, 0.2)),
    "dapo": lambda: token_mean(clip_tokens(0.2, 0.28)),
    "bnpo": lambda: token_mean(clip_tokens(0.2, 0.2)),
    "dr_grpo": lambda: sum(map(sum, clip_tokens(0.2, 0.2))) / (2 * 16),
    "gspo": lambda: grpo_mean(clip_sequences(3e-4, 4e-4)),
    "luspo": lambda: seq_sum(clip_sequences(2e-3, 2.5e-3)),
    "reinforce": lambda: seq_sum(tokens(lambda i, t: -ADV[i] * NOW[i][t])),
    "gpg": lambda: token_mean(tokens(lambda i, t: -ADV[i] * NOW[i][t])),
    "cispo": lambda: token_mean(tokens(lambda i, t: -min(max(ratio(i, t), 0.7), 1.7) * ADV[i] * NOW[i][t])),
    "sapo": lambda: grpo_mean(tokens(sapo_term)),
    "vespo": lambda: token_mean(tokens(vespo_term)),
    "geo_mean": lambda: (geo_mean_term(0) + geo_mean_term(1)) / 2,
    "kl_cov": kl_cov_value,
    "dppo_tv": lambda: token_mean(tokens(lambda i, t: dppo_term(i, t, total_variation))),
    "dppo_kl": lambda: token_mean(tokens(lambda i, t: dppo_term(i, t, binary_kl))),
    "dro": lambda: token_mean(tokens(lambda i, t: -ADV[i] * NOW[i][t] + 0.05 * (NOW[i][t] - OLD[i][t]) ** 2)),
    "clip_cov": clip_cov_value,
}
DETACHED = ("cispo", "vespo", "dppo_tv", "dppo_kl")  # the weight of a token's gradient is a constant
DPPO = {"clip_low": 1e-5, "clip_high": 0.01, "ratio_max": 1.7}
OWN = {
    "dppo_tv": DPPO,
    "dppo_kl": DPPO,
    "dr_grpo": {"max_length": 16},
    "cispo": {"clip_high": 1.7, "ratio_min": 0.7},
    "clip_cov": {"cov_low": 0.3, "cov_high": 50.0},
}


def batch():
    def padded(rows):
        return torch.tensor([r + [float("nan")] * (3 - len(r)) for r in rows], dtype=torch.float64)

    return {
        "logprob": padded(NOW), "old_logprob": padded(OLD), "advantages": torch.tensor(ADV, dtype=torch.float64),
        "mask": torch.tensor([[True] * 3, [True, True, False]]), "ref_logprob": padded(REF),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_plain_python(kind):
    for function in (oracle.policy_loss, policy_loss):
        extra = {"noise": torch.rand(2, 3)} if kind == "clip_cov" and function is oracle.policy_loss else {}
        loss, _ = function(**batch(), kind=kind, **OWN.get(kind, {}), **extra)
        assert loss.item() == pytest.approx(EXPECTED[kind](), rel=1e-12)


def test_expected_values_cover_every_kind():
    assert set(EXPECTED) == set(KINDS)


@pytest.mark.parametrize("correct", [False, True])
def test_kl_term_in_plain_python(correct):
    def kl(i, t):
        d = NOW[i][t] - REF[i][t]
        return (math.exp(-d) - 1 + d) * (ratio(i, t) if correct else 1.0)

    expected = EXPECTED["grpo"]() + 0.3 * grpo_mean(tokens(kl))
    for function in (oracle.policy_loss, policy_loss):
        loss, metrics = function(**batch(), kind="grpo", beta=0.3, kl_correction=correct)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        raw = token_mean(tokens(lambda i, t: kl(i, t) / (ratio(i, t) if correct else 1.0)))
        assert metrics["kl"].item() == pytest.approx(raw, rel=1e-12)


@pytest.mark.parametrize(("delta", "dual_clip"), [(1.5, None), (None, 1.5)])
def test_delta_and_dual_clip_in_plain_python(delta, dual_clip):
    def term(i, t):
        a, r = ADV[i], ratio(i, t)
        loss = max(-min(r, delta or math.inf) * a, -min(max(r, 0.8), 1.2) * a)
        return min(loss, -dual_clip * a) if dual_clip and a < 0 else loss

    expected = token_mean(tokens(term))
    assert expected != pytest.approx(EXPECTED["ppo"](), rel=1e-3)
    for function in (oracle.policy_loss, policy_loss):
        loss, _ = function(**batch(), kind="ppo", delta=delta, dual_clip=dual_clip)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_metrics_in_plain_python():
    _, m = policy_loss(**batch(), kind="ppo")
    high = sum(ratio(i, t) > 1.2 and ADV[i] > 0 for i in range(2) for t in range(LEN[i])) / 5
    low = sum(ratio(i, t) < 0.8 and ADV[i] < 0 for i in range(2) for t in range(LEN[i])) / 5
    flat = [(i, t) for i in range(2) for t in range(LEN[i])]
    assert m["clip_fraction_high"].item() == pytest.approx(high)
    assert m["clip_fraction_low"].item() == pytest.approx(low)
    assert m["clip_fraction"].item() == pytest.approx(high + low)
    assert m["ratio_mean"].item() == pytest.approx(sum(ratio(i, t) for i, t in flat) / 5)
    assert m["ratio_max"].item() == pytest.approx(max(ratio(i, t) for i, t in flat))
    assert m["ratio_min"].item() == pytest.approx(min(ratio(i, t) for i, t in flat))
    approx = sum(ratio(i, t) - 1 - math.log(ratio(i, t)) for i, t in flat) / 5
    assert m["approx_kl"].item() == pytest.approx(approx)
    assert m["policy_loss"].item() == pytest.approx(EXPECTED["ppo"]())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    """Finite differences where nothing is detached; the score-function kinds hold their weight constant by design."""
    case = make_batch((4, 2, 3), 4, seed=11, spread=0.6)
    detached = kind in DETACHED
    options = {**options_of(kind), "beta": 0.1, "entropy_coef": 0.02, "noise": case["noise"]}
    constants = {k: case[k] for k in ("old_logprob", "advantages", "mask", "ref_logprob")}
    if detached:
        options["clip_high"] = 1e-9 if kind == "cispo" else 0.2  # the weight is the constant clip_high
        if kind.startswith("dppo"):
            options["ratio_max"] = 0.01
        if kind == "vespo":
            options |= {"k_pos": 0.0, "k_neg": 0.0, "lambda_pos": 0.0, "lambda_neg": 0.0}  # phi = 1

    def loss(logprob, entropy):
        return oracle.policy_loss(logprob, kind=kind, entropy=entropy, **constants, **options)[0]

    inputs = tuple(case[k].requires_grad_() for k in ("logprob", "entropy"))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("kind", DETACHED)
def test_detached_weights_carry_no_gradient(kind):
    """dL/dlogprob = weight of the token: the loss is linear in logprob, with the ratio's weight held fixed."""
    case = make_batch((4, 2, 3), 4, seed=11, spread=0.6)
    logprob = case["logprob"].requires_grad_()
    loss, _ = oracle.policy_loss(logprob, case["old_logprob"], case["advantages"], kind=kind, mask=case["mask"])
    (grad,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close((grad * logprob).sum(), loss)

"""Every policy loss against the reference: values, gradients and metrics. Runs on the CPU; no GPU needed."""

from __future__ import annotations

import pytest
import torch
from policy_cases import KINDS, make_batch, options_of, ours_with_noise, pack, run

from rlhf_fast import reference
from rlhf_fast.losses import PolicyLoss, policy_loss, policy_loss_kinds
from rlhf_fast.reference import policy as oracle

# fp64 on both sides: sums of some 30 terms of size up to 5, in different orders.
EXACT = {"rtol": 1e-12, "atol": 1e-13}

OPTION_SETS = {
    "plain": {},
    "kl_k3": {"beta": 0.1},
    "kl_k1_straight_through_k2": {"beta": 0.2, "kl_estimator": "k1", "kl_gradient": "k2"},
    "kl_abs": {"beta": 0.2, "kl_estimator": "abs"},
    "kl_corrected": {"beta": 0.1, "kl_correction": True},
    "kl_corrected_straight_through": {"beta": 0.1, "kl_correction": True, "kl_gradient": "k2"},
    "entropy": {"entropy_coef": 0.01},
    "top_entropy": {"top_entropy": 0.3, "entropy_coef": 0.01},
    "off_policy": {"off_policy_threshold": 0.0},
    "token_truncate": {"correction": "token_truncate", "correction_min": 0.7, "correction_max": 1.3},
    "token_mask": {"correction": "token_mask", "correction_max": 1.3},
    "sequence_truncate": {"correction": "sequence_truncate", "correction_max": 1.1},
    "sequence_mask": {"correction": "sequence_mask", "correction_min": 0.5},
    "geometric_mask": {"correction": "geometric_mask", "correction_min": 0.9, "correction_max": 1.2},
    "sequence_level": {"importance_level": "sequence"},
    "sequence_token_level": {"importance_level": "sequence_token", "beta": 0.1, "kl_correction": True},
    "normalizer": {"normalizer": 11.0},
    "everything": {
        "beta": 0.1, "entropy_coef": 0.02, "top_entropy": 0.5, "off_policy_threshold": 0.05,
        "correction": "token_truncate",
    },
}  # fmt: skip


def assert_same(ours, theirs, **tolerance):
    for name, a, b in zip(("loss", "metrics", "dlogprob", "dentropy"), ours, theirs, strict=True):
        if name == "metrics":
            for key in a.keys() & b.keys():
                torch.testing.assert_close(
                    a[key].to(b[key].dtype), b[key], msg=lambda m, k=key: f"{k}: {m}", **tolerance
                )
        elif a is None or b is None:
            nothing = a if b is None else b
            assert nothing is None or not nothing.any(), name
        else:
            torch.testing.assert_close(a.to(b.dtype), b, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_token", [False, True], ids=["per_sequence", "per_token"])
def test_matches_reference_in_fp64(kind, options, per_token):
    batch = make_batch(per_token=per_token, seed=len(kind))
    options = {**options_of(kind), **options}
    ours = run(ours_with_noise, batch, kind, with_noise=True, **options)
    theirs = run(oracle.policy_loss, batch, kind, with_noise=True, **options)
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_sequence", "per_token"])
@pytest.mark.parametrize("kind", KINDS)
def test_finished_importance_weights(kind, per_token):
    """Padded, with NaN under the mask; and packed as a batch for chunks."""
    batch = make_batch(seed=2)
    weight = torch.randn_like(batch["logprob"] if per_token else batch["advantages"]).exp()
    weight[3] = 0.0  # a rejected sequence
    batch["importance_weight"] = weight
    options = {**options_of(kind), "beta": 0.1, "entropy_coef": 0.01}
    theirs = run(oracle.policy_loss, batch, kind, with_noise=True, **options)
    if per_token:
        batch["importance_weight"] = weight.masked_fill(~batch["mask"], torch.nan)
    assert_same(run(ours_with_noise, batch, kind, with_noise=True, **options), theirs, **EXACT)
    if kind != "clip_cov":  # whose draw cannot be given here
        assert_same(run(policy_loss_without_noise, batch, kind, **options), theirs, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_is_a_finished_weight(kind):
    """The same numbers, whether bounded here or by the caller."""
    batch, options = make_batch(seed=4), options_of(kind)
    bounds = {"correction": "token_truncate", "correction_min": 0.8, "correction_max": 1.2}
    one = run(ours_with_noise, batch, kind, with_noise=True, **options, **bounds)
    weight = (batch["old_logprob"] - batch["rollout_logprob"]).exp().clamp(0.8, 1.2)
    two = run(ours_with_noise, batch | {"importance_weight": weight}, kind, with_noise=True, **options)
    for i in (0, 2):
        torch.testing.assert_close(one[i], two[i], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_defaults_are_those_of_the_library(kind):
    """Same kind, no options but what it cannot do without: also guards the defaults, which are written twice."""
    options = {"max_length": 16} if kind == "dr_grpo" else {}
    batch = make_batch(seed=5, spread=1.0)
    ours = run(ours_with_noise, batch, kind, with_noise=True, **options)
    assert_same(ours, run(oracle.policy_loss, batch, kind, with_noise=True, **options), **EXACT)


CLIPS = {"low": {"clip_low": 0.1}, "high": {"clip_high": 0.15}, "both": {"clip_low": 0.1, "clip_high": 0.15}}


@pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_one_clip_alone_is_read_alike(kind, clips):
    """clip_low alone is symmetric, also for the kinds with an upper clip of their own (dapo, gspo, ...)."""
    batch = make_batch(spread=0.6)
    given = {name: value for name, value in options_of(kind).items() if not name.startswith("clip_")} | clips
    ours, theirs = (run(f, batch, kind, with_noise=True, **given) for f in (ours_with_noise, oracle.policy_loss))
    assert_same(ours, theirs, **EXACT)
    if kind in ("dapo", "gspo", "luspo", "geo_mean") and "clip_high" not in clips:
        assert PolicyLoss(kind, **given).clip_high == 0.1


def test_every_kind_has_a_reference():
    assert set(KINDS) == set(oracle.KINDS)
    assert set(KINDS) <= set(policy_loss_kinds())


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize(("delta", "dual_clip"), [(1.5, None), (1.1, None), (None, 1.5), (1.8, 1.4), (0.9, None)])
def test_delta_and_dual_clip(level, delta, dual_clip):
    batch = make_batch(per_token=True, spread=0.8, seed=3)
    batch["old_logprob"] -= torch.tensor([0.9, -0.9, 0.0, 0.9, 0.9])[:, None]  # whole sequences leave the clip too
    options = {"importance_level": level, "delta": delta, "dual_clip": dual_clip, "clip_low": 0.2, "clip_high": 0.3}
    ours = run(policy_loss_without_noise, batch, "ppo", **options)
    theirs = run(oracle.policy_loss, batch, "ppo", **options)
    assert_same(ours, theirs, **EXACT)
    assert ours[1]["dual_clip_fraction"] > 0


def policy_loss_without_noise(*args, **kwargs):
    return policy_loss(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_error_budget(kind, dtype):
    """Against fp64 on the same rounded inputs, no worse than the naive formula in the working dtype plus a floor.

    The floor is one rounding of the result in the gradient's dtype (values are fp32 whatever the input).
    """
    exact = make_batch(seed=1)
    batch = {k: t if t.dtype == torch.bool else t.to(dtype) for k, t in exact.items()}
    options = {**options_of(kind), "beta": 0.1, "entropy_coef": 0.01}
    wide = {k: t if t.dtype == torch.bool else t.double() for k, t in batch.items()}
    # Selections and clips are made on fp32 differences of the rounded inputs: fp64 and fp32 agree on them here.
    truth = run(oracle.policy_loss, wide, kind, with_noise=True, **options)
    ours = run(ours_with_noise, batch, kind, with_noise=True, **options)
    naive = run(oracle.policy_loss, batch, kind, with_noise=True, **options)
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == dtype
    for name, i in {"loss": 0, "dlogprob": 2, "dentropy": 3}.items():
        error, budget = (ours[i].double() - truth[i]).abs(), (naive[i].double() - truth[i]).abs()
        floor = 1e-6 + (torch.finfo(dtype).eps if i > 0 else 0) * truth[i].abs()
        assert (error <= budget + floor).all(), f"{name}: {error.max()} over {budget.max()}"


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_ratio_is_exactly_one(kind):
    batch = make_batch(dtype=torch.float32)
    batch["old_logprob"] = None
    _, metrics, grad, _ = run(ours_with_noise, batch, kind, with_noise=True, **options_of(kind))
    for name in ("ratio_max", "ratio_min"):
        assert metrics[name] == 1.0
    assert metrics["approx_kl"] == 0.0
    assert grad[batch["mask"]].abs().sum() > 0
    torch.testing.assert_close(metrics["ratio_mean"], torch.tensor(1.0), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_extreme_log_ratios_stay_finite(kind, scale):
    """exp(30) does not fit fp16 and exp(1000) nothing: log-ratios are clamped, sums and gradients stay finite."""
    batch = make_batch(dtype=torch.float32, seed=2)
    sign = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0)
    batch["old_logprob"] = batch["logprob"] + scale * sign
    batch["ref_logprob"] = batch["logprob"] - scale * sign
    loss, metrics, grad, _ = run(
        ours_with_noise, batch, kind, with_noise=True, **options_of(kind), beta=0.1, kl_correction=True
    )
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


def test_the_public_function_is_the_protocol():
    batch = make_batch(dtype=torch.float32)
    for kind in KINDS:
        if kind == "clip_cov":
            continue  # draws its own keys
        a = run(policy_loss_without_noise, batch, kind, **options_of(kind))
        b = run(ours_with_noise, batch, kind, with_noise=True, **options_of(kind))
        # One takes what is constant along a sequence as one number and sums by sequences: 60 terms in another order.
        assert_same(a, b, rtol=1e-6, atol=1e-6)


def test_clip_cov_draws_from_torch_generator():
    batch = make_batch(dtype=torch.float32, lengths=(12,) * 5, per_token=True)
    options = {"fraction": 0.2, "cov_low": 0.0, "cov_high": 50.0}
    losses = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        losses.append(run(policy_loss_without_noise, batch, "clip_cov", **options)[0].item())
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1


def test_packed_reference_is_the_padded_one():
    batch = make_batch(per_token=True)
    for kind in KINDS:
        options = {**options_of(kind), "beta": 0.1}
        a = run(reference.policy.policy_loss, batch, kind, with_noise=True, **options)
        b = run(reference.policy.policy_loss, pack(batch), kind, with_noise=True, **options)
        torch.testing.assert_close(a[0], b[0], **EXACT)
        torch.testing.assert_close(a[2][batch["mask"]], b[2], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "kl_correction": True}], ids=["plain", "kl_corrected"])
def test_gradient_beyond_the_clamp(kind, options):
    """Past +-20 nats the ratio is constant: its gradient is 0, not the value of exp there. Values up to 1e9."""
    batch = make_batch(seed=8, spread=15.0, per_token=True)
    options = {**options_of(kind), **options}
    ours = run(ours_with_noise, batch, kind, with_noise=True, **options)
    theirs = run(oracle.policy_loss, batch, kind, with_noise=True, **options)
    far = ((batch["logprob"] - batch["old_logprob"]).abs() > 20) & batch["mask"]
    assert far.any()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-13)

"""Schedules, the KL controllers in both directions, running statistics."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from rlhf_fast.trainers.controllers import AdaptiveKL, AnnealedKL, anneal  # noqa: E402
from rlhf_fast.trainers.ppo_config import PPOConfig  # noqa: E402
from rlhf_fast.trainers.running_stats import RunningStats  # noqa: E402


def test_schedules_at_start_middle_and_end():
    for kind in ("constant", "linear", "cosine"):
        assert anneal(0.4, 0.1, kind, 0.0) == 0.4
    assert anneal(0.4, 0.1, "constant", 1.0) == 0.4
    for kind in ("linear", "cosine"):
        assert anneal(0.4, 0.1, kind, 1.0) == pytest.approx(0.1)
        assert anneal(0.4, 0.1, kind, 0.5) == pytest.approx(0.25)
        assert anneal(0.4, 0.1, kind, 1.7) == pytest.approx(0.1)  # no further than the end
    assert anneal(1.0, 0.0, "linear", 0.25) == 0.75
    assert anneal(1.0, 0.0, "cosine", 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    with pytest.raises(ValueError, match="one of constant, linear, cosine, got 'quadratic'"):
        anneal(1.0, 0.0, "quadratic", 0.5)


def test_adaptive_kl_rises_above_the_target_and_falls_below_it():
    kl = AdaptiveKL(0.1, target=6.0, horizon=1000)
    kl.update(6.6, sequences=100, progress=0.0)  # 10% too much, 100 of 1000 sequences: 1%
    assert kl.value == pytest.approx(0.1 * 1.01)
    kl.update(5.4, sequences=100, progress=0.0)
    assert kl.value == pytest.approx(0.1 * 1.01 * 0.99)
    before = kl.value
    kl.update(6.0, sequences=100, progress=0.0)
    assert kl.value == before
    kl.update(600.0, sequences=100, progress=0.0)  # never more than 20% of the way
    assert kl.value == pytest.approx(before * 1.02)
    kl.update(-600.0, sequences=100, progress=0.0)  # k1 may be negative
    assert kl.value == pytest.approx(before * 1.02 * 0.98)


def test_adaptive_kl_holds_a_system_at_its_target():
    """A KL that falls with the coefficient, from both sides."""
    for start in (0.01, 3.0):
        kl = AdaptiveKL(start, target=6.0, horizon=100)
        for _ in range(400):
            kl.update(2.0 / kl.value, sequences=20, progress=0.0)
        assert 2.0 / kl.value == pytest.approx(6.0, rel=1e-3)


def test_adaptive_kl_survives_odd_rollouts():
    kl = AdaptiveKL(0.1, target=6.0, horizon=10)
    kl.update(math.nan, sequences=8, progress=0.0)
    assert kl.value == 0.1
    kl.update(0.0, sequences=10_000, progress=0.0)  # a rollout longer than the horizon cannot turn the sign
    assert 0 < kl.value < 0.1
    for options in (dict(coef=0.0), dict(target=0.0), dict(horizon=math.inf)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be above 0"):
            AdaptiveKL(**{**dict(coef=0.1, target=6.0, horizon=10.0), **options})


def test_annealed_kl_follows_the_run():
    kl = AnnealedKL(0.2, 0.0, "linear")
    seen = [kl.value]
    for step in range(1, 5):
        kl.update(100.0, sequences=8, progress=step / 4)
        seen.append(kl.value)
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])
    fixed = AnnealedKL(0.2)
    fixed.update(100.0, sequences=8, progress=0.9)
    assert fixed.value == 0.2


@pytest.mark.parametrize("make", [lambda: AdaptiveKL(0.1, 6.0, 100.0), lambda: AnnealedKL(0.1, 0.0, "cosine")])
def test_controllers_resume(make):
    one, other = make(), make()
    for _ in range(3):
        one.update(9.0, sequences=10, progress=0.3)
    other.load_state_dict(one.state_dict())
    assert one.value != make().value
    for kl in (one, other):
        kl.update(2.0, sequences=10, progress=0.6)
    assert one.value == other.value


def test_which_controller_and_loss_the_options_name():
    assert isinstance(PPOConfig().kl_controller(), AdaptiveKL)
    assert isinstance(PPOConfig(ppo_target=None).kl_controller(), AnnealedKL)
    assert isinstance(PPOConfig(kl_coef=0.0).kl_controller(), AnnealedKL)
    config = PPOConfig(epsilon=0.2, epsilon_high=0.3, epsilon_schedule="linear", epsilon_final=0.1)
    losses = [config.policy_loss(progress, 0.0) for progress in (0.0, 0.5, 1.0)]
    assert [loss.clip_low for loss in losses] == pytest.approx([0.2, 0.15, 0.1])
    assert [loss.clip_high for loss in losses] == pytest.approx([0.3, 0.225, 0.15])
    assert PPOConfig(kl_in="loss").policy_loss(0.0, 0.07).beta == 0.07
    assert PPOConfig(kl_in="reward").policy_loss(0.0, 0.07).beta == 0.0


def test_running_stats_are_those_of_everything_seen():
    stats, parts = RunningStats(), [torch.randn(n).double() * 3 + 1e6 for n in (5, 1, 0, 32)]
    for part in parts:
        stats.update(torch.cat([part, torch.tensor([math.nan, math.inf])]))
    every = torch.cat(parts)
    assert stats.count == len(every)
    assert stats.mean == pytest.approx(every.mean().item(), rel=1e-12)
    # 1e6 squared is 1e12: a sum of squares would keep four digits of a variance of 9
    assert stats.variance == pytest.approx(every.var(correction=0).item(), rel=1e-9)
    torch.testing.assert_close(
        stats.normalize(every), (every - every.mean()) / (every.var(correction=0) + 1e-8).sqrt(), rtol=1e-8, atol=1e-8
    )
    other = RunningStats()
    other.load_state_dict(stats.state_dict())
    assert (other.count, other.mean, other.m2) == (stats.count, stats.mean, stats.m2)


def test_running_stats_of_too_few_values():
    stats = RunningStats()
    stats.update(torch.tensor([]))
    assert (stats.mean, stats.variance) == (0.0, 0.0)
    stats.update(torch.tensor([4.0]))
    assert stats.normalize(torch.tensor([4.0])).item() == 0.0
    assert math.isnan(stats.normalize(torch.tensor([math.nan])).item())

"""From scores to advantages: outcome and process rewards against the formulas, the estimators that a config names."""

import math
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import digits_sum, trainer  # noqa: E402

from rlhf_fast.trainers.credit import credit, informative  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOConfig  # noqa: E402
from rlhf_fast.trainers.ppo_config import PPOConfig  # noqa: E402
from rlhf_fast.trainers.refill import Batch  # noqa: E402
from rlhf_fast.trainers.rewards import Rewards, Scores, Steps  # noqa: E402

G, LENGTHS = 3, [4, 2, 5, 3, 3, 1]
ONE = torch.ones(1)


def scores_of(total, steps=None, outcome=None):
    total = torch.tensor(total)
    return Scores(total, total[:, None], total if outcome is None else torch.tensor(outcome), steps)


def steps_of(*columns):
    function, row, token, value = zip(*columns, strict=True)
    return Steps(torch.tensor(function), torch.tensor(row), torch.tensor(token), torch.tensor(value))


def rows_of(result):
    return [row.tolist() for row in result.advantages.split(LENGTHS)]


def test_outcome_rewards_are_spread_over_their_tokens():
    rewards = [1.0, 0.0, 2.0, 5.0, 5.0, 5.0]
    result = credit(scores_of(rewards), torch.tensor(LENGTHS), G, ONE, {})
    for length, row, want in zip(LENGTHS, rows_of(result), [0.0, -1.0, 1.0, 0, 0, 0], strict=True):
        assert row == pytest.approx([want / (1 + 1e-4)] * length)
    assert result.zero_std.tolist() == [False] * 3 + [True] * 3


def test_process_rewards_follow_the_paper():
    """DeepSeekMath 4.1.3, loop by loop: normalised over all steps of the group, summed over the steps that follow."""
    given = [
        (0, 0, 1, 0.5), (0, 0, 3, 1.0), (0, 1, 1, -1.0), (0, 2, 0, 2.0), (0, 2, 2, 0.0), (0, 2, 4, 1.0),
        (0, 3, 2, 7.0), (0, 4, 2, 9.0), (1, 0, 3, 3.0), (1, 2, 4, 5.0),
    ]  # fmt: skip
    outcome = [1.0, 0.0, 2.0, 5.0, 5.0, 5.0]
    weights = torch.tensor([0.5, 2.0, 1.0])
    result = credit(scores_of(outcome, steps_of(*given), outcome), torch.tensor(LENGTHS), G, weights, {})
    for i, row in enumerate(rows_of(result)):
        r = torch.tensor(outcome[i // G * G :][:G])
        base = float((outcome[i] - r.mean()) / (r.std() + 1e-4)) if r.std() else 0.0
        for t, got in enumerate(row):
            want = base
            for function, weight in enumerate((0.5, 2.0)):
                group = torch.tensor([v for f, s, _, v in given if f == function and s // G == i // G])
                for f, s, token, value in given:
                    if (f, s) == (function, i) and token >= t:
                        want += weight * float((value - group.mean()) / (group.std() + 1e-4))
            assert got == pytest.approx(want, abs=1e-5), (i, t)
    assert result.zero_std.tolist() == [False] * 6  # the second group's steps differ


def test_a_row_without_a_usable_reward_leaves_the_steps_of_its_group_alone():
    given = steps_of((0, 0, 0, 1.0), (0, 1, 0, 100.0), (0, 2, 0, 3.0))
    with_it = credit(scores_of([1.0, math.nan, 3.0] * 2, given, [0.0] * 6), torch.tensor(LENGTHS), G, ONE, {})
    rows = rows_of(with_it)
    assert all(map(math.isnan, rows[1]))
    assert rows[0][0] == pytest.approx(-rows[2][0], rel=1e-6)
    assert rows[0] == pytest.approx([rows[0][0], 0, 0, 0])


GDPO = {"combine": "normalize_then_sum"}


def test_process_rewards_are_no_part_of_the_combined_outcome():
    """Outcomes that are all the same add nothing under either combination; the steps count once, by weight."""

    def outcome(completions, **_):
        return [0.0] * len(completions)

    def process(completions, **_):
        return [[(0, 1.0), (1, 0.0)], [(0, 0.0), (1, 0.0)], [(0, 0.0), (1, 0.0)], [(0, 1.0), (1, 1.0)]]

    rewards = Rewards([outcome, process], [1.0, 2.0])
    scores = rewards(["p"] * 4, ["ab"] * 4)
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    normal = 2 * (values - values.mean()) / (values.std() + 1e-4)
    for options in ({}, GDPO):
        got = credit(scores, torch.full((4,), 2), 4, rewards.weights, options)
        torch.testing.assert_close(got.advantages.view(4, 2), normal.flip(1).cumsum(1).flip(1))
        assert not got.zero_std.any()
    assert got.advantages[:2].tolist() == pytest.approx([2 * 0.48300, 2 * -0.72450], abs=1e-3)


def test_informative_groups():
    def told(scores, weights=ONE, options=MappingProxyType({})):
        return informative(scores, G, weights, options).tolist()

    assert told(scores_of([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])) == [False, True]
    assert told(scores_of([math.nan, 1.0, 1.0, math.nan, math.nan, math.nan])) == [False, False]
    steps = steps_of((0, 0, 0, 1.0), (0, 1, 0, 2.0), (0, 3, 0, 2.0))
    assert told(scores_of([1.0] * 6, steps)) == [True, False]
    assert told(scores_of([1.0] * 6, steps), torch.zeros(1)) == [False, False]  # steps that weigh nothing
    assert told(scores_of([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]), options={"baseline": "opo"}) == [False, True]
    assert told(scores_of([0.0, 0.0, 0.0, 1.0, 1.0, math.nan]), options={"baseline": "none", "scale": "none"}) == [
        False,  # nothing times the gradient
        True,
    ]
    for scale in ("none", "batch", "centered"):
        assert told(scores_of([1.0] * 3 + [math.nan] * 3), options={"baseline": "batch", "scale": scale}) == [
            True,
            False,
        ]
    passing = {"baseline": "pass_at_k", "k": 2}  # any reward above 0 passes, and every draw of two does
    assert told(scores_of([1.0, 2.0, 3.0, 0.0, 0.0, 1.0]), options=passing) == [False, True]


def test_informative_judges_as_the_advantages_are_formed():
    """Two rewards whose weighted sum is constant, but which weigh differently once each is normalised."""
    each, weights = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0.5, 1.0])
    each = torch.cat([each, each[1:2].expand(4, 2)])
    total = each @ weights
    scores = Scores(total, each, total)
    assert total.tolist() == [1.0] * 8
    assert informative(scores, 4, weights, {}).tolist() == [False, False]
    assert informative(scores, 4, weights, GDPO).tolist() == [True, False]
    advantages = credit(scores, torch.ones(8, dtype=torch.int64), 4, weights, GDPO).advantages
    assert (advantages != 0).view(2, 4).all(1).tolist() == [True, False]


# ---- what a config names


def batch_of(it, rewards):
    """Completions of fixed lengths for two prompts, whose scores are given."""
    prompts = it.prompts[: len(rewards) // it.config.num_generations]
    rollout = it.sample(prompts, it.config.num_generations)
    total = torch.tensor(rewards)
    return Batch(prompts, rollout, Scores(total, total[:, None], total))


REWARDS = [1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 1.0, 2.0]


def loo(r):
    return r - (r.sum(1, keepdim=True) - r) / 3


ESTIMATORS = {
    "grpo": (dict(), lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)),
    "dr_grpo": (dict(advantage_estimator="dr_grpo"), lambda r: r - r.mean(1, keepdim=True)),
    "scale none": (dict(scale_rewards="none"), lambda r: r - r.mean(1, keepdim=True)),
    "rloo": (dict(advantage_estimator="rloo"), loo),
    "loo": (dict(advantage_baseline="loo", scale_rewards="none"), loo),
    "reinforce++": (dict(advantage_estimator="reinforce_plus_plus"), lambda r: (r - r.mean()) / (r.std() + 1e-4)),
    "pass_at_k": (
        dict(advantage_estimator="pass_at_k_training", pass_at_k=2, scale_rewards="none"),
        # C(3, 2) of C(4, 2) draws fail in the first group: P = 1/2; none in the second
        lambda r: torch.tensor([[0.5, -1 / 6, -1 / 6, -1 / 6], [0.0] * 4]),
    ),
    "remax": (dict(advantage_estimator="remax"), lambda r: r - torch.tensor([[0.25], [2.0]])),
    "greedy": (dict(advantage_baseline="greedy", scale_rewards="none"), lambda r: r - torch.tensor([[0.25], [2.0]])),
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS, ids=str)
def test_estimators(tmp_path, name, monkeypatch):
    options, formula = ESTIMATORS[name]
    it = trainer(tmp_path, **options)
    monkeypatch.setattr(it, "greedy_rewards", lambda prompts: torch.tensor([0.25, 2.0]))
    experience, _ = it.advantages(batch_of(it, REWARDS))
    want = formula(torch.tensor(REWARDS).view(2, 4)).flatten().repeat_interleave(experience.completion_lengths)
    torch.testing.assert_close(experience.advantages, want, rtol=1e-5, atol=1e-6)


def test_opo_weighs_its_baseline_by_lengths(tmp_path):
    it = trainer(tmp_path, advantage_estimator="opo")
    experience, _ = it.advantages(batch_of(it, REWARDS))
    r, n = torch.tensor(REWARDS).view(2, 4), experience.completion_lengths.view(2, 4).float()
    assert len(set(n.flatten().tolist())) > 1
    want = (r - (r * n).sum(1, keepdim=True) / n.sum(1, keepdim=True)).flatten()
    torch.testing.assert_close(
        experience.advantages, want.repeat_interleave(experience.completion_lengths), rtol=1e-5, atol=1e-6
    )


def test_several_rewards_normalised_then_summed(tmp_path):
    """GDPO: the scale of a reward does not decide how much it counts."""

    def thousand(completion_ids, **_):
        return [1000.0 * len(ids) for ids in completion_ids]

    it = trainer(
        tmp_path, reward=[digits_sum, thousand], reward_weights=[1.0, 1.0],
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    prompts = it.prompts[:2]
    rollout = it.sample(prompts, 4)
    scores = it.score_rollout([p for p in prompts for _ in range(4)], rollout)
    experience, _ = it.advantages(Batch(prompts, rollout, scores))
    r = scores.each.view(2, 4, 2)
    each = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).sum(2).flatten()
    want = (each - each.mean()) / (each.std() + 1e-4)
    got = experience.advantages[experience.cu_completions[:-1]]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_greedy_rewards_are_those_of_greedy_completions(tmp_path):
    it = trainer(tmp_path, advantage_estimator="remax")
    greedy = it.sample(it.prompts, sampler=it.make_sampler(greedy=True))
    want = [float(sum(ids) % 7) for ids in greedy.completions()]
    assert it.greedy_rewards(it.prompts).tolist() == want
    assert it.greedy_rewards(it.prompts).tolist() == want


def test_a_process_reward_in_a_run(tmp_path):
    """Rewards by token: the tokens of one completion have advantages of their own, and the run learns from them."""

    def first_is_five(completion_ids, **_):
        return [[(t, float(token == 9)) for t, token in enumerate(ids)] for ids in completion_ids]

    it = trainer(tmp_path, reward=first_is_five, max_steps=60, learning_rate=1e-2, loss_type="dr_grpo")
    rows = it.train()
    assert rows["reward_last"] > rows["reward_first"] + 0.3


def test_options_that_cannot_be_are_named():
    base = GRPOConfig(output_dir="x")
    with pytest.raises(ValueError, match="^advantage_estimator must be one of grpo, .* got 'gdpo'"):
        replace(base, advantage_estimator="gdpo")
    with pytest.raises(ValueError, match="^pass_at_k must be an int >= 1 with advantage_baseline pass_at_k"):
        replace(base, advantage_estimator="pass_at_k_training")
    with pytest.raises(ValueError, match="^multi_objective_aggregation normalize_then_sum needs advantage_base"):
        replace(base, multi_objective_aggregation="normalize_then_sum", advantage_estimator="rloo")
    with pytest.raises(ValueError, match="^epsilon_high must be >= 0, got -1"):
        replace(base, epsilon_high=-1.0)
    with pytest.raises(ValueError, match="^importance_correction_min must be < importance_correction_max=2"):
        replace(base, importance_correction="token_mask", importance_correction_max=2.0, importance_correction_min=3.0)
    with pytest.raises(ValueError, match="^rollout_server_url must begin with http:// or https://, got 'host:1'"):
        replace(base, sampler="server", rollout_server_url="host:1")
    with pytest.raises(ValueError, match="^epsilon_high must be >= 0, got -1"):
        PPOConfig(output_dir="x", epsilon_high=-1.0)

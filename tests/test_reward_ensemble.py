"""Reward models as reward functions, alone and as an ensemble."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import grpo_cases  # noqa: E402
from ppo_cases import classifier, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.ppo_config import PPOConfig  # noqa: E402
from rlhf_fast.trainers.reward_ensemble import (  # noqa: E402
    RewardEnsemble,
    RewardModel,
    fixed_statistics,
    load_rewards,
)
from rlhf_fast.trainers.rewards import Rewards  # noqa: E402

PROMPTS, ANSWERS = [[3, 4], [5], [6, 7, 8]], [[9, 2], [10, 11, 12, 2], [13]]


def constant(*values, name="constant"):
    def fn(completions, **_):
        return list(values)

    fn.__name__ = name
    return fn


def call(ensemble):
    return ensemble(prompts=["a", "b", "c"], completions=["x", "y", "z"])


def test_a_reward_model_scores_each_sequence_at_its_last_token():
    model = classifier().eval()
    scores = RewardModel(model, pad_token_id=2, batch_size=2)(prompt_ids=PROMPTS, completion_ids=ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
        assert score == pytest.approx((hidden @ model.score.weight[0]).item(), rel=1e-5, abs=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_reward_model_among_the_reward_functions():
    rewards = Rewards([RewardModel(classifier()), constant(1.0, 2.0, 3.0)], [2.0, 10.0])
    given = dict(prompt_ids=PROMPTS, completion_ids=ANSWERS, finish_reasons=["stop"] * 3)
    scores = rewards(["a", "b", "c"], ["x", "y", "z"], **given)
    torch.testing.assert_close(scores.total, 2 * scores.each[:, 0] + 10 * scores.each[:, 1])
    assert rewards.names == ["reward_model", "constant"]


def test_tokens_that_the_reward_model_does_not_have_are_named():
    with pytest.raises(ValueError, match="row 1: token id 15 is outside of the reward model's vocabulary 0..14"):
        RewardModel(classifier())(prompt_ids=PROMPTS, completion_ids=[[3], [15, 2], [3]])


MEMBERS = [constant(1.0, 2.0, -4.0), constant(3.0, 2.0, 0.0), constant(8.0, 2.0, 1.0)]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (dict(), [4.0, 2.0, -1.0]),
        (dict(weights=[1, 1, 2]), [5.0, 2.0, -0.5]),
        (dict(aggregation="min"), [1.0, 2.0, -4.0]),
        (dict(aggregation="mean_std", std_coef=0.5), [4 - 0.5 * math.sqrt(26 / 3), 2.0, -1 - 0.5 * math.sqrt(14 / 3)]),
        (dict(aggregation="mean_std", weights=[1, 1, 2]), [5 - math.sqrt(9.5), 2.0, -0.5 - math.sqrt(4.25)]),
    ],
    ids=str,
)
def test_aggregations(options, want):
    ensemble = RewardEnsemble(MEMBERS, **options)
    assert call(ensemble) == pytest.approx(want)
    assert ensemble.metrics["ensemble_spread"] > 0


def test_a_row_that_a_member_cannot_score_has_no_reward():
    ensemble = RewardEnsemble([constant(1.0, None, 2.0), constant(1.0, 1.0, math.nan)], aggregation="min")
    scores = Rewards(ensemble)(["a", "b", "c"], ["x", "y", "z"])
    assert scores.total[0] == 1.0
    assert scores.total[1:].isnan().all()
    assert ensemble.metrics["ensemble_spread"] == 0.0


def test_normalised_members_have_no_offset_and_no_scale():
    """Without it min is the member that happens to lie lowest."""
    members = [constant(1.0, 2.0, 3.0), constant(1030.0, 1020.0, 1010.0)]
    assert call(RewardEnsemble(members, aggregation="min")) == [1.0, 2.0, 3.0]
    one = math.sqrt(1.5)
    ensemble = RewardEnsemble(members, aggregation="min", normalize=True)
    assert call(ensemble) == pytest.approx([-one, 0.0, -one])
    other = RewardEnsemble(members, aggregation="min", normalize=True)
    other.load_state_dict(ensemble.state_dict())
    assert call(ensemble) == call(other)


def lengths(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def normalised_run(folder, **options):
    """The ensemble and the trained weights of a run whose prompts to evaluate on get rewards of their own."""
    ensemble = RewardEnsemble([grpo_cases.digits_sum, lengths], normalize=True)
    config = grpo_cases.config(
        folder, max_steps=4, loss_type="reinforce", scale_rewards="none", eval_on_start=True, **options
    )
    rows, held_out = [[{"prompt": p} for p in prompts] for prompts in (grpo_cases.PROMPTS, ["1>", "22>", "333>"] * 4)]
    it = GRPOTrainer(grpo_cases.tiny(), make_tokenizer(), rows, ensemble, config, eval_dataset=held_out)
    it.train()
    return ensemble, torch.cat([p.detach().flatten() for p in it.model.parameters()])


def test_evaluation_does_not_move_the_statistics(tmp_path):
    ensemble, weights = normalised_run(tmp_path / "seldom", eval_steps=100)
    other, also = normalised_run(tmp_path / "often", eval_steps=1)
    assert ensemble.state_dict() == other.state_dict()
    assert torch.equal(weights, also)
    assert ensemble.statistics[0].count == 64  # two rollouts of 32 completions
    first = grpo_cases.log_rows(tmp_path / "often")[0]["eval_reward"]
    assert 0 < first < 10  # before any training reward: scores as they are


def test_greedy_completions_do_not_move_the_statistics(tmp_path):
    ensemble, _ = normalised_run(tmp_path, advantage_estimator="remax", eval_steps=100)
    assert [s.count for s in ensemble.statistics] == [64.0, 64.0]


def test_statistics_are_fixed_inside_of_the_block_only():
    ensemble = RewardEnsemble([constant(1.0, 2.0, 3.0)], normalize=True)
    with fixed_statistics([RewardEnsemble([ensemble]), lengths]):  # a member, too
        assert call(ensemble) == [1.0, 2.0, 3.0]
    call(ensemble)
    assert ensemble.statistics[0].count == 3


def test_bad_ensembles_are_named():
    with pytest.raises(ValueError, match="reward_aggregation must be one of mean, min, mean_std, got 'max'"):
        RewardEnsemble(MEMBERS, aggregation="max")
    with pytest.raises(ValueError, match="reward_model_weights must hold 3 numbers above 0"):
        RewardEnsemble(MEMBERS, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward_std_coef must be at least 0"):
        RewardEnsemble(MEMBERS, std_coef=-1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path_factory.mktemp(f"rm{seed}") / f"reward-{seed}")
        classifier(seed).save_pretrained(paths[-1])
        make_tokenizer().save_pretrained(paths[-1])
    return list(map(str, paths))


def test_rewards_of_a_config(folders):
    given = dict(prompt_ids=PROMPTS, completion_ids=ANSWERS)
    verifier = "rlhf_fast.trainers.rewards:exact_match"
    model, function = load_rewards(PPOConfig(reward_model=folders[0], reward_funcs=verifier), make_tokenizer())
    assert function.__name__ == "exact_match"
    assert model(**given) == pytest.approx(RewardModel(classifier(1))(**given))
    (ensemble,) = load_rewards(PPOConfig(reward_model=",".join(folders), reward_aggregation="min"), make_tokenizer())
    assert ensemble.members.names == ["reward-1", "reward-2"]
    each = [RewardModel(classifier(seed))(**given) for seed in (1, 2)]
    assert ensemble(["a", "b", "c"], ["x", "y", "z"], **given) == pytest.approx(list(map(min, *each)))


def test_folders_that_cannot_be_reward_models_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="reward_model: no folder"):
        load_rewards(PPOConfig(reward_model=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="reward_model_type is lora, but .*reward-1 holds a whole model"):
        load_rewards(PPOConfig(reward_model=folders[0], reward_model_type="lora"))
    tiny().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="has no trained score head; train one with stage: rm"):
        load_rewards(PPOConfig(reward_model=str(tmp_path / "lm")))
    other = make_tokenizer()
    other.add_tokens(["!"])
    with pytest.raises(ValueError, match="another tokenizer than the policy.*'!'"):
        load_rewards(PPOConfig(reward_model=folders[0]), other)


def test_a_run_on_a_reward_model_starts_the_critic_there(folders, tmp_path):
    it = trainer(tmp_path, reward=None, reward_model=folders[1], max_steps=1)
    critic = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
    assert torch.equal(critic.score.weight, classifier(2).score.weight)
    assert critic.score.weight.requires_grad
    (model,) = it.rewards.functions
    assert model.model is not critic
    it.train()
    assert not torch.equal(critic.score.weight, model.model.score.weight)  # the reward stays what it was
    assert torch.equal(model.model.score.weight, classifier(2).score.weight)

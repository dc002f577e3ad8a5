"""Critics: values where they are asked for, from which weights they start, what is trained, saving and loading."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppo_cases import classifier, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.integrations.lm_head import fuse_lm_head  # noqa: E402
from rlhf_fast.trainers.models.critic import ValueHead, critic_of_policy, load_critic  # noqa: E402
from rlhf_fast.trainers.models.reward_model import load_reward_model  # noqa: E402
from rlhf_fast.trainers.ppo_config import PPOConfig  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 14, 4], [5, 5, 8, 2, 0]])


def lora(model, **kwargs):
    peft = pytest.importorskip("peft")
    shape = dict(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.2)
    return peft.get_peft_model(model, peft.LoraConfig(**{**shape, **kwargs}))


def test_a_critic_of_the_policy_has_its_trunk_and_values_zero():
    policy = tiny().eval()
    critic = critic_of_policy(policy).eval()
    assert torch.equal(critic(IDS, last=torch.arange(10)), torch.zeros(10))
    torch.nn.init.ones_(critic.score.weight)
    hidden = policy.model(IDS).last_hidden_state
    torch.testing.assert_close(critic(IDS, last=torch.tensor([1, 8])), hidden.flatten(0, 1)[[1, 8]].sum(-1))
    with torch.no_grad():
        policy.model.norm.weight.mul_(2)
    assert not torch.equal(critic.model.norm.weight, policy.model.norm.weight)  # a copy
    assert all(p.requires_grad for p in critic.parameters())


def test_what_is_frozen_in_the_policy_is_frozen_in_its_critic():
    policy = tiny()
    policy.model.layers[0].requires_grad_(False)
    critic = critic_of_policy(policy)
    assert not any(p.requires_grad for p in critic.model.layers[0].parameters())
    assert all(p.requires_grad for p in [*critic.model.layers[1].parameters(), critic.score.weight])


def test_a_critic_of_a_lora_policy_starts_from_its_merged_weights_under_an_adapter_of_its_own():
    policy = lora(tiny()).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    critic = critic_of_policy(policy).eval()
    names = {n for n, p in critic.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2 if "score" in n else -3] for n in names} == {"lora_A", "lora_B", "default"}
    assert any("score" in n for n in names)
    score = critic.base_model.model.score.modules_to_save["default"]
    torch.nn.init.ones_(score.weight)
    hidden = policy.base_model.model.model(IDS).last_hidden_state
    torch.testing.assert_close(critic(IDS, last=torch.arange(10)), hidden.flatten(0, 1).sum(-1), rtol=1e-5, atol=1e-5)


def test_a_fused_policy_gives_a_critic_as_well():
    critic = critic_of_policy(fuse_lm_head(tiny()))
    assert critic(IDS, last=torch.arange(10)).shape == (10,)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_critic_begins_as_the_reward_model_and_is_saved_and_loaded_as_one(tmp_path, kind):
    classifier().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    if kind == "lora":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        adapted = lora(base, task_type="SEQ_CLS")
        torch.nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
        adapted.save_pretrained(folder := tmp_path / "adapter")
    config = PPOConfig(model_name_or_path=str(tmp_path / "base"), finetuning_type=kind, lora_rank=4)
    critic = load_critic(config, str(folder)).eval()
    scores = load_reward_model(folder)(IDS, last=torch.tensor([4, 8]))
    torch.testing.assert_close(critic(IDS, last=torch.tensor([4, 8])), scores)
    assert any("score" in n for n, p in critic.named_parameters() if p.requires_grad)
    critic.save_pretrained(tmp_path / "critic")
    again = load_reward_model(tmp_path / "critic")
    torch.testing.assert_close(again(IDS, last=torch.arange(10)), critic(IDS, last=torch.arange(10)))


def test_the_head_on_a_shared_trunk_computes_in_fp32_and_reloads(tmp_path):
    head = ValueHead(16)
    assert torch.equal(head(torch.randn(3, 16)), torch.zeros(3))
    torch.nn.init.normal_(head.weight)
    torch.nn.init.ones_(head.bias)
    hidden = torch.randn(64, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, hidden.float() @ head.weight + 1)
    head.save_pretrained(tmp_path / "critic")
    assert torch.equal(ValueHead.from_pretrained(tmp_path / "critic")(hidden), head(hidden))


def test_hidden_states_come_from_the_same_forward():
    model, calls = fuse_lm_head(tiny()).eval(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model(IDS, target_ids=IDS)  # the first call learns what the model does to its logits
    calls.clear()
    out, hidden = model(IDS, target_ids=IDS, return_hidden=True)
    assert len(calls) == 1
    torch.testing.assert_close(hidden, model.model(IDS).last_hidden_state)
    logits = hidden @ model.lm_head.weight.T
    torch.testing.assert_close(out.logprob, logits.log_softmax(-1).gather(2, IDS[..., None])[..., 0])
    with pytest.raises(ValueError, match="return_hidden needs target_ids"):
        model(IDS, return_hidden=True)


def test_roles_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="critic is shared.*give no critic model"):
        trainer(tmp_path, own=classifier(), critic="shared")
    with pytest.raises(ValueError, match="critic is shared.*leave out critic_model"):
        PPOConfig(critic="shared", critic_model="x")
    with pytest.raises(TypeError, match="no reward model: it needs a linear head 'score'"):
        trainer(tmp_path, own=tiny())

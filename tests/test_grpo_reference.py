"""The reference: which model it is, and how it follows the policy."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import log_rows, tiny, trainer  # noqa: E402

from rlhf_fast.trainers.models.policy import Reference  # noqa: E402


def lora(targets=("q_proj",)):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))


def test_a_trained_adapter_gets_a_frozen_copy_as_reference():
    assert Reference(lora()).adapters_off
    model = lora()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(0.1)
    assert not Reference(model).adapters_off
    for targets in (["embed_tokens"], ["embed_tokens", "q_proj"]):  # an embedding's adapter starts at zero elsewhere
        model = lora(targets)
        assert Reference(model).adapters_off
        next(p for n, p in model.named_parameters() if "lora_embedding_A" in n).data.fill_(0.1)
        assert not Reference(model).adapters_off
    model = lora()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert not Reference(model).adapters_off


def test_another_model_as_reference():
    policy, other = tiny(), tiny(seed=5)
    reference = Reference(policy, other)
    assert reference.model is other
    assert not any(p.requires_grad for p in other.parameters())
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("make", [tiny, lora], ids=["full", "lora"])
def test_sync_mixes_policy_and_reference_by_alpha(make):
    policy = make().double()
    reference = Reference(policy, copy=True)
    assert reference.state_dict() == {}
    before = {n: p.clone() for n, p in reference.model.named_parameters()}
    for p in policy.parameters():
        p.data.add_(torch.randn_like(p))
    reference.sync(policy, 0.25)
    for name, p in policy.named_parameters():
        want = 0.25 * p + 0.75 * before[name]
        torch.testing.assert_close(dict(reference.model.named_parameters())[name], want, rtol=1e-12, atol=1e-12)
    fresh = Reference(make().double(), copy=True)
    fresh.load_state_dict(reference.state_dict())
    kept = dict(reference.model.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in fresh.model.named_parameters())
    reference.sync(policy)
    current = dict(policy.named_parameters())
    assert all(torch.equal(p, current[n]) for n, p in reference.model.named_parameters())


def test_what_cannot_follow_is_named():
    with pytest.raises(ValueError, match="adapters off"):
        Reference(lora()).sync(lora())
    reference = Reference(tiny(), copy=True)
    reference.model.model.norm.weight = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match=r"it has no model.norm.weight of shape \(32,\)"):
        reference.sync(tiny())


def test_a_model_from_a_folder_as_reference(tmp_path):
    tiny(seed=5).save_pretrained(tmp_path / "other")
    it = trainer(tmp_path, beta=0.1, max_steps=1, ref_model=str(tmp_path / "other"))
    it.train()
    assert log_rows(tmp_path)[0]["kl"] > 1e-3
    kept = dict(tiny(seed=5).named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in it.reference.model.named_parameters())
    with pytest.raises(ValueError, match="ref_model_adapters goes with ref_model"):
        trainer(tmp_path, ref_model_adapters="a")

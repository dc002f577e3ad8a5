"""Two steps of each of TRL's trainers, with the patch and without: the same losses, the same weights."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from trl_cases import saved, trainer

from rlhf_fast.integrations.trl import FastGRPOTrainer, patch

LR = 0.05


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("trl") / "model")


def adapter(where: str):
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "lm_head"] if where == "lora on the head" else ["q_proj"]
    return peft.LoraConfig(target_modules=modules, r=2, lora_alpha=4, init_lora_weights=False)


def two_steps(kind, path, tmp_path, where, *, cls=None, **options):
    """(losses and gradient norms of the steps, weights after them); plain SGD, so that weights are as exact as
    gradients."""
    torch.manual_seed(0)
    made = trainer(
        kind, path, tmp_path, cls=cls, peft_config=None if where == "full" else adapter(where),
        **dict(optim="sgd", learning_rate=LR, logging_strategy="steps", logging_steps=1) | options,
    )  # fmt: skip
    made.train()
    log = [(row["loss"], row["grad_norm"]) for row in made.state.log_history if "loss" in row]
    assert len(log) == 2
    return log, {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}, made


def assert_same(a, b):
    """Two runs whose gradients differ by fp32 rounding: sums of some 60 tokens' terms, seen through one step."""
    for x, y in zip(a[0], b[0], strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    assert a[1].keys() == b[1].keys()
    norm = max(norm for _, norm in a[0])
    for name, weight in a[1].items():
        torch.testing.assert_close(b[1][name], weight, rtol=1e-5, atol=2 * LR * norm * 1e-5, msg=name)


def naive_add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=()):
    """TRL's function from full logits: what a head with an adapter should give."""
    from trl.trainer.utils import FusedCausalLMOutput

    inner = model.forward

    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return inner(*args, **kwargs)
        logp = (inner(*args, **kwargs).logits[:, :-1] / temperature).log_softmax(-1)
        labels = labels[:, 1:]
        mask = labels != -100
        chosen = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(~mask, 0)
        entropy = -(logp.exp() * logp).sum(-1).masked_fill(~mask, 0)
        top1 = (logp.argmax(-1) == labels) & mask
        zeros = torch.zeros_like(chosen)  # metrics that the test does not read
        return FusedCausalLMOutput(
            log_probs=chosen, entropy=entropy, mean_logits=zeros, is_top1=top1, label_mask=mask, log_sum_sq_probs=zeros
        )

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def naive(kind):
    """TRL with full logits and without its refusal."""
    import importlib

    module = importlib.import_module(f"trl.trainer.{kind}_trainer")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "add_fused_lm_head", naive_add_fused_lm_head)
        m.setattr(module, "BaseTunerLayer", type("Nothing", (), {}))
        yield


@pytest.mark.parametrize("where", ["full", "lora", "lora on the head"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_two_steps(kind, where, path, tmp_path):
    options = dict(gradient_checkpointing=True)
    with naive(kind) if where == "lora on the head" else contextlib.nullcontext():
        before = two_steps(kind, path, tmp_path, where, **options)
    with patch():
        after = two_steps(kind, path, tmp_path, where, **options)
    assert_same(before, after)
    assert before[0][0] != before[0][1]  # something was learnt in between
    assert after[2].model.is_gradient_checkpointing
    if where == "lora on the head":
        assert any("lm_head.lora_B" in name for name in after[1])


@pytest.mark.parametrize("where", ["full", "lora", "lora on the head"])
def test_two_steps_of_the_single_pass_loss(where, path, tmp_path):
    options = dict(gradient_checkpointing=True, beta=0.05, gradient_accumulation_steps=2, generation_batch_size=16)
    with naive("grpo") if where == "lora on the head" else contextlib.nullcontext():
        before = two_steps("grpo", path, tmp_path, where, **options)
    with patch():
        after = two_steps("grpo", path, tmp_path, where, cls=FastGRPOTrainer, **options)
    assert after[2].own_road is None
    assert_same(before, after)


def test_trl_after_the_patch_is_as_it_was(path, tmp_path):
    """A trainer made and run under the patch leaves nothing behind: bitwise the same run as before."""
    before = two_steps("dpo", path, tmp_path, "full")
    with patch():
        two_steps("dpo", path, tmp_path, "full")
    after = two_steps("dpo", path, tmp_path, "full")
    assert before[0] == after[0]
    assert all(torch.equal(after[1][name], weight) for name, weight in before[1].items())


def test_evaluation_of_the_single_pass_loss(path, tmp_path):
    losses = []
    for cls in (None, FastGRPOTrainer):
        made = trainer("grpo", path, tmp_path, cls=cls, per_device_eval_batch_size=4)
        losses.append(made.evaluate(made.train_dataset.select(range(4)))["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)

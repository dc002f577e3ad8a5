"""The loop around an algorithm: roles, rates, clipping, schedules, checkpoints and back."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppo_cases import config, log_rows, tiny  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.loop import Loop  # noqa: E402
from rlhf_fast.trainers.models.critic import ValueHead  # noqa: E402
from rlhf_fast.trainers.restore import load_weights  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 14, 4], [5, 5, 8, 2, 0]])


def make(tmp_path, model=None, callbacks=(), **options):
    head = ValueHead(16)
    given = dict(others={"critic": head}, learning_rates={"critic": 0.5})
    return Loop(model or tiny(), make_tokenizer(), config(tmp_path, **options), callbacks, 10, **given), head


def both(loop, head, factor=1.0):
    """A loss with gradient in both roles."""
    hidden = loop.unwrapped.model(IDS).last_hidden_state
    return factor * (head(hidden) - 1).square().mean() + hidden.square().mean()


class Norms(transformers.TrainerCallback):
    """Of each role's gradient, as the optimiser meets it."""

    def on_pre_optimizer_step(self, *_, **__):
        self.seen = {
            role: torch.stack([p.grad.norm() for p in parameters]).norm().item()
            for role, parameters in self.loop.parameters.items()
        }


def test_each_role_has_its_rate_its_norm_and_its_folder(tmp_path):
    clipped = Norms()
    options = dict(lr_scheduler_type="constant", max_grad_norm=1e-3, learning_rate=0.25)
    loop, head = make(tmp_path, callbacks=[clipped], **options)
    clipped.loop = loop
    before = {n: p.clone() for n, p in loop.unwrapped.named_parameters()}
    assert {g["lr"] for g in loop.optimizer.param_groups} == {0.25, 0.5}
    loop.start(1, 1.0)
    loop.update([1.0], lambda factor: both(loop, loop.models["critic"], factor))
    norms = loop.recorded()
    loop.end_step({})
    assert clipped.seen == {"policy": pytest.approx(1e-3, rel=1e-3), "critic": pytest.approx(1e-3, rel=1e-3)}
    assert norms["grad_norm"] != norms["grad_norm_critic"]
    # Adam's first step is the rate in every coordinate (but for its epsilon)
    assert head.bias.abs().item() == pytest.approx(0.5, rel=1e-3)
    name = "model.norm.weight"
    moved = (dict(loop.unwrapped.named_parameters())[name] - before[name]).abs()
    assert moved.max().item() == pytest.approx(0.25, rel=1e-2)
    loop.finish()
    assert torch.equal(ValueHead.from_pretrained(tmp_path / "critic").weight, head.weight)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits.isfinite().all()


def test_a_role_without_gradient_stays_and_is_not_in_the_log(tmp_path):
    loop, head = make(tmp_path, weight_decay=0.5)
    loop.start(1, 1.0)
    before = [p.clone() for p in loop.unwrapped.parameters()]
    loop.update([1.0], lambda _: (loop.models["critic"](torch.ones(3, 16)) - 1).square().mean())
    loop.end_step({})
    assert all(torch.equal(p, q) for p, q in zip(loop.unwrapped.parameters(), before, strict=True))
    assert head.bias.item() != 0
    (row,) = log_rows(tmp_path)
    assert "grad_norm" not in row
    assert row["grad_norm_critic"] > 0


@pytest.mark.parametrize("broken", ["policy", "critic"])
def test_one_broken_role_skips_the_update_of_all(tmp_path, broken):
    loop, head = make(tmp_path)
    poison = head.bias if broken == "critic" else loop.unwrapped.model.norm.weight.sum()
    loop.start(2, 1.0)
    before = [p.clone() for p in [*loop.unwrapped.parameters(), *head.parameters()]]
    loop.update([1.0], lambda _: both(loop, loop.models["critic"]) + poison * math.nan)
    assert all(
        torch.equal(p, q) for p, q in zip([*loop.unwrapped.parameters(), *head.parameters()], before, strict=True)
    )
    assert loop.broken_steps.skipped == 1
    loop.update([1.0], lambda _: both(loop, loop.models["critic"]))
    assert head.bias.item() != 0


class Steps(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, *_, **__):
        self.seen.append("begin")

    def on_optimizer_step(self, *_, **__):
        self.seen.append("update")

    def on_step_end(self, *_, **__):
        self.seen.append("end")

    def on_log(self, args, state, control, logs=None, **_):
        logs["note"] = "seen"


def test_a_step_may_hold_several_updates_and_leave_some_out(tmp_path):
    steps = Steps()
    loop, _ = make(tmp_path, callbacks=[steps], learning_rate=1.0)
    loop.start(2, 1.0, updates_per_step=4)
    for done in (4, 1):
        for _ in range(done):
            loop.update([1.0], lambda _: both(loop, loop.models["critic"]))
        loop.pass_updates(4 - done)
        loop.end_step({"reward": 1.0})
    assert steps.seen == ["begin", *["update"] * 4, "end", "begin", "update", "end"]
    rows = log_rows(tmp_path)
    assert rows[0]["learning_rate"] == pytest.approx(1 - 1.5 / 8)  # the mean of 8/8 .. 5/8
    assert rows[1]["learning_rate"] == pytest.approx(0.5)
    assert loop.scheduler.get_last_lr()[0] == 0.0
    assert [row["note"] for row in rows] == ["seen", "seen"]  # what a callback adds is logged
    assert loop.done


def test_micro_batches_add_up(tmp_path):
    gradients = []
    for micros in ([1.0], [0.25, 0.25, 0.5]):
        loop, head = make(tmp_path)
        loop._clip = lambda head=head: gradients.append(head.weight.grad.clone())  # and no step
        loop.start(1, 1.0)
        hidden = torch.linspace(-1, 1, 48).view(3, 16)
        loop.update(micros, lambda f, loop=loop, x=hidden: f * (loop.models["critic"](x) - 1).square().mean())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("only_model", [False, True])
def test_checkpoints_are_pruned_but_the_best_one_stays(tmp_path, only_model):
    loop, _ = make(tmp_path, save_steps=1, save_total_limit=1, save_only_model=only_model)
    loop.start(3, 1.0)
    for step in range(3):
        loop.update([], None)
        loop.end_step({})
        if step == 0:
            loop.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    files = {p.name for p in (tmp_path / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "critic"} <= files
    assert ("optimizer.pt" in files) == (not only_model)
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_weights_come_back_into_a_live_model(tmp_path, kind):
    def build(seed):
        model = tiny(seed)
        if kind == "untied":
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
        if kind == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        return model.eval()

    saved, live = build(1), build(2)
    saved.save_pretrained(tmp_path / "a")
    assert not torch.equal(live(IDS).logits, saved(IDS).logits)
    load_weights(live, tmp_path / "a")
    assert torch.equal(live(IDS).logits, saved(IDS).logits)


def test_weights_of_another_model_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    other = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**tiny().config.to_dict(), "num_hidden_layers": 3, "layer_types": None})
    )
    with pytest.raises(ValueError, match="another model: missing .*layers.2"):
        load_weights(other, tmp_path / "a")
    with pytest.raises(ValueError, match="holds no weights in safetensors"):
        load_weights(other, tmp_path)


def test_a_role_without_anything_to_train_is_named(tmp_path):
    head = ValueHead(16).requires_grad_(False)
    with pytest.raises(ValueError, match="the critic has no parameter that requires grad"):
        Loop(tiny(), make_tokenizer(), config(tmp_path), others={"critic": head})

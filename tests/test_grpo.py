"""GRPO against a plain-torch step, and what happens around the step."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import PROMPTS, config, digits_sum, exact_norms, experience_of, log_rows, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.beforehand import logprob_of  # noqa: E402
from rlhf_fast.trainers.config import make_config  # noqa: E402
from rlhf_fast.trainers.data.tokenize import Prompt  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.layout import Layout  # noqa: E402
from rlhf_fast.trainers.models.policy import updating_mode  # noqa: E402
from rlhf_fast.trainers.rewards import RewardError  # noqa: E402

# ---- the step against plain torch


def plain_logprob(model, prompt, completion, temperature):
    """Left-padded, masked, log_softmax over whole logits: (B, longest completion)."""
    width = max(len(p) + len(c) for p, c in zip(prompt, completion, strict=True))
    ids = torch.zeros(len(prompt), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (p, c) in enumerate(zip(prompt, completion, strict=True)):
        ids[i, width - len(p) - len(c) :] = torch.tensor(p + c)
        mask[i, width - len(p) - len(c) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1] / temperature
    logps = torch.log_softmax(logits, -1)
    chosen = logps.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return [(chosen[i, -len(c) :], entropy[i, -len(c) :]) for i, c in enumerate(completion)]


def plain_loss(model, reference, experience, cfg, on_policy):
    """The formulas, sequence by sequence."""
    ids = [x.tolist() for x in experience.ids.split(experience.cu_seqlens.diff().tolist())]
    cuts, lengths = experience.prompt_lengths.tolist(), experience.completion_lengths.tolist()
    prompt = [x[:n] for x, n in zip(ids, cuts, strict=True)]
    completion = [x[n:] for x, n in zip(ids, cuts, strict=True)]
    now = plain_logprob(model, prompt, completion, cfg.temperature)
    then = plain_logprob(reference, prompt, completion, cfg.temperature) if reference is not None else now
    loss, entropies, tokens = 0.0, 0.0, experience.trained.sum()
    rows = zip(
        *(t.split(lengths) for t in (experience.logprob, experience.advantages, experience.trained)), strict=True
    )
    for (logprob, entropy), (ref, _), (old, a, trained) in zip(now, then, rows, strict=True):
        if not trained.any():
            continue
        logprob, entropy, ref, old, a = (x[trained] for x in (logprob, entropy, ref, old, a))
        log_ratio = logprob - (logprob.detach() if on_policy else old)
        if cfg.loss_type == "gspo":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - (cfg.epsilon or 0), 1 + (cfg.epsilon_high or 0))
        per_token = -torch.minimum(ratio * a, clipped * a)
        if cfg.loss_type == "reinforce":
            per_token = -logprob * a
        if cfg.loss_type == "cispo":
            per_token = -ratio.clamp(max=cfg.epsilon_high).detach() * logprob * a
        if cfg.beta:
            gap = ref.detach() - logprob
            per_token = per_token + cfg.beta * (gap.exp() - gap - 1)
        if cfg.loss_type in ("dapo", "cispo"):
            loss = loss + per_token.sum() / tokens
        elif cfg.loss_type == "dr_grpo":
            loss = loss + per_token.sum() / (cfg.max_completion_length * experience.counted.sum())
        elif cfg.loss_type == "reinforce":
            loss = loss + per_token.sum() / experience.counted.sum()
        else:
            loss = loss + per_token.mean() / experience.counted.sum()
        entropies = entropies + entropy.sum() / tokens
    return loss - cfg.entropy_coef * entropies


STEPS = {
    "on policy": dict(on_policy=True),
    "clipped": dict(),
    "cold": dict(temperature=0.6),
    "token mean": dict(loss_type="dapo"),
    "fixed length": dict(loss_type="dr_grpo", temperature=1.4),
    "sequence ratio": dict(loss_type="gspo"),
    "reinforce": dict(loss_type="reinforce"),
    "cispo": dict(loss_type="cispo", epsilon=None, epsilon_high=1.1),
    "reference": dict(beta=0.3, temperature=0.8),
    "entropy": dict(entropy_coef=0.1),
    "everything": dict(beta=0.2, entropy_coef=0.1, mask_truncated_completions=True, temperature=0.8),
    "cut completions masked": dict(mask_truncated_completions=True),
    "cut masked, token mean": dict(mask_truncated_completions=True, loss_type="dapo", beta=0.1),
    "NaN reward": dict(reward=lambda completion_ids, **_: [math.nan, *digits_sum(completion_ids)[1:]]),
    "advantages by token": dict(by_token=True, beta=0.1),
    "tool tokens": dict(by_token=True, tools=True, loss_type="gspo"),
    "tool tokens, token mean": dict(by_token=True, tools=True, loss_type="dapo", entropy_coef=0.1),
}

LAYOUTS = {  # (share_prompts, packing), count, tokens
    "plain": ((False, False), 16, None),
    "plain by 3": ((False, False), 3, None),
    "plain by tokens": ((False, False), 16, 30),
    "shared": ((True, False), 16, None),
    "shared by 3": ((True, False), 3, None),
    "shared by tokens": ((True, False), 16, 40),
    "packed": ((False, True), 16, None),
    "packed by tokens": ((False, True), 16, 30),
}


FEW = ("plain by 3", "shared", "shared by tokens", "packed by tokens")
EVERYWHERE = ("everything", "tool tokens", "on policy")


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_loss_and_every_gradient_equal_plain_torch(tmp_path, case, monkeypatch):
    """However the sequences are laid out in rows and micro-batches."""
    exact_norms(monkeypatch)
    options = dict(STEPS[case])
    on_policy, reward = options.pop("on_policy", False), options.pop("reward", digits_sum)
    by_token, tools = options.pop("by_token", False), options.pop("tools", False)
    it, plain, reference = pair_of_models(tmp_path, reward, **dict(epsilon=0.2, epsilon_high=0.28) | options)
    experience = experience_of(it)
    if by_token:
        experience = experience._replace(advantages=torch.randn(len(experience.advantages)).double())
    if tools:
        experience = experience._replace(trained=experience.trained & (torch.rand(len(experience.trained)) < 0.6))
    want = plain_loss(plain, reference, experience, it.config, on_policy)
    want.backward()
    for name in LAYOUTS if case in EVERYWHERE else FEW:
        (share, packed), count, tokens = LAYOUTS[name]
        it.layout = Layout(it.model, share=share, packed=packed)
        it.config.per_device_train_batch_size, it.config.max_tokens_per_micro_batch = count, tokens
        it.model.zero_grad()
        (minibatch,) = it.minibatches(experience)
        assert (len(minibatch.micros) > 1) == ("by" in name), name
        losses = [it.fused_loss(m, minibatch, on_policy=on_policy).loss for m in minibatch.micros]
        sum(losses).backward()
        assert sum(losses).item() == pytest.approx(want.item(), rel=1e-12, abs=1e-15), name
        same_gradients(it.model, plain, name)


def pair_of_models(tmp_path, reward=digits_sum, make=tiny, **options):
    """A trainer of one minibatch in fp64, the same model again in plain torch, and the reference (or None)."""
    it = trainer(tmp_path, make(attention_dropout=0.3).double(), reward, **options)
    plain, reference = make(attention_dropout=0.3).double().eval(), None
    if it.config.beta:
        reference = make(seed=9).double().eval()
        it.reference.model.load_state_dict(reference.state_dict())
    updating_mode(it.model, True)
    it.minibatches_per_rollout = 1
    return it, plain, reference


def same_gradients(model, plain, name):
    """Sums of a few hundred terms of at most 1, in another order: 1e-13 of the largest."""
    gradients = dict(model.named_parameters())
    for parameter_name, parameter in plain.named_parameters():
        gap = (gradients[parameter_name].grad - parameter.grad).abs().max()
        assert gap <= 1e-12 * max(1.0, parameter.grad.abs().max()), f"{name}: {parameter_name} is off by {gap}"
    assert max(p.grad.abs().max() for p in plain.parameters()) > 1e-3


def test_micro_batches_are_what_was_asked_for(tmp_path):
    it = trainer(
        tmp_path, per_device_train_batch_size=4, steps_per_generation=4, max_tokens_per_micro_batch=30, beta=0.1
    )
    it.minibatches_per_rollout = 1
    (minibatch,) = it.minibatches(experience_of(it))
    sizes = [m.input_ids.numel() for m in minibatch.micros]
    assert len(sizes) > 3
    assert max(sizes) <= 30
    assert sum(len(m.cu_seqlens) - 1 for m in minibatch.micros) == 16
    it = trainer(tmp_path, per_device_train_batch_size=4, steps_per_generation=4, beta=0.1)
    it.minibatches_per_rollout = 1
    assert [len(m.cu_seqlens) - 1 for m in it.minibatches(experience_of(it))[0].micros] == [4, 4, 4, 4]


@pytest.mark.parametrize("mask", [True, False])
def test_cut_completions_are_masked_when_asked(tmp_path, mask):
    it = trainer(tmp_path, mask_truncated_completions=mask)
    experience = experience_of(it)
    cut = experience.completion_lengths == 5
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(experience.per_sequence(experience.trained.long()) > 0, ~cut if mask else torch.ones_like(cut))
    trained = sum((m.target_ids != -100).sum() for b in it.minibatches(experience) for m in b.micros)
    assert trained == (experience.trained & (experience.advantages != 0)).sum()


def test_advantages_are_the_groups(tmp_path):
    it = trainer(tmp_path)
    experience = experience_of(it)
    groups = [
        experience.ids[a:b].tolist() for a, b in zip(experience.cu_seqlens[:-1], experience.cu_seqlens[1:], strict=True)
    ]
    rewards = torch.tensor(
        [float(sum(g[n:]) % 7) for g, n in zip(groups, experience.prompt_lengths.tolist(), strict=True)]
    )
    rewards = rewards.view(4, 4).double()
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    want = want.flatten().repeat_interleave(experience.completion_lengths)
    torch.testing.assert_close(experience.advantages, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_sequences_of_zero_advantage_do_not_enter_the_model(tmp_path, loss_type):
    """Half of the groups have equal rewards: fewer rows, the same loss and gradients."""

    def by_group(completion_ids, **_):
        return [float(sum(ids) % 7) if (i // 4) % 2 else 1.0 for i, ids in enumerate(completion_ids)]

    results = []
    for drops in (True, False):
        it = trainer(tmp_path, tiny().double(), by_group, epsilon=0.2, loss_type=loss_type)
        assert it.drops_zero_advantages
        it.drops_zero_advantages, it.minibatches_per_rollout = drops, 1
        updating_mode(it.model, True)
        (minibatch,) = it.minibatches(experience_of(it))
        rows = sum(len(m.cu_seqlens) - 1 for m in minibatch.micros)
        loss = sum(it.fused_loss(m, minibatch, on_policy=False).loss for m in minibatch.micros)
        loss.backward()
        results.append((rows, loss.item(), {n: p.grad for n, p in it.model.named_parameters()}))
    (few, loss, grads), (everything, loss_of_all, grads_of_all) = results
    assert everything == 16
    assert few <= 8
    assert loss == pytest.approx(loss_of_all, rel=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_of_all[name], rtol=1e-9, atol=1e-13)


def test_a_micro_batch_without_scored_tokens_is_zero_and_attached(tmp_path):
    it = trainer(tmp_path, beta=0.1, entropy_coef=0.1)
    it.minibatches_per_rollout = 1
    (minibatch,) = it.minibatches(experience_of(it))
    micro = minibatch.micros[0]
    micro = micro._replace(target_ids=torch.full_like(micro.target_ids, -100), advantages=micro.advantages * math.nan)
    out = it.fused_loss(micro, minibatch, on_policy=False)
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in it.model.parameters())
    assert all(v.isfinite().all() for v in out.metrics.values())


# ---- a run


def test_step_zero_has_ratio_one_and_no_kl_with_dropout(tmp_path):
    """Sampler, policy and reference are one function; the second minibatch is still one (no learning rate)."""
    it = trainer(tmp_path, tiny(attention_dropout=0.5), beta=0.1, learning_rate=0.0, temperature=0.7)
    it.train()
    first, second = log_rows(tmp_path)
    assert first["ratio_max"] == first["ratio_min"] == 1.0
    assert first["kl"] == 0.0
    assert first["sampler_logprob_gap_max"] < 2e-5
    assert abs(second["ratio_max"] - 1) < 2e-5
    assert abs(second["ratio_min"] - 1) < 2e-5
    assert second["kl"] == 0.0
    assert first["clip_fraction"] == second["clip_fraction"] == 0.0


def test_step_zero_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), lora)
    it = trainer(tmp_path, model, beta=0.1, max_steps=6, learning_rate=1e-2)
    assert it.reference.adapters_off
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    it.train()
    rows = log_rows(tmp_path)
    assert rows[0]["kl"] == 0.0
    assert rows[0]["ratio_max"] == rows[0]["ratio_min"] == 1.0
    assert rows[0]["sampler_logprob_gap_max"] < 2e-5
    assert rows[-1]["kl"] > 1e-6  # the reference stayed
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_batch_of_zero_advantages_makes_no_step(tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    it = trainer(tmp_path, model, lambda completions, **_: [1.0] * len(completions), max_steps=4)
    it.train()
    rows = log_rows(tmp_path)
    assert [r["no_gradient_steps"] for r in rows] == [1.0] * 4
    assert [r["zero_std_groups"] for r in rows] == [1.0] * 4
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    rates = [r["learning_rate"] for r in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1] > 0
    assert all(v is not None for r in rows for v in r.values())


def weights_after(tmp_path, **kwargs):
    it = trainer(tmp_path, **{"max_steps": 4, **kwargs})
    it.train()
    return {n: p.detach().clone() for n, p in it.model.named_parameters()}


def test_micro_batches_and_checkpointing_change_only_rounding(tmp_path):
    want = weights_after(tmp_path)
    start = dict(tiny().named_parameters())
    assert max((p - start[n]).abs().max() for n, p in want.items()) > 1e-3
    for options in (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=8, steps_per_generation=16),
        dict(max_tokens_per_micro_batch=40),
        dict(gradient_checkpointing=True),
    ):
        got = weights_after(tmp_path, **options)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=2e-5, msg=lambda m, o=options: f"{o}: {m}")


def test_checkpointing_recomputes_layers(tmp_path, monkeypatch):
    calls = {}
    for on in (False, True):
        it = trainer(tmp_path, gradient_checkpointing=on)
        updating_mode(it.model, True)
        it.minibatches_per_rollout = 1
        (minibatch,) = it.minibatches(experience_of(it))
        it.fused_loss(minibatch.micros[0], minibatch, on_policy=True)  # the head is probed once
        mlp, calls[on] = it.model.model.layers[0].mlp, 0
        forward = mlp.forward

        def counted(x, forward=forward, on=on):
            calls[on] += 1
            return forward(x)

        monkeypatch.setattr(mlp, "forward", counted)
        it.fused_loss(minibatch.micros[0], minibatch, on_policy=False).loss.backward()
        assert not it.model.model.layers[0].self_attn.training  # dropout stays off
    assert calls == {False: 1, True: 2}


def test_same_seed_same_run_bit_for_bit(tmp_path):
    a, b = (
        weights_after(tmp_path, num_iterations=2, max_steps=6),
        weights_after(tmp_path, num_iterations=2, max_steps=6),
    )
    assert all(torch.equal(a[n], b[n]) for n in a)
    c = weights_after(tmp_path, num_iterations=2, max_steps=6, seed=4)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_old_logprobs_recomputed_agree_with_the_samplers(tmp_path):
    a = weights_after(tmp_path, num_iterations=2, max_steps=4)
    b = weights_after(tmp_path, num_iterations=2, max_steps=4, old_logprobs="recompute")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-5)


def test_recompute_replaces_what_the_sampler_said(tmp_path):
    it = trainer(tmp_path, old_logprobs="recompute")
    updating_mode(it.model, True)
    experience = experience_of(it)
    experience = experience._replace(logprob=experience.logprob.float() * 0 + 7)
    for minibatch in it.minibatches(experience):
        for micro in minibatch.micros:
            scored = micro.target_ids != -100
            assert (micro.old_logprob[scored] <= 0).all()
            torch.testing.assert_close(micro.old_logprob, logprob_of(it.model, micro, 1.0).logprob)


class Poison(transformers.TrainerCallback):
    """Makes the gradient NaN in the given steps, before it is clipped."""

    def __init__(self, parameter, steps):
        self.step = 0
        self.steps = steps
        parameter.register_hook(lambda g: g * math.nan if self.step in self.steps else g)
        self.weights, self.parameter = [], parameter

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(self.parameter.detach().clone())


def test_nan_gradients_skip_the_step_and_leave_the_moments(tmp_path):
    model = tiny()
    poison = Poison(model.model.norm.weight, {1})
    it = trainer(tmp_path, model, max_steps=4, callbacks=[poison])
    summary = it.train()
    assert summary["skipped_steps"] == 1
    w = poison.weights
    assert torch.equal(w[0], w[1])
    assert not torch.equal(w[1], w[2])
    assert all(p.isfinite().all() for p in model.parameters())
    states = it.loop.optimizer.state.values()
    assert {int(s["step"]) for s in states} == {3}
    assert [r["skipped_steps"] for r in log_rows(tmp_path)] == [0, 1, 1, 1]


def test_only_steps_in_a_row_count_towards_giving_up(tmp_path):
    model = tiny()
    poison = Poison(model.model.norm.weight, {0, 1, 3, 4})
    it = trainer(tmp_path, model, max_steps=6, max_skipped_steps=3, callbacks=[poison])
    assert it.train()["skipped_steps"] == 4


def test_nan_gradients_without_end_give_the_run_up(tmp_path):
    model = tiny()
    it = trainer(
        tmp_path, model, max_steps=9, max_skipped_steps=3, callbacks=[Poison(model.model.norm.weight, range(99))]
    )
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        it.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny().parameters(), strict=True))


def test_a_failing_reward_stops_before_any_step(tmp_path):
    model = tiny()

    def failing(completions, **_):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="'failing' raised KeyError in row 0"):
        trainer(tmp_path, model, failing).train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny().parameters(), strict=True))


def test_nan_rewards_are_counted_and_the_rest_of_the_group_learns(tmp_path):
    it = trainer(tmp_path, reward=lambda completion_ids, **_: [math.nan, None, *digits_sum(completion_ids)[2:]])
    it.train()
    rows = log_rows(tmp_path)
    assert rows[0]["dropped_rows"] == 2
    assert rows[0]["grad_norm"] > 0
    assert all(math.isfinite(v) for r in rows for v in r.values())


def test_files_model_and_checkpoints(tmp_path):
    it = trainer(tmp_path, max_steps=4, save_steps=1, save_total_limit=2, plot_loss=True)
    summary = it.train()
    names = {p.name for p in tmp_path.iterdir()}
    assert {"trainer_log.jsonl", "training_metrics.csv", "training_curves.png", "summary.json"} <= names
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["steps"] == 4
    assert set(summary["seconds_by_part"]) == {"rollout", "scoring", "update"}
    assert sorted(n for n in names if n.startswith("checkpoint")) == ["checkpoint-3", "checkpoint-4"]
    ids = torch.randint(3, 15, (2, 9))
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(ids).logits, it.loop.unwrapped.eval()(ids).logits)
        assert (
            transformers.AutoTokenizer.from_pretrained(folder)("25>")["input_ids"]
            == make_tokenizer()("25>")["input_ids"]
        )
    rows = log_rows(tmp_path)
    for name in ("reward", "entropy", "clip_fraction", "ratio_max", "grad_norm", "completion_length", "peak_memory_mb"):
        assert all(math.isfinite(r[name]) for r in rows), name
    assert rows[0]["tokens_per_second"] > 0


class Events(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append("train_begin")
        assert model is not None

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append("step_end")
        if state.global_step == 3:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append("log")
        assert math.isfinite(logs["reward"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append("evaluate")
        assert math.isfinite(metrics["eval_reward"])

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("train_end")


def test_callbacks_see_the_run_and_can_stop_it(tmp_path):
    events = Events()
    rows = [{"prompt": p} for p in PROMPTS]
    options = config(tmp_path, max_steps=10, logging_steps=2, eval_steps=2)
    it = GRPOTrainer(tiny(), make_tokenizer(), rows, digits_sum, options, eval_dataset=rows[:3], callbacks=[events])
    summary = it.train()
    assert summary["steps"] == 3
    assert events.seen == ["train_begin", "step_end", "step_end", "evaluate", "log", "step_end", "log", "train_end"]
    assert math.isfinite(summary["eval_reward"])


def test_rewards_get_columns_and_chat_prompts_stay_chat(tmp_path):
    seen = {}

    def spy(prompts, completions, answer, **_):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.0] * len(prompts)

    message = [{"role": "user", "content": "25>"}]
    ids = make_tokenizer()("25>")["input_ids"]
    data = [
        Prompt(ids, "25>", {"prompt": message, "answer": "x"}, "a, line 1"),
        Prompt(ids, "25>", {"prompt": "25>", "answer": "y"}, "a, line 2"),
    ]
    it = GRPOTrainer(tiny(), make_tokenizer(), data, spy, config(tmp_path, max_steps=1, per_device_train_batch_size=4))
    it.train()
    assert sorted(seen["answer"]) == ["x"] * 4 + ["y"] * 4
    for prompt, completion, answer in zip(seen["prompts"], seen["completions"], seen["answer"], strict=True):
        assert prompt == (message if answer == "x" else "25>")
        assert isinstance(completion, list if answer == "x" else str)


def test_every_prompt_is_seen_once_an_epoch(tmp_path):
    it = trainer(tmp_path, per_device_train_batch_size=8, steps_per_generation=1)
    texts = [p.text for _ in range(8) for p in it.next_prompts()]
    assert sorted(texts[:8]) == sorted(texts[8:16]) == sorted(PROMPTS)
    assert texts[:8] != texts[8:]
    it = trainer(tmp_path, max_steps=-1, num_train_epochs=3.0)
    assert it.max_steps == 3 * 2  # 8 prompts are one rollout of two minibatches


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be a multiple of num_generations x processes = 4"):
        trainer(tmp_path, per_device_train_batch_size=3, steps_per_generation=1)
    with pytest.raises(ValueError, match="loss_typ.*did you mean 'loss_type'"):
        make_config({"stage": "grpo", "loss_typ": "grpo"})
    with pytest.raises(ValueError, match="unknown policy loss 'grppo'; did you mean 'grpo'"):
        GRPOConfig(loss_type="grppo")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        GRPOConfig(temperature=0.0)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        GRPOConfig(cutoff_len=16, max_completion_length=16)
    with pytest.raises(ValueError, match="output_dir is required"):
        GRPOTrainer(tiny(), make_tokenizer(), [{"prompt": "2>"}], digits_sum, GRPOConfig())
    with pytest.raises(ValueError, match="the dataset is empty"):
        GRPOTrainer(tiny(), make_tokenizer(), [], digits_sum, config(tmp_path))
    with pytest.raises(ValueError, match="a, line 3: token id 99.* outside the model.s vocabulary 0..14"):
        GRPOTrainer(tiny(), make_tokenizer(), [Prompt([3, 99], "", {}, "a, line 3")], digits_sum, config(tmp_path))
    with pytest.raises(ValueError, match=r"model must be a transformers causal LM, got 'some/model' \(str\)"):
        GRPOTrainer("some/model", make_tokenizer(), [], digits_sum, config(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer(tmp_path, resume_from_checkpoint=True)

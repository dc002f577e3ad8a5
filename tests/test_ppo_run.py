"""Runs of PPO: before the first update, every option, the step-wise calls, files, two processes, the issue's YAML."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppo_cases import PROMPTS, config, digits_sum, log_rows, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.grpo import PROPORTIONAL, GRPOConfig, GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.models.critic import ValueHead  # noqa: E402
from rlhf_fast.trainers.models.reward_model import load_reward_model  # noqa: E402
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer  # noqa: E402
from rlhf_fast.trainers.reward_ensemble import RewardEnsemble  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 14, 4], [5, 5, 8, 2, 0]])


def lora():
    peft = pytest.importorskip("peft")
    shape = dict(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    return peft.get_peft_model(tiny(attention_dropout=0.5), peft.LoraConfig(**shape))


# ---- before the first update


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny, dict()),
        (lambda: tiny(attention_dropout=0.5), dict(critic="shared", disable_dropout=False)),
        (lora, dict()),
        (lora, dict(critic="shared", packing=True, temperature=0.7)),
        (lora, dict(bf16=True, kl_in="loss")),
    ],
    ids=["full", "dropout, shared", "lora", "lora, shared, packed", "lora, bf16"],
)
def test_at_step_zero_the_ratio_is_exactly_one_and_the_kl_exactly_zero(tmp_path, model, options):
    """Prompts of six lengths: the sampler pads on the left, the trainer on the right or not at all."""
    it = trainer(
        tmp_path, model(), max_steps=1, ppo_epochs=1, ppo_buffer_size=1, per_device_train_batch_size=8, **options
    )
    it.train()
    (row,) = log_rows(tmp_path)
    assert row["ratio_max"] == row["ratio_min"] == 1.0
    assert row["clip_fraction"] == row["approx_kl"] == 0.0
    assert row["kl"] == row["kl_k1"] == row["kl_k2"] == row["kl_k3"] == row["kl_sequence"] == 0.0
    bf16 = options.get("bf16", False)
    assert row["sampler_logprob_gap"] < (0.1 if bf16 else 2e-6)
    assert row["grad_norm"] > 0


def test_without_a_learning_rate_the_second_step_is_as_the_first(tmp_path):
    it = trainer(tmp_path, learning_rate=0.0, critic_learning_rate=1e-3)
    it.train()
    for row in log_rows(tmp_path):
        assert row["kl"] == 0.0
        assert row["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert row["updates"] == 8
    critic = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
    assert critic.score.weight.abs().max() > 0  # which has a rate of its own


# ---- the options


def test_the_critic_warms_up_alone(tmp_path):
    for kind in ("own", "shared"):
        model = tiny()
        before = {n: p.clone() for n, p in model.named_parameters()}
        it = trainer(tmp_path / kind, model, critic=kind, critic_warmup_steps=1, max_steps=1)
        it.train()
        (row,) = log_rows(tmp_path / kind)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert "grad_norm" not in row
        assert row["grad_norm_critic"] > 0
        head = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
        weight = head.weight if kind == "shared" else head.score.weight
        assert weight.abs().max() > 0


def test_a_large_kl_ends_the_updates_of_a_rollout_and_the_schedule_goes_on(tmp_path):
    trainer(tmp_path / "a", early_stop_kl=1e-4, learning_rate=1e-2).train()
    trainer(tmp_path / "b", early_stop_kl=1e4, learning_rate=1e-2).train()
    stopped, free = log_rows(tmp_path / "a"), log_rows(tmp_path / "b")
    assert stopped[0]["updates"] == 2  # the first one is on-policy, the second sees the first one's KL
    assert free[0]["updates"] == 8
    # the second step begins at the same learning rate, whatever the first one left out
    assert stopped[1]["learning_rate"] == pytest.approx(1e-2 * (8 / 16 - 0.5 / 16))
    assert free[1]["learning_rate"] == pytest.approx(1e-2 * (8 / 16 - 3.5 / 16))


def test_coefficients_and_clips_follow_their_schedules(tmp_path):
    annealed = dict(ppo_target=None, kl_schedule="linear", epsilon_schedule="cosine", epsilon_final=0.1)
    trainer(tmp_path, kl_coef=0.2, max_steps=4, ppo_epochs=1, ppo_buffer_size=1, **annealed).train()
    rows = log_rows(tmp_path)
    assert [r["kl_coef"] for r in rows] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert [r["epsilon"] for r in rows] == pytest.approx(
        [0.1 + 0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    )


def test_the_adaptive_coefficient_follows_the_runs_kl(tmp_path):
    """Below the target the coefficient falls in each step, by the full 20% for 8 of 80 sequences; above it rises."""
    for target, sign in ((1e3, -1), (1e-9, 1)):
        folder = tmp_path / str(target)
        trainer(folder, ppo_target=target, kl_horizon=80, learning_rate=1e-2, max_steps=3).train()
        rows = log_rows(folder)
        assert rows[1]["kl_coef"] / rows[0]["kl_coef"] == pytest.approx(1 - 0.02)  # no KL yet
        assert rows[1]["kl_sequence"] != 0
        sign = -1 if rows[1]["kl_sequence"] < target else sign  # k1 may be below 0
        assert rows[2]["kl_coef"] / rows[1]["kl_coef"] == pytest.approx(1 + sign * 0.02)


def test_scores_are_normalised_clipped_and_penalised_in_this_order(tmp_path):
    it = trainer(tmp_path, ppo_score_norm=True, score_clip=1.0, missing_eos_penalty=0.5)
    scores, ended = torch.tensor([1.0, 2.0, 3.0, 14.0, math.nan]), torch.tensor([True, False, True, False, True])
    kept = scores[:4]
    z = (kept - kept.mean()) / kept.std(correction=0)
    want = z.clamp(-1, 1) - torch.tensor([0.0, 0.5, 0.0, 0.5])
    got = it.normal_scores(scores, ended)
    torch.testing.assert_close(got[:4], want)
    assert got[4].isnan()
    more = it.normal_scores(torch.tensor([20.0]), ended[:1])  # the statistics run on
    every = torch.tensor([1.0, 2.0, 3.0, 14.0, 20.0])
    torch.testing.assert_close(more, ((20 - every.mean()) / every.std(correction=0)).clamp(max=1).reshape(1))


def test_the_reference_may_follow_the_policy(tmp_path):
    it = trainer(
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
        max_steps=3,
        learning_rate=1e-2,
    )
    it.train()
    rows = log_rows(tmp_path)
    assert rows[0]["kl_k2"] == rows[2]["kl_k2"] == 0.0
    assert rows[1]["kl_k2"] > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(ppo_whiten_rewards=True, ppo_score_norm=True, packing=True),
        dict(loss_type="gspo", critic="shared", num_generations=2),
        dict(gradient_checkpointing=True, max_tokens_per_micro_batch=20, kl_in="loss", kl_estimator="k2"),
        dict(sampler="generate", kl_coef=0.0, weight_decay=0.1, max_grad_norm=0.0, vf_coef=1.0),
        *(dict(loss_type=kind) for kind in (*sorted(PROPORTIONAL), "dro", "clip_cov", "kl_cov")),
    ],
    ids=lambda options: options.get("loss_type") or next(iter(options)),
)
def test_other_options_run(tmp_path, options):
    summary = trainer(tmp_path, **options).train()
    assert summary["steps"] == 2
    assert all(math.isfinite(v) for r in log_rows(tmp_path) for v in r.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kl_schedule="linear"), "both steer kl_coef"),
        (dict(kl_coef=0.0, ref_model="x"), "no reference is used"),
        (dict(kl_coef=0.0, sync_ref_model=True), "no reference is used"),
        (dict(kl_coef=0.0, max_kl=1.0), "kl_coef 0 has none"),
        (dict(ref_model_adapters="x"), "goes with ref_model"),
        (dict(kl_in="loss", kl_clip=1.0), "kl_in is loss"),
        (dict(kl_gradient="k2"), "kl_in is reward"),
        (dict(epsilon_final=0.1), "epsilon_final is where epsilon_schedule ends, and epsilon_schedule is constant"),
        (dict(kl_coef_final=0.1, kl_schedule="constant"), "kl_schedule is constant"),
        (dict(rollout_server_model="x"), "rollout_server_model goes with sampler: server"),
        (dict(gamma=1.5), "gamma must be in"),
        (dict(ppo_epochs=0), "ppo_epochs must be at least 1"),
        (dict(ppo_buffer_size=2, steps_per_generation=4), "each is the size of a rollout"),
        (dict(loss_type="pppo"), "did you mean 'ppo'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        PPOConfig(**options)


def test_a_run_needs_something_that_scores(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "25>"}')
    paths = dict(
        model_name_or_path=str(tmp_path / "model"), dataset=str(tmp_path / "p.jsonl"), output_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="reward_model or reward_funcs is required"):
        PPOConfig(**paths).check_paths()
    with pytest.raises(FileNotFoundError, match="reward_model: no folder"):
        PPOConfig(**paths, reward_model=str(tmp_path / "none")).check_paths()


def test_the_ensemble_s_disagreement_and_each_function_are_logged(tmp_path):
    def longer(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    judges = RewardEnsemble([digits_sum, longer], aggregation="mean_std")
    trainer(tmp_path, reward=[judges, longer], reward_weights=[1.0, 0.0], max_steps=1, kl_in="loss").train()
    (row,) = log_rows(tmp_path)
    assert row["ensemble_spread"] > 0
    rows = [{"prompt": p} for p in PROMPTS]
    options = dict(output_dir=str(tmp_path / "grpo"), max_completion_length=5, cutoff_len=32, use_cpu=True, max_steps=1)
    GRPOTrainer(tiny(), make_tokenizer(), rows, judges, GRPOConfig(**options, dynamic_sampling=True)).train()
    assert log_rows(tmp_path / "grpo")[0]["ensemble_spread"] > 0
    assert row["reward"] == pytest.approx(row["reward_ensemble"])
    assert row["reward_longer"] == pytest.approx(row["completion_length"])
    assert row["kl"] == 0.0  # of the rollout
    assert row["kl_loss"] > 0  # of the updates


# ---- what may go wrong


def test_rows_of_nan_scores_are_left_out_and_counted(tmp_path):
    """The other rows learn as they do without them."""
    it = trainer(tmp_path, reward=lambda completion_ids, **_: [math.nan, None, *digits_sum(completion_ids)[2:]])
    it.train()
    rows = log_rows(tmp_path)
    assert rows[0]["dropped_rows"] == 2
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert rows[0]["grad_norm"] > 0


def test_only_nan_scores_change_nothing(tmp_path):
    model = tiny()
    it = trainer(tmp_path, model, reward=lambda completions, **_: [math.nan] * len(completions))
    it.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny().parameters(), strict=True))


def test_gradients_that_are_not_finite_skip_the_update_of_both(tmp_path):
    it = trainer(tmp_path, max_steps=1, ppo_epochs=1, max_skipped_steps=5)
    critic = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
    before = [p.clone() for p in [*it.model.parameters(), *critic.parameters()]]
    critic.score.weight.register_hook(lambda grad: grad * math.nan)
    summary = it.train()
    assert summary["skipped_steps"] == 2
    assert all(torch.equal(p, q) for p, q in zip([*it.model.parameters(), *critic.parameters()], before, strict=True))


# ---- the step-wise calls


def test_generate_and_step_do_what_train_does(tmp_path):
    trainer(tmp_path / "train", max_steps=2).train()
    it = PPOTrainer(tiny(), make_tokenizer(), config=config(tmp_path / "steps"))
    order = trainer(tmp_path / "order")
    for row in log_rows(tmp_path / "train"):
        queries = [prompt.text for prompt in order.next_prompts()]
        responses = it.generate(queries)
        metrics = it.step(queries, responses, digits_sum(responses.completions()))
        assert {"reward", "kl", "loss", "value_loss"} <= metrics.keys()
        for name, value in metrics.items():
            assert value == pytest.approx(row[name], rel=1e-5, abs=1e-6), name
    it.finish()
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("train", "steps"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_steps_are_evaluated(tmp_path):
    rows, options = [{"prompt": p} for p in PROMPTS], dict(max_steps=4, eval_steps=2)
    it = PPOTrainer(tiny(), make_tokenizer(), None, digits_sum, config(tmp_path, **options), eval_dataset=rows)
    for _ in range(3):
        it.step(["25>"], ["25"], [1.0])
    assert [row["step"] for row in log_rows(tmp_path) if "eval_reward" in row] == [2]


def test_step_takes_ids_texts_and_masks(tmp_path):
    it = PPOTrainer(tiny(), make_tokenizer(), config=config(tmp_path, max_steps=5))
    queries = [torch.tensor([5, 7, 14]), [4, 14], "25>", "7>"]
    responses = [torch.tensor([3, 4, 2]), [6], [7, 8, 9], [3]]
    metrics = it.step(queries, responses, torch.tensor([1.0, 0.0, 0.5, 2.0]), [[1, 1, 1], [1], [1, 0, 1], [0]])
    assert metrics["reward"] == pytest.approx(0.875)
    assert "sampler_logprob_gap" not in metrics  # nobody recorded them
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(it.step(["25>"], ["25"], [1.0])["loss"])
    with pytest.raises(ValueError, match="got 1 queries, 2 responses and 1 scores"):
        it.step(["25>"], [[3], [4]], [1.0])
    with pytest.raises(ValueError, match="row 1 has 1 entries, its response 2 tokens"):
        it.step(["25>", "7>"], [[3], [4, 5]], [1.0, 2.0], [[1], [1]])
    with pytest.raises(ValueError, match="max_steps is required without train_dataset"):
        PPOTrainer(tiny(), make_tokenizer(), config=config(tmp_path, max_steps=-1)).step(["7>"], [[3]], [1.0])


# ---- files


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_actor_and_critic_reload_and_say_the_same(tmp_path, kind):
    it = trainer(tmp_path, critic=kind, save_steps=2, plot_loss=kind == "own")
    summary = it.train()
    names = {p.name for p in tmp_path.iterdir()}
    assert {"trainer_log.jsonl", "training_metrics.csv", "summary.json", "critic"} <= names
    assert ("training_curves.png" in names) == (kind == "own")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary["seconds_by_part"]) == {"rollout", "scoring", "forward", "update"}
    policy, critic = it.loop.unwrapped.eval(), it.loop.accelerator.unwrap_model(it.loop.models["critic"]).eval()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(IDS).logits, policy(IDS).logits)
        if kind == "own":
            again = load_reward_model(folder / "critic")
            assert torch.equal(again(IDS, last=torch.arange(10)), critic(IDS, last=torch.arange(10)))
        else:
            hidden = loaded.model(IDS).last_hidden_state
            assert torch.equal(ValueHead.from_pretrained(folder / "critic")(hidden), critic(hidden))


def test_identical_seeds_give_identical_losses_whatever_the_layout(tmp_path):
    layouts = {
        "one": dict(per_device_train_batch_size=8),
        "four": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        "packed": dict(per_device_train_batch_size=8, packing=True),
        "checkpointing": dict(per_device_train_batch_size=8, gradient_checkpointing=True),
    }
    losses = {}
    for name, layout in layouts.items():
        trainer(tmp_path / name, ppo_buffer_size=1, **layout).train()
        losses[name] = [(r["loss"], r["value_loss"], r["kl"]) for r in log_rows(tmp_path / name)]
    for name in ("four", "packed", "checkpointing"):
        for got, want in zip(losses[name], losses["one"], strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-5), name  # fp32, two steps of four updates


# ---- the issue's two files, as they stand but for the paths


def test_the_yaml_of_the_issue(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from rlhf_fast.trainers.config import load_config, run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tiny().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    pairs = [{"prompt": p, "chosen": "123", "rejected": "321"} for p in PROMPTS]
    (tmp_path / "data" / "my_preference_data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "data" / "my_ppo_prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    info = {n: {"file_name": f"{n}.jsonl"} for n in ("my_preference_data", "my_ppo_prompts")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    common = f"model_name_or_path: {tmp_path / 'model'}\nfinetuning_type: lora\ntemplate: qwen\n"
    (tmp_path / "rm.yaml").write_text(
        common + "stage: rm\ndataset: my_preference_data\noutput_dir: saves/lora/reward\n"
    )
    (tmp_path / "ppo.yaml").write_text(
        common + "stage: ppo\ndo_train: true\nreward_model: saves/lora/reward\nppo_epochs: 4\nppo_target: 6.0\n"
        "lora_rank: 64\nlora_target: all\ndataset: my_ppo_prompts\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 8\nlearning_rate: 1.0e-6\nbf16: true\noutput_dir: saves/lora/ppo\n"
    )
    cpu = ["use_cpu=true", "disable_tqdm=true", "plot_loss=false"]
    run(load_config("rm.yaml", cpu))
    summary = run(load_config("ppo.yaml", cpu))
    assert summary["steps"] == 1  # 8 prompts are one rollout
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert peft.PeftModel.from_pretrained(base, "saves/lora/ppo")(IDS).logits.isfinite().all()
    assert load_reward_model("saves/lora/ppo/critic")(IDS, last=torch.arange(10)).isfinite().all()
    (row, *_) = log_rows(tmp_path / "saves/lora/ppo")
    assert row["kl"] == 0.0
    assert row["grad_norm"] > 0

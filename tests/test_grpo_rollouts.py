"""Rollouts to train on: refilled groups, conversations with tools, the step-wise calls, held-out splits, the files."""

import csv
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import PROMPTS, config, digits_sum, log_rows, tiny, trainer  # noqa: E402
from test_data import WORDS, ids_of, word_tokenizer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.config import load_config, run  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.refill import Batch, as_batch, collect, join, refilled, select_groups  # noqa: E402
from rlhf_fast.trainers.rewards import Scores, Steps  # noqa: E402
from rlhf_fast.trainers.rollout.samplers import SamplerSettings  # noqa: E402
from rlhf_fast.trainers.rollout.turns import MultiTurnSampler  # noqa: E402
from rlhf_fast.trainers.stepwise import as_queries, as_rollout  # noqa: E402

# ---- refilled groups


def by_prompt(prompts, completion_ids, **_):
    """Prompts with a 2 give the same reward to every completion."""
    return [1.0 if "2" in p else float(sum(ids) % 7) for p, ids in zip(prompts, completion_ids, strict=True)]


def test_degenerate_groups_are_replaced_by_other_prompts(tmp_path):
    it = trainer(tmp_path, reward=by_prompt, per_device_train_batch_size=8)  # 4 prompts a rollout
    first = collect(it, 4)
    batch, counts = refilled(it, first, 8)
    assert len(batch.prompts) == 4
    assert counts["degenerate_groups"] == 0
    dull = ["2" in p.text for p in first.prompts]
    assert any(dull)
    assert counts["resampled_groups"] >= sum(dull)
    for before, after, was_dull in zip(first.prompts, batch.prompts, dull, strict=True):
        assert (after is before) == (not was_dull)
    rows = [p for p in batch.prompts for _ in range(4)]
    assert torch.equal(it.score_rollout(rows, batch.rollout).total, batch.scores.total)  # everything moved together
    assert batch.scores.total.view(4, 4).std(1).min() > 0


def test_refilling_gives_up_after_its_attempts(tmp_path):
    it = trainer(
        tmp_path, reward=lambda prompts, **_: [0.0] * len(prompts), dynamic_sampling=True,
        dynamic_sampling_attempts=2, max_steps=2,
    )  # fmt: skip
    it.train()
    row = log_rows(tmp_path)[0]
    assert row["resampled_groups"] == 16  # 8 prompts, twice
    assert row["degenerate_groups"] == 8
    assert row["zero_std_groups"] == 1.0
    assert it.prompts_seen == 24


@pytest.mark.parametrize(
    ("options", "degenerate"),
    [
        (dict(advantage_estimator="remax"), 0),
        (dict(advantage_baseline="batch", scale_rewards="batch"), 0),
        (dict(advantage_baseline="none", scale_rewards="none"), 0),
        (dict(advantage_estimator="remax", scale_rewards="group"), 8),  # divided by the group's std
        (dict(advantage_baseline="loo"), 8),
    ],
    ids=str,
)
def test_equal_rewards_teach_where_the_baseline_is_not_the_groups(tmp_path, options, degenerate):
    def same(prompts, **_):
        return [float(len(p) + len(prompts)) for p in prompts]  # of the greedy ones, of which there are fewer, too

    it = trainer(tmp_path, reward=same, dynamic_sampling=True, dynamic_sampling_attempts=1, **options)
    batch, counts = refilled(it, collect(it, 4), 1)
    assert counts == {"resampled_groups": float(degenerate), "degenerate_groups": float(degenerate)}
    if not degenerate:
        experience, _ = it.advantages(batch)
        assert experience.advantages.abs().max() > 0


def test_every_group_of_a_refilled_run_teaches(tmp_path):
    it = trainer(tmp_path, reward=by_prompt, dynamic_sampling=True, dynamic_sampling_attempts=9, max_steps=2)
    it.train()
    assert log_rows(tmp_path)[0]["zero_std_groups"] == 0.0


def test_batches_are_joined_and_picked_apart(tmp_path):
    it = trainer(tmp_path)
    first, second = collect(it, 4), collect(it, 4)
    steps = Steps(torch.tensor([0, 0]), torch.tensor([1, 9]), torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    first = first._replace(scores=first.scores._replace(steps=steps))
    second = second._replace(scores=second.scores._replace(steps=steps._replace(value=steps.value + 10)))
    mask = torch.rand(len(second.rollout.ids)) < 0.5
    second = second._replace(rollout=second.rollout._replace(mask=mask))
    both = join(first, second)
    wanted = torch.tensor([10, 2, 0])
    picked = select_groups(both, wanted)
    rows = [g * 4 + i for g in wanted.tolist() for i in range(4)]
    for name, values in (("completions", both.rollout.completions()), ("finish", both.rollout.finish)):
        got = getattr(picked.rollout, name)
        assert (got() if callable(got) else got) == [values[r] for r in rows]
    lengths = both.rollout.lengths.tolist()
    for field in ("logprob", "mask"):
        parts = getattr(both.rollout, field).split(lengths)
        assert torch.equal(getattr(picked.rollout, field), torch.cat([parts[r] for r in rows]))
    assert picked.rollout.mask[both.rollout.lengths[rows[:4]].sum() :].all()  # the first batch had no mask: all sampled
    assert torch.equal(picked.scores.total, both.scores.total[rows])
    assert [p.text for p in picked.prompts] == [both.prompts[g].text for g in wanted]
    # of the rows 1, 9, 32 + 1, 32 + 9 of the join, 1, 9 and 41 were picked
    assert picked.scores.steps.row.tolist() == [9, 5, 1]
    assert picked.scores.steps.value.tolist() == [1.0, 2.0, 12.0]


# ---- conversations


def calculator(prompts, completions, columns):
    """Answers the first turn, by the row's own column, and ends the conversation after the second."""
    return [a if len(c) == 1 else None for c, a in zip(completions, columns["answer"], strict=True)]


def test_tool_tokens_carry_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "calculator", staticmethod(calculator), raising=False)
    model = tiny()
    model.lm_head.weight.data[2] += 0.3 * model.lm_head.weight.data.abs().max()  # ends its turns now and then
    it = trainer(
        tmp_path, model, environment="rlhf_fast.trainers.grpo:GRPOTrainer.calculator", max_turns=2, max_turn_length=3,
        max_completion_length=12, max_steps=4, beta=0.1, learning_rate=1e-2,
    )  # fmt: skip
    assert isinstance(it.sampler, MultiTurnSampler)
    batch = collect(it, 4)
    rollout = batch.rollout
    assert 0 < (~rollout.mask).sum() < len(rollout.mask)
    experience, _ = it.advantages(batch)
    assert torch.equal(experience.trained, rollout.mask)
    it.minibatches_per_rollout = 1
    (minibatch,) = it.minibatches(experience)
    assert minibatch.tokens == rollout.mask.sum()
    live = experience.advantages != 0
    trained = torch.cat([m.target_ids[m.target_ids != -100] for m in minibatch.micros]).sort().values
    if not it.drops_zero_advantages:
        live = torch.ones_like(live)
    assert torch.equal(trained, rollout.ids[rollout.mask & live].sort().values)
    it.minibatches_per_rollout = 2
    it.train()
    rows = log_rows(tmp_path)
    assert rows[0]["sampler_logprob_gap_max"] < 2e-5  # what the trainer scores is what was sampled, turn by turn
    assert rows[0]["kl"] == 0.0


# ---- step by step


def test_generate_and_step_are_what_train_does(tmp_path):
    def last_state(it):
        return [p.detach().clone() for p in it.model.parameters()]

    it = trainer(tmp_path, max_steps=2)
    it.train()
    want = last_state(it)
    it = trainer(tmp_path, reward=[digits_sum, by_prompt], max_steps=2)  # functions that step has no use for
    prompts = it.next_prompts()
    rollout = it.generate([p.ids for p in prompts], 4)
    metrics = it.step([p.ids for p in prompts], rollout, digits_sum(rollout.completions()))
    assert all(torch.equal(a, b) for a, b in zip(last_state(it), want, strict=True))
    assert metrics["reward"] == log_rows(tmp_path)[0]["reward"]
    assert math.isfinite(metrics["loss"])
    summary = it.finish()
    assert summary["steps"] == 2
    assert (tmp_path / "model.safetensors").is_file()


def test_steps_with_responses_from_elsewhere(tmp_path):
    """Texts, no dataset, no reward function, no recorded log-probabilities: the old ones are computed."""
    options = config(tmp_path, max_steps=8, num_iterations=2, learning_rate=1e-2, per_device_train_batch_size=8)
    it = GRPOTrainer(tiny(), make_tokenizer(), config=options)
    queries, responses = ["25>", "7>"] * 1, ["52", "55", "2", "25", "7", "77", "1", "5"]
    scores = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, math.nan, 0.0]
    it.minibatches_per_rollout = 2
    first = it.step(queries, responses, scores)
    assert first["dropped_rows"] == 1
    rows = log_rows(tmp_path)
    assert rows[0]["ratio_max"] == rows[0]["ratio_min"] == 1.0
    assert all(math.isfinite(v) for row in rows for v in row.values())
    again = it.step([q for q in queries for _ in range(4)], responses, torch.tensor(scores))  # one query a response
    assert math.isfinite(again["loss"])
    assert it.loop.state.global_step == 8
    for bad, message in (
        (dict(scores=[1.0]), r"scores must be \(8,\), one for each response, got \(1,\)"),
        (
            dict(queries=["1>", "2>", "3>"]),
            "queries must hold one for each of 8 responses or groups, got 3",
        ),
        (dict(responses=[[]] * 8), "row 0 is empty"),
        (
            dict(queries=["25>"] * 5 + ["7>"] * 3),
            "groups of num_generations=4 with one prompt, but row 5 has another prompt than row 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            it.step(**{"queries": queries, "responses": responses, "scores": scores, **bad})


def test_groups_of_equal_prompts_stay_apart(tmp_path):
    """Two groups of the first prompt and one of the second, one query a response."""
    tokenizer, settings = make_tokenizer(), SamplerSettings(4, (2,), 0)
    queries, scores = [[5, 6]] * 4 + [[7, 8]] * 2, [0.0, 1.0] * 3
    batch = as_batch(queries, [[9, 2]] * 6, scores, tokenizer, settings, 2)
    assert batch.group_size == 2
    assert [p.ids for p in batch.prompts] == [[5, 6], [5, 6], [7, 8]]
    with pytest.raises(ValueError, match="groups of num_generations=4, got 6 rows"):
        as_batch(queries, [[9, 2]] * 6, scores, tokenizer, settings, 4)


def test_texts_get_one_bos_and_one_eos():
    from tokenizers import processors

    tokenizer = word_tokenizer(bos=True)
    settings = SamplerSettings(4, (tokenizer.eos_token_id, WORDS.index("d")), 1)
    want = ids_of("<s> a b")
    assert [q.ids for q in as_queries(["<s> a b", "a b", want], tokenizer)] == [want] * 3
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    assert as_queries(["a b"], tokenizer)[0].ids == want
    rollout = as_rollout(["a b </s>", "a b", "a d", ids_of("a"), ""], tokenizer, settings)
    assert rollout.completions() == [ids_of(text) for text in ("a b </s>", "a b </s>", "a d", "a", "</s>")]
    assert rollout.finish == ["stop", "stop", "stop", "length", "stop"]


# ---- data and files


def run_folder(tmp_path, **options):
    tiny().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"{i}>", "answer": str(i)}) for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts.jsonl").write_text('{"text": "0123456789"}\n{"text": "99"}\n')
    values = dict(
        stage="grpo", model_name_or_path=str(tmp_path / "model"), dataset=str(tmp_path / "data.jsonl"),
        output_dir=str(tmp_path / "out"), num_generations=2, max_completion_length=4, cutoff_len=16, use_cpu=True,
        per_device_train_batch_size=8, max_steps=2, disable_tqdm=True, eval_steps=1, beta=0.1, val_size=0.2,
        reward_funcs="rlhf_fast.trainers.rewards:exact_match", max_kl=9.0, load_best_model_at_end=True,
        perplexity_dataset=str(tmp_path / "texts.jsonl"), eval_reward_funcs="rlhf_fast.trainers.rewards:exact_match",
        learning_rate=1e-3, num_iterations=2, dynamic_sampling=True,
    )  # fmt: skip
    path = tmp_path / "grpo.yaml"
    path.write_text(json.dumps(values | options))  # JSON is YAML
    return load_config(path)


METRICS = """
    reward reward_std loss policy_loss kl kl_k1 kl_k2 kl_k3 approx_kl entropy clip_fraction clip_fraction_low
    clip_fraction_high ratio_mean ratio_max ratio_min sampler_logprob_gap sampler_logprob_gap_max zero_std_groups
    resampled_groups degenerate_groups completion_length completion_length_min completion_length_max
    truncated_completions dropped_rows no_gradient_steps grad_norm learning_rate tokens_per_second seconds_rollout
    seconds_scoring seconds_update seconds_evaluate skipped_steps peak_memory_mb epoch eval_reward eval_exact_match
    eval_completion_length eval_perplexity
"""


def test_a_run_from_yaml_leaves_every_metric_and_file(tmp_path):
    config = run_folder(tmp_path)
    summary = run(config)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [name for name in METRICS.split() if name not in rows[0]] == []
    header = next(csv.reader((out / "training_metrics.csv").open()))
    assert set(METRICS.split()) <= set(header)
    assert (out / "training_curves.png").stat().st_size > 1000
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in ("reward_first", "reward_last", "best_step", "best_eval_exact_match", "eval_perplexity", "warnings"):
        assert name in summary, name
    ids = torch.randint(3, 15, (1, 6))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{summary['best_step']}")
    assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_val_size_holds_prompts_out(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(GRPOTrainer, "train", lambda self: seen.update(train=self.prompts, held=self.eval_prompts))
    for size, count in ((0.2, 4), (5, 5)):
        run(run_folder(tmp_path, val_size=size))
        train, held = ({p.text for p in seen[part]} for part in ("train", "held"))
        assert len(held) == count
        assert len(train) == 20 - count
        assert not train & held
    with pytest.raises(ValueError, match="val_size=20.0 leaves none of 20 rows to train on"):
        run(run_folder(tmp_path, val_size=20))


def test_a_prompt_dataset_is_needed_for_train(tmp_path):
    it = GRPOTrainer(tiny(), make_tokenizer(), None, digits_sum, config(tmp_path))
    with pytest.raises(ValueError, match="train_dataset is required, got None"):
        it.train()
    it = GRPOTrainer(tiny(), make_tokenizer(), config=config(tmp_path, max_steps=-1))
    with pytest.raises(ValueError, match="max_steps is required without train_dataset"):
        it.step(["2>"], ["1", "2", "3", "4"], [0.0, 1.0, 0.0, 0.0])
    it = GRPOTrainer(tiny(), make_tokenizer(), [{"prompt": p} for p in PROMPTS], None, config(tmp_path))
    with pytest.raises(ValueError, match="reward_funcs must hold at least one function, got none"):
        it.train()
    assert Batch([1, 2], type("R", (), {"finish": [0] * 6}), Scores(*[torch.zeros(6)] * 3)).group_size == 3
    assert GRPOConfig().dynamic_sampling is False

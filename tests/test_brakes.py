"""Brakes and gauges: each illness from a made-up log, and each brake in a real run of a tiny model."""

import json
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import ppo_cases  # noqa: E402
from grpo_cases import PROMPTS, config, digits_sum, log_rows, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.gauges import HealthWarnings  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.ppo import PPOTrainer  # noqa: E402

# ---- illnesses


def watch(rows, **kwargs):
    """The messages that a log gives, and its rows."""
    health = HealthWarnings(**kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, row in enumerate(rows, 1):
            state = SimpleNamespace(global_step=step, is_world_process_zero=True)
            health.on_log(None, state, None, logs=row)
    return health.messages


def steady(count, **metrics):
    return [dict(metrics) for _ in range(count)]


def path(name, *values, each=6, **rest):
    """`each` rows at every value of one metric. What is said first is a mean over the last 5 rows."""
    return [{name: v, **rest} for v in values for _ in range(each)]


HEALTHY = dict(
    reward=0.5, entropy=1.0, kl=0.02, approx_kl=0.01, zero_std_groups=0.2, completion_length=50.0,
    truncated_completions=0.1, sampler_logprob_gap=1e-4, explained_variance=0.3,
)  # fmt: skip

ILL = {
    "entropy collapse": (path("entropy", 1.0, 0.5, 0.05), "from 1 to 0.05 nats"),
    "KL explosion": (path("kl", 0.1, 0.5, 2.0), "runs away: KL 1.1 nats a token from the reference. Try"),
    "no spread": (path("zero_std_groups", 0.3, 0.9, reward=1.0), r"90% of the groups have equal rewards \(mean 1\)"),
    "lengths running away": (
        path("completion_length", 50.0, 60.0, truncated_completions=0.0)
        + path("completion_length", 200.0, truncated_completions=0.6),
        "from 50 to 116 tokens and 24% of them are cut",
    ),
    "sampler and trainer disagree": (path("sampler_logprob_gap", 1e-4, 0.2), "0.0801 nats a token off"),
    "blind critic": (path("explained_variance", 0.2, -0.5), "explained variance -0.22"),
    "alignment tax": ([{"eval_perplexity": p} for p in (10.0, 12.0, 16.0)], "is 1.6 times what it was"),
    "reward hacking": (
        [
            {"reward": r, **({"eval_exact_match": e} if e is not None else {})}
            for r, e in [(0.2, 0.5), (0.3, None), (0.4, 0.7), (0.6, None), (0.7, 0.6), (0.9, None), (1.0, 0.4)]
        ],
        "the reward rose from 0.35 to 0.95 while eval_exact_match went from 0.7 to 0.4",
    ),
}


@pytest.mark.parametrize("name", ILL, ids=str)
def test_each_illness_is_told_once_with_its_numbers(name):
    rows, words = ILL[name]
    messages = watch(rows + [rows[-1]] * 20, metric="eval_exact_match")
    assert len(messages) == 1
    assert messages[0].startswith("step ")
    assert f": {name}: " in messages[0]
    assert "Try " in messages[0]
    assert re.search(words, messages[0]), messages[0]
    assert [r["warning"] for r in rows if "warning" in r] or "warning" in rows[-1]


def test_a_healthy_run_is_left_alone():
    assert watch(steady(50, **HEALTHY, eval_reward=0.5, eval_perplexity=10.0)) == []
    rising = [HEALTHY | {"reward": i / 50, "eval_reward": i / 60 + 0.02 * math.sin(i)} for i in range(50)]
    assert watch(rising) == []


def test_a_held_out_score_that_falls_with_the_reward_is_no_hacking():
    rows = [{"reward": r, "eval_reward": r} for r in (0.2, 0.5, 0.8, 0.5, 0.4, 0.3)]
    assert watch(rows) == []


def test_perplexity_as_the_metric_is_better_when_less():
    rows = [{"reward": r, "eval_perplexity": p} for r, p in ((0.1, 12.0), (0.2, 10.0), (0.4, 12.0), (0.6, 13.0))]
    assert any("reward hacking" in m for m in watch(rows, metric="eval_perplexity", greater_is_better=False))


def test_an_illness_is_told_again_only_after_it_was_better():
    high, low, between = (path("zero_std_groups", v, each=10, reward=1.0) for v in (0.9, 0.1, 0.7))
    assert len(watch(high + low + high)) == 2
    assert len(watch(high + between + high)) == 1  # 0.7 / 0.8 is not well


def test_nan_and_missing_metrics_say_nothing():
    assert watch(steady(30, reward=math.nan, kl=math.nan, entropy=None, note="x")) == []
    assert watch(steady(30, reward=math.nan, zero_std_groups=1.0)) == []  # no row has a reward: they are not equal


# ---- in a run


def test_a_real_run_warns_and_the_files_hold_it(tmp_path):
    """A reward that is the same for all: no group has a spread."""
    same = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    it = trainer(tmp_path, reward=same, max_steps=6)
    with pytest.warns(UserWarning, match="step 5: no spread: 100% of the groups have equal rewards"):
        summary = it.train()
    (message,) = summary["warnings"]
    assert "dynamic_sampling" in message
    rows = log_rows(tmp_path)
    assert [r["step"] for r in rows if "warning" in r] == [5]
    assert json.loads((tmp_path / "summary.json").read_text())["warnings"] == [message]
    assert "warning" in (tmp_path / "training_metrics.csv").read_text().splitlines()[0]
    again = trainer(tmp_path, reward=same, max_steps=6, health_warnings=False).train()
    assert "warnings" not in again


def evaluated(tmp_path, reward=digits_sum, model=None, eval_rows=PROMPTS, texts=None, **kwargs):
    rows = [{"prompt": p} for p in PROMPTS]
    held_out = [{"prompt": p} for p in eval_rows] if eval_rows else None
    return GRPOTrainer(
        model or tiny(), make_tokenizer(), rows, reward, config(tmp_path, **kwargs), eval_dataset=held_out,
        perplexity_dataset=texts,
    )  # fmt: skip


def test_perplexity_is_that_of_plain_torch_and_needs_no_prompts(tmp_path):
    texts = ["0123456789", "55", "9>1"]
    it = evaluated(tmp_path, eval_rows=None, texts=texts, eval_steps=1, per_device_eval_batch_size=2, max_steps=1)
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[*make_tokenizer()(text)["input_ids"], 2]])
        logps = torch.log_softmax(it.model.eval()(ids).logits[0, :-1], -1)
        total, count = total - logps.gather(1, ids[0, 1:, None]).sum().item(), count + ids.shape[1] - 1
    assert it.evaluate() == {"eval_perplexity": pytest.approx(math.exp(total / count), rel=1e-5)}
    it.train()
    assert log_rows(tmp_path)[0]["eval_perplexity"] > 1


def length_of(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_evaluation_measures_functions_that_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "length_of", length_of, raising=False)  # an import path wherever the tests are
    specs = ["rlhf_fast.trainers.grpo:GRPOTrainer.length_of"]
    it = evaluated(tmp_path, eval_reward_funcs=specs)
    scores = it.evaluate()
    assert set(scores) == {"eval_reward", "eval_length_of", "eval_completion_length"}
    assert scores["eval_length_of"] == scores["eval_completion_length"]
    assert it.config.best_metric == ("eval_GRPOTrainer.length_of", False) or it.config.best_metric[0].startswith(
        "eval_"
    )


def test_a_kl_budget_stops_the_run(tmp_path):
    it = trainer(tmp_path, max_kl=0.01, max_steps=200, learning_rate=3e-2)
    summary = it.train()
    rows = log_rows(tmp_path)
    assert summary["steps"] == len(rows) < 200
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl"] > 0.01
    assert all(r["kl"] <= 0.01 for r in rows[:-1])
    assert summary["stopped_by"].startswith(f"kl={rows[-1]['kl']:.4g} above max_kl=0.01 at step {len(rows)}")
    assert (tmp_path / "model.safetensors").is_file()


def test_kl_is_measured_without_being_trained_on(tmp_path):
    """max_kl takes a reference, but the gradient is that of beta 0."""
    results = []
    for options in (dict(), dict(max_kl=100.0)):
        it = trainer(tmp_path, max_steps=3, **options)
        it.train()
        results.append([p.detach().clone() for p in it.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    row = log_rows(tmp_path)[-1]
    assert row["kl"] == row["kl_k3"] > 0
    assert row["kl_k2"] > 0
    assert abs(row["kl_k1"]) < 1


class Scripted:
    """Evaluations that a test writes; it also marks the weights so that each step's can be told."""

    def __init__(self, it, values):
        self.values, self.seen, self.it = list(values), [], it

    def __call__(self, prompts=None):
        weights = self.it.loop.unwrapped.model.norm.weight
        self.seen.append(weights.detach().clone())
        return {"eval_reward": self.values[len(self.seen) - 1], "eval_perplexity": -self.values[len(self.seen) - 1]}


@pytest.mark.parametrize("metric", [None, "perplexity"])
def test_the_best_model_is_kept_through_rotation_and_comes_back(tmp_path, metric):
    it = evaluated(
        tmp_path, max_steps=6, eval_steps=1, save_steps=1, save_total_limit=1, load_best_model_at_end=True,
        learning_rate=1e-2, metric_for_best_model=metric,
    )  # fmt: skip
    it.evaluate = script = Scripted(it, [0.1, 0.5, math.nan, 0.4, 0.3, 0.2, 0.5])
    summary = it.train()
    assert summary["best_step"] == 2
    name = "best_eval_reward" if metric is None else "best_eval_perplexity"
    assert summary[name] == (0.5 if metric is None else -0.5)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert torch.equal(loaded, script.seen[1])
    assert not torch.equal(loaded, script.seen[5])
    assert torch.equal(script.seen[6], script.seen[1])  # the last evaluation is of the model that is saved


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_the_start_may_be_the_best(tmp_path, stage):
    options = dict(max_steps=2, eval_steps=1, load_best_model_at_end=True, eval_on_start=True)
    if stage == "grpo":
        it = evaluated(tmp_path, **options)
    else:
        rows = [{"prompt": p} for p in PROMPTS]
        settings = ppo_cases.config(tmp_path, **options)
        it = PPOTrainer(tiny(), make_tokenizer(), rows, digits_sum, settings, eval_dataset=rows)
    start = it.loop.unwrapped.model.norm.weight.detach().clone()
    it.evaluate = Scripted(it, [0.9, 0.5, 0.4, 0.9])
    assert it.train()["best_step"] == 0
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight, start)


def test_an_unknown_metric_names_those_that_there_are(tmp_path):
    it = evaluated(tmp_path, eval_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match="no 'eval_accuracy', it has eval_completion_length, eval_reward"):
        it.train()


def test_the_reference_follows_the_policy(tmp_path):
    still = trainer(tmp_path, beta=0.1, max_steps=6, learning_rate=1e-2)
    still.train()
    kl = [r["kl"] for r in log_rows(tmp_path)]
    it = trainer(
        tmp_path, beta=0.1, max_steps=6, learning_rate=1e-2, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
    )  # fmt: skip
    it.train()
    moved = [r["kl"] for r in log_rows(tmp_path)]
    assert moved[:2] == kl[:2]
    assert moved[2] == moved[4] == 0.0  # just copied: the next rollout starts on the reference
    assert kl[4] > 1e-6
    current = dict(it.loop.unwrapped.named_parameters())
    assert all(torch.equal(p, current[n]) for n, p in it.reference.model.named_parameters())


def test_options_of_the_brakes():
    with pytest.raises(ValueError, match="load_best_model_at_end goes by evaluations: set eval_steps"):
        GRPOConfig(load_best_model_at_end=True)
    with pytest.raises(ValueError, match="max_kl must be above 0 or null, got 0.0"):
        GRPOConfig(max_kl=0.0)
    with pytest.raises(ValueError, match="ref_model_mixup_alpha must be in"):
        GRPOConfig(ref_model_mixup_alpha=0.0)
    assert GRPOConfig(eval_reward_funcs="a.b:exact").best_metric == ("eval_exact", True)
    assert GRPOConfig(metric_for_best_model="eval_perplexity").best_metric == ("eval_perplexity", False)
    assert GRPOConfig(metric_for_best_model="reward", greater_is_better=False).best_metric == ("eval_reward", False)

"""What a run is refused for before its model is loaded, by `--dry-run` as by the run itself."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from grpo_cases import config, tiny
from test_hostile_runs import ROLLOUTS, ROWS, ModelIsLoaded, refused, run

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers import rl, stage
from rlhf_fast.trainers.grpo import GRPOTrainer

__all__ = ["run"]  # the fixture


@pytest.fixture
def both(run, monkeypatch):
    """both(stage, rows, *overrides, words): run and dry run are refused for the same reason, without a model."""

    def no_model(*args, **kwargs):
        raise ModelIsLoaded

    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(rl, "load_model", no_model)
    monkeypatch.setattr(rl, "load_rewards", no_model)
    monkeypatch.setattr(stage, "load_data", lambda *args, **kwargs: pytest.fail("the data was read"))

    def call(kind, rows, *overrides, words):
        for dry in ([], ["--dry-run"]):
            refused(run(kind, rows, *overrides, *dry), *words)

    return call


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward_funcs=nope:f"], ["reward function 'nope:f'", "no module 'nope'"]),
        (["eval_reward_funcs=nope:f"], ["reward function 'nope:f'"]),
        (["reward_funcs=[]"], ["reward_model or reward_funcs is required"]),
        (
            ["reward_model=model", "reward_model_type=lora"],
            ["reward_model_type is lora, but model holds a whole model"],
        ),
        (["reward_model=gone"], ["reward_model: no folder gone"]),
        (["reward_weights=[1.0, 2.0]"], ["reward_weights must hold 1 numbers"]),
        (["environment=math:nothing"], ["error: environment 'math:nothing': math has no 'nothing'"]),
        (["perplexity_dataset=gone.jsonl"], ["perplexity_dataset: no file or folder gone.jsonl"]),
    ],
)
@pytest.mark.parametrize("kind", ROLLOUTS)
def test_what_scores_a_rollout(both, kind, overrides, words):
    both(kind, [ROWS[kind]] * 4, *overrides, words=words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lr_scheduler_type=cosin"], ["lr_scheduler_type must be one of ", "did you mean 'cosine'?"]),
        (["lr_scheduler_type=warmup_stable_decay"], ["lr_scheduler_type=warmup_stable_decay", "num_decay_steps"]),
        (["optim=adamww"], ["optim must be "]),
        (["report_to=bogus"], ["report_to: bogus is not supported"]),
        (["resume_from_checkpoint=latest"], ["resume_from_checkpoint: no complete checkpoint in "]),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_names_and_the_checkpoint(both, kind, overrides, words):
    both(kind, [ROWS[kind]] * 4, *overrides, words=words)


def test_what_only_the_dry_run_asks_early(run):
    (run.folder / "texts.jsonl").write_text('{"text": 3}')
    texts = f"perplexity_dataset={run.folder}/texts.jsonl"
    refused(run("ppo", [ROWS["ppo"]] * 4, texts, "--dry-run"), "texts.jsonl, line 1: ")
    refused(
        run("sft", [ROWS["sft"]], "load_best_model_at_end=true", "--dry-run"),
        "load_best_model_at_end goes by evaluations",
    )
    refused(run("grpo", [ROWS["grpo"]] * 4, "per_device_train_batch_size=3", "--dry-run"), "must be a multiple of")


def test_a_column_that_a_reward_function_needs(both):
    rows = [ROWS["grpo"], {"prompt": "2>"}]
    where = ["train.jsonl, line 2: no column 'answer'", "reward function 'exact_match' needs", "the row has prompt"]
    both("grpo", rows, words=where)
    both("ppo", rows, "val_size=1", words=where)
    rows = [{"prompt": "2>", "completion": "2"}]
    both("grpo", rows, words=["train.jsonl, line 1: no column 'answer'"])


def test_a_column_that_the_trainer_hands_over_itself(both):
    rows = [ROWS["grpo"], {**ROWS["grpo"], "completion_ids": [1]}]
    both("grpo", rows, words=["train.jsonl, line 2: the column 'completion_ids' is what the trainer hands over itself"])


def test_columns_of_a_trainer_made_in_python(tmp_path):
    def wants(completions, answer, level=1):
        return [0.0] * len(completions)

    def wants_completion(completions, *, completion):
        return [0.0] * len(completions)

    rows = [{"prompt": "2>", "answer": "2"}, {"prompt": "3>", "completion": "3"}]

    def make(reward, rows, **more):
        return GRPOTrainer(tiny(), make_tokenizer(), rows, reward, config(tmp_path), **more)

    make(wants, rows[:1])
    with pytest.raises(ValueError, match="rows, row 2: no column 'answer', which the reward function 'wants' needs"):
        make(wants, rows)
    with pytest.raises(ValueError, match="rows, row 1: no column 'answer'"):
        make(wants, rows[:1], eval_dataset=rows[1:])
    with pytest.raises(ValueError, match="'wants_completion' needs the column 'completion', which is not handed over"):
        make(wants_completion, rows[1:])
    for name in ("prompts", "completions", "prompt_ids", "completion_ids", "finish_reasons"):
        with pytest.raises(ValueError, match=f"the column '{name}' is what the trainer hands over itself; rename it"):
            make(wants, [{**rows[0], name: "x"}])


def test_every_other_column_is_handed_over(tmp_path):
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [float(i) for i in range(len(completions))]

    rows = [{"prompt": f"{i}>", "completion": "1", "answer": "2", "level": i} for i in range(4)]
    del rows[2]["level"]
    it = GRPOTrainer(tiny(), make_tokenizer(), rows, reward, config(tmp_path, max_steps=1))
    it.train()
    assert set(seen) == {"prompts", "prompt_ids", "completion_ids", "finish_reasons", "answer", "level"}
    assert seen["level"] == [None if text == "2>" else int(text[0]) for text in seen["prompts"]]

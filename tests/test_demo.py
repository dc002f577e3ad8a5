"""The demo, shortened: the reward teaches, and without its link to the completions nothing is learnt."""

import json

import pytest

transformers = pytest.importorskip("transformers")

from rlhf_fast.cli.demos import demo, task  # noqa: E402
from rlhf_fast.cli.demos.task import accuracy, answers, make_rows, make_tokenizer  # noqa: E402
from rlhf_fast.trainers.config import load_config  # noqa: E402
from rlhf_fast.trainers.grpo import run_grpo  # noqa: E402
from rlhf_fast.trainers.rewards import exact_match  # noqa: E402

ROLLOUTS, SHUFFLED = 30, 20  # accuracy 0.54 to 0.79; with shuffled rewards below 0.1


def shuffled(completions, answer, finish_reasons, **_):
    """The same rewards, each for the completion of another prompt: half a batch away."""
    rewards = exact_match(completions, answer, finish_reasons)
    return rewards[len(rewards) // 2 :] + rewards[: len(rewards) // 2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo("grpo", folder, seed=0, rollouts=ROLLOUTS, quiet=True)


def test_accuracy_rises(short):
    folder, summary = short
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    assert summary["accuracy_after"] == pytest.approx(summary["eval_reward"])  # reloaded = as it was in the run
    assert summary["reward_last"] > summary["reward_first"] + 0.1
    assert summary["warnings"] == []
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_it_leaves_the_files_of_any_run(short):
    folder, summary = short
    for name in (
        "trainer_log.jsonl",
        "training_metrics.csv",
        "training_curves.png",
        "model.safetensors",
        "tokenizer.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(2 * ROLLOUTS + 1))  # 0: the evaluation before training
    assert rows[0]["eval_reward"] == pytest.approx(summary["accuracy_before"])
    gaps = [r["sampler_logprob_gap_max"] for r in rows if "sampler_logprob_gap_max" in r]
    assert len(gaps) == ROLLOUTS  # the first update of each
    assert max(gaps) < 1e-4


def test_held_out_prompts_are_in_no_training_set(short):
    folder, _ = short
    parts = {}
    for name in ("sft", "prompts", "test"):
        lines = (folder / "data" / f"{name}.jsonl").read_text().splitlines()
        parts[name] = {json.loads(line)["prompt"] for line in lines}
    assert [len(parts[n]) for n in ("sft", "prompts", "test")] == [100, 64 * ROLLOUTS, 512]
    assert not parts["test"] & (parts["sft"] | parts["prompts"])
    assert not parts["sft"] & parts["prompts"]


def test_with_shuffled_rewards_it_falls(short, tmp_path, monkeypatch):
    folder, summary = short
    monkeypatch.setattr(task, "shuffled", shuffled, raising=False)  # an import path wherever the tests are
    overrides = [f"output_dir={tmp_path}", "reward_funcs=rlhf_fast.cli.demos.task:shuffled", "plot_loss=false"]
    overrides += [f"max_steps={2 * SHUFFLED}"]
    run_grpo(load_config(folder / "grpo.yaml", overrides))
    after = accuracy(answers(tmp_path, folder / "data" / "test.jsonl"))
    assert after < summary["accuracy_before"] - 0.1


def test_tokenizer_and_rows():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 15
    ids = tokenizer("251648>")["input_ids"]
    assert len(ids) == 7
    assert tokenizer.decode(ids) == "251648>"
    assert (
        tokenizer.decode([*tokenizer("124568")["input_ids"], tokenizer.eos_token_id], skip_special_tokens=True)
        == "124568"
    )
    rows = make_rows(200, 3)
    assert rows == make_rows(200, 3) != make_rows(200, 4)
    assert all(answer == "".join(sorted(prompt[:-1])) and len(answer) == 6 for prompt, answer in rows)


def test_unknown_demo():
    with pytest.raises(ValueError, match="must be one of .*grpo.*, got 'vlm'"):
        demo("vlm")

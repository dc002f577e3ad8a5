"""The PPO demos, cut short: a few steps of each stage, and what they leave behind."""

import json

import pytest

pytest.importorskip("transformers")

from rlhf_fast.cli.demos import DEMOS, demo, ppo, rm, task  # noqa: E402
from rlhf_fast.trainers.models.reward_model import load_reward_model  # noqa: E402


def test_ppo_on_a_learned_reward_with_the_verifier_watching(tmp_path, monkeypatch):
    monkeypatch.setitem(rm.RM, "max_steps", 3)
    monkeypatch.setattr(ppo, "ROLLOUT", 16)
    few = dict(per_device_train_batch_size=4, ppo_epochs=1, eval_steps=0, plot_loss=False)
    assert {"ppo", "ppo-rm"} <= DEMOS.keys()
    summary = demo("ppo-rm", tmp_path, seed=0, quiet=True, steps=3, prompts=200, pairs=60, overrides=few)
    assert summary["demo"] == "ppo-rm"
    assert {"accuracy_before", "accuracy_after", "pair_accuracy", "eval_reward_exact_match"} <= summary.keys()
    assert summary["accuracy_after"] == pytest.approx(summary["eval_reward_exact_match"])  # reloaded = as in the run
    assert summary["accuracy_before"] == task.accuracy(task.answers(tmp_path / "sft", tmp_path / "data" / "test.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["reward"] == pytest.approx(row["reward_reward_model"], rel=1e-5) for row in rows[1:])
    assert all("reward_exact_match" in row for row in rows[1:])  # of no weight
    assert ["grad_norm" in row for row in rows[1:]] == [False, False, True]  # the critic alone for two steps
    load_reward_model(tmp_path / "critic")

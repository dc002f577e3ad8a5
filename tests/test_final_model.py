"""The final model: put into its folder whole, kept whatever comes after training, an error that says what is there."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import grpo_cases
import ppo_cases
import resume_cases as cases
import torch
from safetensors.torch import load_file
from stage_cases import tiny
from test_signals import run_with
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers.base import FusedTrainer
from rlhf_fast.trainers.reward_calls import RewardError
from rlhf_fast.trainers.rl import RLTrainer
from rlhf_fast.trainers.run_log import read_log
from rlhf_fast.trainers.signals import Stopped

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
KILLED = 9


def save(folder, seed, shards):
    """A model of `seed` in one file or in several."""
    model = tiny(seed, dtype=torch.float32)
    with files.placing(folder, ALONE) as part:
        model.save_pretrained(part, max_shard_size="10KB" if shards else "1GB")
        (part / "critic").mkdir()
        model.save_pretrained(part / "critic")


def killed_at(k, folder, seed, shards):
    """The save of another process, which dies before its k-th flush, rename or removal; whether it came so far."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, 10**6))

        def counted(function):
            def call(*args, **kwargs):
                if next(calls) == k:
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return call

        torch.set_num_threads(1)
        os.replace = counted(os.replace)
        files.flush = counted(files.flush)
        type(folder).unlink = counted(type(folder).unlink)
        code = 0
        try:
            save(folder, seed, shards)
        except BaseException:
            code = 1
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def seed_of(folder):
    """Which model a folder holds, None for none; every file in it has to be whole."""
    for path in folder.rglob("*.safetensors"):
        if ".model.part" not in path.parts:
            load_file(path)
    if not (folder / "config.json").is_file():
        return None
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    same = [s for s in (1, 2) if all(torch.equal(found[n], p) for n, p in tiny(s, torch.float32).state_dict().items())]
    return same[0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(("old", "new"), [(None, False), (False, False), (False, True), (True, False)])
def test_killed_at_every_moment_the_old_model_or_the_new_one_is_there(tmp_path, old, new):
    seen, k = [], 1
    while True:
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
        if old is not None:
            save(folder, 1, old)
        died = killed_at(k, folder, 2, new)
        seen.append(seed_of(folder))
        assert (folder / "mine.txt").is_file()
        if not died:
            break
        k += 1
    assert k > 8
    assert set(seen) == {None if old is None else 1, 2}
    assert seen == sorted(seen, key=lambda s: s or 0)
    assert seen[-1] == 2
    assert not (folder / ".model.part").exists()
    assert len(list(folder.glob("*.safetensors"))) > 1 if new else len(list(folder.glob("*.safetensors"))) == 1
    assert (folder / "model.safetensors.index.json").is_file() == new
    save(tmp_path / "1", 2, new)  # what a killed save has left is in nobody's way
    assert seed_of(tmp_path / "1") == 2
    assert not (tmp_path / "1" / ".model.part").exists()


def test_a_model_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path):
    save(tmp_path, 1, False)

    def fail():
        with files.placing(tmp_path, ALONE, needed=1234) as part:
            (part / "model.safetensors").write_text("half")
            raise OSError("no such luck")

    with pytest.raises(files.CheckpointError, match=r"the model in .* could not be written: no such luck\. It needs"):
        fail()
    assert seed_of(tmp_path) == 1
    assert not (tmp_path / ".model.part").exists()


# ---- what comes after the last step


EVALUATE = dict(max_steps=2, save_steps=0)


@pytest.mark.parametrize(("case", "trainer"), [("sft by length", FusedTrainer), ("grpo", RLTrainer)])
def test_an_evaluation_that_fails_does_not_cost_the_model(tmp_path, monkeypatch, case, trainer):
    folder = cases.prepare(tmp_path, cases.CASES[case]["stage"])

    def fails(self, *args, **kwargs):
        raise MemoryError("of the evaluation")

    monkeypatch.setattr(trainer, "evaluate", fails)
    with pytest.raises(Exception, match="of the evaluation"):
        cases.train(folder, "out", case, eval_dataset=str(folder / "train.jsonl"), **EVALUATE)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32


class SignalAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **_):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("case", "trainer"), [("sft by length", FusedTrainer), ("grpo", RLTrainer)])
def test_a_signal_after_the_last_step_does_not_cost_the_model(tmp_path, monkeypatch, case, trainer):
    """The run ends with it, without the evaluation."""
    folder = cases.prepare(tmp_path, cases.CASES[case]["stage"])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: pytest.fail("evaluated after the signal"))
    values = cases.options(folder, "out", case, eval_dataset=str(folder / "train.jsonl"), **EVALUATE)
    with pytest.raises(Stopped, match="SIGTERM, after the run had ended") as stopped:
        run_with(values, SignalAtTheEnd())
    assert stopped.value.code == 143
    assert AutoModelForCausalLM.from_pretrained(folder / "out").dtype == torch.float32
    assert grpo_cases.log_rows(folder / "out")


class Fails:
    """A reward function that fails in its third rollout of four."""

    def __init__(self, error, fails=True):
        self.calls, self.error, self.fails = 0, error, fails

    def __call__(self, completion_ids, **_):
        self.calls += 1
        if self.calls == 3 and self.fails:
            raise self.error
        return grpo_cases.digits_sum(completion_ids)


@pytest.mark.parametrize("trainer", [grpo_cases.trainer, ppo_cases.trainer])
def test_a_reward_that_fails_does_not_cost_the_steps_before(tmp_path, trainer):
    """The run goes on behind them."""
    sizes = dict(max_steps=4, save_steps=0, steps_per_generation=1)
    if trainer is ppo_cases.trainer:
        del sizes["steps_per_generation"]
    with (
        pytest.warns(UserWarning, match="checkpoint-2 holds the 2 steps made before the error"),
        pytest.raises(RewardError, match="raised OSError"),
    ):
        trainer(tmp_path, reward=Fails(OSError("no route to the judge")), **sizes).train()
    assert files.flaw(tmp_path / "checkpoint-2") is None
    summary = trainer(tmp_path, reward=Fails(None, fails=False), resume_from_checkpoint="latest", **sizes).train()
    assert summary["steps"] == 4
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]
    broken = trainer(tmp_path / "first", reward=Fails(OSError("at once")), **sizes)
    broken.rewards.functions[0].calls = 2
    with pytest.raises(RewardError):
        broken.train()
    assert not list((tmp_path / "first").glob("checkpoint-*"))

"""What the tests of resuming share: every stage as a small run from folders, and what two runs must have alike."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from grpo_cases import PROMPTS, digits_sum
from safetensors.torch import load_file
from stage_cases import PAIRS, folders, judged_rows, run_options

from rlhf_fast.trainers.config import make_config, run
from rlhf_fast.trainers.run_log import read_log

TIMINGS = ("seconds", "tokens_per_second", "peak_memory_mb", "eval_runtime", "eval_samples_per", "eval_steps_per")
RL = dict(max_completion_length=5, num_generations=4, reward_funcs=["grpo_cases:digits_sum"], learning_rate=1e-3)
RL |= dict(per_device_train_batch_size=8, eval_dataset=None, eval_do_sample=True)
ONE = dict(num_generations=1, per_device_train_batch_size=4, reward_funcs=["resume_cases:noisy_reward"])
# Every stage with as much state as it can have, and a log row over several steps.
CASES = {
    "sft": dict(stage="sft", lora_dropout=0.3, finetuning_type="lora", lora_rank=2, per_device_train_batch_size=2),
    "sft by length": dict(stage="sft", per_device_train_batch_size=2, train_sampling_strategy="group_by_length"),
    "rm": dict(stage="rm", per_device_train_batch_size=2),
    "dpo": dict(
        stage="dpo", sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.3, pref_bco_weight=0.5
    ),
    "kto": dict(stage="kto", sync_ref_model=True, ref_model_sync_steps=2),
    "ppo": dict(
        stage="ppo", ppo_score_norm=True, ppo_target=0.1, kl_horizon=100.0, kl_coef=0.2,
        sync_ref_model=True, ref_model_sync_steps=1,
        ppo_epochs=2, ppo_buffer_size=2, **RL | ONE,
    ),
    "grpo": dict(
        stage="grpo", beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, num_iterations=2, steps_per_generation=2,
        **RL,
    ),
}  # fmt: skip


def prepare(tmp_path: Path, stage: str) -> Path:
    """A model folder and the stage's data."""
    rows = judged_rows() if stage == "kto" else PAIRS
    if stage == "sft":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    if stage in ("ppo", "grpo"):
        rows = [{"prompt": p, "answer": str(len(p))} for p in PROMPTS]
    return folders(tmp_path, rows)


def options(folder: Path, name: str, case: str, **changes):
    values = run_options(folder, name, **dict(max_steps=8, save_steps=3, logging_steps=2, cutoff_len=32))
    return values | CASES[case] | changes


def train(folder: Path, name: str, case: str, **changes):
    values = options(folder, name, case, **changes)
    return run(make_config(values))


@contextmanager
def one_thread():
    """As in the processes of `environment`: sums round by their threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def break_off(folder: Path, step: int) -> None:
    """The run as a kill after `step` leaves it, with rows of the log that no checkpoint knows."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "adapter_model.safetensors", "summary.json"):
        (folder / name).unlink(missing_ok=True)


def rows(folder: Path) -> list[dict]:
    """The log without timings."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in read_log(folder)]


def weights(folder: Path) -> dict:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in folder.rglob("*.safetensors")
        if "checkpoint-" not in str(path.relative_to(folder))
        for name, tensor in load_file(path).items()
    }


def command(folder: Path, values: dict) -> list[str]:
    """`rlhf-fast train` of these options."""
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "rlhf_fast", "train", str(folder / "run.yaml")]


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the reward functions of the tests."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def assert_same(folder: Path, name: str, summary: dict, want: dict) -> None:
    """Weights, log and summary of a run are those of the unbroken one."""
    a, b = weights(folder / "whole"), weights(folder / name)
    assert a.keys() == b.keys()
    assert len(a) > 0
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert rows(folder / "whole") == rows(folder / name)
    timed = ("seconds", "_per_second", "_mb", "runtime", "output_dir", "by_part")
    kept = {k: v for k, v in want.items() if not k.endswith(timed)}
    assert {k: v for k, v in summary.items() if not k.endswith(timed)} == kept


def noisy_reward(completion_ids, **_):
    """From every generator that a process has."""
    noise = [random.random() + np.random.rand() + torch.rand(()).item() for _ in completion_ids]  # noqa: NPY002
    return [a + b for a, b in zip(digits_sum(completion_ids), noise, strict=True)]


def slow_reward(completion_ids, **_):
    """Half a minute from the second rollout on."""
    if slow_reward.called:
        time.sleep(30)
    slow_reward.called = True
    return digits_sum(completion_ids)


slow_reward.called = False


def rising_reward(completion_ids, **_):
    """More at every call."""
    rising_reward.calls += 1
    return [float(rising_reward.calls)] * len(completion_ids)


rising_reward.calls = 0


def hurt_reward(completion_ids, **_):
    """In the second call of the second process it gets the signal that HURT names."""
    hurt_reward.calls += 1
    if hurt_reward.calls == 2 and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), getattr(signal, os.environ["HURT"]))
    return digits_sum(completion_ids)


hurt_reward.calls = 0

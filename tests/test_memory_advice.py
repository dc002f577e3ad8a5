"""When memory runs out, the error names the part of the run and the options that help."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import grpo_cases
import ppo_cases
from stage_cases import arguments
from test_cli import invoke
from test_sft import make_rows, tiny_model
from test_sft import trainer_for as sft_trainer

from rlhf_fast.trainers.memory_advice import OutOfMemory, memory_advice

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
)


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_every_kind_of_failed_allocation_is_known(error):
    words = "out of memory in training: .*gradient_checkpointing"
    with pytest.raises(OutOfMemory, match=words) as caught, memory_advice(None, "training"):
        raise error
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, torch.OutOfMemoryError)


def test_other_errors_pass_and_an_inner_part_knows_better():
    with pytest.raises(RuntimeError, match="^a bug$"), memory_advice(None, "training"):
        raise RuntimeError("a bug")
    with (
        pytest.raises(OutOfMemory, match="in the rollout"),
        memory_advice(None, "load"),
        memory_advice(None, "rollout"),
    ):
        raise GPU


def test_what_is_set_already_is_not_suggested(tmp_path):
    config = grpo_cases.config(tmp_path, gradient_checkpointing=True, max_tokens_per_micro_batch=64)
    with pytest.raises(OutOfMemory) as caught, memory_advice(config, "update"):
        raise GPU
    text = str(caught.value)
    assert "a smaller max_tokens_per_micro_batch (now 64)" in text
    assert "gradient_checkpointing" not in text
    assert "per_device_train_batch_size" not in text  # no longer the unit of a forward


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("sample", "in the rollout: .*rollout_batch_size.* max_completion_length"),
        ("score_rollout", "in scoring: .*per_device_eval_batch_size"),
        ("update", "in update: .*per_device_train_batch_size .*max_tokens_per_micro_batch.*gradient_checkpointing"),
    ],
)
@pytest.mark.parametrize("cases", [grpo_cases, ppo_cases])
def test_the_parts_of_grpo_and_ppo(tmp_path, monkeypatch, part, words, cases):
    trainer = cases.trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    monkeypatch.setattr(trainer, part, failing(GPU))
    with pytest.raises(OutOfMemory, match=words):
        trainer.train()
    assert trainer.loop.state.global_step == 0


def test_the_trainer_stages(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path, tiny_model(), make_rows(8), max_steps=1, per_device_train_batch_size=8)
    monkeypatch.setattr(trainer, "share", failing(CPU))
    with pytest.raises(OutOfMemory, match=r"in training: .*per_device_train_batch_size \(now 8\), with gradient_acc"):
        trainer.train()
    with pytest.raises(OutOfMemory, match=r"in the evaluation: .*per_device_eval_batch_size"):
        trainer.evaluate(trainer.train_dataset)
    assert arguments(tmp_path).gradient_checkpointing is False


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.cli.train.train", failing(OutOfMemory("out of memory in the rollout: try less")))
    result = invoke("train", tmp_path / "x.yaml")
    assert (result.exit_code, result.stderr) == (2, "error: out of memory in the rollout: try less\n")
    monkeypatch.setattr("rlhf_fast.cli.train.train", failing(RuntimeError("a bug")))
    assert isinstance(invoke("train", tmp_path / "x.yaml").exception, RuntimeError)

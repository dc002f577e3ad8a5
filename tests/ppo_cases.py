"""A model of two layers, and PPO trainers around it."""

import json

import torch
import transformers
from grpo_cases import PROMPTS, digits_sum, tiny

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer


def config(tmp_path, **kwargs):
    values = dict(
        output_dir=str(tmp_path), max_completion_length=5, cutoff_len=32, use_cpu=True, disable_tqdm=True, seed=3,
        per_device_train_batch_size=4, ppo_buffer_size=2, learning_rate=1e-3, plot_loss=False, max_steps=2,
    )  # fmt: skip
    return PPOConfig(**{**values, **kwargs})


def trainer(tmp_path, model=None, reward=digits_sum, *, own=None, ref_model=None, callbacks=(), **kwargs):
    rows = [{"prompt": p, "answer": str(len(p))} for p in PROMPTS]
    given = dict(critic=own, ref_model=ref_model, callbacks=callbacks)
    return PPOTrainer(model or tiny(), make_tokenizer(), rows, reward, config(tmp_path, **kwargs), **given)


def classifier(seed=1):
    torch.manual_seed(seed)
    settings = {**tiny().config.to_dict(), "num_labels": 1}
    return transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**settings))


def log_rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]

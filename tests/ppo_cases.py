"""A model of two layers, and PPO trainers around it."""

import json

import torch
import transformers

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = ["25>", "7>", "90331>", "2516>", "8>", "11>", "4444>", "306>"]


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=15, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, **kwargs,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def digits_sum(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


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

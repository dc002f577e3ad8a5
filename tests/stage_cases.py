"""What the tests of the reward-model, DPO and KTO stages share: a tiny model, ragged pairs, trainers, runs."""

from __future__ import annotations

import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.data.collators import PairCollator
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows

new = "activation_checkpointing"  # its name from transformers 5.20 or so on
CHECKPOINTING = {new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing": True}

PAIRS = [
    {"prompt": f"{i}{9 - i}4>", "chosen": "123456"[: 1 + (i * 5) % 6], "rejected": "98765"[: 1 + (i * 3) % 5]}
    for i in range(8)
]


def tiny_config(**options):
    shape = dict(vocab_size=15, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2)
    return Qwen2Config(**shape | dict(tie_word_embeddings=True, initializer_range=0.3) | options)


def tiny(seed=0, dtype=torch.float64, **options):
    """Two layers, width 16, weights large enough for logits that differ."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(tiny_config(**options)).to(dtype)


def pair_data(rows=PAIRS):
    return tokenize_pairs(Rows.from_list([dict(r) for r in rows]), make_tokenizer(), max_length=32)


def judged_rows(rows=PAIRS):
    return [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in rows
            for side in ("chosen", "rejected")]  # fmt: skip


def judged_data(rows):
    return tokenize_kto(Rows.from_list([dict(r) for r in rows]), make_tokenizer(), max_length=32)


def pair_batch(data, packing=False):
    return PairCollator(0, packing=packing)([data[i] for i in range(len(data))])


def arguments(folder, **options):
    quiet = dict(use_cpu=True, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=0)
    return TrainingArguments(output_dir=str(folder), **quiet | options)


def one_step(make, **options):
    """(weights after one SGD step over all rows, what it logged)."""
    trainer = make(**dict(max_steps=1, learning_rate=0.5, optim="sgd", max_grad_norm=0.0) | options)
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()], trainer.state.log_history[0]


def sequence_logprob(model, ids, prompt):
    """log p(answer | prompt) of one sequence, from the model's own logits."""
    logprob = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprob[torch.arange(prompt - 1, len(ids) - 1), torch.tensor(ids[prompt:])]


def each_answer(data, side):
    """(ids, prompt length) of one side of each pair."""
    for i in range(len(data)):
        row = data[i][side]
        yield row["input_ids"].tolist(), int(row["scored"].argmax())


def folders(tmp_path, rows, **options):
    """A model folder and a data file; tmp_path."""
    tiny(dtype=torch.float32, **options).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def run_options(folder, name="out", **changes):
    values = dict(model_name_or_path=str(folder / "model"), dataset=str(folder / "train.jsonl"))
    values |= dict(output_dir=str(folder / name), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2)
    return values | dict(use_cpu=True, disable_tqdm=True, plot_loss=False) | changes

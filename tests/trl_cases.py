"""What the tests of the TRL integration share: a tiny model and tokenizer, and trainers that run two steps on it."""

from __future__ import annotations

import pytest

trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402

VOCAB = 40
QUIET = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    max_steps=2,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    seed=0,
)
PAIRS = [
    {"prompt": f"{i}{9 - i}4>", "chosen": "12345"[: 2 + i % 4], "rejected": "98765"[: 5 - i % 3]} for i in range(8)
]
DATA = {
    "sft": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS],
    "dpo": PAIRS,
    "kto": [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(PAIRS)],
    "grpo": [{"prompt": r["prompt"]} for r in PAIRS],
    "rloo": [{"prompt": r["prompt"]} for r in PAIRS],
}


def tiny(dtype: torch.dtype = torch.float32, **options) -> Qwen2ForCausalLM:
    """One layer, width 16, untied unless asked."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # logits that differ
        **{"tie_word_embeddings": False} | options,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def saved(folder, **options) -> str:
    """The tiny model and its tokenizer in a folder: TRL loads the reference from where the policy came from."""
    tiny(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def reward(completions: list[str], **_) -> list[float]:
    """The share of 1s."""
    return [text.count("1") + len(text) / 10 for text in completions]


def trainer(kind: str, path: str, tmp_path, *, cls=None, peft_config=None, **options):
    """A trainer of TRL's on the model in `path`, two steps."""
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(path)
    options = QUIET | dict(output_dir=str(tmp_path / "out")) | options
    if kind in ("grpo", "rloo"):
        options = dict(num_generations=4, max_completion_length=6, generation_batch_size=8) | options
        tokenizer.padding_side = "left"
    name = kind.upper()
    config = getattr(trl, f"{name}Config")(**options)
    arguments = dict(model=model, args=config, train_dataset=Dataset.from_list(DATA[kind]), processing_class=tokenizer)
    if kind in ("grpo", "rloo"):
        arguments["reward_funcs"] = reward
    return (cls or getattr(trl, f"{name}Trainer"))(**arguments, peft_config=peft_config)

"""The data of PPO and GRPO: prompts, their columns, a held-out split, texts for the perplexity."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rlhf_fast.trainers.data.dataset_info import load_rows, split
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import (
    DataStats,
    Prompt,
    check_prompt_vocabulary,
    check_vocabulary,
    tokenize_prompts,
    tokenize_sft,
)
from rlhf_fast.trainers.gauges import Perplexity
from rlhf_fast.trainers.rl_config import RLConfig


def as_prompts(rows: Any, tokenizer: Any, config: RLConfig, vocabulary: int) -> list[Prompt] | None:
    """`Prompt`s of rows (or as they are), their ids within the model's vocabulary."""
    if rows is None:
        return None
    if len(rows) == 0:
        raise ValueError("the dataset is empty")
    prompts = list(rows)
    if not isinstance(rows[0], Prompt):
        rows = rows if isinstance(rows, Rows) else Rows.from_list(map(dict, rows))
        limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
        prompts, stats = tokenize_prompts(rows, tokenizer, **limits)
        if stats.dropped_overlong_prompt or stats.truncated_prompts:
            warnings.warn(f"prompts: {stats}", stacklevel=4)
    check_prompt_vocabulary(prompts, vocabulary)
    return prompts


def columns_of(rows: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The data's own columns, one value a row."""
    reserved = {"prompt", "prompts", "completion", "completions", "prompt_ids", "completion_ids", "finish_reasons"}
    names = dict.fromkeys(name for p in rows for name in p.columns if name not in reserved)
    return {name: [p.columns.get(name) for p in rows] for name in names}


def load_prompts(config: RLConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt] | None, DataStats]:
    """(to train on, to evaluate on, what became of the rows) of a run's configuration."""

    def load(key: str) -> tuple[list[Prompt], DataStats]:
        limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
        prompts, stats = tokenize_prompts(load_rows(config, key), tokenizer, **limits)
        if not config.disable_tqdm:
            print(f"{key}: {stats}", file=sys.stderr)  # for people, off the output of programs
        return prompts, stats

    prompts, stats = load("dataset")
    if config.eval_dataset:
        return prompts, load("eval_dataset")[0], stats
    if not config.val_size:
        return prompts, None, stats
    kept, held = split(len(prompts), config.val_size, config.seed)
    return [prompts[i] for i in kept], [prompts[i] for i in held], stats


def make_perplexity(config: RLConfig, tokenizer: Any, vocabulary: int, texts: Any = None) -> Perplexity | None:
    """The gauge over the given texts (strings, or rows that SFT takes), or over those of the config."""
    rows = texts if texts is not None or not config.perplexity_dataset else load_rows(config, "perplexity_dataset")
    if rows is None:
        return None
    if not isinstance(rows, Rows):
        rows = Rows.from_list([{"text": row} if isinstance(row, str) else dict(row) for row in rows], "texts")
    dataset = tokenize_sft(rows, tokenizer, max_length=config.cutoff_len, overlong_prompt="truncate")
    check_vocabulary(dataset, vocabulary, rows, tokenizer)
    return Perplexity(dataset, tokenizer.pad_token_id, batch_size=config.per_device_eval_batch_size)

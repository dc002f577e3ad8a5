"""The data of PPO and GRPO: prompts, their columns, a held-out split, texts for the perplexity."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
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
from rlhf_fast.trainers.preflight import reward_functions
from rlhf_fast.trainers.rewards import HANDED_OVER, RewardFunction, name_of, required
from rlhf_fast.trainers.rl_config import RLConfig

WITHHELD = frozenset(("prompt", "completion"))  # columns of the data that reward functions do not get


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
    """What reward functions get of the data: every column but `WITHHELD`; None where a row has none."""
    names = dict.fromkeys(name for p in rows for name in p.columns if name not in WITHHELD)
    return {name: [p.columns.get(name) for p in rows] for name in names}


def check_columns(prompts: Sequence[Prompt] | None, functions: Iterable[RewardFunction]) -> None:
    """Raise ValueError naming file and line where a row has a column that only the trainer may hand over, or lacks one
    that a function takes without a default; for the latter the function too."""
    needed = [(function, column) for function in functions for column in required(function) - HANDED_OVER]
    for function, column in needed:
        if column in WITHHELD:
            raise ValueError(
                f"reward function {name_of(function)!r} needs the column {column!r}, which is not handed over as such: "
                f"prompts are in `prompts`, and a reference answer needs a column of another name"
            )
    for prompt in prompts or ():
        for name in prompt.columns.keys() & HANDED_OVER:
            raise ValueError(f"{prompt.where}: the column {name!r} is what the trainer hands over itself; rename it")
        for function, column in needed:
            if column not in prompt.columns:
                raise ValueError(
                    f"{prompt.where}: no column {column!r}, which the reward function {name_of(function)!r} needs; "
                    f"the row has {', '.join(prompt.columns) or 'none'} (null is a value; a default makes it optional)"
                )


def load_prompts(config: RLConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt] | None, DataStats]:
    """(to train on, to evaluate on, what became of the rows) of a run's configuration."""

    def load(key: str) -> tuple[list[Prompt], DataStats]:
        limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
        prompts, stats = tokenize_prompts(load_rows(config, key), tokenizer, **limits)
        if not config.disable_tqdm:
            print(f"{key}: {stats}", file=sys.stderr)  # for people, off the output of programs
        return prompts, stats

    prompts, stats = load("dataset")
    held_out = load("eval_dataset")[0] if config.eval_dataset else None
    if config.val_size:
        kept, held = split(len(prompts), config.val_size, config.seed)
        prompts, held_out = [prompts[i] for i in kept], [prompts[i] for i in held]
    check_columns_of(config, prompts, held_out)
    return prompts, held_out, stats


def check_columns_of(config: RLConfig, prompts: Sequence[Prompt] | None, evaluation: Sequence[Prompt] | None) -> None:
    """`check_columns` by the functions of a configuration."""
    scoring, measured = reward_functions(config)
    check_columns(prompts, scoring)
    check_columns(evaluation, [*scoring, *measured])


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

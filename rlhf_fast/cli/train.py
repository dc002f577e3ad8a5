"""`rlhf-fast train CONFIG.yaml [key=value ...]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train(config: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> dict[str, Any]:
    """Run the stage that a YAML file describes and print where its output is; returns its summary.

    `dry_run` reads and checks configuration and data, prints both, and loads no model.
    """
    from rlhf_fast.trainers.config import load_config, run

    resolved = load_config(config, overrides)
    if dry_run:
        return _dry_run(resolved)
    _quiet_libraries()
    summary = run(resolved)
    _print_summary(summary, resolved.output_dir)
    return summary


def _dry_run(config: Any) -> dict[str, Any]:
    import dataclasses

    import yaml

    from rlhf_fast.trainers.data import tokenize_prompts
    from rlhf_fast.trainers.hf_utils import load_tokenizer
    from rlhf_fast.trainers.readers import read_rows

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    tokenizer = load_tokenizer(config)
    counts: dict[str, Any] = {}
    if config.takes_training_arguments:
        from rlhf_fast.trainers.stage import load_data

        for key, (dataset, _) in zip(("train", "evaluation"), load_data(config, tokenizer, quiet=True), strict=True):
            if dataset is not None:
                counts[key] = dataset.stats
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        steps = math.ceil(math.ceil(counts["train"].kept / batch) * config.num_train_epochs)
        print(f"# {steps if config.max_steps < 0 else config.max_steps:,} steps on one device")
    else:
        limit = getattr(config, "prompt_length", config.cutoff_len)
        for key in ("dataset", "eval_dataset"):
            if paths := config.dataset_paths(key):
                rows = read_rows(paths, limit=config.max_samples)
                policy = config.overlong_prompt
                counts[key] = tokenize_prompts(rows, tokenizer, max_length=limit, overlong_prompt=policy)[1]
    for key, stats in counts.items():
        print(f"# {key}: {stats}")
    return {key: dataclasses.asdict(stats) for key, stats in counts.items()}


def _quiet_libraries() -> None:
    """No progress bars for loading shards: the training bar is the one to watch."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_summary(summary: dict[str, Any], output_dir: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary.get('stage', '')} done", show_header=False)
    for key, value in summary.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table, f"model, logs and curves: {output_dir}")

"""`rlhf-fast train CONFIG.yaml [key=value ...]`."""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train(config: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> dict[str, Any]:
    """Run the stage that a YAML file describes and print where its output is; returns its summary.

    `dry_run` makes every check that needs no model (names, import paths, the checkpoint to go on from, data), prints
    configuration, data and the predicted memory, and loads no model.
    """
    from rlhf_fast.trainers.config import load_config, run
    from rlhf_fast.trainers.run_log import is_main_process

    _find_modules(Path(config))
    resolved = load_config(config, overrides)
    if dry_run:
        return _dry_run(resolved)
    _quiet_libraries()
    summary = run(resolved)
    if is_main_process():
        _print_summary(summary, resolved.output_dir)
    return summary


def _find_modules(config: Path) -> None:
    """A reward function's module may lie in the working directory or beside the configuration; others come first."""
    for folder in dict.fromkeys((os.getcwd(), str(config.absolute().parent))):
        if folder not in sys.path:
            sys.path.append(folder)


def leave_ranks() -> None:
    """End a process of several whose run is done; a process alone goes on.

    gloo's threads may hold a Python object for a moment longer than the run. If one lets go of it while the interpreter
    shuts down, the process aborts, and its launcher calls a finished run failed: so the shutdown is cut short.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _dry_run(config: Any) -> dict[str, Any]:
    import dataclasses

    import yaml

    from rlhf_fast.cli.plan import show
    from rlhf_fast.trainers.models.hf_utils import load_tokenizer
    from rlhf_fast.trainers.plan import plan
    from rlhf_fast.trainers.preflight import preflight

    preflight(config)
    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    tokenizer = load_tokenizer(config)
    counts = (_prompts if config.stage in ("ppo", "grpo") else _examples)(config, tokenizer)
    for key, stats in counts.items():
        print(f"# {key}: {stats}")
    steps = _steps(config, counts["train"].kept)
    print(f"# {steps:,} steps on one device")
    show(plan(config, length=max(stats.longest for stats in counts.values())))
    return {key: dataclasses.asdict(stats) for key, stats in counts.items()}


def _examples(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the data of a Trainer stage holds."""
    from rlhf_fast.trainers.stage import load_data, training_arguments

    training_arguments(config, has_eval=bool(config.eval_dataset or config.val_size))
    parts = zip(("train", "evaluation"), load_data(config, tokenizer, quiet=True), strict=True)
    return {key: dataset.stats for key, (dataset, _) in parts if dataset is not None}


def _prompts(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the prompts of PPO and GRPO hold."""
    from rlhf_fast.trainers.data.dataset_info import load_rows
    from rlhf_fast.trainers.data.tokenize import tokenize_prompts
    from rlhf_fast.trainers.rl_data import check_columns_of, make_perplexity

    limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
    keys = [("train", "dataset"), ("evaluation", "eval_dataset")]
    wanted = [(name, key) for name, key in keys if getattr(config, key)]
    found = {name: tokenize_prompts(load_rows(config, key), tokenizer, **limits) for name, key in wanted}
    check_columns_of(config, *(found[name][0] if name in found else None for name, _ in keys))
    make_perplexity(config, tokenizer, sys.maxsize)  # its rows can be read; ids are compared once there is a model
    return {name: stats for name, (_, stats) in found.items()}


def _steps(config: Any, rows: int) -> int:
    """Optimizer steps on one device (for PPO: rollouts)."""
    generates = config.stage in ("ppo", "grpo")
    prompts, minibatches = config.sizes() if generates else (0, 0)  # an error where they do not divide
    if config.max_steps > 0:
        return config.max_steps
    if not generates:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return math.ceil(math.ceil(rows / batch) * config.num_train_epochs)
    rollouts = max(1, math.ceil(config.num_train_epochs * rows / prompts))
    return rollouts if config.stage == "ppo" else rollouts * minibatches * config.num_iterations


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

"""The run around a `FusedTrainer`: data before model, the run's files, training, evaluation, the saved model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rlhf_fast.trainers.base import FusedTrainer
from rlhf_fast.trainers.callbacks import QuietProgress, RunLogCallback
from rlhf_fast.trainers.checkpoint import step_of
from rlhf_fast.trainers.config import TrainerConfig
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.data.dataset_info import load_rows, split
from rlhf_fast.trainers.data.packing import check_packing
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import check_vocabulary, tokenize_sft
from rlhf_fast.trainers.models.hf_utils import check_window, load_tokenizer, read_ending_ids, vocabulary_size
from rlhf_fast.trainers.models.lora import optimizer_groups
from rlhf_fast.trainers.preflight import preflight
from rlhf_fast.trainers.run_log import RunLog, largest_peak_mb, write_atomic
from rlhf_fast.trainers.sharding import join_processes, load_whole


def run_stage(
    config: TrainerConfig,
    *,
    load: Callable[[TrainerConfig, Any], nn.Module],
    build: Callable[..., FusedTrainer],
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train one stage as its configuration says; returns what `summary.json` holds.

    Data is read and checked before the model is loaded. The output folder gets the model, the tokenizer, the
    resolved configuration and the files of `RunLog`.

    Args:
        load: (config, tokenizer) -> model.
        build: (model, args, processing_class=, train_dataset=, eval_dataset=, callbacks=) -> trainer.
    """
    start = time.perf_counter()
    checkpoint = preflight(config)
    load_whole()
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    train, evaluation = load_data(config, tokenizer)
    set_seed(config.seed)  # weights that are made here do not depend on how the data was read
    model = load(config, tokenizer)
    for dataset, rows in (train, evaluation):
        if dataset is not None:
            check_vocabulary(dataset, vocabulary_size(model), rows, tokenizer)
            check_window(model, dataset.stats.longest, "the longest row")
    if config.packing:
        check_packing(model)
    use_cache = model.config.use_cache

    resume_step = None if checkpoint is None else step_of(checkpoint)
    with RunLog(config.output_dir, resume_step=resume_step) as run_log:
        save_config(config, run_log)
        trainer = build(
            model,
            training_arguments(config, has_eval=evaluation[0] is not None),
            processing_class=tokenizer,
            train_dataset=train[0],
            eval_dataset=evaluation[0],
            callbacks=[RunLogCallback(run_log, curves=config.plot_loss), *callbacks],
        )
        trainer.run_options = config.to_dict()
        trainer.broken_steps.limit = config.max_skipped_steps
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        if not config.disable_tqdm:
            trainer.add_callback(QuietProgress)
        if config.loraplus_lr_ratio is not None:
            trainer.parameter_groups = optimizer_groups(model, config)
        trained, metrics = {}, {}
        with trainer.signals if config.do_train else nullcontext():  # the model is saved before they end the run
            if config.do_train:
                result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                trained = {"steps": result.global_step, "train_loss": trainer.train_loss}
                model.config.use_cache = use_cache  # the Trainer switches it off
                trainer.save_model(config.output_dir)
            if evaluation[0] is not None and not trainer.signals.agreed(trainer.accelerator):
                metrics = trainer.evaluate()
        if config.plot_loss:
            run_log.curves()
        return run_log.summary(
            stage=config.stage,
            **trained,
            **{name: value for name, value in metrics.items() if not name.endswith(SPEEDS) and name != "epoch"},
            **({"best_step": trainer.state.best_global_step} if trainer.state.best_global_step else {}),
            data=dataclasses.asdict(train[0].stats),
            skipped_steps=trainer.broken_steps.skipped,
            tokens_per_second=_median([row.get("tokens_per_second") for row in run_log.rows]),
            peak_memory_mb=largest_peak_mb(trainer.accelerator),
            seconds=round(time.perf_counter() - start, 2),
            output_dir=str(config.output_dir),
        )


SPEEDS = ("_runtime", "_per_second", "_preparation_time")
Loaded = tuple[Any, "Rows | None"]


def load_data(config: TrainerConfig, tokenizer: Any, *, quiet: bool = False) -> tuple[Loaded, Loaded]:
    """((training set, its rows), (evaluation set, its rows)); the latter are None without an evaluation set."""

    def load(key: str) -> Loaded:
        rows = load_rows(config, key)
        dataset = tokenize(config, rows, tokenizer)
        if not (quiet or config.disable_tqdm):
            print(f"{key}: {dataset.stats}", file=sys.stderr)  # for people, off the output of programs
        return dataset, rows

    train, rows = load("dataset")
    if config.eval_dataset:
        return (train, rows), load("eval_dataset")
    if not config.val_size:
        return (train, rows), (None, None)
    kept, held = split(len(train), config.val_size, config.seed)
    return (train.select(kept), rows), (train.select(held), rows)


def tokenize(config: TrainerConfig, rows: Rows, tokenizer: Any) -> Any:
    """The rows as what the stage trains on: examples, pairs or judged answers."""
    limits = dict(max_length=config.cutoff_len, overlong_prompt=config.overlong_prompt)
    if config.stage == "sft":
        limits |= dict(train_on_prompt=config.train_on_prompt, mask_history=config.mask_history)
        return tokenize_sft(rows, tokenizer, **limits)
    if config.stage == "rm":  # scored where a policy's completions end
        limits |= dict(ending_ids=read_ending_ids(config, tokenizer))
    return (tokenize_kto if config.stage == "kto" else tokenize_pairs)(rows, tokenizer, **limits)


def training_arguments(config: TrainerConfig, *, has_eval: bool) -> TrainingArguments:
    """The Trainer's arguments; `config.training_arguments` has the last word."""
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "run_name": config.run_name,
        "warmup_steps": config.warmup_steps or config.warmup_ratio,  # below 1: a share of the steps
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "eval_strategy": "steps" if config.eval_steps and has_eval else "no",
        "eval_steps": config.eval_steps or None,
        "report_to": names(config.report_to),
        "use_cpu": config.use_cpu or not torch.accelerator.is_available(),  # transformers asks for it with bf16
        "data_seed": config.seed,
        "dataloader_pin_memory": torch.cuda.is_available() and not config.use_cpu,
        "logging_nan_inf_filter": False,  # a NaN loss is to be seen
    }
    same = "seed per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate"
    same += " lr_scheduler_type num_train_epochs max_steps weight_decay adam_beta1 adam_beta2 adam_epsilon"
    same += " max_grad_norm bf16 fp16 logging_steps save_total_limit disable_tqdm save_only_model ddp_timeout"
    values |= {name: getattr(config, name) for name in same.split()}
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"  # its name from transformers 5.20 or so on
    values[new if new in known else "gradient_checkpointing"] = config.gradient_checkpointing
    values |= config.training_arguments
    if values.get("load_best_model_at_end") and values["eval_strategy"] == "no":
        raise ValueError("load_best_model_at_end goes by evaluations: set eval_steps, and an evaluation set")
    join_processes(config)
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the training arguments do not fit: {error}") from error


def save_config(config: TrainerConfig, run_log: RunLog) -> None:
    """Write the resolved configuration to `run_config.yaml`."""
    import yaml

    if run_log.main:
        path = Path(config.output_dir) / "run_config.yaml"
        write_atomic(path, lambda f: f.write(yaml.safe_dump(config.to_dict(), sort_keys=False)))


def _median(values: Iterable[float | None]) -> float | None:
    ordered = sorted(v for v in values if v)
    return ordered[len(ordered) // 2] if ordered else None

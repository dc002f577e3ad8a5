"""Supervised fine-tuning: `transformers.Trainer` with the head and the loss fused.

    L = -1/n sum over scored tokens of log p(token | before),   n = scored tokens of the whole step

Departures from the stock trainer:
- the logits never exist: the loss is formed where the model calls its head (`fuse_lm_head`);
- n counts the scored tokens of all micro-batches and all ranks, so 1 x 4 and 4 x 1 are the same step;
- the evaluation loss is a mean over tokens, not a mean of batch means;
- a step with a NaN gradient changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.losses.nll import NLL

from .callbacks import QuietProgress, RunLogCallback, SkipBrokenSteps
from .data import Collator, TokenDataset, check_vocabulary, tokenize_sft
from .hf_utils import load_model, load_tokenizer, ready_tokenizer, resume_path, vocabulary_size
from .readers import Rows, read_rows
from .run_log import RunLog, peak_memory_mb, write_atomic
from .sft_config import SFTConfig


class SFTTrainer(Trainer):
    """A `transformers.Trainer` for causal LMs whose batches hold `input_ids`, `attention_mask`, `target_ids`.

    Args:
        model: a causal LM, plain or a PEFT model; its head is fused here.
        args: `remove_unused_columns` is switched off.
        train_dataset, eval_dataset: `TokenDataset`s, or rows with "input_ids" and "scored".
        processing_class: the tokenizer.
    Logged beside the Trainer's own: perplexity, tokens_per_second, peak_memory_mb, skipped_steps.
    """

    loss_is_scaled_for_ga = True  # by the number of scored tokens in the whole step

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        ready_tokenizer(processing_class)
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # DataParallel cannot gather a fused loss; torchrun gives one process a GPU
            args._n_gpu = 1
        super().__init__(
            model=fuse_lm_head(model),
            args=args,
            data_collator=data_collator or Collator(processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self.broken_steps = SkipBrokenSteps()
        self.add_callback(self.broken_steps)
        self._tokens: Tensor | int = 0
        self._tokens_since = time.perf_counter()
        self._eval_sums: list[Tensor] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """The micro-batches of one step and the number of scored tokens in them, over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        count = sum((batch["target_ids"] != -100).sum() for batch in batches).to(device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean NLL; times the ranks, whose gradients are averaged."""
        out = model(**inputs, loss_fn=NLL(normalizer=num_items_in_batch))
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = out.loss * ranks if ranks > 1 else out.loss
        return (loss, out) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        self._tokens = self._tokens + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One evaluation batch; sums are kept for a mean over tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs, loss_fn=NLL())
        count = (inputs["target_ids"] != -100).sum()
        self._eval_sums.append(torch.stack([out.metrics["nll"].double(), count.double()]))
        return out.loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        start, self._eval_sums = time.perf_counter(), []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums:
            sums = self.accelerator.reduce(torch.stack(self._eval_sums).sum(0), reduction="sum")
            nll, count = sums.tolist()
            loss = nll / max(count, 1.0)
            output.metrics[f"{metric_key_prefix}_loss"] = loss
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(loss)
        self._tokens_since += time.perf_counter() - start  # not training time
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._tokens) * self.accelerator.num_processes
            logs["perplexity"] = perplexity(logs["loss"])
            logs["tokens_per_second"] = round(tokens / max(now - self._tokens_since, 1e-9), 1)
            logs["peak_memory_mb"] = round(peak_memory_mb(), 1)
            if self.broken_steps.skipped:
                logs["skipped_steps"] = self.broken_steps.skipped
            self._tokens, self._tokens_since = 0, now
        super().log(logs, start_time)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def run_sft(config: SFTConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Fine-tune as the configuration says; returns what `summary.json` holds.

    Data is read and checked before the model is loaded. The output folder gets the model, the tokenizer, the
    resolved configuration and the files of `RunLog`.
    """
    start = time.perf_counter()
    config.check_paths()
    checkpoint = resume_path(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    train, evaluation = load_data(config, tokenizer)
    set_seed(config.seed)  # weights that are made here do not depend on how the data was read
    model = load_model(config, tokenizer)
    for dataset, rows in (train, evaluation):
        if dataset is not None:
            check_vocabulary(dataset, vocabulary_size(model), rows, tokenizer)
    use_cache = model.config.use_cache

    resume_step = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    with RunLog(config.output_dir, resume_step=resume_step) as run_log:
        save_config(config, run_log)
        trainer = SFTTrainer(
            model,
            training_arguments(config, has_eval=evaluation[0] is not None),
            processing_class=tokenizer,
            train_dataset=train[0],
            eval_dataset=evaluation[0],
            callbacks=[RunLogCallback(run_log, curves=config.plot_loss), *callbacks],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        if not config.disable_tqdm:
            trainer.add_callback(QuietProgress)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        metrics = trainer.evaluate() if evaluation[0] is not None else {}
        model.config.use_cache = use_cache  # the Trainer switches it off
        trainer.save_model(config.output_dir)
        (Path(config.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
        if config.plot_loss:
            run_log.curves()
        speeds = [row["tokens_per_second"] for row in run_log.rows if row.get("tokens_per_second")]
        return run_log.summary(
            stage="sft",
            steps=result.global_step,
            train_loss=result.training_loss,
            **{k: v for k, v in metrics.items() if k in ("eval_loss", "eval_perplexity")},
            data=dataclasses.asdict(train[0].stats),
            skipped_steps=trainer.broken_steps.skipped,
            tokens_per_second=sorted(speeds)[len(speeds) // 2] if speeds else None,
            peak_memory_mb=round(peak_memory_mb(), 1),
            seconds=round(time.perf_counter() - start, 2),
            output_dir=str(config.output_dir),
        )


Loaded = tuple["TokenDataset | None", "Rows | None"]


def load_data(config: SFTConfig, tokenizer: Any, *, quiet: bool = False) -> tuple[Loaded, Loaded]:
    """((training set, its rows), (evaluation set, its rows)); the latter are None without an evaluation set."""

    def load(key: str) -> Loaded:
        rows = read_rows(config.dataset_paths(key), limit=config.max_samples)
        dataset = tokenize_sft(
            rows,
            tokenizer,
            max_length=config.cutoff_len,
            overlong_prompt=config.overlong_prompt,
            train_on_prompt=config.train_on_prompt,
        )
        if not (quiet or config.disable_tqdm):
            print(f"{key}: {dataset.stats}", file=sys.stderr)  # for people, off the output of programs
        return dataset, rows

    train, rows = load("dataset")
    if config.eval_dataset:
        return (train, rows), load("eval_dataset")
    if not config.val_size:
        return (train, rows), (None, None)
    held = int(config.val_size) if config.val_size >= 1 else max(1, round(config.val_size * len(train)))
    if held >= len(train):
        raise ValueError(f"val_size={config.val_size} leaves none of {len(train)} rows to train on")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return (train.select(sorted(order[held:])), rows), (train.select(sorted(order[:held])), rows)


def training_arguments(config: SFTConfig, *, has_eval: bool) -> TrainingArguments:
    """The Trainer's arguments; `config.training_arguments` has the last word."""
    report_to = config.report_to if isinstance(config.report_to, list) else config.report_to.split(",")
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "run_name": config.run_name,
        "warmup_steps": config.warmup_steps or config.warmup_ratio,  # below 1: a share of the steps
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "eval_strategy": "steps" if config.eval_steps and has_eval else "no",
        "eval_steps": config.eval_steps or None,
        "report_to": [name.strip() for name in report_to],
        "data_seed": config.seed,
        "dataloader_pin_memory": torch.cuda.is_available() and not config.use_cpu,
        "logging_nan_inf_filter": False,  # a NaN loss is to be seen
    }
    same = "seed per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate"
    same += " lr_scheduler_type num_train_epochs max_steps weight_decay adam_beta1 adam_beta2 adam_epsilon"
    same += " max_grad_norm bf16 fp16 use_cpu logging_steps save_total_limit disable_tqdm"
    values |= {name: getattr(config, name) for name in same.split()}
    if config.gradient_checkpointing:
        names = {f.name for f in dataclasses.fields(TrainingArguments)}
        new = "activation_checkpointing"  # its name from transformers 5.20 or so on
        values[new if new in names else "gradient_checkpointing"] = True
    values |= config.training_arguments
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the training arguments do not fit: {error}") from error


def save_config(config: SFTConfig, run_log: RunLog) -> None:
    """Write the resolved configuration to `run_config.yaml`."""
    import yaml

    if run_log.main:
        path = Path(config.output_dir) / "run_config.yaml"
        write_atomic(path, lambda f: f.write(yaml.safe_dump(config.to_dict(), sort_keys=False)))

"""What SFT, the reward model, DPO and KTO share: a `transformers.Trainer` whose sums are exact, and the run around it.

A stage says what it counts (`counts`: tokens, pairs, ...) and what one micro-batch adds to the loss and the metrics
when those counts are known for the whole step (`share`). Then, whatever the micro-batches and ranks:

    L(step) = sum over micro-batches and ranks of share(micro-batch, totals of the step)

The evaluation is the same formula with the whole evaluation set as its one step.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .callbacks import QuietProgress, RunLogCallback, SkipBrokenSteps
from .config import TrainerConfig
from .hf_utils import load_tokenizer, ready_tokenizer, resume_path, vocabulary_size
from .policy import updating_mode
from .readers import Rows, read_rows
from .run_log import RunLog, peak_memory_mb, write_atomic

Totals = dict[str, Tensor]  # 0-d, over all micro-batches and ranks of a step
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class FusedTrainer(Trainer):
    """A `transformers.Trainer` with exact normalisers, metrics averaged over the logging window, and broken steps skipped.

    Subclasses define `counts` and `share`, and may extend `totals`, `finish_metrics` and `extra_state`.

    Args:
        model: what the subclass trains.
        args: `remove_unused_columns` is switched off.
        processing_class: the tokenizer.
        data_collator, train_dataset, eval_dataset: as the Trainer's.
        disable_dropout: update in eval mode.
    Logged beside the Trainer's own: the stage's metrics, tokens_per_second, peak_memory_mb, skipped_steps.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]],
        disable_dropout: bool = False,
        **kwargs: Any,
    ):
        ready_tokenizer(processing_class)
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # DataParallel cannot gather a fused loss; torchrun gives one process a GPU
            args._n_gpu = 1
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        self.model_accepts_loss_kwargs = True
        self.disable_dropout = disable_dropout
        self.broken_steps = SkipBrokenSteps()
        self.add_callback(self.broken_steps)
        self._window, self._window_steps, self._evaluation = _Sums(), 0, _Sums()
        self._tokens: Tensor | int = 0
        self._tokens_since = time.perf_counter()

    # ---- what a stage is

    def counts(self, batch: Mapping[str, Any]) -> Totals:
        """What a micro-batch holds of everything that the loss is a mean over; 0-d tensors."""
        raise NotImplementedError

    def share(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(loss, metrics) of a micro-batch as its share of the step's; metrics named *_max and *_min are extremes."""
        raise NotImplementedError

    def totals(self, batches: Iterable[Mapping[str, Any]]) -> Totals:
        """`counts` over the micro-batches and all ranks, before any of them is computed."""
        sums = _Sums()
        for batch in batches:
            sums.add(self.counts(batch))
        return sums.reduced(self.accelerator)

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics that follow from the others, of a logging window or an evaluation; "loss" is among them."""
        return metrics

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside model, optimiser, schedule and random states."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `extra_state` gave."""

    # ---- training

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Totals | None]:
        """The micro-batches of one step, and their totals in the place of `num_items_in_batch`."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        self._window_steps += 1
        return batches, self.totals(batches)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Totals | None = None
    ) -> Tensor:
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; times the ranks, whose gradients are averaged."""
        if model.training and self.disable_dropout:
            updating_mode(model, True)
        totals = self.totals([inputs]) if num_items_in_batch is None else num_items_in_batch
        loss, metrics = self.share(model, inputs, totals)
        if self.is_in_train:
            self._window.add(metrics)
        ranks = self.accelerator.num_processes
        loss = loss * ranks if ranks > 1 else loss
        return (loss, metrics) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._tokens) * self.accelerator.num_processes
            window = self._window.reduced(self.accelerator, self._window_steps)
            logs |= self.finish_metrics({"loss": logs["loss"]} | {k: v.item() for k, v in window.items()})
            logs["tokens_per_second"] = round(tokens / max(now - self._tokens_since, 1e-9), 1)
            logs["peak_memory_mb"] = round(peak_memory_mb(), 1)
            if self.broken_steps.skipped:
                logs["skipped_steps"] = self.broken_steps.skipped
            self._window, self._window_steps, self._tokens, self._tokens_since = _Sums(), 0, 0, now
        super().log(logs, start_time)

    # ---- evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Count the whole evaluation set, then add up its batches' shares."""
        start, self._evaluation = time.perf_counter(), _Sums()
        with torch.no_grad():
            self._evaluation_totals = self.totals(map(self._prepare_inputs, dataloader))
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._evaluation.reduced(self.accelerator)
        metrics = self.finish_metrics({name: value.item() for name, value in sums.items()})
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._tokens_since += time.perf_counter() - start  # not training time
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """One evaluation batch; its share is kept for the sums."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.share(model, inputs, self._evaluation_totals)
        self._evaluation.add({"loss": loss.detach(), **metrics})
        return None, None, None

    # ---- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.extra_state()
        if state and self.args.should_save:
            from safetensors.torch import save_file

            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, Path(output_dir) / EXTRA_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / EXTRA_STATE).is_file():
            from safetensors.torch import load_file

            self.load_extra_state(load_file(Path(checkpoint) / EXTRA_STATE))


EXTRA_STATE = "stage_state.safetensors"


class _Sums:
    """Named 0-d tensors added up in fp64 on their device, extremes for names in _max and _min."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, new: Mapping[str, Tensor]) -> None:
        for name, value in new.items():
            value = value.detach().double()
            self.values[name] = _pick(name)(self.values[name], value) if name in self.values else value

    def reduced(self, accelerator: Any, divisor: int = 1) -> dict[str, Tensor]:
        """Over all ranks, in one exchange; sums divided by `divisor`."""
        if not self.values:
            return {}
        names, stacked = list(self.values), torch.stack([v.to(accelerator.device) for v in self.values.values()])
        if accelerator.num_processes > 1:
            ranks = accelerator.gather(stacked[None])
            kinds = {"_max": ranks.amax(0), "_min": ranks.amin(0)}
            stacked = torch.stack([kinds.get(name[-4:], ranks.sum(0))[i] for i, name in enumerate(names)])
        scale = max(divisor, 1)
        return {n: v if n[-4:] in ("_max", "_min") else v / scale for n, v in zip(names, stacked, strict=True)}


def _pick(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.maximum if name.endswith("_max") else torch.minimum if name.endswith("_min") else torch.add


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch goes to the model: ids, and the mask of padded or the positions of packed sequences."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


# ---- the run


def run_stage(
    config: TrainerConfig,
    *,
    tokenize: Callable[[Rows, Any], Any],
    load: Callable[[TrainerConfig, Any], nn.Module],
    build: Callable[..., FusedTrainer],
    check: Callable[[Any, int, Rows, Any], None],
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train one stage as its configuration says; returns what `summary.json` holds.

    Data is read and checked before the model is loaded. The output folder gets the model, the tokenizer, the
    resolved configuration and the files of `RunLog`.

    Args:
        tokenize: (rows, tokenizer) -> dataset with `stats` and `select`.
        load: (config, tokenizer) -> model.
        build: (model, args, processing_class=, train_dataset=, eval_dataset=, callbacks=) -> trainer.
        check: (dataset, vocabulary size, rows, tokenizer); raises when an id does not fit the model.
    """
    start = time.perf_counter()
    config.check_paths()
    checkpoint = resume_path(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    train, evaluation = load_data(config, lambda rows: tokenize(rows, tokenizer))
    set_seed(config.seed)  # weights that are made here do not depend on how the data was read
    model = load(config, tokenizer)
    for dataset, rows in (train, evaluation):
        if dataset is not None:
            check(dataset, vocabulary_size(model), rows, tokenizer)
    use_cache = model.config.use_cache

    resume_step = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
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
        return run_log.summary(
            stage=config.stage,
            steps=result.global_step,
            train_loss=result.training_loss,
            **{name: value for name, value in metrics.items() if not name.endswith(SPEEDS) and name != "epoch"},
            **({"best_step": trainer.state.best_global_step} if trainer.state.best_global_step else {}),
            data=dataclasses.asdict(train[0].stats),
            skipped_steps=trainer.broken_steps.skipped,
            tokens_per_second=_median([row.get("tokens_per_second") for row in run_log.rows]),
            peak_memory_mb=round(peak_memory_mb(), 1),
            seconds=round(time.perf_counter() - start, 2),
            output_dir=str(config.output_dir),
        )


SPEEDS = ("_runtime", "_per_second", "_preparation_time")
Loaded = tuple[Any, "Rows | None"]


def load_data(config: TrainerConfig, tokenize: Callable[[Rows], Any], *, quiet: bool = False) -> tuple[Loaded, Loaded]:
    """((training set, its rows), (evaluation set, its rows)); the latter are None without an evaluation set."""

    def load(key: str) -> Loaded:
        rows = read_rows(config.dataset_paths(key), limit=config.max_samples)
        dataset = tokenize(rows)
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


def training_arguments(config: TrainerConfig, *, has_eval: bool) -> TrainingArguments:
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
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"  # its name from transformers 5.20 or so on
    values[new if new in names else "gradient_checkpointing"] = config.gradient_checkpointing
    values |= config.training_arguments
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

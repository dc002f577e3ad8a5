"""What SFT, the reward model, DPO and KTO share: a `transformers.Trainer` whose sums are exact.

A stage says what it counts (`counts`: tokens, pairs, ...) and what one micro-batch adds to the loss and the metrics
when those counts are known for the whole step (`share`). Then, whatever the micro-batches and ranks:

    L(step) = sum over micro-batches and ranks of share(micro-batch, totals of the step)

The evaluation is the same formula with the whole evaluation set as its one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from rlhf_fast.trainers.callbacks import SkipBrokenSteps, or_broken, warn_of_fp16
from rlhf_fast.trainers.checkpoint import read_marker
from rlhf_fast.trainers.data.sequences import first_sequences
from rlhf_fast.trainers.memory_advice import memory_advice
from rlhf_fast.trainers.meters import Sums
from rlhf_fast.trainers.models.hf_utils import check_special_tokens, ready_tokenizer
from rlhf_fast.trainers.models.policy import updating_mode
from rlhf_fast.trainers.restore import load_state, own_file
from rlhf_fast.trainers.resumable import ResumableTrainer
from rlhf_fast.trainers.run_log import peak_memory_mb
from rlhf_fast.trainers.sharding import exact_precision
from rlhf_fast.trainers.signals import Stopped, StopSignals

Totals = dict[str, Tensor]  # 0-d, over all micro-batches and ranks of a step
PEAK = "peak_memory_mb_max"  # over the processes


class FusedTrainer(ResumableTrainer):
    """A `transformers.Trainer` with exact normalisers, metrics averaged over the logging window, broken steps skipped.

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
        check_special_tokens(model, ready_tokenizer(processing_class))
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # DataParallel cannot gather a fused loss; torchrun gives one process a GPU
            args._n_gpu = 1
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        exact_precision(self.accelerator)
        warn_of_fp16(self.accelerator)
        self.model_accepts_loss_kwargs = True
        self.disable_dropout = disable_dropout
        self.parameter_groups: list[dict[str, Any]] | None = None
        broken = SkipBrokenSteps(scaler=self.accelerator.scaler)
        self.broken_steps = broken.steps
        self.add_callback(broken)
        self.add_callback(_AfterStep(self))
        self._step, self._window, self._window_steps, self._evaluation = Sums(), Sums(), 0, Sums()
        self._tokens: Tensor | int = 0
        self.loss_before = 0.0
        self.signals, self.stopping = StopSignals(), False
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
        sums = Sums()
        for batch in batches:
            sums.add(self.counts(batch))
        return sums.reduced(self.accelerator)

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics that follow from the others, of a logging window or an evaluation; "loss" is among them."""
        return metrics

    def after_step(self) -> None:
        """After each optimiser step, before anything is logged or saved."""

    def step_metrics(self) -> dict[str, Tensor]:
        """The metrics of the step just made, over its micro-batches and all ranks."""
        return self._step.reduced(self.accelerator)

    # ---- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; when memory runs out, the error names the options that help.

        Ctrl-C and SIGTERM end it after the step, which is saved.

        Args:
            resume_from_checkpoint: a path, or True or "latest" for the newest complete one in output_dir.
        """
        wanted = self.checkpoint_to_resume(resume_from_checkpoint)
        self.stopping = False
        with self.signals, memory_advice(self.args, "training"):
            return super().train(wanted, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluate`, with the same."""
        with memory_advice(self.args, "evaluate"):
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments, over `parameter_groups` where they are set (LoRA+)."""
        if self.optimizer is None and self.parameter_groups is not None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(self.parameter_groups, **options)
        return super().create_optimizer(model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is not None and name.removeprefix("eval_") not in {n.removeprefix("eval_") for n in metrics}:
            known = ", ".join(sorted(metrics))
            raise ValueError(f"metric_for_best_model: the evaluation has no {name!r}, it has {known}")
        return super()._determine_best_metric(metrics=metrics, trial=trial)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """By then there is an engine under DeepSpeed, whose files are to be plain too."""
        if self.is_deepspeed_enabled:
            from rlhf_fast.trainers.zero_state import write_plainly

            write_plainly(self.accelerator.deepspeed_engine_wrapped.engine)
        try:
            return super().create_scheduler(*args, **kwargs)
        except (TypeError, ValueError) as error:  # one that needs more than a number of steps
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type.value}, lr_scheduler_kwargs: {error}"
            ) from error

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """group_by_length also for datasets, such as pairs, whose items say their lengths elsewhere."""
        dataset, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "lengths"):
            together = args.train_batch_size * args.gradient_accumulation_steps
            seed = args.seed if args.data_seed is None else args.data_seed
            return ByLength(together, dataset.lengths.tolist(), lambda: seed + int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Totals | None]:
        """The micro-batches of one step, and their totals in the place of `num_items_in_batch`."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        self._step = Sums()
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
            self._step.add(metrics)
        loss = or_broken(loss, self.accelerator.num_processes)
        return (loss, metrics) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._tokens) * self.accelerator.num_processes
            self._window.add({PEAK: torch.tensor(peak_memory_mb())})
            window = self._window.reduced(self.accelerator, self._window_steps)
            peak = window.pop(PEAK).item()
            logs |= self.finish_metrics({"loss": logs["loss"]} | {k: v.item() for k, v in window.items()})
            logs["tokens_per_second"] = round(tokens / max(now - self._tokens_since, 1e-9), 1)
            logs["peak_memory_mb"] = round(peak, 1)
            if self.broken_steps.skipped or self.broken_steps.scaler is not None:
                logs |= self.broken_steps.metrics()
            self._window, self._window_steps, self._tokens, self._tokens_since = Sums(), 0, 0, now
        super().log(logs, start_time)

    # ---- evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Count the whole evaluation set, then add up its batches' shares."""
        start, self._evaluation = time.perf_counter(), Sums()
        with torch.no_grad():
            self._evaluation_totals = self.totals(map(self._evaluation_batch, dataloader))
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._evaluation.reduced(self.accelerator)
        metrics = self.finish_metrics({name: value.item() for name, value in sums.items()})
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._tokens_since += time.perf_counter() - start  # not training time
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """One evaluation batch; its share is kept for the sums."""
        inputs = self._evaluation_batch(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.share(model, inputs, self._evaluation_totals)
        self._evaluation.add({"loss": loss.detach(), **metrics})
        return None, None, None

    def _evaluation_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of the evaluation set without the rows that are repeated to give all ranks the same number."""
        inputs = self._prepare_inputs(inputs)
        state, rows = self.accelerator.gradient_state, self.args.per_device_eval_batch_size
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        real = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        return self.first_rows(inputs, real)

    def first_rows(self, inputs: dict[str, Any], count: int) -> dict[str, Any]:
        """A batch of which only the first `count` rows of the dataset count."""
        return first_sequences(inputs, count)

    # ---- checkpoints

    def _window_state(self) -> dict[str, Any]:
        """This process's part of what is logged next, and the counters of the run."""
        return {
            "window": dict(self._window.values),
            "window_steps": self._window_steps,
            "tokens": int(self._tokens),
            "loss": (self._tr_loss, self._globalstep_last_logged, self.loss_before + self._total_loss_scalar),
            "skipped": self.broken_steps.state_dict(),
        }

    def _load_window_state(self) -> None:
        """Once the Trainer has set its own counters to zero."""
        if self._resumed is None:
            self.loss_before = 0.0
            return
        folder, self._resumed = Path(self._resumed), None
        process, processes, device = self.args.process_index, self.args.world_size, self.args.device
        before = read_marker(folder).get("processes", processes)
        if before == processes:
            states = [load_state(folder / own_file(process))]
        else:  # the first one takes the sums of all; each an equal share of what the log averages or multiplies
            states = [load_state(folder / own_file(i)) for i in range(before)]
        self._window = Sums()
        for state in states if before == processes or process == 0 else ():
            self._window.add({name: value.to(device) for name, value in state["window"].items()})
        share = 1 if before == processes else processes
        self._window_steps, self._tokens = states[0]["window_steps"], sum(s["tokens"] for s in states) // share
        _, self._globalstep_last_logged, self.loss_before = states[0]["loss"]
        self._tr_loss = torch.stack([state["loss"][0] for state in states]).mean().to(device)
        self.broken_steps.load_state_dict(states[0]["skipped"])

    @property
    def train_loss(self) -> float:
        """The mean over all steps of the run, also those before it was resumed."""
        return (self.loss_before + self._total_loss_scalar) / max(self.state.global_step, 1)


class ByLength(LengthGroupedSampler):
    """The order of an epoch follows from `seed()` alone, so that a resumed run has it too, as has every process."""

    def __init__(self, batch_size: int, lengths: list[int], seed: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed())
        return super().__iter__()


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: FusedTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._load_window_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.after_step()
        trainer._window.add(trainer._step.values)
        trainer._window_steps += 1
        if trainer.signals.agreed(trainer.accelerator):
            trainer.stopping = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping:
            raise Stopped(self.trainer.signals.signum, f" after step {state.global_step}, which is saved")

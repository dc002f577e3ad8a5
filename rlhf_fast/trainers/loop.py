"""What every plain training loop needs around its algorithm: optimiser, schedule, callbacks, logs, checkpoints.

`Loop` knows no rewards and no losses. A trainer asks it for one optimiser step at a time:

    loop.start(max_steps)
    while not loop.done:
        with loop.timed("rollout"): ...
        loop.update(micro_batches, loss_of)     # gradients, clipping, the step, the schedule
        loop.end_step({"reward": ...})          # callbacks, logs, checkpoints
    summary = loop.finish()

A step may hold several updates (`updates_per_step`), as PPO's does: one rollout and all its epochs.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers.callbacks import SkippedSteps, or_broken, warn_of_fp16
from rlhf_fast.trainers.config import RunConfig
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.memory_advice import memory_advice
from rlhf_fast.trainers.meters import Meters
from rlhf_fast.trainers.models.lora import optimizer_groups
from rlhf_fast.trainers.preflight import check_names
from rlhf_fast.trainers.run_log import RunLog, largest_peak_mb, write_atomic
from rlhf_fast.trainers.sharding import join_processes
from rlhf_fast.trainers.signals import Stopped, StopSignals
from rlhf_fast.trainers.snapshot import POLICY, Snapshot
from rlhf_fast.trainers.spread import Modules, spread_of

REDRAW_SECONDS = 60.0  # curves of a run in progress


class Loop:
    """Everything of a run that is not its algorithm.

    Args:
        model: the policy; its parameters that require grad are trained.
        processing_class: the tokenizer, saved beside the model.
        config: the stage's options.
        callbacks: `TrainerCallback`s, besides those of `report_to`.
        max_skipped_steps: updates in a row with gradients that are not finite before the run is given up.
        others: modules that are trained beside the policy in the same backward, by role: each with its own learning
            rate (`learning_rates`, default the policy's) and gradient clipping, saved by its `save_pretrained` in a
            folder named like the role.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        config: RunConfig,
        callbacks: Sequence[TrainerCallback] = (),
        max_skipped_steps: int = 10,
        *,
        others: Mapping[str, nn.Module] | None = None,
        learning_rates: Mapping[str, float] | None = None,
    ):
        self.checkpoint = files.resume_path(config)  # to go on from
        join_processes(config)
        self.arguments = _training_arguments(config)  # first: it resets accelerate's state
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
        plugin = self.arguments.deepspeed_plugin
        on_cpu = config.use_cpu and plugin is None  # accelerate would switch DeepSpeed off; the group is gloo's
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, deepspeed_plugin=plugin)
        warn_of_fp16(self.accelerator)
        self.spread = spread_of(self.accelerator, config.stage, bf16=config.bf16)
        self.config, self.processing_class = config, processing_class
        modules = {POLICY: model, **(others or {})}
        for role, module in modules.items():
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(f"the {'model' if role == POLICY else role} has no parameter that requires grad")
        rates = {role: (learning_rates or {}).get(role, config.learning_rate) for role in modules}
        self.models, self.optimizer = self.spread.prepare(modules, lambda m: _optimizer(m, config, rates))
        self.parameters = {r: [p for p in m.parameters() if p.requires_grad] for r, m in self.models.items()}
        self.model = self.models[POLICY]
        self.state = TrainerState(is_world_process_zero=self.main, is_local_process_zero=self.main)
        self.control = TrainerControl()
        reporting = get_reporting_integration_callbacks(self.arguments.report_to)
        every = [DefaultFlowCallback, *reporting, *callbacks]
        self.callbacks = CallbackHandler(every, self.unwrapped, processing_class, self.optimizer, None)
        self.log: RunLog | None = None
        self.seconds: dict[str, float] = defaultdict(float)  # by part, whole run
        self.broken_steps = SkippedSteps(max_skipped_steps, self.accelerator.scaler)
        self._in_step = False
        self.signals = StopSignals()
        self.meters = Meters()
        self.snapshot = Snapshot(self)
        self.snapshot.parts |= self.spread.parts(self.optimizer)
        self.max_grad_norm = config.max_grad_norm or float("inf")

    # ---- the run

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def unwrapped(self) -> nn.Module:
        return self.spread.unwrap(self.model)

    @property
    def done(self) -> bool:
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    def start(self, max_steps: int, epochs: float, *, updates_per_step: int = 1) -> None:
        """Schedule, log files and progress bar for `max_steps` steps of `updates_per_step` optimiser steps each."""
        config = self.config
        updates, warmup = max_steps * updates_per_step, config.warmup_steps * updates_per_step
        warmup = warmup or int(config.warmup_ratio * updates)
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, warmup, updates)
        self.callbacks.lr_scheduler = self.scheduler
        self.state.max_steps, self.state.num_train_epochs = max_steps, epochs
        self.state.logging_steps, self.state.save_steps = config.logging_steps, config.save_steps
        self.state.eval_steps = config.eval_steps
        self._reset_metrics()
        self._began = self._tokens_at = self._drawn = time.perf_counter()
        self._tokens_logged = 0
        if self.checkpoint is not None:
            self.snapshot.restore(self.checkpoint)
        resume_step = None if self.checkpoint is None else self.state.global_step
        self.log = RunLog(config.output_dir, resume_step=resume_step, main=self.main)
        if self.main:
            options = yaml.safe_dump(config.to_dict(), sort_keys=False)
            write_atomic(self.log.output_dir / "run_config.yaml", lambda f: f.write(options))
        hidden = config.disable_tqdm or not self.main
        name, done = config.run_name or config.stage, self.state.global_step
        self.bar = tqdm(total=max_steps, initial=done, desc=name, unit="step", disable=hidden)
        self.control = self.callbacks.on_init_end(self.arguments, self.state, self.control)
        self.control = self.callbacks.on_train_begin(self.arguments, self.state, self.control)

    def finish(self, evaluate: Callable[[], Mapping[str, float]] | None = None, **values: Any) -> dict[str, Any]:
        """Save the model, then evaluate it (but after a signal), draw the curves, write the summary."""
        self.control = self.callbacks.on_train_end(self.arguments, self.state, self.control)
        self.bar.close()
        states, needed = self.snapshot.model_states(), files.expected_bytes(self.models.values())
        with files.placing(self.config.output_dir, self.accelerator, needed=needed) as part:
            self.snapshot.save_model(part, states)
        if evaluate is not None and not self.signals.agreed(self.accelerator):
            values |= evaluate()
        if self.config.plot_loss:
            self.log.curves()
        self.log.close()
        total = time.perf_counter() - self._began
        return self.log.summary(
            stage=self.config.stage,
            steps=self.state.global_step,
            seconds=round(total, 3),
            tokens_per_second=round(self.state.num_input_tokens_seen / total, 1),
            seconds_by_part={name: round(value, 3) for name, value in self.seconds.items()},
            **self.broken_steps.metrics(),
            peak_memory_mb=largest_peak_mb(self.accelerator),
            output_dir=str(self.config.output_dir),
            **values,
        )

    # ---- one step

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `part`, whose options are named when its memory runs out."""
        start = time.perf_counter()
        try:
            with memory_advice(self.config, part):
                yield
        finally:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds[part] += time.perf_counter() - start

    def update(self, micro_batches: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> None:
        """One optimiser step over the summed losses. No micro-batch: no step, but the schedule goes on.

        A role whose parameters got no gradient stays as it is. An update with a loss or a gradient that is not
        finite, of whichever role, is skipped, moments untouched, and counted.
        """
        if not self._in_step:
            self.control = self.callbacks.on_step_begin(self.arguments, self.state, self.control)
            self._in_step = True
        processes = self.accelerator.num_processes  # DDP averages over them, the normalisers are global
        for k, micro in enumerate(micro_batches):
            last = k + 1 == len(micro_batches)
            with self.spread.micro_batch(self.models, last=last):
                self.spread.backward(or_broken(loss_of(micro), processes))
        if micro_batches:
            if self._clip():
                self.control = self.callbacks.on_pre_optimizer_step(self.arguments, self.state, self.control)
                self.optimizer.step()
                self.control = self.callbacks.on_optimizer_step(self.arguments, self.state, self.control)
                self.broken_steps.made()
            else:
                self.broken_steps.missed(self.state.global_step + 1)
                if self.accelerator.scaler is not None:
                    self.accelerator.scaler.update()  # a lower scale
            self.optimizer.zero_grad()
        self.record({"learning_rate": self.optimizer.param_groups[0]["lr"]})
        self.pass_updates(1)

    def even(self, micro_batches: list[Any], idle: Callable[[Any], Any]) -> list[Any]:
        """The micro-batches, and where weights are sharded as many as any process has: `idle` empties a copy of one."""
        if not self.spread.sharded:
            return micro_batches
        count = torch.tensor([len(micro_batches)], device=self.accelerator.device)
        more = int(self.accelerator.gather(count).max()) - len(micro_batches)
        return [*micro_batches, *(idle(micro_batches[-1]) for _ in range(more))]

    def pass_updates(self, count: int) -> None:
        """Let the schedule go on by `count` updates: those just made, or those left out."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # no step yet: skipped or empty
            for _ in range(count):
                self.scheduler.step()

    def _clip(self) -> bool:
        """Clip each role's gradient by its own norm; whether all of them are finite."""
        self.accelerator.unscale_gradients(self.optimizer)
        finite = True
        for role, parameters in self.parameters.items():
            norm = self.spread.clip(self.models[role], parameters, self.max_grad_norm)
            if norm is None:  # nothing has reached this role
                continue
            self.record({"grad_norm" if role == POLICY else f"grad_norm_{role}": norm})
            finite = finite and bool(torch.isfinite(norm))
        return finite

    def end_step(
        self, metrics: Mapping[str, Any], *, evaluate: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        """Count the step; callbacks, log row, evaluation and checkpoint where they are due."""
        self.record(metrics)
        self._in_step = False
        self.state.global_step += 1
        self.bar.update()
        self.control = self.callbacks.on_step_end(self.arguments, self.state, self.control)
        if self.control.should_evaluate and evaluate is not None:
            scores = dict(evaluate())
            self.record(scores)
            self.control.should_log = True
            self.control = self.callbacks.on_evaluate(self.arguments, self.state, self.control, metrics=scores)
        self.control.should_evaluate = False
        if self.control.should_log or self.done:
            self._log()
        stop = self.signals.agreed(self.accelerator)
        if self.control.should_save or stop:
            self.log.sync()
            self.snapshot.save()
            self.control = self.callbacks.on_save(self.arguments, self.state, self.control)
        if stop:
            self.bar.close()
            self.log.close()
            raise Stopped(stop, f" after step {self.state.global_step}, which is saved")

    def rescue(self) -> None:
        """A checkpoint of the steps made so far, of a run that something outside of the model ends.

        One process alone: of several, others are still at work. What it resumes with are the next prompts.
        """
        step = self.state.global_step
        folder = Path(self.config.output_dir) / f"checkpoint-{step}"
        if self._in_step or not step or self.accelerator.num_processes > 1 or files.read_marker(folder).get("step"):
            return
        self.log.sync()
        try:
            self.snapshot.save()
        except files.CheckpointError as error:
            warnings.warn(f"the steps made so far could not be saved: {error}", stacklevel=2)
        else:
            warnings.warn(f"{folder} holds the {step} steps made before the error", stacklevel=2)

    # ---- metrics

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Keep values for the next log row: averaged over its steps, extremes for names in _max and _min."""
        self.meters.record(metrics)

    def recorded(self) -> dict[str, float]:
        """What the next log row would say of the values recorded so far."""
        return self.meters.reduced()

    def _reset_metrics(self) -> None:
        self.meters.clear()
        self._seconds_logged = dict(self.seconds)

    def _log(self) -> None:
        row = self.recorded()
        now, tokens = time.perf_counter(), self.state.num_input_tokens_seen - self._tokens_logged
        if tokens:  # from rollout to rollout: the steps between them have no tokens of their own
            row["tokens_per_second"] = tokens / max(now - self._tokens_at, 1e-9)
            self._tokens_logged, self._tokens_at = self.state.num_input_tokens_seen, now
        for part, seconds in self.seconds.items():
            row[f"seconds_{part}"] = seconds - self._seconds_logged.get(part, 0.0)
        row |= self.broken_steps.metrics()
        row |= {"peak_memory_mb": largest_peak_mb(self.accelerator), "epoch": self.state.epoch}
        self.control = self.callbacks.on_log(self.arguments, self.state, self.control, logs=row)  # may add to the row
        self.log.log(self.state.global_step, row)
        shown = {name: f"{row[name]:.3f}" for name in ("reward", "loss", "kl") if name in row}
        self.bar.set_postfix(shown, refresh=False)
        self.state.log_history.append({"step": self.state.global_step, **row})
        self._reset_metrics()
        if self.config.plot_loss and time.perf_counter() - self._drawn > REDRAW_SECONDS:
            self.log.curves()
            self._drawn = time.perf_counter()

    # ---- what a checkpoint holds of the loop itself

    def state_dict(self) -> dict[str, Any]:
        """Metrics since the last row of the log, counters and clocks."""
        now = time.perf_counter()
        return {
            "metrics": self.meters.state_dict(),
            "skipped": self.broken_steps.state_dict(),
            "seconds": (dict(self.seconds), self._seconds_logged, now - self._began),
            "tokens": (self._tokens_logged, now - self._tokens_at),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meters.load_state_dict(state["metrics"])
        self.broken_steps.load_state_dict(state["skipped"])
        seconds, self._seconds_logged, run = state["seconds"]
        self.seconds.update(seconds)
        self._tokens_logged, logged = state["tokens"]
        now = time.perf_counter()
        self._began, self._tokens_at = now - run, now - logged


def _optimizer(modules: Modules, config: RunConfig, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """AdamW over what trains of the modules, each at its own rate."""
    return torch.optim.AdamW(
        [group for role, module in modules.items() for group in optimizer_groups(module, config, rates[role])],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # one pass over the parameters, on the CPU as well
    )


def _training_arguments(config: RunConfig) -> TrainingArguments:
    """What callbacks read: the same values under transformers' names."""
    shared = ("output_dir", "run_name", "seed", "logging_steps", "learning_rate", "per_device_train_batch_size")
    shared += ("gradient_accumulation_steps", "max_grad_norm", "weight_decay", "lr_scheduler_type", "use_cpu")
    shared += ("ddp_timeout",)  # of the process group, which is made here
    check_names(config)
    settings = getattr(config, "deepspeed", None)
    asked = settings is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    deepspeed = dict(deepspeed=settings, bf16=config.bf16, fp16=config.fp16) if asked else {}
    arguments = TrainingArguments(
        **{name: getattr(config, name) for name in shared},
        **deepspeed,
        report_to=names(config.report_to),
        disable_tqdm=config.disable_tqdm,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
    )
    _ = arguments.device  # sets accelerate up, now rather than later
    own = json.loads(json.dumps(config.to_dict(), default=str))
    arguments.to_dict = lambda: own  # trackers show the run's own options
    return arguments

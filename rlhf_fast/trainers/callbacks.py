"""Callbacks for `transformers.Trainer`: the run's files, a quiet progress bar, steps with broken gradients."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback

from rlhf_fast.trainers.run_log import RunLog

_END_OF_RUN = "train_runtime"  # in the last record of a Trainer, which sums up and is no step


class RunLogCallback(TrainerCallback):
    """Feeds a RunLog: every record becomes a row, curves are redrawn now and then, the last record a summary."""

    def __init__(self, run_log: RunLog, *, curves: bool = True, redraw_seconds: float = 60.0):
        self.run_log = run_log
        self.curves = curves
        self.redraw_seconds = redraw_seconds
        self._drawn = time.monotonic()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if _END_OF_RUN in logs:
            names = ("train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")
            self.run_log.summary(**{name: logs[name] for name in names if name in logs})
            return
        self.run_log.log(state.global_step, logs)
        if self.curves and time.monotonic() - self._drawn > self.redraw_seconds:
            self._draw()

    def on_save(self, args, state, control, **kwargs) -> None:
        self.run_log.sync()
        self._draw()

    def _draw(self) -> None:
        if self.curves:
            self.run_log.curves()
        self._drawn = time.monotonic()


class QuietProgress(ProgressCallback):
    """The usual progress bar, with the latest loss beside it in place of a line for every record."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {k: f"{v:.4g}" for k, v in logs.items() if k in ("loss", "eval_loss") and v is not None}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)


class SkippedSteps:
    """Counts the optimiser steps that are left out because a loss or a gradient is not finite; `limit` in a row are an
    error.

    fp16's gradient scaler begins with a scale that is too high and halves it at each such step. What that costs before
    the first step that is made is normal, and counted apart, in `searching`.
    """

    def __init__(self, limit: int = 10, scaler: Any = None):
        self.limit, self.scaler = limit, scaler
        self.skipped = self.searching = self.in_a_row = 0
        self._any_made = False

    def made(self) -> None:
        """A step was made."""
        self.in_a_row, self._any_made = 0, True

    def missed(self, step: int) -> None:
        """Step number `step` was not. Raises FloatingPointError at the limit."""
        if self.scaler is None or self._any_made:
            self.skipped += 1
        else:
            self.searching += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            scale = "" if self.scaler is None else f" at a loss scale of {self.scaler.get_scale():g}"
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had gradients that are not finite, up to step {step}{scale}; "
                "a lower learning_rate, or a look at the data, may help"
            )

    def metrics(self) -> dict[str, float]:
        """What a log row says of them."""
        if self.scaler is None:
            return {"skipped_steps": self.skipped}
        own = {"loss_scale": self.scaler.get_scale(), "loss_scale_search_steps": self.searching}
        return {"skipped_steps": self.skipped} | own

    def state_dict(self) -> dict[str, Any]:
        names = ("skipped", "searching", "in_a_row", "_any_made")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class SkipBrokenSteps(TrainerCallback):
    """Drops the gradients of a step when one, or the loss, is NaN or infinite: weights and moments stay as they are.

    Every rank decides alike. Under fp16 the gradient scaler drops them, here they are counted.
    """

    def __init__(self, limit: int = 10, scaler: Any = None):
        self.steps = SkippedSteps(limit, scaler)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if model is None:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads and type(optimizer).__name__ != "DeepSpeedOptimizerWrapper":
            return
        if not (_broken(grads) if grads else optimizer.step_was_skipped):  # DeepSpeed's engine has judged, and stepped
            self.steps.made()
            return
        if self.steps.scaler is None:
            for parameter in model.parameters():
                parameter.grad = None
        warnings.warn(f"step {state.global_step + 1}: a gradient is not finite, step skipped", stacklevel=2)
        self.steps.missed(state.global_step + 1)


def check_trackers(names: list[str]) -> None:
    """Raise ValueError where a tracker is unknown or not installed."""
    try:
        for tracker in get_reporting_integration_callbacks([n for n in names if n not in ("none", "all")]):
            tracker()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"report_to: {error}") from error


def warn_of_fp16(accelerator: Any) -> None:
    """accelerate has fp16 on accelerators alone, and says nothing on the CPU."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        warnings.warn("fp16 is not computed on the CPU: this run is in the dtype of its weights", stacklevel=3)


def or_broken(loss: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """loss x factor; of a loss that is not finite also the gradient is none, so that the step is skipped on all ranks.

    An infinite loss may have a finite gradient. No exchange is needed: the gradients' sum carries the NaN everywhere.
    """
    return loss * torch.where(loss.detach().isfinite(), factor, torch.nan)


def _broken(grads: list[torch.Tensor]) -> bool:
    """Whether one is not finite, on any rank."""
    bad = (~torch.stack([g.isfinite().all() for g in map(_local, grads)]).all()).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return bool(bad.item())


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad

"""Brakes of PPO and GRPO: a KL budget, the best model by the evaluation, a reference that follows, warnings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from rlhf_fast.trainers.gauges import HealthWarnings
from rlhf_fast.trainers.loop import Loop

if TYPE_CHECKING:
    from rlhf_fast.trainers.rl import RLTrainer
    from rlhf_fast.trainers.rl_config import RLConfig


class KLBudget(TrainerCallback):
    """Stops the run once the logged `kl` exceeds `max_kl` nats a token."""

    def __init__(self, max_kl: float):
        self.max_kl = max_kl
        self.reason: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kl = (logs or {}).get("kl")
        if kl is not None and kl > self.max_kl and self.reason is None:
            self.reason = f"kl={kl:.4g} above max_kl={self.max_kl:g} at step {state.global_step}"
            control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reason = state["reason"]


class BestModel(TrainerCallback):
    """A checkpoint at each evaluation whose `metric` is the best so far; rotation leaves the best one alone."""

    def __init__(self, metric: str, greater_is_better: bool):
        self.metric, self.sign = metric, 1.0 if greater_is_better else -1.0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ValueError(f"metric_for_best_model: the evaluation has no {self.metric!r}, it has {known}")
        value, best = metrics[self.metric], state.best_metric
        if math.isfinite(value) and (best is None or self.sign * value > self.sign * best):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            control.should_save = True


class FollowingReference(TrainerCallback):
    """Every `steps` steps: reference <- alpha policy + (1 - alpha) reference."""

    def __init__(self, trainer: RLTrainer, alpha: float, steps: int):
        self.trainer, self.alpha, self.steps = trainer, alpha, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 and self.trainer.reference is not None:
            self.trainer.reference.sync(self.trainer.loop.unwrapped, self.alpha)


class Brakes:
    """The brakes that a configuration asks for."""

    def __init__(self, config: RLConfig):
        self.config = config
        self.health = HealthWarnings(*config.best_metric) if config.health_warnings else None
        self.budget = KLBudget(config.max_kl) if config.max_kl is not None else None
        self.best = BestModel(*config.best_metric) if config.load_best_model_at_end else None

    def callbacks(self, trainer: RLTrainer) -> list[TrainerCallback]:
        config = self.config
        follows = [FollowingReference(trainer, config.ref_model_mixup_alpha, config.ref_model_sync_steps)]
        every = [self.health, self.budget, self.best, *(follows if config.sync_ref_model else [])]
        return [brake for brake in every if brake is not None]

    def finish(self, loop: Loop) -> dict[str, Any]:
        """Put the best weights back where they were asked for; what the summary says about the brakes."""
        values: dict[str, Any] = {}
        state = loop.state
        if self.best is not None and state.best_model_checkpoint is not None:
            loop.spread.load_weights(loop.model, Path(state.best_model_checkpoint))
            values |= {"best_step": state.best_global_step, f"best_{self.best.metric}": state.best_metric}
        if self.budget is not None and self.budget.reason:
            values["stopped_by"] = self.budget.reason
        if self.health is not None:
            values["warnings"] = self.health.messages
        return values

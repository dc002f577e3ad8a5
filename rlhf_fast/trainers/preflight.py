"""What a run is refused for before its data is read and its model loaded; `rlhf-fast train --dry-run` asks it too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rlhf_fast.trainers.callbacks import check_trackers
from rlhf_fast.trainers.checkpoint import resume_path
from rlhf_fast.trainers.config import RunConfig
from rlhf_fast.trainers.config_types import names, nearest
from rlhf_fast.trainers.reward_ensemble import check_kind
from rlhf_fast.trainers.rewards import RewardFunction, Rewards
from rlhf_fast.trainers.rl_config import RLConfig
from rlhf_fast.trainers.rollout.turns import load_environment

BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules


def preflight(config: RunConfig) -> Path | None:
    """Raise an error that names the key where the run cannot start; the checkpoint that it goes on from."""
    config.check_paths()
    check_names(config)
    if isinstance(config, RLConfig):
        reward_functions(config)
        if config.environment is not None:
            load_environment(config.environment)
    return resume_path(config)


def check_names(config: RunConfig) -> None:
    """Raise ValueError where a tracker, the schedule or the optimiser is unknown, or lacks what it needs."""
    check_trackers(names(config.report_to))
    more = getattr(config, "training_arguments", {})
    schedule = config.lr_scheduler_type
    _among("lr_scheduler_type", schedule, (kind.value for kind in SchedulerType))
    if more.get("optim") is not None:
        _among("optim", more["optim"], (kind.value for kind in OptimizerNames))
    if not config.takes_training_arguments and schedule in BY_METRIC:
        raise ValueError(f"lr_scheduler_type={schedule} follows a metric, not steps: not supported")
    kwargs = more.get("lr_scheduler_kwargs")
    if isinstance(kwargs, str):  # JSON, which TrainingArguments reads
        return
    try:  # one that needs more than a number of steps
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 2, kwargs or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_type={schedule}, lr_scheduler_kwargs: {error}") from error


def reward_functions(config: RLConfig) -> tuple[list[RewardFunction], list[RewardFunction]]:
    """The Python functions that score rollouts, and those that score evaluations beside them, each one loaded."""
    for folder in names(config.reward_model):
        check_kind(folder, config.reward_model_type)
    models = [_reward_model] * bool(names(config.reward_model))  # they are one function, whose model is not loaded here
    scoring = Rewards([*models, *_specs(config.reward_funcs)], config.reward_weights)
    measured = _specs(config.eval_reward_funcs)
    return scoring.functions[len(models) :], Rewards(measured).functions if measured else []


def _reward_model(**_: Any) -> list[float]:
    raise NotImplementedError


def _specs(functions: Any) -> list[Any]:
    return [functions] if isinstance(functions, str) else list(functions)


def _among(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")

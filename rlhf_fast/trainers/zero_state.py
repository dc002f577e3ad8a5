"""What a process has of a DeepSpeed engine (ZeRO-1, 2, 3) as plain tensors and numbers, and back.

DeepSpeed's own files are pickles of its classes; these are read with `weights_only`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.trainers.restore import load_state, own_file

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16


def masters(engine: Any) -> list[Tensor] | None:
    """This process's part of the trained weights in the optimiser's precision; None: a kind of optimiser not known."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3; stages 1 and 2
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return None


def engine_state(engine: Any) -> dict[str, Any]:
    """Weights in full precision, moments, counters."""
    with _whole_groups(engine.optimizer) as inner:
        state = inner.state_dict()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "weights": [weight.detach() for weight in masters(engine)],
        "optimizer": state,
        "steps": (engine.global_steps, engine.skipped_steps, engine.micro_steps, engine.global_samples),
        "scaler": {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
    }


@torch.no_grad()
def load_engine(engine: Any, state: dict[str, Any]) -> None:
    """Take back what `engine_state` gave.

    Raises: ValueError when it is of other parameters.
    """
    optimizer, mine = engine.optimizer, masters(engine)
    before, now = ([len(w) for w in weights] for weights in (state["weights"], mine))
    if before != now:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint's optimiser has partitions of {before} weights, this run's {now}"
        )
    with _whole_groups(optimizer) as inner:
        inner.load_state_dict(state["optimizer"])
    for weight, saved in zip(mine, state["weights"], strict=True):
        weight.copy_(saved)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(mine)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept := list(optimizer.persistent_parameters):  # small ones, which every process holds
            kept[0].partition(kept)
            kept[0].all_gather(kept)
    else:
        optimizer.update_lp_params()
    engine.global_steps, engine.skipped_steps, engine.micro_steps, engine.global_samples = state["steps"]
    for name, value in state["scaler"].items():
        setattr(optimizer.loss_scaler, name, value)


@contextmanager
def _whole_groups(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimiser with its parameters: stage 3 hands it one group of them at a time."""
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if stage3:
        optimizer._set_fp32_optimizer_param_groups()
    try:
        yield optimizer.optimizer
    finally:
        if stage3:
            optimizer._clear_fp32_optimizer_param_groups()


# ---- as an engine's own checkpoints, for transformers' Trainer


def write_plainly(engine: Any) -> None:
    """From here on the engine's `save_checkpoint` and `load_checkpoint` write and read what `engine_state` gives, each
    process a file. Optimisers of DeepSpeed that this module does not know keep DeepSpeed's own."""
    if masters(engine) is not None:
        engine.save_checkpoint, engine.load_checkpoint = partial(_save, engine), partial(_load, engine)


def _save(engine: Any, folder: str, **_: Any) -> None:
    path = Path(folder) / f"global_step{engine.global_steps}"  # the name by which the Trainer knows DeepSpeed's
    path.mkdir(parents=True, exist_ok=True)
    torch.save(engine_state(engine), path / own_file(engine.global_rank))


def _load(engine: Any, folder: str, **_: Any) -> tuple[str, dict[str, Any]]:
    found = list(Path(folder).glob(f"global_step*/{own_file(engine.global_rank)}"))
    if len(found) != 1:
        raise ValueError(f"resume_from_checkpoint: {folder} holds no state of process {engine.global_rank} under ZeRO")
    load_engine(engine, load_state(found[0]))
    return folder, {}

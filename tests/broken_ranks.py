"""Every stage with a loss or a gradient that is not finite on one process: `python broken_ranks.py OUT` in torchrun's
environment, or `results(folder)` in this process."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import grpo_cases
import ppo_cases
import torch
from accelerate import PartialState
from stage_cases import judged_rows, tiny
from test_dpo import trainer_for as dpo_trainer
from test_kto_trainer import trainer_for as kto_trainer
from test_rm import trainer_for as rm_trainer
from test_sft import make_rows
from test_sft import trainer_for as sft_trainer

from rlhf_fast.cli.train import leave_ranks

LIMIT = 2


def stages(folder: Path, steps: int = 4):
    """(name, function that makes a trainer) of every stage."""
    sizes = dict(max_steps=steps, per_device_train_batch_size=2, learning_rate=0.1)
    rl = dict(max_steps=steps, max_skipped_steps=LIMIT)
    yield "sft", lambda: sft_trainer(folder / "sft", tiny(vocab_size=18), make_rows(16), **sizes)
    yield "rm", lambda: rm_trainer(folder / "rm", **sizes)
    yield "dpo", lambda: dpo_trainer(folder / "dpo", **sizes)
    yield "kto", lambda: kto_trainer(folder / "kto", rows=judged_rows(), **sizes)
    yield "grpo", lambda: grpo_cases.trainer(folder / "grpo", **rl)
    yield "ppo", lambda: ppo_cases.trainer(folder / "ppo", ppo_epochs=1, **rl)


def break_loss(trainer, value: float) -> None:
    """A constant that is not finite beside a loss whose gradient is fine."""
    if hasattr(trainer, "loop"):
        update = trainer.loop.update
        trainer.loop.update = lambda micros, loss_of: update(micros, lambda micro: loss_of(micro) + value)
        return
    share = trainer.share

    def broken(*args, **kwargs):
        loss, metrics = share(*args, **kwargs)
        return loss + value, metrics

    trainer.share = broken


def break_gradient(module: torch.nn.Module) -> None:
    list(module.parameters())[-1].register_hook(lambda grad: grad * math.nan)


def breaks(name: str, trainer) -> dict[str, Callable[[], None]]:
    ways = {
        "nan loss": lambda: break_loss(trainer, math.nan),
        "inf loss": lambda: break_loss(trainer, math.inf),
        "nan gradient": lambda: break_gradient(trainer.model),
    }
    if name == "ppo":
        ways["nan gradient of the critic"] = lambda: break_gradient(trainer.loop.models["critic"])
    return ways


def modules(trainer) -> list[torch.nn.Module]:
    return list(trainer.loop.models.values()) if hasattr(trainer, "loop") else [trainer.model]


def results(folder: Path) -> dict[str, dict]:
    """What became of each stage and break, on this process; the last one is broken."""
    out, state = {}, PartialState()
    for name, make in stages(folder / str(state.process_index)):
        for way in breaks(name, None):
            trainer = make()
            if not hasattr(trainer, "loop"):
                trainer.broken_steps.limit = LIMIT
            if state.process_index == state.num_processes - 1:
                breaks(name, trainer)[way]()
            before = [p.detach().clone() for m in modules(trainer) for p in m.parameters()]
            try:
                trainer.train()
                error = "none"
            except FloatingPointError as caught:
                error = str(caught)
            after = [p.detach() for m in modules(trainer) for p in m.parameters()]
            optimizer = trainer.loop.optimizer if hasattr(trainer, "loop") else trainer.optimizer
            out[f"{name}: {way}"] = {
                "error": error,
                "unchanged": all(map(torch.equal, before, after)),
                "moments": sum(int(s.get("step", 0)) for s in optimizer.state.values()),
                "skipped": getattr(trainer, "loop", trainer).broken_steps.skipped,
            }
    return out


if __name__ == "__main__":
    found, where = results(Path(sys.argv[1])), PartialState()
    (Path(sys.argv[1]) / f"{where.process_index}.json").write_text(json.dumps(found))
    leave_ranks()

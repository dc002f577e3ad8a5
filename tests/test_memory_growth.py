"""No stage keeps memory from step to step: live tensors are counted, resident memory is measured."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import broken_ranks  # noqa: E402

WARM = 15  # steps until buffers, caches and the allocator have their size


class Watch(transformers.TrainerCallback):
    """Live tensors and resident bytes after each step."""

    def __init__(self) -> None:
        self.tensors: list[int] = []
        self.resident: list[int] = []

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step in (WARM, state.max_steps):
            gc.collect()
            self.tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append(pages * os.sysconf("SC_PAGESIZE"))


def watched(stage: str, folder: Path, steps: int) -> Watch:
    """The readings of a run; one step is one rollout where there are rollouts."""
    make = dict(broken_ranks.stages(folder, steps))[stage]
    trainer, watch = make(), Watch()
    (trainer.loop.callbacks if hasattr(trainer, "loop") else trainer).add_callback(watch)
    trainer.train()
    return watch


STAGES = ["sft", "rm", "dpo", "kto", "ppo", "grpo"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stage", STAGES)
def test_no_growth(stage, tmp_path):
    watch = watched(stage, tmp_path, WARM + 30)
    warm, end = watch.tensors
    assert end <= warm + 2, f"{end - warm} more tensors after 30 steps"
    grown = watch.resident[1] - watch.resident[0]
    assert grown < 4 << 20, f"{grown / 2**20:.1f} MB more after 30 steps"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_no_growth_over_200_steps(stage, tmp_path):
    watch = watched(stage, tmp_path, WARM + 200)
    grown = (watch.resident[1] - watch.resident[0]) / 2**20
    tensors = watch.tensors[1] - watch.tensors[0]
    print(f"{stage}: {grown:+.2f} MB of {watch.resident[0] / 2**20:.0f} MB, {tensors:+d} tensors over 200 steps")
    assert tensors <= 2
    assert grown < 6

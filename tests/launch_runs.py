"""Runs of several stages in one launch: `torchrun launch_runs.py FOLDER`; the configurations lie in FOLDER/*.yaml."""

import os
import sys
from pathlib import Path

import torch

from rlhf_fast.cli.train import leave_ranks, train
from rlhf_fast.trainers.run_log import peak_memory_mb


def score(completion_ids, **_):
    """A reward that differs within groups."""
    return [float(sum(ids) % 7) for ids in completion_ids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    ballast = torch.zeros((1 << 28) * int(os.environ["RANK"]), dtype=torch.uint8)  # MB that the first process lacks
    ballast.fill_(1)
    if sys.argv[2:] == ["fsdp2"]:
        from ranks import fsdp2_on_the_cpu

        fsdp2_on_the_cpu()
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # accelerate launch's own default
    for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
        train(file)
        Path(sys.argv[1], f"{file.stem}-{os.environ['RANK']}.peak").write_text(str(peak_memory_mb()))
    leave_ranks()

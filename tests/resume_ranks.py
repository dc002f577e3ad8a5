"""Runs of a plan one after the other on any number of processes: `python resume_ranks.py FOLDER` in torchrun's
environment. FOLDER/runs.json is a list of

    {"options": of the run, "fsdp2": whether weights are sharded, "after": a checkpoint that is copied to its output}

Weights are fp64, so that layouts can be compared. The first process leaves each run's warnings in `warnings.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from ranks import exact_norms, fsdp2_on_the_cpu

from rlhf_fast.cli.train import leave_ranks
from rlhf_fast.trainers.config import make_config, run
from rlhf_fast.trainers.models import hf_utils
from rlhf_fast.trainers.models.policy import Reference
from rlhf_fast.trainers.sharding import is_sharded


def copy_checkpoint(checkpoint: Path, output: Path) -> None:
    """A run as a kill after its checkpoint leaves it."""
    output.mkdir(parents=True)
    shutil.copytree(checkpoint, output / checkpoint.name)
    shutil.copy(checkpoint.parent / "trainer_log.jsonl", output)


def check_references() -> None:
    """From here on a reference of DPO or KTO that does not lie as the policy does is an error."""
    lay_beside = Reference.lay_beside

    def checked(self: Reference, accelerator: Accelerator) -> None:
        lay_beside(self, accelerator)
        if is_sharded(self.model) != accelerator.is_fsdp2:
            raise RuntimeError(f"reference sharded: {is_sharded(self.model)}, the policy: {accelerator.is_fsdp2}")

    Reference.lay_beside = checked


def follow(plan: dict) -> None:
    os.environ["ACCELERATE_USE_FSDP"] = str(plan["fsdp2"]).lower()
    output, main = Path(plan["options"]["output_dir"]), os.environ["RANK"] == "0"
    if "after" in plan and main:
        copy_checkpoint(Path(plan["after"]), output)
    if dist.is_initialized():
        dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(make_config(plan["options"]))
    layout = PartialState().distributed_type.value
    if layout != ("FSDP" if plan["fsdp2"] else "MULTI_CPU"):
        raise RuntimeError(f"{output} ran under {layout}")
    if main:
        (output / "warnings.json").write_text(json.dumps([str(w.message) for w in caught]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    exact_norms()
    hf_utils.DTYPES["float32"] = torch.float64
    fsdp2_on_the_cpu()
    check_references()
    for plan in json.loads(Path(sys.argv[1], "runs.json").read_text()):
        follow(plan)
    leave_ranks()

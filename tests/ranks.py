"""Checks on the ranks of a gloo group, which are started once and run all of them.

A module of checks has CHECKS = {name: (function of the group, world sizes)}. A rank that dies or waits too long fails
every check that it did not reach.
"""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 20  # seconds of one collective
DEADLINE = 240  # seconds of all checks on one group; they take a tenth of it on two idle cores


def registry() -> tuple[dict, Callable]:
    """(CHECKS, a decorator that registers a check; without `worlds` it runs on every group)."""
    checks = {}

    def check(*worlds):
        def register(fn):
            checks[fn.__name__] = (fn, worlds or (2, 3))
            return fn

        return register

    return checks, check


def rank_main(module: str, rank: int, world: int, folder: str) -> None:
    """Run every check; the outcome so far lies in `folder/<rank>.json` at any time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    outcome = {}
    for name, (fn, worlds) in importlib.import_module(module).CHECKS.items():
        if world not in worlds:
            continue
        start = time.perf_counter()
        try:
            fn(dist.group.WORLD)
            error = ""
        except Exception:
            error = traceback.format_exc()
        outcome[name] = dict(error=error, seconds=time.perf_counter() - start)
        Path(folder, f"{rank}.json.part").write_text(json.dumps(outcome))
        Path(folder, f"{rank}.json.part").rename(Path(folder, f"{rank}.json"))
        dist.barrier()  # a rank that failed before a collective joins the others again, or they stop here
    dist.destroy_process_group()


def run_ranks(module: str, world: int, folder: Path) -> list[dict]:
    """The outcome of every check of `module`, by rank."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        arguments = [(module, r, world, str(folder)) for r in range(world)]
        ranks = [context.Process(target=rank_main, args=args, daemon=True) for args in arguments]
        for process in ranks:
            process.start()
    end = time.monotonic() + DEADLINE
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    files = [folder / f"{r}.json" for r in range(world)]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files]


def assert_passed(name: str, ranks: list[dict]) -> None:
    """Fail with every rank's traceback."""
    errors = [
        f"rank {r} of {len(ranks)}:\n{o[name]['error']}" if name in o else f"rank {r} of {len(ranks)} never got there"
        for r, o in enumerate(ranks)
        if name not in o or o[name]["error"]
    ]
    assert not errors, "\n".join(errors)


def exact_norms() -> None:
    """transformers' RMSNorm rounds to fp32 even in an fp64 model, and a last bit becomes 1e-8; here it does not."""
    from transformers.models.qwen2 import modeling_qwen2

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    modeling_qwen2.Qwen2RMSNorm.forward = forward


def fsdp2_on_the_cpu() -> None:
    """accelerate switches FSDP2 on for accelerators only; torch's runs on the CPU as well. For this process."""
    import accelerate.state
    from accelerate.utils import DistributedType

    wrap = dict(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    os.environ |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true") | wrap
    plain = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


def torchrun(script: str, ranks: int, *arguments: object, timeout: float = 300) -> None:
    """Start `ranks` processes of a script in the environment that torchrun gives; fail with what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    common |= dict(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE=str(ranks))
    command = [sys.executable, script, *map(str, arguments)]
    with ExitStack() as stack:  # files, not pipes: a rank whose pipe is full waits for its reader, and others for it
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        where = dict(cwd=Path(script).parent, stderr=subprocess.STDOUT)
        running = [
            subprocess.Popen(command, env=common | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=output, **where)
            for r, output in enumerate(outputs)
        ]
        end = time.monotonic() + timeout
        try:
            for process, output in zip(running, outputs, strict=True):
                process.wait(max(0.0, end - time.monotonic()))
                output.seek(0)
                assert process.returncode == 0, output.read()[-3000:]
        finally:
            for process in running:
                process.kill()


def save_results(results: Callable[[Path, int], dict]) -> None:
    """The body of a script `OUT STEPS [fsdp2]` in torchrun's environment: `results(OUT, STEPS)` on every rank, the
    first one's in OUT/results.pt."""
    from rlhf_fast.cli.train import leave_ranks

    torch.set_num_threads(1)
    exact_norms()
    if sys.argv[3:] == ["fsdp2"]:
        fsdp2_on_the_cpu()
    found = results(Path(sys.argv[1]), int(sys.argv[2]))
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[1]) / "results.pt")
    leave_ranks()

"""Checks on the ranks of a gloo group, which are started once and run all of them.

A module of checks has CHECKS = {name: (function of the group, world sizes)}. A rank that dies or waits too long fails
every check that it did not reach.
"""

import importlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable
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

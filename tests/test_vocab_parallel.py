"""A head over 2 and 3 gloo ranks on the CPU against the unsharded op. Checks: `vocab_parallel_checks.py`.

The ranks of a group are started once and run all its checks; a rank that dies or waits too long fails every check that
it did not reach.
"""

import json
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from vocab_parallel_checks import CHECKS

TIMEOUT = 20  # seconds of one collective
DEADLINE = 240  # seconds of all checks on one group; they take a tenth of it on two idle cores


def rank_main(rank: int, world: int, folder: str) -> None:
    """Run every check; the outcome so far lies in `folder/<rank>.json` at any time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    outcome = {}
    for name, (fn, worlds) in CHECKS.items():
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


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    """(world size, outcome of every rank)."""
    world, folder = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        ranks = [context.Process(target=rank_main, args=(r, world, str(folder)), daemon=True) for r in range(world)]
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
    return world, [json.loads(f.read_text()) if f.exists() else {} for f in files]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.skipif(os.name == "nt", reason="a rendezvous through a file")
@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    world, ranks = outcomes
    if world not in CHECKS[name][1]:
        pytest.skip(f"not for {world} ranks")
    errors = [
        f"rank {r} of {world}:\n{o[name]['error']}" if name in o else f"rank {r} of {world} never got there"
        for r, o in enumerate(ranks)
        if name not in o or o[name]["error"]
    ]
    assert not errors, "\n".join(errors)

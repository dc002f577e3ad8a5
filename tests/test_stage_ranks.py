"""Two processes train exactly what one trains: normalisers, KTO's reference point, BCO's shift, evaluation sums."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import stage_ranks

RANKS = 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(results of one process, of two)."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS))
    command = [sys.executable, stage_ranks.__file__, str(folder)]
    where = dict(cwd=Path(stage_ranks.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [
        subprocess.Popen(command, env=common | dict(RANK=str(r), LOCAL_RANK=str(r)), **where) for r in range(RANKS)
    ]
    one = stage_ranks.results(folder / "one")
    for process in running:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
    return one, torch.load(folder / "results.pt")


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto"])
def test_two_processes_equal_one(both, stage):
    """fp64 weights and metrics; the Trainer adds its losses up in fp32."""
    one, two = (results[stage] for results in both)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    for part in ("logged", "evaluation"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert two[part][name] == pytest.approx(value, rel=1e-6), (part, name)
    assert len(one["evaluation"]) > 2

"""Two processes: one of them gets a signal, one of them dies, and the run still ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import resume_cases as cases

from rlhf_fast.trainers import checkpoint as files

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(os.name == "nt", reason="gloo through the loopback device"),
]


def launch(folder, name, **changes):
    """(exit status, output, seconds) of torchrun."""
    hurt = changes.pop("hurt", "")
    if hurt:
        changes["reward_funcs"] = ["resume_cases:hurt_reward"]
    values = cases.options(folder, name, "grpo", max_steps=16, save_steps=2, logging_steps=1, ddp_timeout=60, **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += cases.command(folder, values)[1:]
    began = time.monotonic()
    done = subprocess.run(command, env=cases.environment(HURT=hurt), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_two_processes_end_resume_and_agree(tmp_path):
    folder = cases.prepare(tmp_path, "grpo")
    code, output, _ = launch(folder, "whole")
    assert code == 0, output[-3000:]
    code, output, _ = launch(folder, "parts", hurt="SIGTERM")  # of one process only
    assert code != 0
    assert "exitcode  : 143" in output, output[-3000:]
    saved = files.find_checkpoint(folder / "parts", "latest")
    assert files.step_of(saved) == 5  # the first of the second rollout's four updates
    own = [torch.load(saved / f"process_{r}.pt", weights_only=True)["parts"]["trainer"] for r in range(2)]
    assert not torch.equal(own[0]["shuffle"], own[1]["shuffle"])
    assert own[0]["todo"] == own[1]["todo"] == [(0, 1), (1, 0), (1, 1)]
    code, output, seconds = launch(folder, "parts", hurt="SIGKILL", resume_from_checkpoint=True)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output, output[-3000:]
    assert seconds < 120
    assert files.step_of(files.last_checkpoint(folder / "parts")) == 12
    code, output, _ = launch(folder, "parts", resume_from_checkpoint=True)
    assert code == 0, output[-3000:]
    a, b = cases.weights(folder / "whole"), cases.weights(folder / "parts")
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert cases.rows(folder / "whole") == cases.rows(folder / "parts")

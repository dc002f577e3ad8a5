"""Two processes: one of them gets a signal, one of them dies, and the run still ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import resume_cases as cases
import resume_ranks

from rlhf_fast.trainers import checkpoint as files

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(os.name == "nt", reason="gloo through the loopback device"),
]


def launch(folder, name, stage, **changes):
    """(exit status, output, seconds) of torchrun; PPO under FSDP2, GRPO under DDP."""
    hurt = changes.pop("hurt", "")
    changes["reward_funcs"] = ["resume_cases:hurt_reward" if hurt else "grpo_cases:digits_sum"]
    values = cases.options(folder, name, stage, max_steps=16, save_steps=2, logging_steps=1, ddp_timeout=60, **changes)
    if stage == "ppo":
        (folder / "runs.json").write_text(json.dumps([dict(options=values, fsdp2=True)]))
        run = [resume_ranks.__file__, str(folder)]
    else:
        run = cases.command(folder, values)[1:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *run]
    began = time.monotonic()
    done = subprocess.run(command, env=cases.environment(HURT=hurt), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@pytest.mark.parametrize(("stage", "stopped", "killed"), [("grpo", 5, 12), ("ppo", 2, 2)])
def test_two_processes_end_resume_and_agree(tmp_path, stage, stopped, killed):
    """The second rollout's rewards bring a signal; PPO's step is a rollout, GRPO's one of its updates."""
    folder = cases.prepare(tmp_path, stage)
    code, output, _ = launch(folder, "whole", stage)
    assert code == 0, output[-3000:]
    code, output, _ = launch(folder, "parts", stage, hurt="SIGTERM")  # of one process only
    assert code != 0
    assert "exitcode  : 143" in output, output[-3000:]
    saved = files.find_checkpoint(folder / "parts", "latest")
    assert files.step_of(saved) == stopped
    own = [torch.load(saved / f"process_{r}.pt", weights_only=True)["parts"]["trainer"] for r in range(2)]
    assert not torch.equal(own[0]["shuffle"], own[1]["shuffle"])
    if stage == "grpo":  # the first of the second rollout's four updates is made
        assert own[0]["todo"] == own[1]["todo"] == [(0, 1), (1, 0), (1, 1)]
    code, output, seconds = launch(folder, "parts", stage, hurt="SIGKILL", resume_from_checkpoint=True)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output, output[-3000:]
    assert seconds < 120
    assert files.step_of(files.last_checkpoint(folder / "parts")) == killed
    code, output, _ = launch(folder, "parts", stage, resume_from_checkpoint=True)
    assert code == 0, output[-3000:]
    a, b = cases.weights(folder / "whole"), cases.weights(folder / "parts")
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert cases.rows(folder / "whole") == cases.rows(folder / "parts")

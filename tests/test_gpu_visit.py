"""The script of a GPU visit, rehearsed on the CPU: every stage runs, a broken row costs itself alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.benchmarks.cases import OPS

VISIT = Path(__file__).parents[1] / "benchmarks" / "gpu_visit.py"


def _visit(folder, *options):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(VISIT), str(folder), "--rehearse", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


def test_rehearsal(tmp_path):
    """Rows of every op are right; the planted stage, and no other, fails; all of it is in the record."""
    pytest.importorskip("transformers")
    done = _visit(tmp_path, "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "visit.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in record["stages"]}
    broken = [name for name in status if "nothing" in name]
    assert [status.pop(name) for name in broken] == ["exit status 1"]
    assert set(status.values()) == {"ok"}, (status, (tmp_path / "visit.log").read_text()[-4000:])
    assert len(status) == 7
    ours = [row for row in record["rows"] if row["provider"] == "rlhf_fast"]
    assert {row["op"] for row in ours} == set(OPS)
    assert all(row["status"] in ("ok", "loose") for row in ours)
    assert record["trainer-grpo"]["steps"] == 2
    assert record["trainer-ppo"]["steps"] == 1
    assert record["trainer-dpo"]["rlhf_fast"]["step_seconds"] > 0
    assert f"{len(ours)} of {len(ours)} of our rows right" in done.stdout


def test_without_time_left_there_is_still_a_record(tmp_path):
    done = _visit(tmp_path, "--minutes", "0.2")
    record = json.loads((tmp_path / "visit.json").read_text())
    assert {stage["status"] for stage in record["stages"]} == {"no time left"}
    assert done.returncode == 1

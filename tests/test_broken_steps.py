"""A loss or gradient that is not finite, in every stage: skipped, counted, given up after a limit; on all processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import broken_ranks
import yaml
from test_cli import (
    config,  # noqa: F401
    invoke,
)

RANKS = 2


def check(results: dict[str, dict]) -> None:
    assert len(results) == 6 * 3 + 1
    for name, found in results.items():
        assert "2 steps in a row" in found["error"], f"{name}: {found}"
        assert found["unchanged"], name
        assert found["moments"] == 0, name  # Adam has made no step
        assert found["skipped"] == broken_ranks.LIMIT, name


@pytest.mark.filterwarnings("ignore:step .* a gradient is not finite")
def test_one_process(tmp_path):
    check(broken_ranks.results(tmp_path))


def test_two_processes_of_which_one_is_broken(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS))
    command = [sys.executable, broken_ranks.__file__, str(tmp_path)]
    where = dict(cwd=Path(broken_ranks.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [
        subprocess.Popen(command, env=common | dict(RANK=str(r), LOCAL_RANK=str(r)), **where) for r in range(RANKS)
    ]
    for process in running:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
    for rank in range(RANKS):
        check(json.loads((tmp_path / f"{rank}.json").read_text()))


def test_the_limit_is_an_option_of_every_stage(config):  # noqa: F811
    """A learning rate beyond all reason: the command gives up, says so and leaves no model behind."""
    settings = yaml.safe_load(config.read_text()) | dict(learning_rate=1e38, max_steps=9, max_skipped_steps=2)
    config.write_text(yaml.safe_dump(settings | dict(lr_scheduler_type="constant", max_grad_norm=0)))
    result = invoke("train", config)
    assert result.exit_code == 2
    assert "2 steps in a row had gradients that are not finite" in result.stderr
    assert not (config.parent / "out" / "model.safetensors").exists()
    assert invoke("train", config, "max_skipped_steps=0").exit_code == 2

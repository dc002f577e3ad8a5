"""The loops of `examples/` run as they stand, and learn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# where each loss begins and what it has to fall below; ppo and grpo return -reward, in [-1, 0]
BOUNDS = {
    "sft": (2.3, 1.2),  # log 12 = 2.48 at first; half of it says that digits and their order are known
    "dpo": (0.69, 0.35),  # log 2 at first
    "kto": (0.49, 0.35),  # 1/2 at first
    "rm": (0.5, 0.3),  # log 2 at first
    "grpo": (-0.6, -0.8),  # 6 of 12 tokens are even
    "ppo": (-0.6, -0.8),
}


def test_every_example_is_here():
    assert {p.stem for p in EXAMPLES.glob("*.py")} - {"tiny", "mesh"} == set(BOUNDS)  # mesh: in mesh_checks.py


@pytest.mark.parametrize("name", BOUNDS)
def test_the_loss_falls(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    try:
        losses = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    finally:
        sys.modules.pop("tiny", None)
    first, last = BOUNDS[name]
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] > first
    assert sum(losses[-5:]) / 5 < last
    assert "step   0" in capsys.readouterr().out

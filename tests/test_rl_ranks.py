"""GRPO and PPO do the same on one process, on two under FSDP2 and on four under DDP: weights and metrics in fp64.

Whatever could be a process's own is in there: normalisers, group and batch statistics, whitening, score statistics, the
KL controller, and a process on whose rows nothing is trained.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import rl_ranks  # noqa: E402
from ranks import torchrun  # noqa: E402

SHORT = {"one": (1,), "two, FSDP2": (2, "fsdp2"), "four, DDP": (4,)}
LONG = SHORT | {"two, DDP": (2,), "four, FSDP2": (4, "fsdp2")}
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(os.name == "nt", reason="gloo through the loopback device"),
]


def run(folder, layouts, steps):
    found = {}
    for name, (ranks, *mode) in layouts.items():
        (folder / name).mkdir()
        torchrun(rl_ranks.__file__, ranks, folder / name, steps, *mode)
        found[name] = torch.load(folder / name / "results.pt", weights_only=True)
    return found


def compare(found):
    """1e-11 of the weights, which are of the order of 1: 1e5 roundings; scores and log-probabilities are fp32."""
    want = found.pop("one")
    assert found
    for layout, got in found.items():
        for trainer, expected in want.items():
            for name, weight in expected["weights"].items():
                where = f"{layout}, {trainer}, {name}"
                torch.testing.assert_close(
                    got[trainer]["weights"][name], weight, rtol=1e-11, atol=1e-11, msg=lambda m, w=where: f"{w}: {m}"
                )
            for step, (metrics, others) in enumerate(zip(expected["metrics"], got[trainer]["metrics"], strict=True)):
                assert metrics.keys() == others.keys()
                for name, value in metrics.items():
                    where = (layout, trainer, step, name)
                    assert others[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), where


def test_the_layout_changes_nothing(tmp_path):
    compare(run(tmp_path, SHORT, 2))


@pytest.mark.slow
def test_nor_over_twenty_steps(tmp_path):
    compare(run(tmp_path, LONG, 20))

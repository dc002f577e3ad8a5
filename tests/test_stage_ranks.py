"""The Trainer stages do the same on one process, on two under FSDP2 and on four under DDP.

Normalisers, KTO's reference point, BCO's shift, a reference that follows the policy, and evaluation sums are global.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import stage_ranks
from ranks import torchrun

SHORT = {"one": (1,), "two, FSDP2": (2, "fsdp2"), "four, DDP": (4,)}
LONG = SHORT | {"two, DDP": (2,), "four, FSDP2": (4, "fsdp2")}
STAGES = ["sft", "rm", "dpo", "kto"]


def run(folder, layouts, steps):
    found = {}
    for name, (ranks, *mode) in layouts.items():
        (folder / name).mkdir()
        torchrun(stage_ranks.__file__, ranks, folder / name, steps, *mode)
        found[name] = torch.load(folder / name / "results.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Results of two steps by layout."""
    return run(tmp_path_factory.mktemp("ranks"), SHORT, 2)


def compare(layouts, stage):
    """fp64 weights and metrics; the Trainer adds its losses up in fp32."""
    one = layouts["one"][stage]
    for layout, results in layouts.items():
        for name, weight in one["weights"].items():
            where = f"{layout}, {name}"
            torch.testing.assert_close(
                results[stage]["weights"][name], weight, rtol=1e-11, atol=1e-11, msg=lambda m, w=where: f"{w}: {m}"
            )
        for part in ("logged", "evaluation"):
            assert one[part].keys() == results[stage][part].keys()
            for name, value in one[part].items():
                assert results[stage][part][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (layout, part, name)
    assert len(one["evaluation"]) > 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_layout_changes_nothing(layouts, stage):
    compare(layouts, stage)


@pytest.mark.slow
def test_nor_over_twenty_steps(tmp_path):
    layouts = run(tmp_path, LONG, 20)
    for stage in STAGES:
        compare(layouts, stage)

"""A GRPO step beside TRL's, on the CPU: the target is half of TRL's seconds."""

from __future__ import annotations

import pytest

from rlhf_fast.benchmarks import grpo_step


def test_half_of_trls_seconds(capsys):
    """Medians over alternating short runs in one process."""
    result = grpo_step.run(rounds=3)
    if "skipped" in result["trl"]:
        pytest.skip(result["trl"]["skipped"])
    with capsys.disabled():
        from rich import print

        print(grpo_step.table(result))
    assert result["ratio"] <= 0.5

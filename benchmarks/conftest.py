"""`pytest benchmarks/` on a clone: the suite's cases as pytest-benchmark rows, for regression runs.

    pytest benchmarks/ --benchmark-autosave            # keep a run
    pytest benchmarks/ --benchmark-compare             # this one against the last kept
    pytest benchmarks/ --shape qwen2.5-0.5b --device cuda --providers all

For a table with limits, memory and errors: `rlhf-fast bench`.
"""

from __future__ import annotations

import pytest
import torch

QUICK = "rlhf_fast,rlhf_fast-torch,torch,trl"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The shape, the providers and the device of all rows."""
    parser.addoption("--shape", default="small", help="a name or N,D,V (rlhf-fast bench --list)")
    parser.addoption("--providers", default=QUICK, help="comma-separated, or all: some compile for minutes")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")

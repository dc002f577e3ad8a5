"""ZeRO-2 and ZeRO-3 on two processes train what one process trains: `fuse_lm_head`, TRL under the patch, our trainers.

Needs DeepSpeed, which is not among the test packages: `DS_BUILD_OPS=0 pip install deepspeed`, run with 0.19.8.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", minversion="1.16")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed", allow_module_level=True)

SCRIPT = Path(__file__).with_name("deepspeed_ranks.py")
CASES = [
    *(f"{kind}{tied}{again}" for kind in ("logprob", "loss_fn") for tied in ("", ", tied")
      for again in ("", ", checkpointed")),
    *("trl sft", "trl dpo", "sft", "dpo"),
]  # fmt: skip


def run(folder: Path, *command: str) -> list[dict]:
    """What each rank has saved."""
    done = subprocess.run(
        [sys.executable, *command], cwd=SCRIPT.parent, env=os.environ | dict(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return [torch.load(path) for path in sorted(folder.glob("*/results.pt"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (results,) = run(folder, str(SCRIPT), str(folder))
    assert list(results) == CASES
    return results


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return run(folder, *launch, str(SCRIPT), str(folder), str(request.param))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(alone, ranks, case):
    """fp32: losses and weights after two steps of SGD, to a few roundings of numbers near 1."""
    assert len(ranks) == 2
    for results in ranks:
        assert results[case].keys() == alone[case].keys()
        for name, value in alone[case].items():
            torch.testing.assert_close(
                results[case][name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )

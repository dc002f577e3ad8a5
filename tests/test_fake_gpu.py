"""The code that runs on a GPU's host, on a GPU made of host memory (fake_gpu/): devices, dtypes, strides, syncs.

For a torch without CUDA alone, of the release that fake_gpu was written for; where there is a GPU its own tests run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "fake_gpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None or sys.platform != "linux", reason="needs torch without CUDA"),
    pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="fake_gpu is written for torch 2.13"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]
TESTS = {
    "engine": ["test_engine_device.py", "-k", "1000 or strided or compaction"],
    "epilogue": ["test_epilogue.py", "-k", "fused or against_fp64 or copied"],
    "scans": ["test_scans_device.py", "-rs"],
    "policy": ["test_policy_op.py"],
    "devices": ["test_devices.py", "-k", "two or ranks"],
}
TRAINERS = """
import tempfile
import fake_gpu, torch
from rlhf_fast.cli.demos import load_demo
for name, run in (("grpo", dict(rollouts=1)), ("ppo", dict(steps=1))):
    fake_gpu.DEVICE.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        found = load_demo(name)(folder, **run, overrides=dict(use_cpu=False, bf16=True), quiet=True)
    assert found["steps"] > 0 and fake_gpu.DEVICE.peak() > 1e6, (found, fake_gpu.DEVICE.peak())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fake_gpu")
    code = f"import fake_gpu, pathlib; fake_gpu.build(pathlib.Path({str(folder)!r}))"
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=own)
    return own | {"FAKE_GPU": str(folder)}


@pytest.mark.parametrize("tests", TESTS.values(), ids=TESTS)
def test_on_device(tests, environment):
    command = [sys.executable, "-m", "pytest", "-p", "fake_gpu", "-p", "no:cacheprovider", "--on-device"]
    file, *chosen = tests
    command += [str(FOLDER.parent / file), *chosen]
    several = {"FAKE_GPUS": "2"} if file == "test_devices.py" else {}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | several)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "a fake GPU" in done.stdout


def test_trainers(environment):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", TRAINERS],
        capture_output=True,
        text=True,
        env=environment | {"RLHF_FAST_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

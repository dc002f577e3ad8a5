"""ZeRO-2 and ZeRO-3 on two processes train what one process trains: `fuse_lm_head`, TRL under the patch, our trainers;
and a resumed run is the unbroken one.

Needs DeepSpeed, which `make test` puts into a folder of the environment; run with 0.19.8.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", minversion="1.16")
FOLDER = Path(sys.prefix, "deepspeed")
if importlib.util.find_spec("deepspeed") is None and not (FOLDER / "deepspeed").is_dir():
    pytest.skip(f"DeepSpeed is neither installed nor in {FOLDER}: `make test` fetches it", allow_module_level=True)

from ranks import torchrun  # noqa: E402
from zero_ranks import CLIP  # noqa: E402

SCRIPT = str(Path(__file__).with_name("deepspeed_ranks.py"))
RL = ["grpo", "ppo", "ppo, shared critic", "grpo, lora", "ppo, lora"]
CASES = [
    *(f"{kind}{tied}{again}" for kind in ("logprob", "loss_fn") for tied in ("", ", tied")
      for again in ("", ", checkpointed")),
    *("trl sft", "trl dpo", "sft", "dpo", "dpo, ahead", "dpo, followed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    torchrun(SCRIPT, 1, folder)
    return folder / "0"


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The folders of two ranks, which have resumed runs in passing."""
    folder = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        if FOLDER.is_dir():
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")])))
        torchrun(SCRIPT, 2, folder, request.param, timeout=600)
    return [folder / "0", folder / "1"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(alone, ranks, case):
    """fp32: losses and weights after two steps of SGD, to a few roundings of numbers near 1."""
    want = torch.load(alone / "results.pt")
    assert list(want) == CASES
    for folder in ranks:
        check_weights(torch.load(folder / "results.pt")[case], want[case])


@pytest.mark.parametrize("trainer", RL)
def test_grpo_and_ppo_do_what_one_process_does(alone, ranks, trainer):
    """fp32: weights after three steps to a few roundings, metrics to as many of what they are differences of."""
    every = torch.load(alone / "rl.pt")
    assert list(every) == RL
    want, got = every[trainer], torch.load(ranks[0] / "rl.pt")[trainer]
    check_weights(got["weights"], want["weights"])
    for step, (metrics, others) in enumerate(zip(want["metrics"], got["metrics"], strict=True)):
        assert metrics.keys() == others.keys()
        for name, value in metrics.items():
            assert others[name] == pytest.approx(value, rel=2e-5, abs=1e-6, nan_ok=True), (step, name)
    norms = {(n, value) for metrics in want["metrics"] for n, value in metrics.items() if n.startswith("grad_norm")}
    assert all(any(value > CLIP for n, value in norms if n == role) for role in {n for n, _ in norms})


def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_both(alone, ranks):
    want = {name: found["skipped"] for name, found in torch.load(alone / "rl.pt").items()}
    assert set(want.values()) == {2}  # updates of a step
    for folder in ranks:
        assert {name: found["skipped"] for name, found in torch.load(folder / "rl.pt").items()} == want


def check_weights(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

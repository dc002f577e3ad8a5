"""PPO on two processes (gloo, CPU) is PPO on one: normalisers, whitening, statistics, and a process without rows."""

import socket

import pytest
import torch

pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from ppo_process import CASES, process, two_steps  # noqa: E402

OF_A_PROCESS = {"completion_length", "sampler_logprob_gap"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(process, (2, port, str(folder)), nprocs=2)
    return folder


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(results, tmp_path, case):
    metrics, weights = two_steps(tmp_path, case, 0, 1)
    for rank in range(2):
        got_metrics, got_weights = torch.load(results / f"{case}-{rank}.pt", weights_only=False)
        for name, want in weights.items():
            torch.testing.assert_close(got_weights[name], want, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert got_metrics.keys() == metrics.keys()
        for name, want in metrics.items():
            assert got_metrics[name] == pytest.approx(want, rel=1e-6, abs=1e-6), name  # scores are fp32

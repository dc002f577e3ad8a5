"""Both ops inside DDP and FSDP2 on 2 gloo ranks against one process. Checks: `data_parallel_checks.py`."""

import os

import pytest
import torch.distributed as dist
from data_parallel_checks import CHECKS
from ranks import assert_passed, run_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcome of every rank."""
    return run_ranks("data_parallel_checks", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.skipif(os.name == "nt", reason="a rendezvous through a file")
@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    assert_passed(name, outcomes)

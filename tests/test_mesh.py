"""Two dimensions of parallelism at once, and sequences spread over ranks, on 4 gloo ranks. Checks: `mesh_checks.py`."""

import os

import pytest
import torch.distributed as dist
from mesh_checks import CHECKS
from ranks import assert_passed, run_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcome of every rank."""
    return run_ranks("mesh_checks", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.skipif(os.name == "nt", reason="a rendezvous through a file")
@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    assert_passed(name, outcomes)

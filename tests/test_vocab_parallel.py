"""A head over 2 and 3 gloo ranks on the CPU against the unsharded op. Checks: `vocab_parallel_checks.py`."""

import os

import pytest
import torch.distributed as dist
from ranks import assert_passed, run_ranks
from vocab_parallel_checks import CHECKS


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    """Outcome of every rank."""
    return run_ranks("vocab_parallel_checks", request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.skipif(os.name == "nt", reason="a rendezvous through a file")
@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(outcomes, name):
    if len(outcomes) not in CHECKS[name][1]:
        pytest.skip(f"not for {len(outcomes)} ranks")
    assert_passed(name, outcomes)

"""Peak memory of the fused loss and of `linear_logprob` in a process of their own, their time beside the naive's."""

import pytest

from rlhf_fast import _backend
from rlhf_fast.benchmarks.cases import Case, parse_shape
from rlhf_fast.benchmarks.inputs import make_inputs
from rlhf_fast.benchmarks.measure import interleaved
from rlhf_fast.benchmarks.memory import Unmeasured, in_fresh_process
from rlhf_fast.benchmarks.providers import PROVIDERS, build

SHAPE = parse_shape("cpu")  # (2048, 512, 32000): the fp32 logits alone are 262 MB
OPS = ["grpo", "logprob_grad"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_peak_memory_stays_below_250_mb(op, dtype):
    try:
        extra = in_fresh_process("rlhf_fast", Case(op, SHAPE, dtype))
    except Unmeasured as error:
        pytest.skip(str(error))
    assert 10e6 < extra.steady < 250e6
    assert extra.cold < 250e6


@pytest.mark.parametrize("op", OPS)
def test_never_slower_than_naive(op):
    if not _backend.cpp_available():
        pytest.skip("without the C++ row passes no promise is made")
    case = Case(op, SHAPE, "fp32")
    x = make_inputs(case)
    calls = {name: build(PROVIDERS[name], case, x) for name in ("rlhf_fast", "torch")}
    for call in calls.values():
        call()
    timings = interleaved(calls, "cpu", 5)
    assert timings["rlhf_fast"].best <= timings["torch"].best, timings  # the best: others may be at work

"""Peak memory of the fused loss in a process of its own, and its time beside the naive expression's."""

import pytest

from rlhf_fast import _backend
from rlhf_fast.benchmarks.cases import Case, make_inputs, parse_shape
from rlhf_fast.benchmarks.measure import interleaved
from rlhf_fast.benchmarks.memory import Unmeasured, in_fresh_process
from rlhf_fast.benchmarks.providers import PROVIDERS, build

SHAPE = parse_shape("cpu")  # (2048, 512, 32000): the fp32 logits alone are 262 MB
OP = "grpo"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_memory_stays_below_250_mb(dtype):
    try:
        extra = in_fresh_process("rlhf_fast", Case(OP, SHAPE, dtype))
    except Unmeasured as error:
        pytest.skip(str(error))
    assert 10e6 < extra.steady < 250e6
    assert extra.cold < 250e6


def test_never_slower_than_naive():
    if not _backend.cpp_available():
        pytest.skip("without the C++ row passes no promise is made")
    case = Case(OP, SHAPE, "fp32")
    x = make_inputs(case)
    calls = {name: build(PROVIDERS[name], case, x) for name in ("rlhf_fast", "torch")}
    for call in calls.values():
        call()
    timings = interleaved(calls, "cpu", 3)
    assert timings["rlhf_fast"].median <= timings["torch"].median, timings

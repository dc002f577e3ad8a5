"""Every op with the providers asked for: checked against fp64, then timed by pytest-benchmark."""

from __future__ import annotations

import pytest

from rlhf_fast.benchmarks import cases, inputs
from rlhf_fast.benchmarks.measure import synchronize
from rlhf_fast.benchmarks.providers import PROVIDERS, Unavailable, build

ROUNDS = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A row for every op, provider and dtype."""
    chosen = metafunc.config.getoption("--providers").split(",")
    rows = [
        (op, name, dtype)
        for op in cases.OPS
        for dtype in (["fp32"] if cases.on_tokens(op) else ["fp32", "bf16"])
        for name, provider in PROVIDERS.items()
        if op in provider.ops and (name in chosen or chosen == ["all"])
    ]
    metafunc.parametrize(("op", "provider", "dtype"), rows)


@pytest.fixture(scope="module")
def checked():
    """Inputs and fp64 answers, made once for each op and dtype."""
    made: dict[cases.Case, tuple] = {}

    def get(case: cases.Case) -> tuple:
        if case not in made:
            made.clear()
            x = inputs.make_inputs(case)
            made[case] = (x, inputs.answer(case, x))
        return made[case]

    return get


def test_op(benchmark, checked, request, op, provider, dtype):
    """One row of the table."""
    device = request.config.getoption("--device")
    (shape,) = cases.shapes_for(op, [request.config.getoption("--shape")]) or pytest.skip("a shape for other ops")
    case = cases.Case(op, shape, dtype, device=device)
    x, truth = checked(case)
    try:
        step = build(PROVIDERS[provider], case, x)
        reason = cases.wrong(case, cases.errors(step(), truth))
    except Unavailable as error:
        pytest.skip(str(error))
    assert not reason
    benchmark.group = case.label
    benchmark.name = provider

    def call() -> None:
        step()
        synchronize(device)

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)

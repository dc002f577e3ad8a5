"""TRL's trainers with the patch and without, on the CPU: faster, in less memory, no further from fp64."""

from __future__ import annotations

import pytest

from rlhf_fast.benchmarks import trl_patch


@pytest.mark.parametrize("dtype", trl_patch.DTYPES)
@pytest.mark.parametrize("host", trl_patch.MODES)
def test_faster_and_smaller(host, dtype, capsys):
    """Medians over runs that alternate in one process; memory from fresh ones. Against TRL with its masked positions
    left out, which is the harder comparison."""
    pytest.importorskip("trl")
    result = trl_patch.run((host,), (dtype,), rounds=2)
    with capsys.disabled():
        from rich import print

        for table in trl_patch.tables(result):
            print(table)
    rows = result[host][dtype]
    for mode in set(rows) & {"patch", "single pass"}:
        assert rows[mode]["step_seconds"] < rows["trl, scored rows"]["step_seconds"], mode
        assert rows[mode]["extra_mb"] < rows["trl, scored rows"]["extra_mb"], mode
    for name, error in result["error"][dtype]["patch"].items():
        assert error <= 1.1 * result["error"][dtype]["trl"][name], name

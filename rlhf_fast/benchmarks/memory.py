"""Peak host memory of one call beyond its inputs and outputs, in a fresh process.

The kernel keeps the high-water mark of the resident set (VmHWM) and lets a process reset it. The call runs twice:
`cold`, the first time at this shape in the process (a library's caches and compilation are in it), and `steady`.

    python -m rlhf_fast.benchmarks.memory PROVIDER OP SHAPE DTYPE ZERO_ROWS MASKED
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import Case, Shape, parse_shape
from rlhf_fast.benchmarks.inputs import make_inputs
from rlhf_fast.benchmarks.measure import output_bytes

TIMEOUT = 600


class Extra(NamedTuple):
    """Bytes beyond inputs and outputs: of the first call, and of a later one."""

    cold: int
    steady: int


class Unmeasured(Exception):
    """Memory cannot be measured here, or the process that should do it failed."""


def extra_bytes(fn: Callable[[], dict[str, Tensor]]) -> int:
    """Peak resident memory during one call, less what was there before and less its outputs. Linux only."""
    before = reset_peak()
    out = fn()
    return peak_bytes() - before - output_bytes(out)


def reset_peak() -> int:
    """Hand freed memory back and set the high-water mark to what is resident: these bytes."""
    gc.collect()
    _trim()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM := VmRSS
    except OSError as error:
        raise Unmeasured(f"the high-water mark of memory cannot be reset here: {error}") from error
    return _status("VmRSS")


def peak_bytes() -> int:
    """The high-water mark since `reset_peak`."""
    return _status("VmHWM")


def watch(device: str) -> int | None:
    """What is in use now, as the peak is reset; None where it cannot be read."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        return reset_peak()
    except Unmeasured:
        return None


def peak_above(before: int | None, device: str) -> int | None:
    """The peak since `watch`, beyond what it returned."""
    if before is None:
        return None
    return (torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()) - before


def in_fresh_process(provider: str, case: Case) -> Extra:
    """`extra_bytes` of a provider, measured by a process of its own."""
    shares = [str(case.zero_rows), str(case.masked)]
    command = [sys.executable, "-m", __name__, provider, case.op, json.dumps(case.shape), case.dtype, *shares]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unmeasured(f"not done after {TIMEOUT} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise Unmeasured((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Extra(**json.loads(lines[-1]))


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise Unmeasured(f"/proc/self/status has no {field}")


def _trim() -> None:
    """Hand freed heap back, so that the call cannot hide in it."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def main(arguments: list[str]) -> None:
    """Measure one provider on one case and print JSON."""
    from rlhf_fast.benchmarks.providers import PROVIDERS, build

    provider, op, shape, dtype, zero_rows, masked = arguments
    tiny = Case(op, parse_shape("tiny", op), dtype)
    for _ in range(2):  # threads, lazy imports and the libraries' own first-call memory
        build(PROVIDERS[provider], tiny, make_inputs(tiny))()
    case = Case(op, Shape(*json.loads(shape)), dtype, float(zero_rows), "cpu", float(masked))
    step = build(PROVIDERS[provider], case, make_inputs(case))
    print(json.dumps(Extra(extra_bytes(step), extra_bytes(step))._asdict()))


if __name__ == "__main__":
    main(sys.argv[1:])

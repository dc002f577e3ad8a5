"""Time, limits and memory: providers in turn, medians, and what the machine could do at best in the same minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import OPS, Case, Inputs

SAMPLE_SECONDS = 0.01
"""A sample repeats the call until it lasts about this long: small cases must not measure the clock."""

LIMIT_ROWS_BYTES = 2 << 30
CLOSE = 2.0


class Timing(NamedTuple):
    """Seconds of one call: the median over rounds, the fastest round, all rounds."""

    median: float
    best: float
    rounds: list[float]


def synchronize(device: str) -> None:
    """Wait for the device: its work is asynchronous."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(fn: Callable[[], object], device: str, repeat: int = 1) -> float:
    """Seconds of one call, averaged over `repeat`."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            fn()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeat
    begin = time.perf_counter()
    for _ in range(repeat):
        fn()
    return (time.perf_counter() - begin) / repeat


def interleaved(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timing]:
    """Every call once per round, in an order that rotates: a slow minute hits all of them alike.

    A call that is not timed precedes each sample: without it a provider pays for what its neighbour left in the caches,
    and on a virtual machine for fresh memory that went back to the host meanwhile (150 ms for a tile of 131 MB).
    """
    repeat = {}
    for name, fn in calls.items():  # the callers have warmed up
        synchronize(device)
        repeat[name] = max(1, min(1000, int(SAMPLE_SECONDS / max(once(fn, device), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            calls[name]()
            synchronize(device)
            samples[name].append(once(calls[name], device, repeat[name]))
    return {name: Timing(median(s), min(s), s) for name, s in samples.items()}


def race(calls: dict[str, Callable[[], object]], device: str, rounds: int, always: str) -> dict[str, Timing]:
    """`interleaved`, and then three times the rounds among those within CLOSE of the fastest, and `always`.

    Rounds without the slow ones are short, so that a busy machine is as busy for all; only they count for the close.
    """
    timings = interleaved(calls, device, rounds)
    if rounds == 1:
        return timings
    others = [t.median for name, t in timings.items() if name != always] or [timings[always].median]
    close = [name for name, t in timings.items() if name == always or t.median <= CLOSE * min(others)]
    return timings | interleaved({name: calls[name] for name in close}, device, 3 * rounds)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


# ---- limits -----------------------------------------------------------------------------------------------


def flops(case: Case) -> int:
    """Of the products that the op cannot do without."""
    return OPS[case.op].products * 2 * case.shape.n * case.shape.d * case.shape.v


def traffic(case: Case, itemsize: int) -> int:
    """Bytes over the logits that the op cannot do without."""
    return OPS[case.op].passes * case.shape.n * case.shape.v * itemsize


def limit(case: Case, x: Inputs) -> Callable[[], object]:
    """The floor as a call: the bare products at this shape, or a copy of the logits.

    A copy reads and writes; the time of `traffic` bytes follows from it by `limit_share`.
    """
    if OPS[case.op].passes:
        out = torch.empty_like(x.logits)
        return lambda: out.copy_(x.logits.detach())
    return _products(x.hidden.detach(), x.weight.detach(), OPS[case.op].products)


def limit_share(case: Case) -> float:
    """The floor in units of the `limit` call."""
    return OPS[case.op].passes / 2 if OPS[case.op].passes else 1.0


def _products(hidden: Tensor, weight: Tensor, products: int) -> Callable[[], None]:
    """logits, dhidden, dweight as plain products into buffers that exist; in row blocks where the logits are large."""
    n, rows = hidden.shape[0], max(1, LIMIT_ROWS_BYTES // (weight.shape[0] * hidden.element_size()))
    rows = min(n, rows)
    z = torch.randn((rows, weight.shape[0]), device=hidden.device).to(hidden.dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, n, rows):
            h = hidden[start : start + rows]
            tile = z[: h.shape[0]]
            torch.mm(h, weight.t(), out=tile)
            if products == 3:
                torch.mm(tile, weight, out=dhidden[start : start + rows])
                torch.mm(tile.t(), h, out=dweight)

    return run


# ---- memory on a GPU (on the CPU: `memory`, in a fresh process) ---------------------------------------------


def cuda_extra_bytes(fn: Callable[[], dict[str, Tensor]]) -> int:
    """Peak device memory of one call beyond its inputs and its outputs."""
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fn()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - output_bytes(out)


def output_bytes(out: dict[str, Tensor]) -> int:
    """Bytes of the results themselves: every provider has to make them."""
    return sum(t.untyped_storage().nbytes() for t in out.values())

"""Time, limits and memory: providers in turn, medians, and what the machine could do at best in the same minutes."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks.cases import DTYPES, OPS, Case, on_tokens
from rlhf_fast.benchmarks.inputs import IGNORE, Inputs
from rlhf_fast.benchmarks.token_inputs import TokenInputs

SAMPLE_SECONDS = 0.01
"""A sample repeats the call until it lasts about this long: small cases must not measure the clock."""

QUEUED = 32
"""Calls of a sample on a GPU, at most: what they launch must fit in the queue (1024 kernels)."""

CYCLES = 2e9
"""Of a GPU, per second: a head start need not be exact."""

LIMIT_ROWS_BYTES = 2 << 30
CLOSE = 2.0
SLOW = 4.0
"""A dtype whose products take longer than this many of fp32's is not timed for peers on the CPU."""


class Timing(NamedTuple):
    """Seconds of one call: the median over rounds, the fastest round, all rounds."""

    median: float
    best: float
    rounds: list[float]


def synchronize(device: str) -> None:
    """Wait for the device: its work is asynchronous."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(fn: Callable[[], object], device: str, repeat: int = 1, ahead: float = 0.0) -> float:
    """Seconds of one call, averaged over `repeat`.

    On a GPU the host is let `ahead` by so many seconds: calls that do not wait for the device are then queued when it
    begins, as in a training step, and its time is measured rather than Python's.
    """
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES))
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


def interleaved(
    calls: dict[str, Callable[[], object]], device: str, rounds: int, budget: float = math.inf
) -> dict[str, Timing]:
    """Every call once per round, in an order that rotates: a slow minute hits all of them alike.

    A call that is not timed precedes each sample: without it a provider pays for what its neighbour left in the caches,
    and on a virtual machine for fresh memory that went back to the host meanwhile (150 ms for a tile of 131 MB).
    A call whose `rounds` would take more than `budget` seconds gets fewer; one that takes so long by itself, one. With
    0 rounds each is called once.
    """
    repeat, ahead, turns, samples = {}, {}, {}, {}
    for name, fn in calls.items():  # the callers have warmed up
        synchronize(device)
        first = once(fn, device)
        repeat[name] = max(1, min(QUEUED if device == "cuda" else 1000, int(SAMPLE_SECONDS / max(first, 1e-7))))
        ahead[name] = 1.5 * first * repeat[name] if repeat[name] > 1 else 0.0
        turns[name] = int(min(rounds, budget / max(first * (1 + repeat[name]), 1e-7)))
        again = repeat[name] > 1 and not turns[name]
        samples[name] = [] if turns[name] else [once(fn, device, repeat[name], ahead[name]) if again else first]
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i < turns[name]:
                calls[name]()
                synchronize(device)
                samples[name].append(once(calls[name], device, repeat[name], ahead[name]))
    return {name: Timing(median(s), min(s), s) for name, s in samples.items()}


def race(
    calls: dict[str, Callable[[], object]], device: str, rounds: int, always: str, budget: float = math.inf
) -> dict[str, Timing]:
    """A call of each, then `rounds` of `interleaved` among those within CLOSE of the fastest, and `always`.

    Rounds without the slow ones are short, so that a busy machine is as busy for all; only they count for the close.
    """
    timings = interleaved(calls, device, 0)
    others = [t.median for name, t in timings.items() if name != always] or [timings[always].median]
    close = [name for name, t in timings.items() if name == always or t.median <= CLOSE * min(others)]
    return timings | interleaved({name: calls[name] for name in close}, device, rounds, budget)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


# ---- limits -----------------------------------------------------------------------------------------------


def flops(case: Case) -> int:
    """Of the products that the op cannot do without: those of the rows that count."""
    return round(OPS[case.op].products * 2 * case.shape.n * (1 - case.masked) * case.shape.d * case.shape.v)


def traffic(case: Case, itemsize: int) -> int:
    """Bytes over the logits, or of the token vectors, that the op cannot do without."""
    op = OPS[case.op]
    return case.shape.n // op.grain * op.bytes if op.bytes else op.passes * case.shape.n * case.shape.v * itemsize


def limit(case: Case, x: Inputs | TokenInputs) -> Callable[[], object]:
    """The floor as a call: the bare products at this shape, or a copy of the logits or of as many bytes.

    A copy reads and writes; the time of `traffic` bytes follows from it by `limit_share`.
    """
    if isinstance(x, TokenInputs):
        source = torch.zeros(max(1, traffic(case, 4) // 8), device=case.device)  # 4 bytes read, 4 written
        out = torch.empty_like(source)
        return lambda: out.copy_(source)
    if OPS[case.op].passes:
        out = torch.empty_like(x.logits)
        return lambda: out.copy_(x.logits.detach())
    hidden, weight = x.hidden.detach(), x.weight.detach()
    if case.masked:
        hidden = hidden[x.target != IGNORE]
    if slow_dtype(case):
        hidden, weight = hidden.float(), weight.float()
    return _products(hidden, weight, OPS[case.op].products)


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
            if products == 4:  # the reference's
                torch.mm(h, weight.t(), out=tile)
            if products >= 3:
                torch.mm(tile, weight, out=dhidden[start : start + rows])
                torch.mm(tile.t(), h, out=dweight)

    return run


# ---- processors without units for a dtype ---------------------------------------------------------------------


def slow_dtype(case: Case) -> float:
    """How many times longer a product takes in this dtype than in fp32, where that is more than SLOW; otherwise 0."""
    if case.device != "cpu" or case.dtype == "fp32" or on_tokens(case.op):
        return 0.0
    ratio = _against_fp32(DTYPES[case.dtype])
    return ratio if ratio > SLOW else 0.0


@functools.cache
def _against_fp32(dtype: torch.dtype) -> float:
    seconds = []
    for kind in (torch.float32, dtype):
        a, b = torch.ones((64, 512), dtype=kind), torch.ones((2048, 512), dtype=kind)
        call = lambda a=a, b=b: a @ b.t()  # noqa: E731
        call()
        seconds.append(min(once(call, "cpu") for _ in range(3)))
    return seconds[1] / seconds[0]


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

"""The run: for each case inputs, answer, limit; each provider checked, then all timed in turn, then memory."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rlhf_fast.benchmarks.cases import DTYPES, OPS, Case, errors, label, within_budget, wrong
from rlhf_fast.benchmarks.inputs import Inputs, answer, make_inputs
from rlhf_fast.benchmarks.measure import (
    Timing,
    cuda_extra_bytes,
    flops,
    limit,
    limit_share,
    race,
    slow_dtype,
    synchronize,
    traffic,
)
from rlhf_fast.benchmarks.memory import Unmeasured, extra_bytes, in_fresh_process
from rlhf_fast.benchmarks.providers import NAIVE, OURS, PROVIDERS, Provider, Step, Unavailable, build

LIMIT = "limit"
PATIENCE = 2.0
"""A first call that takes longer than these seconds is followed by no warm-up but the race's own first call."""


@dataclass
class Row:
    """One provider on one case. `status`: ok; loose (less exact than naive torch); skipped, wrong or failed (`reason`).

    Times in ms; `ratio` to ours, `x_limit` to the machine's floor for this case; memory in MB (1e6 bytes).
    """

    op: str
    shape: str
    n: int
    d: int
    v: int
    dtype: str
    zero_rows: float
    device: str
    provider: str
    status: str = "ok"
    reason: str = ""
    ms: float | None = None
    ms_best: float | None = None
    ms_rounds: list[float] = field(default_factory=list)
    ratio: float | None = None
    x_limit: float | None = None
    rate: float | None = None
    rate_unit: str = ""
    extra_mb: float | None = None
    extra_mb_cold: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    masked: float = 0.0
    length: int = 64

    @property
    def case(self) -> str:
        """What was measured, in words."""
        return label(self.op, self.n, self.d, self.v, self.length, self.dtype, self.zero_rows, self.masked)

    @property
    def key(self) -> tuple:
        """What makes rows of two runs comparable."""
        return (self.case, self.provider)

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """How a run is done.

    `budget`: seconds that a provider may take for its rounds of a case; the slow get fewer, the slowest one call.
    `seconds`: of a case, after which no further provider is begun, and one that is not ready is given up.
    `memory` False leaves the column empty; `fresh` takes a process a provider on the CPU, for the first call's too.
    """

    providers: tuple[str, ...] = tuple(PROVIDERS)
    rounds: int = 5
    warmup: int = 2
    memory: bool = True
    fresh: bool = False
    budget: float = 10.0
    seconds: float = math.inf
    seed: int = 0


Notify = Callable[[str], None]


def run_case(case: Case, options: Options, notify: Notify = lambda text: None) -> list[Row]:
    """All rows of one case, the limit first."""
    notify(f"{case.label}: inputs and fp64 answer")
    end = time.perf_counter() + options.seconds
    x = make_inputs(case, options.seed)
    truth = answer(case, x)
    naive = _naive_error(case, x, truth)
    rows, steps = [], {}
    for name in options.providers:
        provider = PROVIDERS[name]
        if case.op not in provider.ops:
            continue
        notify(f"{case.label}: {name}, checked")
        row = _row(case, name)
        rows.append(row)
        if time.perf_counter() > end:
            row.status, row.reason = "skipped", f"not begun within {options.seconds:.0f} s"
            continue
        with _until(end, f"not ready within {options.seconds:.0f} s"):
            step = _checked(provider, case, x, truth, naive, row, options.warmup)
        if step is not None:
            steps[name] = step
    notify(f"{case.label}: {len(steps)} providers timed, up to {options.rounds} rounds")
    calls = {LIMIT: limit(case, x), **steps}
    calls[LIMIT]()
    timings = _race(calls, case, options, rows)
    floor = timings.pop(LIMIT)
    share = limit_share(case)
    floor = Timing(floor.median * share, floor.best * share, [s * share for s in floor.rounds])
    rows.insert(0, _timed(_row(case, LIMIT), case, floor, floor, timings.get(OURS)))
    if slow_dtype(case):
        rows[0].reason = "products in fp32, which are faster here"
    for row in rows[1:]:
        if row.provider in timings:
            _timed(row, case, timings[row.provider], floor, timings.get(OURS))
    if options.memory:
        _memory(rows, steps, case, options.fresh, notify)
    return rows


@contextmanager
def _until(end: float, reason: str) -> Iterator[None]:
    """Raise Unavailable inside once the clock has passed `end`: a compilation must not cost the others their rows.
    Nothing where Python has no alarm for it: off the main thread, on Windows."""
    alarm = getattr(signal, "setitimer", None)
    if alarm is None or math.isinf(end) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Unavailable(reason)

    before = signal.signal(signal.SIGALRM, stop)
    alarm(signal.ITIMER_REAL, max(end - time.perf_counter(), 1e-3))
    try:
        yield
    finally:
        alarm(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _race(calls: dict[str, Step], case: Case, options: Options, rows: list[Row]) -> dict[str, Timing]:
    """Timings. Whoever fails only now, of memory that the others hold, say, leaves the race and a row that says so."""
    row_of = {row.provider: row for row in rows}

    def watched(name: str, step: Step) -> Step:
        def call() -> dict[str, torch.Tensor]:
            try:
                return step()
            except Exception as error:
                row_of[name].status, row_of[name].reason = "failed", _brief(error)
                raise

        return call

    while True:
        running = {name: step for name, step in calls.items() if name == LIMIT or row_of[name].status != "failed"}
        try:
            racing = {name: step if name == LIMIT else watched(name, step) for name, step in running.items()}
            return race(racing, case.device, options.rounds, LIMIT, options.budget)
        except Exception:
            if all(row_of[name].status != "failed" for name in running if name != LIMIT):
                raise


def run(cases: Iterable[Case], options: Options, notify: Notify = lambda text: None) -> list[Row]:
    """Every case; one that breaks leaves a row that says so, and the run goes on."""
    rows = []
    for case in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows += run_case(case, options, notify)
        except Exception as error:  # out of memory, a missing driver: the other cases still count
            row = _row(case, "all")
            row.status, row.reason = "failed", _brief(error)
            rows.append(row)
        gc.collect()
        torch.compiler.reset()  # or a long run exceeds the limit of recompilations
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _row(case: Case, provider: str) -> Row:
    shape = case.shape
    row = Row(case.op, shape.name, *shape[1:4], case.dtype, case.zero_rows, case.device, provider)
    row.masked, row.length = case.masked, shape.length
    return row


def _naive_error(case: Case, x: Inputs, truth: dict) -> dict[str, float]:
    if slow_dtype(case):
        return dict.fromkeys(truth, float("inf"))
    try:
        return errors(build(PROVIDERS[NAIVE], case, x)(), truth)
    except (RuntimeError, MemoryError):  # the naive expression does not fit: the hard limits still hold
        return dict.fromkeys(truth, float("inf"))


def _checked(
    provider: Provider, case: Case, x: Inputs, truth: dict, naive: dict[str, float], row: Row, warmup: int
) -> Step | None:
    """The provider's call, warmed up, if its results are right; otherwise None and the reason in the row."""
    try:
        if (times := slow_dtype(case)) and not provider.name.startswith(OURS):
            raise Unavailable(f"no {case.dtype} units: a product takes {times:.0f} times as long as in fp32")
        step = build(provider, case, x)
        start = time.perf_counter()
        row.error = errors(step(), truth)
        reason = wrong(case, row.error)
        if reason:
            row.status, row.reason = "wrong", reason
            return None
        if not within_budget(case, row.error, naive):
            row.status, row.reason = "loose", "less exact than the naive expression"
        for _ in range(warmup - 1):
            if time.perf_counter() - start < PATIENCE:
                step()
        synchronize(case.device)
        return step
    except Unavailable as error:
        row.status, row.reason = "skipped", str(error)
    except Exception as error:  # a peer may fail in any way; its row says how
        row.status, row.reason = "failed", _brief(error)
    return None


def _timed(row: Row, case: Case, timing: Timing, floor: Timing, ours: Timing | None) -> Row:
    row.ms, row.ms_best = timing.median * 1e3, timing.best * 1e3
    row.ms_rounds = [seconds * 1e3 for seconds in timing.rounds]
    row.x_limit = timing.median / floor.median
    row.ratio = timing.median / ours.median if ours else None
    if OPS[case.op].products:
        row.rate, row.rate_unit = flops(case) / timing.median / 1e12, "TFLOP/s"
    else:
        row.rate, row.rate_unit = traffic(case, DTYPES[case.dtype].itemsize) / timing.median / 1e9, "GB/s"
    return row


def _memory(rows: list[Row], steps: dict[str, Step], case: Case, fresh: bool, notify: Notify) -> None:
    for row in rows:
        if row.provider not in steps or row.status == "failed":
            continue
        notify(f"{case.label}: {row.provider}, memory")
        try:
            if case.device == "cuda":
                row.extra_mb = cuda_extra_bytes(steps[row.provider]) / 1e6
            elif not fresh:
                row.extra_mb = extra_bytes(steps[row.provider]) / 1e6
            else:
                extra = in_fresh_process(row.provider, case)
                row.extra_mb, row.extra_mb_cold = extra.steady / 1e6, extra.cold / 1e6
        except (Unmeasured, RuntimeError) as error:
            row.reason = row.reason or f"memory: {_brief(error)}"


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"

"""Calling reward functions: coroutines at the same time, a limit on the time of each, errors that name the row."""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

SEARCH = 10.0  # seconds to look for the row that makes a function raise
GRACE = 1.0  # seconds that a coroutine has to notice that its time is up
HELD = 10.0  # seconds that an overdue function may keep the interpreter to itself


class RewardError(ValueError):
    """A reward function raised, took too long, or returned something that is no list of rewards."""


Call = tuple[str, Callable[..., Any], Mapping[str, Sequence[Any]]]
"""(name, function, keywords): each keyword holds one entry for each completion."""


def call_all(calls: Sequence[Call], rows: int, timeout: float | None = None) -> list[Any]:
    """What each function returned. Coroutine functions run together, the others one after the other meanwhile.

    Raises: RewardError naming the function, and the first row that fails alone where one does.
    """
    together = [i for i, (_, function, _) in enumerate(calls) if is_coroutine(function)]
    results: dict[int, Any] = {}
    pending = None
    if together:
        waits = None if timeout is None else timeout + GRACE
        pending = _Thread(lambda: asyncio.run(_gather([calls[i] for i in together], timeout)), waits)
    for i, (name, function, kwargs) in enumerate(calls):
        if i in together:
            continue
        try:
            results[i] = _call(function, kwargs, timeout)
        except (Exception, SystemExit) as error:  # a function that exits would end the run as if it were done
            raise _error(name, function, kwargs, rows, timeout, error) from error
    if pending is not None:
        names = ", ".join(repr(calls[i][0]) for i in together)
        try:
            results |= zip(together, pending.result(), strict=True)
        except TimeoutError:
            raise RewardError(f"of the reward functions {names} one blocks the others for {timeout} seconds") from None
        except SystemExit as error:
            raise RewardError(f"of the reward functions {names} one raised SystemExit: {error}") from error
    for i, result in results.items():
        if isinstance(result, Exception):
            name, function, kwargs = calls[i]
            raise _error(name, function, kwargs, rows, timeout, result) from result
    return [results[i] for i in range(len(calls))]


def is_coroutine(function: Callable[..., Any]) -> bool:
    """Whether a call gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _gather(calls: Sequence[Call], timeout: float | None) -> list[Any]:
    """Results and exceptions."""
    waits = [asyncio.wait_for(function(**kwargs), timeout) for _, function, kwargs in calls]
    return await asyncio.gather(*waits, return_exceptions=True)


def _call(function: Callable[..., Any], kwargs: Mapping[str, Any], timeout: float | None) -> Any:
    if is_coroutine(function):  # in a thread: the caller may be in an event loop of its own, as notebooks are
        return _Thread(lambda: asyncio.run(asyncio.wait_for(function(**kwargs), timeout)), timeout).result()
    return function(**kwargs) if timeout is None else _Thread(lambda: function(**kwargs), timeout).result()


class _Thread:
    """A function on a thread that does not keep the process alive when it hangs.

    A regular expression that backtracks without end holds Python's lock: no thread, signal or timeout in Python is
    served any more. faulthandler's watch needs no lock: it ends the process, every thread's stack on stderr.
    """

    def __init__(self, function: Callable[[], Any], timeout: float | None = None):
        self.value: Any = None
        self.error: BaseException | None = None
        self.timeout = None if timeout is None else max(timeout, 0.0)

        def run() -> None:
            try:
                self.value = function()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        _threads.add(self.thread)
        self._watch()  # the function may never let go
        self.thread.start()

    def _watch(self) -> None:
        if self.timeout is not None and sys.__stderr__ is not None:
            with suppress(OSError, ValueError):  # stderr is no file
                faulthandler.dump_traceback_later(self.timeout + HELD, exit=True, file=sys.__stderr__)

    def result(self) -> Any:
        """What the function returned or raised; TimeoutError once `timeout` seconds have passed here."""
        self._watch()  # others may have been watched since
        try:
            self.thread.join(self.timeout)
        finally:
            if self.timeout is not None:
                faulthandler.cancel_dump_traceback_later()
        if self.thread.is_alive():
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self.value


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def any_left_behind() -> bool:
    """Whether a function that took too long still runs.

    The interpreter's shutdown may wait for it without end, for the executors and threads that it has started.
    """
    return any(thread.is_alive() for thread in _threads)


def _error(
    name: str, function: Callable[..., Any], kwargs: Mapping[str, Any], rows: int, timeout: float | None, error: Any
) -> RewardError:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return RewardError(
            f"reward function {name!r} took longer than reward_timeout={timeout} seconds for {rows} rows"
        )
    row = _guilty_row(function, kwargs, rows, timeout)
    where = "on the batch"
    if row is not None:
        where = f"in row {row} ({kwargs.get('completions', [None] * rows)[row]!r:.80})"
    return RewardError(f"reward function {name!r} raised {type(error).__name__} {where}: {error}")


def _guilty_row(
    function: Callable[..., Any], kwargs: Mapping[str, Any], rows: int, timeout: float | None
) -> int | None:
    """The first row that raises alone, so that the message can name it; None when that is not found soon."""
    end = time.monotonic() + SEARCH
    for row in range(rows):
        left = end - time.monotonic()
        try:
            alone = {key: value[row : row + 1] for key, value in kwargs.items()}
            _call(function, alone, left if timeout is None else min(left, timeout))
        except (TimeoutError, asyncio.TimeoutError):  # noqa: PERF203
            return None
        except (Exception, SystemExit):
            return row
    return None

"""Ctrl-C, SIGTERM and a terminal that is gone (SIGHUP): the step is finished, a checkpoint saved, and the process ends
with the signal's exit code."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP]))
ONE = 1.0  # seconds: within them a signal is the same one, passed on by a launcher and by the terminal


class Stopped(SystemExit):
    """A signal ended the run; `code` is 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(128 + signum)
        self.signum, self.text = signum, text

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.text}"


class StopSignals:
    """Inside the `with` block the first signal is only noted; a second one ends the process at once.

    The handlers that were there before are back afterwards, that is after the outermost of several blocks inside one
    another. Outside of the main thread nothing is changed, and a SIGHUP that is ignored (nohup) stays so.
    """

    def __init__(self) -> None:
        self.signum, self._since, self._before, self._depth = 0, 0.0, {}, 0
        self._terminals: list[int] = []  # one that is gone no longer says that it is one

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth > 1:
            return self
        self.signum, self._terminals = 0, [d for d in (1, 2) if os.isatty(d)]
        if threading.current_thread() is threading.main_thread():
            ignored = {HANGUP} if HANGUP and signal.getsignal(HANGUP) is signal.SIG_IGN else set()
            self._before = {s: signal.signal(s, self._noted) for s in SIGNALS if s not in ignored}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        if kind is None and self.signum:  # too late to stop anything, but not unsaid
            raise Stopped(self.signum, ", after the run had ended")

    def _noted(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == HANGUP:
            _leave(self._terminals)
        if not self.signum:
            self.signum, self._since = signum, now
            _say(f"{signal.Signals(signum).name}: this step is finished and saved; once more to exit at once")
        elif now - self._since > ONE:
            _say(f"{signal.Signals(signum).name} again: exit without saving")
            os._exit(128 + signum)

    def agreed(self, accelerator: Any) -> int:
        """The signal that any process has seen, 0 for none; all processes call it and get the same."""
        if accelerator.num_processes == 1:
            return self.signum
        seen = torch.tensor([self.signum], device=accelerator.device)
        self.signum = int(accelerator.gather(seen).max())
        return self.signum


def _leave(terminals: list[int]) -> None:
    """Write nowhere from now on: to a terminal that is gone it would be an error, before the step is saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())

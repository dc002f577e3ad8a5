"""Ctrl-C and SIGTERM end a run after the step, saved once, with an exit code that says so; `kill -9` loses no more."""

from __future__ import annotations

import importlib
import os
import random
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import resume_cases as cases
from transformers import TrainerCallback

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers.config import STAGES, make_config
from rlhf_fast.trainers.run_log import read_log
from rlhf_fast.trainers.signals import ONE, Stopped, StopSignals


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step, and counts the saves."""

    def __init__(self, step, signum):
        self.step, self.signum, self.saved = step, signum, []

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)

    def on_save(self, args, state, control, **_):
        self.saved.append(state.global_step)


def run_with(values, *callbacks):
    """The stage's run with callbacks."""
    config = make_config(values)
    module, _, name = STAGES[config.stage].run.partition(":")
    return getattr(importlib.import_module(module), name)(config, callbacks=callbacks)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize(
    ("case", "signum"),
    [("sft", signal.SIGINT), ("dpo", signal.SIGTERM), ("ppo", signal.SIGTERM), ("grpo", signal.SIGINT)],
)
def test_a_signal_ends_the_run_saved_and_the_rest_is_as_if_it_had_not(tmp_path, case, signum):
    folder = cases.prepare(tmp_path, cases.CASES[case]["stage"])
    want = cases.train(folder, "whole", case, max_steps=5, save_steps=0)
    values = cases.options(folder, "parts", case, max_steps=5, save_steps=0)
    before = [signal.getsignal(s) for s in CODES]
    at = SignalAt(3, signum)
    with pytest.raises(Stopped, match=f"stopped by {signum.name} after step 3, which is saved") as stopped:
        run_with(values, at)
    assert stopped.value.code == CODES[signum]
    assert [signal.getsignal(s) for s in CODES] == before
    assert at.saved == [3]
    assert [p.name for p in (folder / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (folder / "parts" / "summary.json").exists()
    summary = run_with(values | dict(resume_from_checkpoint="latest"))
    cases.assert_same(folder, "parts", summary, want)


def test_handlers_notice_once_and_are_put_back(capfd):
    alone = SimpleNamespace(num_processes=1)
    before = [signal.getsignal(s) for s in CODES]

    def finish():
        with StopSignals() as signals:
            assert signals.agreed(alone) == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # within a second: the same, from terminal and launcher
            assert signals.agreed(alone) == signal.SIGTERM

    with pytest.raises(Stopped, match="SIGTERM, after the run had ended"):
        finish()
    assert [signal.getsignal(s) for s in CODES] == before
    assert "this step is finished and saved" in capfd.readouterr().err


def start(folder, case, name="parts", **changes):
    values = cases.options(folder, name, case, **changes)
    return subprocess.Popen(
        cases.command(folder, values), env=cases.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_rows(process, folder, count):
    """Until the log has so many rows."""
    end = time.monotonic() + 120
    while len(read_log(folder)) < count:
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        assert time.monotonic() < end, "no step was made in two minutes"
        time.sleep(0.02)


def test_the_command_ends_with_143_and_a_second_signal_ends_it_at_once(tmp_path):
    folder = cases.prepare(tmp_path, "grpo")
    process = start(folder, "grpo", max_steps=100000, save_steps=0, logging_steps=1)
    wait_for_rows(process, folder / "parts", 2)
    process.terminate()
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 143, output[-3000:]
    assert "SIGTERM: this step is finished and saved" in output
    assert files.flaw(files.newest(folder / "parts")) is None
    slow = dict(reward_funcs=["resume_cases:slow_reward"], max_steps=100000, save_steps=0, logging_steps=1)
    process = start(folder, "grpo", "slow", **slow)
    wait_for_rows(process, folder / "slow", 4)  # all updates of the first rollout
    time.sleep(0.5)  # it is in the second one's reward now
    process.send_signal(signal.SIGINT)
    time.sleep(1.5 * ONE)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0].decode()
    assert time.monotonic() - began < 10
    assert process.returncode == 130, output[-3000:]
    assert "SIGINT again: exit without saving" in output
    assert not list((folder / "slow").glob("checkpoint-*"))


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
def test_a_terminal_that_is_gone_ends_the_command_saved_but_not_under_nohup(tmp_path):
    import pty

    folder = cases.prepare(tmp_path, "sft")
    values = cases.options(folder, "parts", "sft", max_steps=100000, save_steps=0, logging_steps=1)
    command = cases.command(folder, values | dict(disable_tqdm=False))
    child, terminal = pty.fork()
    if child == 0:
        os.execve(command[0], command, cases.environment())
    process = SimpleNamespace(poll=lambda: None if os.waitpid(child, os.WNOHANG)[0] == 0 else 1)
    reader = threading.Thread(target=drain, args=(terminal, stop := threading.Event()))
    reader.start()
    wait_for_rows(process, folder / "parts", 2)
    stop.set()
    reader.join()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    saved = files.newest(folder / "parts")
    assert files.flaw(saved) is None
    assert files.step_of(saved) >= 2
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def drain(terminal: int, stop: threading.Event) -> None:
    """Read what a child writes, which waits once the terminal is full."""
    while not stop.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)


def kill_and_resume(tmp_path: Path, case: str, kills: int, seed: int, steps: int) -> list[int]:
    """Kill a run again and again at random moments, half of them in mid-save; finish it; the steps resumed from.

    The result has to be that of an unbroken run, bit for bit.
    """
    chance = random.Random(seed)
    folder = cases.prepare(tmp_path, cases.CASES[case]["stage"])
    sizes = dict(max_steps=steps, save_steps=1, save_total_limit=2, logging_steps=1)
    with cases.one_thread():
        want = cases.train(folder, "whole", case, **sizes | dict(save_steps=0))
    resumed = []
    for k in range(kills):
        found = files.last_checkpoint(folder / "parts")
        resumed.append(files.step_of(found) if found is not None else 0)
        process = start(folder, case, overwrite_output_dir=False, **sizes)
        wait_for_rows(process, folder / "parts", resumed[-1] + chance.randint(1, 3))
        end = time.monotonic() + 20
        while k % 2 and not list((folder / "parts").glob(".checkpoint-*.part")) and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(chance.random() * (0.004 if k % 2 else 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    parts = folder / "parts"
    resumed.append(files.step_of(files.last_checkpoint(parts)))
    with cases.one_thread():
        summary = cases.train(folder, "parts", case, overwrite_output_dir=False, **sizes)
    cases.assert_same(folder, "parts", summary, want)
    return resumed


@pytest.mark.filterwarnings("error:.*is skipped:UserWarning")
def test_killed_at_random_moments_a_run_goes_on_from_a_complete_checkpoint(tmp_path):
    resumed = kill_and_resume(tmp_path, "grpo", 3, seed=0, steps=40)
    assert resumed == sorted(resumed)
    assert resumed[-1] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grpo", "dpo", "sft"])
def test_killed_twenty_times(tmp_path, case):
    resumed = kill_and_resume(tmp_path, case, 20, seed=1, steps=200)
    print("resumed from steps", resumed)
    assert resumed == sorted(resumed)

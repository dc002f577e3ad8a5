"""N steps = k steps, a checkpoint, N - k more: bit for bit, for every stage; what cannot be resumed says why."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import resume_cases as cases
from test_loop import both, make

from rlhf_fast.trainers.brakes import KLBudget
from rlhf_fast.trainers.gauges import HealthWarnings


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """stage -> (folder, summary) of an unbroken run, made once."""
    made = {}

    def get(case):
        if case not in made:
            folder = cases.prepare(tmp_path_factory.mktemp("runs"), cases.CASES[case]["stage"])
            made[case] = folder, cases.train(folder, "whole", case, save_steps=0)
        return made[case]

    return get


@pytest.mark.parametrize("case", cases.CASES)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(whole, case):
    folder, want = whole(case)
    cases.train(folder, "parts", case)
    cases.break_off(folder / "parts", 6 if "length" in case else 3)  # 6: in the second epoch
    summary = cases.train(folder, "parts", case, resume_from_checkpoint="latest")
    cases.assert_same(folder, "parts", summary, want)


def test_brakes_and_counters_are_taken_back(tmp_path):
    brakes = [HealthWarnings(), KLBudget(0.5)]
    loop, _ = make(tmp_path, callbacks=brakes, save_steps=1)
    loop.start(2, 1.0)
    loop.update([1.0], lambda _: both(loop, loop.models["critic"]) * math.nan)
    brakes[0].ill.add("KL explosion")
    brakes[0].messages.append("step 0: ill")
    loop.end_step({"kl": 0.7})
    assert brakes[1].reason
    again = [HealthWarnings(), KLBudget(0.5)]
    other, _ = make(tmp_path, callbacks=again, resume_from_checkpoint=True)
    other.start(2, 1.0)
    assert (other.broken_steps.skipped, other.broken_steps.in_a_row, other.state.global_step) == (1, 1, 1)
    assert again[0].history.series["kl"] == [(1, 0.7)]
    assert (again[0].ill, again[0].messages) == ({"KL explosion"}, ["step 0: ill"])
    assert again[1].reason == brakes[1].reason

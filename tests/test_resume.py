"""N steps = k steps, a checkpoint, N - k more: bit for bit, for every stage; what cannot be resumed says why."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import resume_cases as cases


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

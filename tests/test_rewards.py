"""Reward functions: what they are given, how they add up, and what their mistakes say."""

import asyncio
import math
import time

import pytest
import torch

from rlhf_fast.trainers import reward_calls
from rlhf_fast.trainers.rewards import RewardError, Rewards, exact_match, load_function
from rlhf_fast.trainers.rollout.turns import load_environment

PROMPTS, COMPLETIONS = ["a>", "a>", "b>"], ["x", "yy", ""]
IDS = [[3, 1], [4, 4, 1], [1]]


def lengths(completions, **kwargs):
    return [float(len(c)) for c in completions]


def test_keywords_and_columns():
    seen = {}

    def fn(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=kwargs)
        return [1, 0.5, True]

    scores = Rewards(fn)(
        PROMPTS,
        COMPLETIONS,
        {"answer": ["p", "p", "q"], "level": [1, 1, 2]},
        completion_ids=IDS,
        finish_reasons=["stop"] * 3,
    )
    assert scores.total.tolist() == [1.0, 0.5, 1.0]
    assert seen["prompts"] == PROMPTS
    assert seen["completions"] == COMPLETIONS
    assert seen["ids"] == IDS
    assert seen["answer"] == ["p", "p", "q"]
    assert seen["rest"] == {"level": [1, 1, 2], "finish_reasons": ["stop"] * 3}


def test_a_function_gets_only_the_keywords_it_names():
    def narrow(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    rewards = Rewards(narrow)
    assert rewards(PROMPTS, COMPLETIONS, {"answer": ["x", "", ""], "other": [0] * 3}).total.tolist() == [1.0, 0.0, 1.0]


def test_weights_and_several_functions():
    rewards = Rewards([lengths, lambda prompts, **_: [1.0] * len(prompts)], [0.5, -2])
    scores = rewards(PROMPTS, COMPLETIONS)
    assert scores.total.tolist() == [0.5 - 2, 1.0 - 2, -2.0]
    assert scores.each.tolist() == [[1.0, 1.0], [2.0, 1.0], [0.0, 1.0]]
    assert rewards.names == ["lengths", "<lambda>"]
    assert Rewards([lengths, lengths]).names == ["lengths", "lengths_2"]


def test_equal_sums_of_different_terms_are_equal():
    terms = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.0, 0.7, -0.1]]
    columns = [lambda completions, values=values: list(values) for values in zip(*terms, strict=True)]
    totals = {tuple(Rewards(columns, [w] * 3)(["p"] * 4, ["c"] * 4).total.tolist()) for w in (1.0, 0.7, 1 / 3)}
    assert all(len(set(total)) == 1 for total in totals), totals


def test_none_leaves_the_row_to_the_others_and_nan_drops_it():
    a = lambda **_: [None, 1.0, None]  # noqa: E731
    b = lambda **_: [2.0, float("nan"), None]  # noqa: E731
    total = Rewards([a, b])(PROMPTS, COMPLETIONS).total.tolist()
    assert total[0] == 2.0
    assert math.isnan(total[1])
    assert math.isnan(total[2])  # no function had anything to say
    assert math.isnan(Rewards(lambda **_: [math.inf, 0, 0])(PROMPTS, COMPLETIONS).total[0])


@pytest.mark.parametrize("kind", [torch.tensor, lambda v: [torch.tensor(x) for x in v], tuple])
def test_tensors_and_tuples_are_numbers(kind):
    assert Rewards(lambda **_: kind([1.0, 2.0, 3.0]))(PROMPTS, COMPLETIONS).total.tolist() == [1.0, 2.0, 3.0]


def test_errors_name_function_and_row():
    def picky(completions, **_):
        return [1 / len(c) for c in completions]

    with pytest.raises(RewardError, match=r"'picky' raised ZeroDivisionError in row 2 \(''\)"):
        Rewards(picky)(PROMPTS, COMPLETIONS)

    def batch_only(completions, **_):
        if len(completions) > 1:
            raise KeyError("k")
        return [0.0]

    with pytest.raises(RewardError, match="'batch_only' raised KeyError on the batch"):
        Rewards(batch_only)(PROMPTS, COMPLETIONS)

    def short(**_):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="'short' must return 3 rewards, got 2; row 2 is the first without one"):
        Rewards(short)(PROMPTS, COMPLETIONS)

    def words(**_):
        return [1.0, "good", 2.0]

    with pytest.raises(RewardError, match=r"'words' must return numbers or None, got 'good' \(str\) in row 1"):
        Rewards(words)(PROMPTS, COMPLETIONS)

    def number(**_):
        return 1.0

    with pytest.raises(RewardError, match="'number' must return a list of 3 numbers, got float"):
        Rewards(number)(PROMPTS, COMPLETIONS)


def test_import_paths():
    assert load_function("rlhf_fast.trainers.rewards:exact_match") is exact_match
    assert load_function("os.path:join")("a", "b") == "a/b"
    with pytest.raises(ValueError, match="no module 'rlhf_fast.nothing'"):
        load_function("rlhf_fast.nothing:fn")
    with pytest.raises(ValueError, match="has no 'nothing'"):
        load_function("rlhf_fast.trainers.rewards:nothing")
    with pytest.raises(ValueError, match="'package.module:function' or a callable, got 'len'"):
        load_function("len")
    with pytest.raises(ValueError, match="is not callable but float"):
        load_function("math:pi")
    with pytest.raises(ValueError, match=r"^environment 'math:nothing': math has no 'nothing'"):
        load_environment("math:nothing")


def test_bad_construction():
    with pytest.raises(ValueError, match="at least one function"):
        Rewards([])
    with pytest.raises(ValueError, match="must hold 1 numbers, one a function, got 2"):
        Rewards([lengths], [1, 2])


def test_exact_match_wants_text_and_end():
    assert exact_match(["12", "12", "21"], ["12"] * 3, ["stop", "length", "stop"]) == [1.0, 0.0, 0.0]


# ---- coroutines and time


def test_coroutines_run_at_the_same_time_and_beside_plain_functions():
    running, most = 0, 0
    both = asyncio.Barrier(2) if hasattr(asyncio, "Barrier") else None  # from Python 3.11 on

    async def slow(completions, **_):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await (both.wait() if both else asyncio.sleep(0.05))  # passes only when both are here
        running -= 1
        return [float(len(c)) for c in completions]

    class Judge:
        async def __call__(self, completions):
            return [10 * x for x in await slow(completions)]

    scores = Rewards([slow, lengths, Judge()], timeout=20)(PROMPTS, COMPLETIONS)
    assert scores.each.tolist() == [[1.0, 1.0, 10.0], [2.0, 2.0, 20.0], [0.0, 0.0, 0.0]]
    assert most == 2


def test_rewards_are_called_from_within_an_event_loop():
    async def score(completions, **_):
        return [1.0] * len(completions)

    async def notebook():
        return Rewards(score)(PROMPTS, COMPLETIONS).total.tolist()

    assert asyncio.run(notebook()) == [1.0] * 3


async def never(completions, **_):
    await asyncio.sleep(60)


async def blocking(completions, **_):
    time.sleep(3)


def hanging(completions, **_):
    time.sleep(3)


@pytest.mark.parametrize("function", [never, blocking, hanging])
def test_a_function_that_hangs_is_an_error_that_names_it(function, monkeypatch):
    monkeypatch.setattr(reward_calls, "GRACE", 0.2)
    start = time.perf_counter()
    with pytest.raises(RewardError, match=rf"'{function.__name__}'.*(reward_timeout=0.3 s for 3 rows|0.3 seconds)"):
        Rewards([lengths, function], timeout=0.3)(PROMPTS, COMPLETIONS)
    assert time.perf_counter() - start < 2.5


def test_a_coroutine_that_raises_names_its_row():
    async def picky(completions, **_):
        return [1 / len(c) for c in completions]

    with pytest.raises(RewardError, match=r"'picky' raised ZeroDivisionError in row 2 \(''\)"):
        Rewards([picky, lengths], timeout=20)(PROMPTS, COMPLETIONS)


def test_the_search_for_the_row_has_an_end(monkeypatch):
    """A batch that fails at once, rows that take their time."""

    def slow_alone(completions, **_):
        if len(completions) == 1:
            time.sleep(5)
        raise KeyError("k")

    monkeypatch.setattr(reward_calls, "SEARCH", 0.3)
    start = time.perf_counter()
    with pytest.raises(RewardError, match="'slow_alone' raised KeyError on the batch"):
        Rewards(slow_alone)(PROMPTS, COMPLETIONS)
    assert time.perf_counter() - start < 4


# ---- process rewards


def test_steps_and_tokens():
    rewards = Rewards(
        [
            lambda completions, **_: [[0.5, 1.0], [(2, 3.0), (0, 1.0)], None],
            lambda completions, **_: [1.0, 2.0, 3.0],
            lambda completion_ids, **_: [torch.ones(len(ids)) for ids in completion_ids],
        ],
        [1.0, 10.0, 0.0],
    )
    scores = rewards(PROMPTS, COMPLETIONS, completion_ids=IDS)
    assert scores.each[:, 0].tolist()[:2] == [0.75, 2.0]
    assert scores.each[2, 0].isnan()
    assert scores.outcome.tolist() == [10.0, 20.0, 30.0]
    assert scores.total.tolist() == [10.75, 22.0, 30.0]
    mine = scores.steps.function == 0
    assert [column[mine].tolist() for column in scores.steps] == [
        [0] * 4, [0, 0, 1, 1], [0, 1, 0, 2], [0.5, 1.0, 1.0, 3.0],
    ]  # fmt: skip
    assert scores.steps.row[scores.steps.function == 2].tolist() == [0, 0, 1, 1, 1, 2]
    assert Rewards(lengths)(PROMPTS, COMPLETIONS).steps is None


def test_an_outcome_that_does_not_apply_leaves_the_steps():
    steps = lambda **_: [[(0, 1.0)], [(0, 2.0)], []]  # noqa: E731
    scores = Rewards([steps, lambda **_: [None, 1.0, None]])(PROMPTS, COMPLETIONS)
    assert scores.outcome.tolist()[:2] == [0.0, 1.0]
    assert scores.total.tolist()[:2] == [1.0, 3.0]
    assert scores.total[2].isnan()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0], [1.0] * 3, [1.0]], "row 0: a list of numbers holds one for each of the 2 tokens, got 1"),
        ([[(2, 1.0)], None, None], "row 0: a step ends at token 2, of 2 tokens"),
        ([[(0, 1.0, 2)], None, None], r"row 0: a step is \(index of its last token, reward\), got \(0, 1.0, 2\)"),
        ([[(0, 1.0)], 3.0, None], "rewards of steps, but a single number in row 1"),
        ([[("a", 1.0)], None, None], "a step is"),
    ],
)
def test_bad_steps_are_named(values, message):
    with pytest.raises(RewardError, match=message):
        Rewards(lambda **_: values)(PROMPTS, COMPLETIONS, completion_ids=IDS)

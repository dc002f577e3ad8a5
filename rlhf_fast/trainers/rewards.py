"""Reward functions: Python callables or import paths, combined by weights.

A function is called with keywords and returns one entry for each completion:

    def fn(prompts, completions, completion_ids, **columns) -> list[float | None | list]

`prompts` and `completions` are strings (for chat prompts: lists of messages), `prompt_ids` and `completion_ids` lists
of token ids, `finish_reasons` is "stop" or "length" for each row, and every other column of the dataset but `prompt`
and `completion` comes as a list under its own name, repeated for each completion of a prompt. A function without
**kwargs gets the keywords that it names. It may be a coroutine function: all of those run at the same time.

None means "does not apply to this row" and leaves the row to the other functions; NaN or infinity drops the row. A list
is a process reward: numbers, one for each token of the completion, or pairs (token, reward), one for each step, where
`token` is the index of the step's last token.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.trainers.config_types import first_line
from rlhf_fast.trainers.reward_calls import RewardError, call_all

RewardFunction = Callable[..., Any]
HANDED_OVER = frozenset(("prompts", "completions", "prompt_ids", "completion_ids", "finish_reasons"))
"""What a function gets beside the data's columns, none of which may have such a name."""
Entry = float | list[tuple[int, float]] | None
"""What a function says about one completion: a reward, the rewards of its steps, or nothing."""


class Steps(NamedTuple):
    """Process rewards, S steps in all."""

    function: Tensor  # (S,) int64: which of the functions gave it
    row: Tensor  # (S,) int64: the completion
    token: Tensor  # (S,) int64: index of the step's last token in it
    value: Tensor  # (S,) fp32


class Scores(NamedTuple):
    total: Tensor  # (B,) fp32: weighted sum; NaN where a row has no usable reward
    each: Tensor  # (B, F) fp32: every function's own, NaN for None; of a process reward the mean over its steps
    outcome: Tensor  # (B,) fp32: `total` without process rewards
    steps: Steps | None = None
    metrics: dict[str, float] | None = None  # what the functions say of these rows together, in their `metrics`


def load_function(spec: str | RewardFunction, what: str = "reward function") -> RewardFunction:
    """A callable as it is, or the one at an import path "package.module:function". `what` is its name in errors."""
    if callable(spec):
        return spec
    module, colon, name = str(spec).partition(":")
    if not colon or not module or not name:
        raise ValueError(f"{what}: expected 'package.module:function' or a callable, got {spec!r}")
    try:
        function = importlib.import_module(module)
    except Exception as error:  # of the module's own code too
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{what} {spec!r}: no module {error.name!r} on Python's path, to which `rlhf-fast train` adds "
                "the working directory and the configuration's folder"
            ) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise ValueError(
            f"{what} {spec!r}: {module} cannot be imported: {type(error).__name__}: {first_line(error)}{where}"
        ) from error
    for part in name.split("."):
        if not hasattr(function, part):
            raise ValueError(f"{what} {spec!r}: {module} has no {name!r}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"{what} {spec!r} is not callable but {type(function).__name__}")
    return function


def exact_match(completions: Sequence[str], answer: Sequence[str], finish_reasons: Sequence[str], **_) -> list[float]:
    """1 where a completion is its row's `answer` and ended by itself, else 0."""
    rows = zip(completions, answer, finish_reasons, strict=True)
    return [float(text == want and reason == "stop") for text, want, reason in rows]


class Rewards:
    """Calls every function on a batch and adds the results up.

    Args:
        functions: one or more callables or import paths.
        weights: one number a function; default 1 each.
        timeout: seconds that a function may take for a batch; None: any number. One that takes longer is an error.
    Example:
        >>> rewards = Rewards(lambda completions, **_: [float(len(c)) for c in completions])
        >>> rewards(["a?", "a?"], ["b", "bc"]).total.tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        functions: str | RewardFunction | Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ):
        specs = [functions] if callable(functions) or isinstance(functions, str) else list(functions)
        if not specs:
            raise ValueError("reward_funcs must hold at least one function, got none")
        self.functions = [load_function(spec) for spec in specs]
        self.names = _distinct([name_of(f) for f in self.functions])
        weights = [1.0] * len(specs) if weights is None else [float(w) for w in weights]
        if len(weights) != len(specs):
            raise ValueError(f"reward_weights must hold {len(specs)} numbers, one a function, got {len(weights)}")
        self.weights, self.timeout = torch.tensor(weights), timeout
        self._accepts = [_accepted(f) for f in self.functions]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        **extra: Sequence[Any],
    ) -> Scores:
        """Scores on the CPU. `extra`: completion_ids, finish_reasons and whatever else the caller has by row."""
        given = {**(columns or {}), **extra, "prompts": list(prompts), "completions": list(completions)}
        calls = [
            (name, function, given if accepted is None else {k: v for k, v in given.items() if k in accepted})
            for name, function, accepted in zip(self.names, self.functions, self._accepts, strict=True)
        ]
        rows = len(completions)
        lengths = [len(ids) for ids in extra["completion_ids"]] if "completion_ids" in extra else None
        columns = [
            _entries(name, values, rows, lengths)
            for name, values in zip(self.names, call_all(calls, rows, self.timeout), strict=True)
        ]
        process = torch.tensor([any(isinstance(e, list) for e in column) for column in columns])
        applies = torch.tensor([[e is not None for e in column] for column in columns]).T
        each = torch.tensor([[_mean(e) for e in column] for column in columns], dtype=torch.float64).T
        # Added up in fp64: in fp32 equal sums of different terms differ, and a group's std would see it.
        weighted = torch.where(applies, each * self.weights, 0.0)
        total, outcome, each = weighted.sum(1).float(), weighted[:, ~process].sum(1).float(), each.float()
        usable = applies.any(1) & total.isfinite()
        steps = _steps(columns) if process.any() else None
        said = {k: float(v) for function in self.functions for k, v in getattr(function, "metrics", {}).items()}
        return Scores(total.where(usable, math.nan), each, outcome.where(usable, math.nan), steps, said)


def finite_mean(values: Tensor) -> float:
    """NaN where there is none."""
    return float(values[values.isfinite()].double().mean())


def _mean(entry: Entry) -> float:
    if entry is None:
        return math.nan
    return sum(value for _, value in entry) / len(entry) if isinstance(entry, list) else entry


def _steps(columns: Sequence[Sequence[Entry]]) -> Steps:
    flat = [
        (i, row, *step)
        for i, column in enumerate(columns)
        for row, entry in enumerate(column)
        if isinstance(entry, list)
        for step in entry
    ]
    return Steps(*map(torch.tensor, zip(*flat, strict=True)))


def name_of(function: RewardFunction) -> str:
    """What metrics and errors call it."""
    return getattr(function, "__name__", type(function).__name__)


def required(function: RewardFunction) -> set[str]:
    """The keywords that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in named if p.default is p.empty}


def _accepted(function: RewardFunction) -> set[str] | None:
    """The keywords that a function takes; None: all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _entries(name: str, values: Any, rows: int, lengths: Sequence[int] | None) -> list[Entry]:
    """The returned values as floats, steps and None; anything else is an error that names the row."""
    values = values.tolist() if isinstance(values, Tensor) or hasattr(values, "tolist") else values
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise RewardError(f"reward function {name!r} must return a list of {rows} numbers, got {type(values).__name__}")
    if len(values) != rows:
        missing = f"; row {len(values)} is the first without one" if len(values) < rows else ""
        raise RewardError(f"reward function {name!r} must return {rows} rewards, got {len(values)}{missing}")
    out: list[Entry] = []
    for row, value in enumerate(values):
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            out.append(_row_steps(name, value, row, None if lengths is None else lengths[row]))
        elif value is None or isinstance(value, numbers.Real):
            out.append(None if value is None else float(value))
        else:
            raise RewardError(
                f"reward function {name!r} must return numbers or None, got {value!r:.60} "
                f"({type(value).__name__}) in row {row}"
            )
    lone = next((row for row, entry in enumerate(out) if isinstance(entry, float)), None)
    if lone is not None and any(isinstance(entry, list) for entry in out):
        raise RewardError(f"reward function {name!r} returned rewards of steps, but a single number in row {lone}")
    return out


def _row_steps(name: str, values: Sequence[Any], row: int, length: int | None) -> list[tuple[int, float]] | None:
    """(token, reward) of each step, in the order of the tokens; None where there is no step."""
    who = f"reward function {name!r}, row {row}:"
    if all(isinstance(v, numbers.Real) for v in values):
        if length is not None and values and len(values) != length:
            raise RewardError(f"{who} a list of numbers holds one for each of the {length} tokens, got {len(values)}")
        steps = [(token, float(v)) for token, v in enumerate(values)]
    else:
        steps = []
        for value in values:
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], int)
            if not (pair and isinstance(value[1], numbers.Real)):
                raise RewardError(f"{who} a step is (index of its last token, reward), got {value!r:.60}")
            if value[0] < 0 or (length is not None and value[0] >= length):
                raise RewardError(f"{who} a step ends at token {value[0]}, of {length} tokens")
            steps.append((value[0], float(value[1])))
    return sorted(steps) or None


def _distinct(names: list[str]) -> list[str]:
    """lambda, lambda -> lambda, lambda_2: metric names must not collide."""
    out: list[str] = []
    for name in names:
        count = sum(n == name or n.startswith(f"{name}_") for n in out)
        out.append(name if name not in out else f"{name}_{count + 1}")
    return out

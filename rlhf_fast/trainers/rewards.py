"""Reward functions: Python callables or import paths, combined by weights.

A function is called with keywords and returns one number for each completion:

    def fn(prompts, completions, completion_ids, **columns) -> list[float | None]

`prompts` and `completions` are strings (for chat prompts: lists of messages), `completion_ids` lists of token ids,
`finish_reasons` is "stop" or "length" for each row, and every other column of the dataset comes as a list under its
own name, repeated for each completion of a prompt. A function without **kwargs gets the keywords that it names.
None means "does not apply to this row" and leaves the row to the other functions; NaN or infinity drops the row.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(ValueError):
    """A reward function raised or returned something that is no list of rewards."""


class Scores(NamedTuple):
    total: Tensor  # (B,) fp32: weighted sum; NaN where a row has no usable reward
    each: Tensor  # (B, F) fp32: every function's own, NaN for None


def load_function(spec: str | RewardFunction) -> RewardFunction:
    """A callable as it is, or the one at an import path "package.module:function"."""
    if callable(spec):
        return spec
    module, colon, name = str(spec).partition(":")
    if not colon or not module or not name:
        raise ValueError(f"a reward function is 'package.module:function' or a callable, got {spec!r}")
    try:
        function = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"reward function {spec!r}: no module {error.name!r}") from None
    for part in name.split("."):
        if not hasattr(function, part):
            raise ValueError(f"reward function {spec!r}: {module} has no {name!r}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"reward function {spec!r} is not callable but {type(function).__name__}")
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
    Example:
        >>> rewards = Rewards(lambda completions, **_: [float(len(c)) for c in completions])
        >>> rewards(["a?", "a?"], ["b", "bc"]).total.tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        functions: str | RewardFunction | Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
    ):
        specs = [functions] if callable(functions) or isinstance(functions, str) else list(functions)
        if not specs:
            raise ValueError("reward_funcs must hold at least one function, got none")
        self.functions = [load_function(spec) for spec in specs]
        self.names = _distinct([getattr(f, "__name__", type(f).__name__) for f in self.functions])
        weights = [1.0] * len(specs) if weights is None else [float(w) for w in weights]
        if len(weights) != len(specs):
            raise ValueError(f"reward_weights must hold {len(specs)} numbers, one a function, got {len(weights)}")
        self.weights = torch.tensor(weights)
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
        each = torch.full((len(completions), len(self.functions)), math.nan)
        applies = torch.zeros_like(each, dtype=torch.bool)
        for i, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            accepted = self._accepts[i]
            kwargs = given if accepted is None else {k: v for k, v in given.items() if k in accepted}
            values = _numbers(name, _call(name, function, kwargs, len(completions)), len(completions))
            applies[:, i] = torch.tensor([v is not None for v in values])
            each[:, i] = torch.tensor([math.nan if v is None else v for v in values])
        total = torch.where(applies, each * self.weights, 0.0).sum(1)
        total = torch.where(applies.any(1) & total.isfinite(), total, math.nan)
        return Scores(total, each)


def _accepted(function: RewardFunction) -> set[str] | None:
    """The keywords that a function takes; None: all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _call(name: str, function: RewardFunction, kwargs: dict[str, Any], rows: int) -> Any:
    try:
        return function(**kwargs)
    except Exception as error:
        row = _guilty_row(function, kwargs, rows)
        where = (
            f"in row {row} ({kwargs.get('completions', [None] * rows)[row]!r:.80})"
            if row is not None
            else "on the batch"
        )
        raise RewardError(f"reward function {name!r} raised {type(error).__name__} {where}: {error}") from error


def _guilty_row(function: RewardFunction, kwargs: dict[str, Any], rows: int) -> int | None:
    """The first row that raises alone, so that the message can name it."""
    for row in range(rows):
        try:
            function(**{key: value[row : row + 1] for key, value in kwargs.items()})
        except Exception:  # noqa: PERF203
            return row
    return None


def _numbers(name: str, values: Any, rows: int) -> list[float | None]:
    """The returned values as floats and None; anything else is an error that names the row."""
    values = values.tolist() if isinstance(values, Tensor) or hasattr(values, "tolist") else values
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise RewardError(f"reward function {name!r} must return a list of {rows} numbers, got {type(values).__name__}")
    if len(values) != rows:
        missing = f"; row {len(values)} is the first without one" if len(values) < rows else ""
        raise RewardError(f"reward function {name!r} must return {rows} rewards, got {len(values)}{missing}")
    out: list[float | None] = []
    for row, value in enumerate(values):
        if isinstance(value, Tensor) or hasattr(value, "item"):
            value = value.item()
        if value is not None and not isinstance(value, numbers.Real):
            raise RewardError(
                f"reward function {name!r} must return numbers or None, got {value!r:.60} "
                f"({type(value).__name__}) in row {row}"
            )
        out.append(None if value is None else float(value))
    return out


def _distinct(names: list[str]) -> list[str]:
    """lambda, lambda -> lambda, lambda_2: metric names must not collide."""
    out: list[str] = []
    for name in names:
        count = sum(n == name or n.startswith(f"{name}_") for n in out)
        out.append(name if name not in out else f"{name}_{count + 1}")
    return out

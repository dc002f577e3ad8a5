"""What a value in YAML or on the command line is as the type that a dataclass field is annotated with."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read safely; a key given twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise ValueError(f"key {key!r} is given twice, again in line {key_node.start_mark.line + 1}")
                seen.add(key if isinstance(key, str) else str(key))
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None
    except RecursionError:
        raise ValueError("not usable YAML: nested too deeply") from None
    if values is None:
        raise ValueError("the file is empty")
    if not isinstance(values, dict):
        raise ValueError(f"must hold 'key: value' lines, got a {type(values).__name__}")
    return values


def split_override(text: str) -> tuple[str, str]:
    """("seed", "7") of "seed=7" or "--seed=7"."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"overrides are key=value, got {text!r}")
    return key.strip().removeprefix("--"), value


def parse_override(expected: Any, text: str) -> Any:
    """The value of `key=text` for a key of type `expected`: the text itself where it takes a string, else YAML."""
    import yaml

    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    takes_text = expected is str or str in typing.get_args(expected)
    if takes_text and not isinstance(value, (str, list, bool, type(None))):
        return text  # run_name=7 is the name "7"
    if expected is str and isinstance(value, bool):
        return text
    return value


def convert(name: str, value: Any, expected: Any) -> Any:
    """`value` as the annotated type, converting only where nothing can be lost; else ValueError.

    "1e-6" is a float (YAML 1.1 reads it as text), 8.0 an int, "true" a bool; True is not an int.
    """
    options = typing.get_args(expected) if is_union(expected) else (expected,)
    for option in options:  # an exact match first: True stays a bool in `str | bool`
        if _is_exactly(value, option):
            return value
    for option in options:
        try:
            return _convert_one(value, option)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{name} must be {describe(expected)}, got {value!r} ({type(value).__name__})")


def describe(expected: Any) -> str:
    """A type in words, for error messages."""
    if is_union(expected):
        return " or ".join(describe(option) for option in typing.get_args(expected))
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list" + (f" of {getattr(args[0], '__name__', args[0])}" if args else "")
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping"}
    names[type(None)] = "null"
    return names.get(origin or expected, str(expected))


def require(name: str, value: Any, ok: bool, expected: str) -> None:
    """Raise ValueError unless `ok` (False for NaN by construction of the comparison)."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'seed'?", or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def names(value: str | Iterable[str] | None) -> list[str]:
    """The entries of a list, or of a text with commas."""
    parts = value.split(",") if isinstance(value, str) else value or []
    return [part.strip() for part in parts if part.strip()]


@contextmanager
def in_words_of(keys: Mapping[str, str]) -> Iterator[None]:
    """A ValueError or TypeError from inside as a ValueError that calls arguments {argument: key} by their keys."""
    try:
        yield
    except (ValueError, TypeError) as error:
        pattern = rf"\b({'|'.join(map(re.escape, keys))})\b"
        raise ValueError(re.sub(pattern, lambda match: keys[match[1]], str(error))) from None


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def field_types(cls: type) -> dict[str, Any]:
    """{field: type} of a dataclass, annotations resolved along its bases."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def is_union(expected: Any) -> bool:
    """Whether a type is `A | B`."""
    return typing.get_origin(expected) in (typing.Union, types.UnionType)


def _is_exactly(value: Any, option: Any) -> bool:
    if option is Any:
        return True
    origin = typing.get_origin(option)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in typing.get_args(option))
    if origin is list:
        args = typing.get_args(option) or (Any,)
        return isinstance(value, list) and all(_is_exactly(v, args[0]) for v in value)
    if origin is dict or option is dict:
        return isinstance(value, dict)
    return type(value) is option


def _convert_one(value: Any, option: Any) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if option is float and not isinstance(value, bool):
        number = float(text if text is not None else value)
        if number != number:
            raise ValueError
        return number
    if option is int and not isinstance(value, bool):
        number = float(text if text is not None else value)
        if not number.is_integer():
            raise ValueError
        return int(text) if text is not None and re.fullmatch(r"[+-]?\d+", text) else int(number)
    if option is bool and text is not None and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if option is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if typing.get_origin(option) is Literal:
        for choice in typing.get_args(option):
            if choice == "no" and value is False:  # YAML 1.1 reads a bare `no` as false
                return choice
            if type(choice) is int and choice == _convert_one(value, int):  # 4.0 where 4 is a choice
                return choice
    if typing.get_origin(option) is list and isinstance(value, (list, tuple)):
        (inner,) = typing.get_args(option)
        return [v if _is_exactly(v, inner) else _convert_one(v, inner) for v in value]
    raise ValueError

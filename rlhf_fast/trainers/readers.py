"""Rows from JSON and JSONL files, each with the place it came from, so that every error can name it."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl")


class Rows:
    """Rows of one or more files: `rows[i]` is a dict, `where(i)` its file and 1-based line or row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.files: list[tuple[Path, str]] = []  # (file, "line" or "row")
        self._file = array("i")
        self._number = array("q")

    @classmethod
    def from_list(cls, rows: Iterable[dict[str, Any]], name: str = "rows") -> Rows:
        """Rows that are in memory already."""
        out = cls()
        out.files.append((Path(name), "row"))
        for number, row in enumerate(rows, 1):
            out._append(row, number, f"{name}, row {number}")
        if not out.rows:
            raise ValueError(f"{name}: the dataset is empty")
        return out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, i: int) -> str:
        """Such as "data/train.jsonl, line 7"; a JSON array has rows in place of lines."""
        path, unit = self.files[self._file[i]]
        return f"{path}, {unit} {self._number[i]}"

    def _append(self, row: Any, number: int, where: str) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object {{...}}, got {_kind(row)}")
        self.rows.append(row)
        self._file.append(len(self.files) - 1)
        self._number.append(number)


def read_rows(paths: Iterable[str | os.PathLike], *, limit: int | None = None) -> Rows:
    """Read every row of the files, or of the .json and .jsonl files in folders, in order.

    Args:
        paths: files or folders. A .json file holds an array of objects, or one object a line like .jsonl.
        limit: stop after so many rows.
    Raises: FileNotFoundError; ValueError with file, 1-based line and reason; ValueError when there is no row.
    """
    out = Rows()
    files = [file for path in paths for file in _data_files(Path(path))]
    for path in files:
        if limit is not None and len(out) >= limit:
            break
        if path.suffix == ".json" and _first_character(path) == b"[":
            _read_array(path, out, limit)
        else:
            _read_lines(path, out, limit)
    if not out.rows:
        names = ", ".join(str(p) for p in files) or "no file was given"
        raise ValueError(f"the dataset is empty: no row in {names}")
    return out


def _data_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.name != "dataset_info.json")
        if not found:
            raise ValueError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no data file or folder {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a {' or '.join(SUFFIXES)} file, got {path.suffix or 'no suffix'}")
    return [path]


def _first_character(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_array(path: Path, out: Rows, limit: int | None) -> None:
    out.files.append((path, "row"))
    try:
        items = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    for number, row in enumerate(items, 1):
        if limit is not None and len(out) >= limit:
            return
        out._append(row, number, f"{path}, row {number}")


def _read_lines(path: Path, out: Rows, limit: int | None) -> None:
    out.files.append((path, "line"))
    with open(path, "rb") as f:  # bytes: lines end at \n alone, so U+2028 inside a string is no line end
        for number, raw in enumerate(f, 1):
            if limit is not None and len(out) >= limit:
                return
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
            out._append(row, number, where)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)

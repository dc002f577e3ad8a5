"""One data file each: JSON lines by offset, Arrow tables by blocks, lists.

Rows are read when they are asked for. What stays in memory is 24 bytes a line of .jsonl and the columns of a table; of
a .json array and a .gz all of it.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rlhf_fast.trainers.config_types import first_line

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrow")
SAVED = ("state.json", "dataset_dict.json")  # mark the folders of Dataset.save_to_disk and DatasetDict.save_to_disk
BLOCK = 1 << 20  # bytes of JSON lines read at once
TABLE_BLOCK = 256  # rows of a table turned into Python objects at once
BOM = b"\xef\xbb\xbf"


class Source(Protocol):
    """The rows of one file."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...

    def where(self, i: int) -> str: ...


def open_source(path: Path, limit: int | None = None, split: str | None = None) -> Source:
    """The rows of one file, or of one folder of `save_to_disk`."""
    if path.is_dir():
        return Table(_load_from_disk(path, split), str(path), limit)
    if path.suffix == ".csv":
        return Table(_arrow(_read_csv, path), str(path), limit)
    if path.suffix == ".parquet":
        return Table(_arrow(_read_parquet, path), str(path), limit)
    if path.suffix == ".arrow":
        return Table(_arrow(_read_arrow, path), str(path), limit)
    if path.suffix == ".json" and _first_character(path) == b"[":
        return Listed(_read_array(path)[:limit], str(path))
    return JsonLines(path, limit)


class Listed:
    """Rows in memory: those of a .json array, or the caller's."""

    def __init__(self, rows: list[Any], name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def where(self, i: int) -> str:
        return f"{self.name}, row {i + 1}"


class JsonLines:
    """One object a line; blank lines are skipped. Keeps offsets, reads and parses what is asked for."""

    def __init__(self, path: Path, limit: int | None = None):
        self.path, self.name = path, str(path)
        self._start, self._end, self._line = array("q"), array("q"), array("q")
        self._at, self._bytes = 0, _gunzip(path) if path.suffix == ".gz" else b""  # a window of the file
        at = 0
        with io.BytesIO(self._bytes) if path.suffix == ".gz" else open(path, "rb") as f:
            for number, raw in enumerate(f, 1):  # bytes: lines end at \n alone, so U+2028 in a string is no line end
                if limit is not None and len(self) >= limit:
                    break
                skip = len(BOM) if number == 1 and raw.startswith(BOM) else 0
                if not raw[skip:].isspace() and len(raw) > skip:
                    self._start.append(at + skip)
                    self._end.append(at + len(raw))
                    self._line.append(number)
                at += len(raw)

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, i: int) -> Any:
        begin, end = self._start[i] - self._at, self._end[i] - self._at
        if begin < 0 or end > len(self._bytes):
            with open(self.path, "rb") as f:
                f.seek(self._start[i])
                self._at, self._bytes = self._start[i], f.read(max(BLOCK, end - begin))
            begin, end = 0, end - begin
        return parse_json(self._bytes[begin:end], self.where(i))

    def where(self, i: int) -> str:
        return f"{self.name}, line {self._line[i]}"


class Table:
    """Rows of an Arrow table, or of a `datasets.Dataset`, which gives tables for slices."""

    def __init__(self, table: Any, name: str, limit: int | None = None):
        self.table, self.name = table, name
        self._length = table.num_rows if limit is None else min(limit, table.num_rows)
        self._at, self._rows = 0, []
        self._changed: dict[str, Any] = {}  # the columns that Arrow hands out otherwise than they were, and their types

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Any:
        if not self._at <= i < self._at + len(self._rows):
            self._at = i - i % TABLE_BLOCK
            end = min(self._at + TABLE_BLOCK, self._length)
            is_table = hasattr(self.table, "slice")
            part = self.table.slice(self._at, end - self._at) if is_table else self.table[self._at : end]
            self._rows = part.to_pylist()
            self._changed = {f.name: f.type for f in part.schema if CHANGED.search(f"{f.name}: {f.type}")}
        row = self._rows[i - self._at]
        changed = self._changed.items()
        return row | {k: _restored(row[k], t, self.where(i), k in CALLS) for k, t in changed} if changed else row

    def where(self, i: int) -> str:
        return f"{self.name}, row {i + 1}"


CALLS = ("tools", "tool_calls", "function")
CHANGED = re.compile(rf"arrow\.json|\b({'|'.join(CALLS)}): ")


def _restored(value: Any, arrow: Any, where: str, call: bool) -> Any:
    """A value of Arrow's type as it was before: JSON (`datasets.Json`) decoded, and in calls and tools no key added.

    The values of a column share all keys, and those that one lacked are null; a call or a schema with them is another.
    """
    if value is None:
        return None
    if getattr(arrow, "extension_name", None) == "arrow.json":
        return parse_json(value.encode(), where)
    if isinstance(value, list) and hasattr(arrow, "value_type"):
        return [_restored(v, arrow.value_type, where, call) for v in value]
    if isinstance(value, dict) and hasattr(arrow, "get_field_index"):  # a struct, which gives its fields
        given = ((field, value[field.name]) for field in arrow if not (call and value[field.name] is None))
        return {f.name: _restored(v, f.type, where, call or f.name in CALLS) for f, v in given}
    return value


def _load_from_disk(path: Path, split: str | None) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(f"{path}: a folder of save_to_disk needs the datasets library: pip install datasets") from None
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # of pyarrow, of json, of the library itself
        raise ValueError(f"{path}: not readable as a folder of save_to_disk: {first_line(error)}") from None
    if hasattr(data, "keys"):
        splits = list(data)
        name = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if name not in splits:
            raise ValueError(f"{path}: split must be one of {', '.join(splits)}, got {split}")
        data = data[name]
    return data.with_format("arrow")


def _arrow(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: {path.suffix} files need pyarrow: pip install pyarrow") from None
    try:
        return read(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names of columns that are not UTF-8
        raise ValueError(f"{path}: not readable as {path.suffix}: {first_line(error)}") from None


def _read_csv(path: Path) -> Any:
    """All columns are text: whoever wants a number or a truth value reads it from there."""
    import pyarrow
    from pyarrow import csv

    read = csv.ReadOptions(use_threads=False)  # with threads, errors do not name the row
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, read_options=read, parse_options=parse) as f:
        text = dict.fromkeys(f.schema.names, pyarrow.string())
    convert = csv.ConvertOptions(column_types=text, strings_can_be_null=False)
    return csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)


def _read_parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path, memory_map=True)


def _read_arrow(path: Path) -> Any:
    from pyarrow import ArrowInvalid, ipc, memory_map

    try:
        return ipc.open_stream(memory_map(str(path))).read_all()
    except ArrowInvalid:  # the file format rather than the stream format
        return ipc.open_file(memory_map(str(path))).read_all()


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as f:
            return f.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not readable as .gz: {first_line(error)}") from None


def _first_character(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(4096).removeprefix(BOM).lstrip()[:1]


def _read_array(path: Path) -> list[Any]:
    return parse_json(path.read_bytes().removeprefix(BOM), str(path), lines=True)


def parse_json(data: bytes, where: str, *, lines: bool = False) -> Any:
    """The value of JSON text; ValueError with `where`, the reason, and the column or, with `lines`, the line.

    A key given twice is an error, since one of its values would be lost; so is what is no Unicode text.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        if SURROGATE.search(data):  # an escape; halves of a pair have no encoding
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        if lines:
            raise ValueError(f"{where}, line {error.lineno}: not valid JSON: {error.msg}") from None
        raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: not Unicode text: half of a surrogate pair, {error.object[error.start]!r}"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # a key twice; an integer of thousands of digits
        raise ValueError(f"{where}: not usable JSON: {first_line(error)}") from None


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r:.60} is given twice")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", str: "a string", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)

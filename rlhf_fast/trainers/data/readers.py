"""Rows of data files, each with the place it came from, so that every error can name it.

.jsonl, .json, .jsonl.gz, .csv, .parquet, .arrow, folders of these, and folders of `datasets.save_to_disk`
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.trainers.data.sources import SAVED, SUFFIXES, Listed, Source, kind, open_source

Convert = Callable[[dict[str, Any], str], dict[str, Any]]  # (row, where) -> row of a known form


class Rows:
    """Rows of one or more files: `rows[i]` is a dict, `where(i)` its file and 1-based line or row."""

    def __init__(self) -> None:
        self.sources: list[tuple[Source, Convert | None]] = []
        self._source = array("i")
        self._number = array("q")

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Rows:
        """Rows that are in memory already."""
        out = cls()
        out.add(Listed(list(rows), name))
        if not len(out):
            raise ValueError(f"{name}: the dataset is empty")
        for i in range(len(out)):
            out[i]
        return out

    def add(self, source: Source) -> None:
        """Append the rows of a source."""
        self._source.extend([len(self.sources)] * len(source))
        self._number.extend(range(len(source)))
        self.sources.append((source, None))

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows of `indices`, in that order."""
        out = Rows()
        out.sources = self.sources
        chosen = list(indices)
        out._source = array("i", map(self._source.__getitem__, chosen))
        out._number = array("q", map(self._number.__getitem__, chosen))
        return out

    def convert(self, convert: Convert) -> Rows:
        """The same rows, each turned into another form when it is read."""
        out = Rows()
        out.sources = [(source, convert) for source, _ in self.sources]
        out._source, out._number = self._source, self._number
        return out

    @staticmethod
    def join(parts: Sequence[Rows], picks: Iterable[tuple[int, int]] | None = None) -> Rows:
        """One `Rows` of several: one after the other, or the (part, row) pairs of `picks`."""
        out = Rows()
        first = [0]
        for part in parts:
            out.sources += part.sources
            first.append(first[-1] + len(part.sources))
        every = ((p, i) for p, part in enumerate(parts) for i in range(len(part)))
        for p, i in every if picks is None else picks:
            out._source.append(first[p] + parts[p]._source[i])
            out._number.append(parts[p]._number[i])
        return out

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, i: int) -> dict[str, Any]:
        source, convert = self.sources[self._source[i]]
        row = source[self._number[i]]
        if not isinstance(row, Mapping):
            raise ValueError(f"{self.where(i)}: expected an object {{...}}, got {kind(row)}")
        return row if convert is None else convert(row, self.where(i))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        """Such as "data/train.jsonl, line 7"; what is no JSON lines has rows in place of lines."""
        return self.sources[self._source[i]][0].where(self._number[i])


def read_rows(
    paths: Iterable[str | os.PathLike], *, limit: int | None = None, split: str | None = None, subset: str | None = None
) -> Rows:
    """The rows of the files, or of all data files in folders, in order.

    Args:
        paths: files or folders. A .json file holds an array of objects, or one object a line like .jsonl.
        limit: stop after so many rows.
        split, subset: of a folder written by `DatasetDict.save_to_disk`; the folder `subset` below it.
    Raises: FileNotFoundError; ValueError with file and reason here, and with the 1-based line or row for what is
        found when a row is read; ValueError when there is no row.
    """
    out = Rows()
    files = [file for path in paths for file in _data_files(Path(path), subset)]
    for path in files:
        left = None if limit is None else limit - len(out)
        if left is not None and left <= 0:
            break
        out.add(open_source(path, left, split))
    if not len(out):
        names = ", ".join(str(p) for p in files) or "no file was given"
        raise ValueError(f"the dataset is empty: no row in {names}")
    return out


def is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.name != "dataset_info.json"


def _data_files(path: Path, subset: str | None = None) -> list[Path]:
    if path.is_dir():
        path = path / subset if subset else path
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}")
        if any((path / name).is_file() for name in SAVED):
            return [path]
        found = sorted(p for p in path.rglob("*") if p.is_file() and is_data(p))
        if not found:
            raise ValueError(f"{path}: the folder holds no data file ({', '.join(SUFFIXES)})")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no data file or folder {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    return [path]

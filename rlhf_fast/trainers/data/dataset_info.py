"""Data sets by name: LLaMA-Factory's registry `dataset_info.json`, and the rows of a run.

    {"my_pairs": {"file_name": "pairs.jsonl", "ranking": true,
                  "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}}}

A name is an entry of the registry in `dataset_dir`, or else a file or folder, as it stands or in `dataset_dir`. An
entry that gives columns has only these; the row's other columns stay for the reward functions. One that gives neither
columns nor tags has rows of any form in `forms`. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_fast.trainers.config_types import names, nearest
from rlhf_fast.trainers.data.chat import SHAREGPT, Tags, as_messages
from rlhf_fast.trainers.data.readers import Rows, read_rows
from rlhf_fast.trainers.data.sources import BOM, parse_json

REGISTRY = "dataset_info.json"
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
KEYS = ("file_name", "formatting", "ranking", "columns", "tags", "num_samples", "split", "subset", "folder", *HUBS)
MEDIA = ("images", "videos", "audios")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}  # column key -> its name in our rows
SHARED = ("system", "tools", "chosen", "rejected", "kto_tag")
OPENAI = Tags("role", "content", "user", "assistant", "tool", "function_call", "system")
MIXES = ("concat", "interleave_under", "interleave_over")


@dataclass(frozen=True)
class Layout:
    """How an entry's rows become rows of a known form; callable on (row, where)."""

    formatting: str = "alpaca"
    columns: Mapping[str, str] | None = None  # None: the format's own names
    tags: Tags = SHAREGPT

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        given = self.columns or {}
        named = {key: given.get(key) if self.columns else key for key in (*SHARED, "history")}
        if self.formatting == "alpaca":
            named |= {ours: given.get(key) if self.columns else ours for key, ours in ALPACA.items()}
        else:
            own = "messages" if self.formatting == "openai" else "conversations"
            named["messages"] = given.get("messages") if self.columns else own
        out = {key: value for key, value in row.items() if key not in _FORM_KEYS}
        for ours, column in named.items():
            if column is None:
                continue
            if self.columns and column not in row and ours in _NEEDED:
                columns = ", ".join(map(str, row))
                raise ValueError(f"{where}: no column {column!r}, which {REGISTRY} names; its columns are {columns}")
            if row.get(column) is not None:
                out[ours] = self._value(ours, column, row[column], where)
        return out

    def _value(self, ours: str, column: str, value: Any, where: str) -> Any:
        if self.formatting == "alpaca" or ours not in ("messages", "chosen", "rejected") or isinstance(value, str):
            return value
        return as_messages([value] if isinstance(value, Mapping) else value, column, where, self.tags)


_NEEDED = ("instruction", "messages", "chosen", "rejected", "kto_tag")
_FORM_KEYS = {*ALPACA.values(), *SHARED, "history", "messages", "conversations", "prompt", "completion", "response"}
_FORM_KEYS -= {"output"}  # an answer that no column names is still the reward functions'


class DataSource(NamedTuple):
    """A file or folder and how to read it."""

    path: Path
    name: str
    layout: Layout | None = None
    num_samples: int | None = None
    split: str | None = None
    subset: str | None = None

    def rows(self, *, max_samples: int | None = None, seed: int = 0) -> Rows:
        """Its rows: `num_samples` of them by chance (with repeats if there are fewer), then the first `max_samples`."""
        limit = max_samples if self.num_samples is None else None
        rows = read_rows([self.path], limit=limit, split=self.split, subset=self.subset)
        if self.num_samples is not None:
            rows = rows.select(_sample(len(rows), self.num_samples, seed)[:max_samples])
        return rows if self.layout is None else rows.convert(self.layout)


def split(rows: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """(to train on, to evaluate on): a random split by the seed, in the order of the rows.

    Args:
        held_out: `val_size`, a fraction below 1 or a number of rows.
    """
    held = int(held_out) if held_out >= 1 else max(1, round(held_out * rows))
    if held >= rows:
        raise ValueError(f"val_size={held_out} leaves none of {rows} rows to train on")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def load_rows(config: Any, key: str = "dataset") -> Rows:
    """The rows of a run's `dataset` or `eval_dataset`: all of them, `max_samples` of each at most, mixed as it says.

    Raises: FileNotFoundError and ValueError naming the key, the entry, and what is wrong with it.
    """
    try:
        sources = resolve(names(getattr(config, key)), Path(config.dataset_dir))
        parts = [source.rows(max_samples=config.max_samples, seed=config.seed) for source in sources]
        strategy = getattr(config, "mix_strategy", "concat")
        return mix(parts, strategy, getattr(config, "interleave_probs", None), seed=config.seed)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None


def resolve(wanted: Sequence[str], dataset_dir: str | os.PathLike = ".") -> list[DataSource]:
    """Where the data sets of these names are and how they are read.

    Raises: FileNotFoundError naming what was tried; ValueError naming registry, entry and key.
    """
    folder = Path(dataset_dir).expanduser()
    registry = read_registry(folder / REGISTRY)
    return [_registered(n, registry[n], folder) if n in registry else _path(n, folder, registry) for n in wanted]


def read_registry(path: Path) -> dict[str, Any]:
    """The entries of a dataset_info.json; none when there is no such file."""
    if not path.is_file():
        return {}
    entries = parse_json(path.read_bytes().removeprefix(BOM), str(path), lines=True)
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: must hold an object of entries, got a {type(entries).__name__}")
    return entries


def mix(
    parts: Sequence[Rows],
    strategy: str = "concat",
    probabilities: str | Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> Rows:
    """One `Rows` of several.

    Args:
        strategy: concat; interleave_under: in turns until one is used up; interleave_over: in turns until all are,
            the others starting again. The rows of `datasets.interleave_datasets` (first_exhausted, all_exhausted).
        probabilities: of each part's turn, summing to 1; None: one after the other, in whole rounds.
    """
    if strategy not in MIXES:
        raise ValueError(f"mix_strategy must be one of {', '.join(MIXES)}, got {strategy!r}{nearest(strategy, MIXES)}")
    if strategy == "concat" or len(parts) == 1:
        return Rows.join(parts)
    return Rows.join(parts, _turns([len(p) for p in parts], _shares(probabilities, len(parts)), strategy, seed))


def _turns(lengths: list[int], shares: np.ndarray | None, strategy: str, seed: int) -> Iterator[tuple[int, int]]:
    """(part, row) in turns."""
    under = strategy == "interleave_under"
    if shares is None:
        for turn in range(min(lengths) if under else max(lengths)):
            yield from ((p, turn % length) for p, length in enumerate(lengths))
        return
    rng = np.random.default_rng(seed)
    taken = [0] * len(lengths)
    while True:
        for p in rng.choice(len(lengths), 1024, p=shares).tolist():
            yield p, taken[p] % lengths[p]
            taken[p] += 1
            used_up = [t >= n for t, n in zip(taken, lengths, strict=True)]
            if any(used_up) if under else all(used_up):
                return


def _shares(value: str | Sequence[float] | None, parts: int) -> np.ndarray | None:
    if value is None or value == "":
        return None
    try:
        shares = np.array([float(v) for v in (value.split(",") if isinstance(value, str) else value)])
    except (TypeError, ValueError):
        raise ValueError(f"interleave_probs must be numbers, got {value!r}") from None
    if len(shares) != parts or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"interleave_probs must be {parts} numbers above 0 that sum to 1, got {value!r}")
    return shares / shares.sum()


def _sample(rows: int, count: int, seed: int) -> list[int]:
    """`count` of the rows by chance, each as often as any other but for one time; in their order."""
    rng = np.random.default_rng(seed)
    times, rest = divmod(count, rows)
    chosen = np.concatenate([np.tile(np.arange(rows), times), rng.permutation(rows)[:rest]])
    return np.sort(chosen).tolist()


def _path(name: str, folder: Path, registry: Mapping[str, Any]) -> DataSource:
    candidates = [Path(name).expanduser(), folder / name]
    found = next((p for p in candidates if p.exists()), None)
    if found is None:
        tried = " or ".join(dict.fromkeys(os.path.normpath(p) for p in candidates))
        where = f", and no entry {name!r} in {folder / REGISTRY}{nearest(name, registry)}" if registry else ""
        raise FileNotFoundError(f"no file or folder {tried}{where}")
    return DataSource(found, name)


def _registered(name: str, entry: Any, folder: Path) -> DataSource:
    where = f"{folder / REGISTRY}, entry {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {entry!r:.60}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, KEYS)}")
    file = entry.get("file_name")
    if not file:
        hub = next((key for key in HUBS if entry.get(key)), None)
        what = f"{hub} is {entry[hub]!r}, but nothing is downloaded: " if hub else ""
        raise ValueError(f"{where}: {what}file_name must name a local file or folder")
    for key in ("file_name", "split", "subset"):
        value = entry.get(key)
        if value is not None and (not isinstance(value, str) or not value.isprintable()):
            raise ValueError(f"{where}: {key} must be a string, got {value!r:.60}")
    path = folder / Path(file).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{where}: no file or folder {path}")
    samples = entry.get("num_samples")
    if samples is not None and not (isinstance(samples, int) and not isinstance(samples, bool) and samples > 0):
        raise ValueError(f"{where}: num_samples must be an integer of at least 1, got {samples!r}")
    plain = entry.get("columns") is None and entry.get("tags") is None
    layout = _layout(entry, where)
    return DataSource(path, name, None if plain else layout, samples, entry.get("split"), entry.get("subset"))


def _layout(entry: Mapping[str, Any], where: str) -> Layout:
    formatting = entry.get("formatting", "alpaca")
    formats = ("alpaca", "sharegpt", "openai")
    if formatting not in formats:
        raise ValueError(f"{where}: formatting must be one of {', '.join(formats)}, got {formatting!r}")
    own = tuple(ALPACA) + ("history",) if formatting == "alpaca" else ("messages",)
    columns = _mapping(entry, "columns", (*own, *SHARED, *MEDIA), where)
    media = [key for key in MEDIA if columns and columns.get(key)]
    if media:
        raise ValueError(f"{where}: columns.{media[0]}: only text is supported")
    if entry.get("ranking") and columns and not ("chosen" in columns and "rejected" in columns):
        raise ValueError(f"{where}: ranking needs columns.chosen and columns.rejected")
    tags = _mapping(entry, "tags", tuple(f.name for f in fields(Tags)), where) or {}
    return Layout(formatting, columns, replace(OPENAI if formatting == "openai" else SHAREGPT, **tags))


def _mapping(entry: Mapping[str, Any], name: str, known: Sequence[str], where: str) -> dict[str, str] | None:
    value = entry.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object, got {value!r:.60}")
    for key, column in value.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {name}.{key}{nearest(key, known)}")
        if not (column is None or isinstance(column, str)):
            raise ValueError(f"{where}: {name}.{key} must be a string, got {column!r:.60}")
    return {key: column for key, column in value.items() if column is not None}

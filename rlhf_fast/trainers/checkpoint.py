"""Checkpoints that are whole or not there: written beside, flushed, hashed, renamed; verified before they are used.

    .checkpoint-8.part/     every file is written and flushed to the disk
        complete.json       last: step, stage, options, and size and sha256 of each file
    checkpoint-8/           the same folder renamed, and the rename flushed too

A process that is killed at any moment leaves `checkpoint-*` folders that are complete, and perhaps a hidden one that
the next save removes. Weights are safetensors; the rest are `torch.save` files that are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn

from rlhf_fast.trainers.config import RunConfig

MARKER = "complete.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; those that were there before are untouched."""


# ---- writing


@contextmanager
def writing(
    folder: str | os.PathLike, accelerator: Any, *, needed: int = 0, limit: int | None = None, best: Any = None,
    **about: Any,
) -> Iterator[Path]:  # fmt: skip
    """Inside the block every process writes its files into the folder that it is given; then it becomes `folder`.

    A process that fails makes all of them fail. Afterwards old checkpoints beyond `limit` are removed.

    Args:
        needed: bytes, about; for the error on a full disk.
        best: a checkpoint that stays.
        about: what the marker says besides the files; `resumable=False` where the training state is left out.
    Raises: CheckpointError naming the folder, the reason, and the bytes needed and free.
    """
    folder = Path(folder)

    def prepare(part: Path) -> None:
        for left in folder.parent.glob(".checkpoint-*.part"):  # of a killed process
            shutil.rmtree(left, ignore_errors=True)

    def finish(part: Path) -> None:
        seal(part, about)
        replace(part, folder)
        prune(folder.parent, limit, best)

    with _beside(folder.with_name(f".{folder.name}.part"), folder, accelerator, needed, prepare, finish) as part:
        yield part


@contextmanager
def placing(folder: str | os.PathLike, accelerator: Any, *, needed: int = 0) -> Iterator[Path]:
    """Inside the block every process writes a model's files into the folder that it is given; then they are put into
    `folder`, beside and instead of what is there.

    They are whole and on the disk before the first one gets its name. Weights come first, `config.json` last: in a new
    folder there is a model when all of it is there. Weights of an earlier model go once the new ones have their place.

    Args:
        needed: bytes, about; for the error on a full disk.
    Raises: CheckpointError naming the folder, the reason, and the bytes needed and free.
    """
    folder = Path(folder)

    def finish(part: Path) -> None:
        for path in (*part.rglob("*"), part):
            flush(path)
        put(part, folder)

    with _beside(folder / ".model.part", folder, accelerator, needed, lambda part: None, finish) as part:
        yield part


@contextmanager
def _beside(
    part: Path, folder: Path, accelerator: Any, needed: int, prepare: Callable[[Path], None],
    finish: Callable[[Path], None],
) -> Iterator[Path]:  # fmt: skip
    """The steps of a save, after each of which a process that failed makes all of them fail."""
    main = accelerator.is_main_process
    error: BaseException | None = None
    try:
        if main:
            part.parent.mkdir(parents=True, exist_ok=True)
            prepare(part)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
    except OSError as failed:
        error = failed
    _all_fine(error, part, folder, accelerator, needed)
    try:
        yield part
    except (OSError, RuntimeError, SafetensorError) as failed:
        error = failed
    _all_fine(error, part, folder, accelerator, needed)
    try:
        if main:
            finish(part)
    except OSError as failed:
        error = failed
    _all_fine(error, part, folder, accelerator, needed)


def _all_fine(error: BaseException | None, part: Path, folder: Path, accelerator: Any, needed: int) -> None:
    """Raise on all processes where one failed."""
    own = None if error is None else _words(error)
    every = gather_object([own]) if accelerator.num_processes > 1 else [own]
    failed = {rank: text for rank, text in enumerate(every) if text is not None}
    if not failed:
        return
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    run = part.parent
    kept = newest(run)
    before = f"{kept.name} is complete" if kept is not None else "there is no earlier checkpoint"
    where = "" if len(every) == 1 else f" by process {', '.join(map(str, failed))}"
    what = f"the model in {folder}" if run == folder else str(folder)
    reason = f"{next(iter(failed.values()))}. {_room(run, needed)}; {before}"
    raise CheckpointError(f"{what} could not be written{where}: {reason}") from error


def _words(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _room(folder: Path, needed: int) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        free = "how many are free is unknown"
    return f"It needs about {needed:,} bytes, {free}"


def seal(part: Path, about: Mapping[str, Any]) -> None:
    """Flush every file to the disk, then write the marker with their sizes and hashes."""
    files = {}
    for path in sorted(p for p in part.rglob("*") if p.is_file() and p != part / MARKER):
        flush(path)
        files[path.relative_to(part).as_posix()] = [path.stat().st_size, _sha256(path)]
    marker = {"format": 1, "written": time.time(), **about, "files": files}
    (part / MARKER).write_text(json.dumps(marker, indent=1, default=str))
    flush(part / MARKER)
    for path in (*(p for p in part.rglob("*") if p.is_dir()), part):
        flush(path)


def replace(part: Path, folder: Path) -> None:
    """`part` becomes `folder`; an earlier one of that name goes."""
    old = folder.with_name(f".{folder.name}.old.part")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put(part: Path, folder: Path) -> None:
    """Rename the files of `part` into `folder`, whose weights of before are removed."""
    files = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
    folders = {file.parent for file in files}
    for name in sorted(folders):
        (folder / name).mkdir(exist_ok=True, parents=True)
    ends, last = (".safetensors", ".index.json"), ("config.json", "adapter_config.json")
    for file in sorted(files, key=lambda f: (f.name in last, not f.name.endswith(ends), str(f))):
        os.replace(part / file, folder / file)
    kinds = {(file.parent, file.name.split(".")[0].split("-")[0]) for file in files if file.name.endswith(ends)}
    for name in folders:
        for old in (folder / name).iterdir():
            kind = (name, old.name.split(".")[0].split("-")[0])  # model, of model-00001-of-00002.safetensors
            if old.name.endswith(ends) and kind in kinds and old.relative_to(folder) not in files:
                old.unlink()
        flush(folder / name)
    shutil.rmtree(part, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, limit: int | None, best: Any = None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but never the newest or the best one."""
    if limit is None or limit < 1:
        return
    found = [path for _, path in _by_age(folder)]
    for old in found[: max(0, len(found) - limit)]:
        if best is not None and old.resolve() == Path(best).resolve():
            continue
        hidden = old.with_name(f".{old.name}.old.part")  # a kill in mid-removal leaves no half checkpoint
        old.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def expected_bytes(model: Iterable[nn.Module], optimizer: Any = None) -> int:
    """About what a checkpoint of these takes."""
    tensors = [p for module in model for p in module.parameters()]
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(getattr(t, "ds_numel", t.numel()) * t.element_size() for t in tensors)  # whole, under ZeRO-3 too


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        found = hashlib.sha256()
        while block := f.read(1 << 22):
            found.update(block)
    return found.hexdigest()


# ---- finding


def read_marker(folder: str | os.PathLike) -> dict[str, Any]:
    """What `complete.json` says; empty when it is not there or not to be read."""
    try:
        marker = json.loads((Path(folder) / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else {}


def flaw(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, None when nothing is: its marker, the size and the hash of every file."""
    marker = Path(folder) / MARKER
    return _flaw(str(folder), marker.stat().st_mtime_ns if marker.is_file() else 0)


@lru_cache(maxsize=64)  # hashing takes a second a gigabyte
def _flaw(folder: str, changed: int) -> str | None:
    marker = read_marker(folder)
    if not marker:
        there = (Path(folder) / MARKER).exists()
        return f"corrupt: {MARKER} is not to be read" if there else f"incomplete: it has no {MARKER}"
    for name, (size, digest) in marker["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            return f"incomplete: {name} is missing"
        if path.stat().st_size != size:
            return f"corrupt: {name} has {path.stat().st_size:,} bytes, it was written with {size:,}"
        if _sha256(path) != digest:
            return f"corrupt: {name} is not what was written (its sha256 differs)"
    if not marker.get("resumable", True):
        return "without training state (save_only_model)"
    return None


def _by_age(folder: Path) -> list[tuple[float, Path]]:
    """(time written, path) of every `checkpoint-N` with a marker, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and (marker := read_marker(path)):
            found.append((float(marker.get("written", 0)), path))
    return sorted(found)


def newest(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint written last, verified or not."""
    found = _by_age(Path(output_dir))
    return found[-1][1] if found else None


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete `checkpoint-N`; what is incomplete, corrupt or without training state is warned of."""
    known = {path: written for written, path in _by_age(Path(output_dir))}
    every = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    for path in sorted(every, key=lambda p: (known.get(p, float("inf")), int(p.name[11:])), reverse=True):
        wrong = flaw(path)
        if wrong is None:
            return path
        warnings.warn(f"{path} is {wrong}; it is skipped", stacklevel=2)
    return None


def find_checkpoint(output_dir: str | os.PathLike, wanted: str | os.PathLike | bool | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a path, or the newest one for True and "latest".

    Raises: ValueError when it is not there, or not complete.
    """
    if not wanted:
        return None
    if wanted is True or str(wanted) == "latest":
        path = last_checkpoint(output_dir)
        if path is None:
            raise ValueError(
                f"resume_from_checkpoint: no complete checkpoint in {output_dir} (one is written every save_steps, and "
                "0, the default, is never)"
            )
        return path
    path = Path(wanted)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint: {path} is no folder")
    wrong = flaw(path)
    if wrong is not None:
        raise ValueError(f"resume_from_checkpoint: {path} is {wrong}")
    return path


def resume_path(config: RunConfig) -> Path | None:
    """The checkpoint that a run goes on from; ValueError when the one that is asked for is not there.

    With `overwrite_output_dir: false` it is the newest in `output_dir`, and a finished model there is an error.
    """
    if config.resume_from_checkpoint is not None or config.overwrite_output_dir:
        return find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    path = last_checkpoint(config.output_dir)
    finished = [n for n in ("config.json", "adapter_config.json") if (Path(config.output_dir) / n).is_file()]
    if path is None and finished:
        raise ValueError(f"output_dir: {config.output_dir} holds a model, and overwrite_output_dir is false")
    return path


def step_of(folder: str | os.PathLike) -> int:
    """The step after which a checkpoint was written."""
    return int(read_marker(folder)["step"])

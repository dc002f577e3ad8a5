"""What a run leaves: `trainer_log.jsonl`, `training_metrics.csv`, `training_curves.png`, `summary.json`.

Plain files, written as the run goes, so that a run that dies still has its history. Needs the standard
library alone; matplotlib is imported when curves are drawn.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

LOG_NAME = "trainer_log.jsonl"
CSV_NAME = "training_metrics.csv"
CURVES_NAME = "training_curves.png"
SUMMARY_NAME = "summary.json"

# One panel each, in this order; a metric goes to the first panel that has one of its words.
PANELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("accuracy", frozenset({"accuracy", "acc", "margin", "margins"})),
    ("reward", frozenset({"reward", "rewards", "score", "scores"})),
    ("clip fraction", frozenset({"clip", "clipfrac", "clipped"})),
    ("KL", frozenset({"kl"})),
    ("entropy", frozenset({"entropy"})),
    ("loss", frozenset({"loss", "nll"})),
    ("perplexity", frozenset({"perplexity", "ppl"})),
    ("value function", frozenset({"value", "values", "explained", "returns", "advantage", "advantages"})),
    ("length", frozenset({"length", "lengths", "len"})),
    ("ratio", frozenset({"ratio"})),
    ("groups of equal rewards", frozenset({"groups"})),
    ("sampler against trainer", frozenset({"gap", "ess"})),
    ("gradient norm", frozenset({"grad"})),
    ("learning rate", frozenset({"lr", "learning"})),
    ("tokens / s", frozenset({"tokens"})),
    ("memory, MB", frozenset({"memory"})),
    ("evaluation", frozenset({"eval"})),  # whatever a run measures there
)
_NOT_DRAWN = frozenset({"runtime", "second"})  # how fast an evaluation was
_SMOOTH_FROM = 100  # points; longer series get a running mean over the faint raw line


def is_main_process() -> bool:
    """True on rank 0, whether or not `torch.distributed` is initialised."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0") or 0) == 0


def peak_memory_mb() -> float:
    """Peak memory of this process in MB: allocated on the current CUDA device, else resident in RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # Linux; not ru_maxrss, which a child inherits from the process that started it
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def largest_peak_mb(accelerator: Any) -> float:
    """The largest `peak_memory_mb` of all processes, each of which calls it."""
    peak = peak_memory_mb()
    if accelerator.num_processes == 1:
        return round(peak, 1)
    torch = sys.modules["torch"]
    return round(float(accelerator.gather(torch.tensor([peak], device=accelerator.device)).max()), 1)


def to_plain(value: Any) -> Any:
    """Tensors, NumPy scalars, paths and containers of them as what JSON knows; NaN and inf stay floats."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if hasattr(value, "tolist"):  # torch and NumPy, 0-d or more
        return to_plain(value.detach().tolist() if hasattr(value, "detach") else value.tolist())
    return str(value)


def finite(value: Any) -> Any:
    """The same plain value with every NaN or infinity replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value


def write_atomic(path: Path, write: Callable[[TextIO], None]) -> None:
    """Write a text file so that readers see the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class RunLog:
    """The files of one run in `output_dir`. On other ranks than 0 every method does nothing.

    Args:
        output_dir: made if needed. A run that starts there anew replaces the files of an earlier one.
        resume_step: keep the earlier files up to and including this step, and go on after it.
        main: write at all; default: only on rank 0.

    Example:
        log = RunLog("out")
        log.log(1, {"reward": 0.5, "kl": 0.01})
        log.curves(); log.summary(accuracy_after=0.96)
    """

    def __init__(self, output_dir: str | os.PathLike, *, resume_step: int | None = None, main: bool | None = None):
        self.output_dir = Path(output_dir)
        self.main = is_main_process() if main is None else main
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step", "seconds"]
        self._seconds_before = 0.0
        self._start = time.monotonic()
        self._jsonl: TextIO | None = None
        self._csv: TextIO | None = None
        if not self.main:
            return
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"output_dir: {self.output_dir} cannot be made: {error.strerror}") from error
        if resume_step is None:
            (self.output_dir / SUMMARY_NAME).unlink(missing_ok=True)
            (self.output_dir / CURVES_NAME).unlink(missing_ok=True)
        else:
            self.rows = [r for r in read_log(self.output_dir) if r.get("step", 0) <= resume_step]
            self._seconds_before = max((r.get("seconds") or 0.0 for r in self.rows), default=0.0)
        write_atomic(self.output_dir / LOG_NAME, lambda f: f.writelines(map(_json_line, self.rows)))
        self._jsonl = open(self.output_dir / LOG_NAME, "a", encoding="utf-8")  # noqa: SIM115
        self._add_columns(self.rows)
        self._rewrite_csv()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row. Values may be numbers, strings, None or 0-d tensors; new names may appear later."""
        if not self.main:
            return
        if self._jsonl is None or self._csv is None:
            raise ValueError("RunLog.log called after close()")
        seconds = round(self._seconds_before + time.monotonic() - self._start, 3)
        row = {"step": int(step), "seconds": seconds}
        row.update((name, to_plain(v)) for name, v in metrics.items() if name != "step")
        self.rows.append(row)
        self._jsonl.write(_json_line(row))
        self._jsonl.flush()
        if self._add_columns([row]):
            self._rewrite_csv()
        else:
            csv.writer(self._csv).writerow(self._cells(row))
            self._csv.flush()

    def curves(self) -> Path | None:
        """Draw every metric seen so far; the path, or None when there is nothing to draw."""
        if not self.main or not self.rows:
            return None
        try:
            return draw_curves(self.rows, self.output_dir / CURVES_NAME)
        except ImportError:
            warnings.warn("training_curves.png needs matplotlib: pip install matplotlib", stacklevel=2)
            return None

    def summary(self, **values: Any) -> dict[str, Any]:
        """Merge values into `summary.json` and return the whole of it."""
        path = self.output_dir / SUMMARY_NAME
        merged: dict[str, Any] = {}
        if path.is_file():
            try:
                merged = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                warnings.warn(f"{path} was not JSON and is replaced", stacklevel=2)
        merged.update(finite(to_plain(values)))
        if self.main:
            write_atomic(path, lambda f: f.write(json.dumps(merged, indent=2, ensure_ascii=False) + "\n"))
        return merged

    def sync(self) -> None:
        """Have the disk hold all rows. A killed process loses none without it, a power cut does."""
        for f in (self._jsonl, self._csv):
            if f is not None:
                os.fsync(f.fileno())

    def close(self) -> None:
        """Close the files; drawing and the summary still work."""
        self.sync()
        for f in (self._jsonl, self._csv):
            if f is not None:
                f.close()
        self._jsonl = self._csv = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _add_columns(self, rows: list[dict[str, Any]]) -> bool:
        known = set(self.columns)
        new = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in known]
        self.columns += new
        return bool(new)

    def _cells(self, row: dict[str, Any]) -> list[Any]:
        cells = (row.get(name) for name in self.columns)
        return [json.dumps(finite(c), ensure_ascii=False) if isinstance(c, (list, dict)) else c for c in cells]

    def _rewrite_csv(self) -> None:
        if self._csv is not None:
            self._csv.close()
        path = self.output_dir / CSV_NAME

        def write(f: TextIO) -> None:
            csv.writer(f).writerows([self.columns, *map(self._cells, self.rows)])

        write_atomic(path, write)
        self._csv = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115


def read_log(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `trainer_log.jsonl`; a last line cut off by a kill is left out."""
    path = Path(output_dir) / LOG_NAME
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def draw_curves(rows: list[dict[str, Any]], path: str | os.PathLike) -> Path | None:
    """Small multiples of every numeric metric against the step; None when no metric has a finite value."""
    panels = _panels(rows)
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for name, (steps, values) in series.items():
            _draw(axis, name, steps, values)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _draw(axis: Any, name: str, steps: list[float], values: list[float]) -> None:
    few = len(values) <= 30
    if len(values) < _SMOOTH_FROM:
        axis.plot(steps, values, label=name, lw=1.4, marker="o" if few else None, ms=3)
        return
    (raw,) = axis.plot(steps, values, lw=0.8, alpha=0.25)
    window = max(5, len(values) // 25)
    total, smooth = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        smooth.append(total / min(i + 1, window))
    axis.plot(steps, smooth, label=name, lw=1.6, color=raw.get_color())


def _panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{panel: {metric: (steps, values)}} with finite values only, in the order of PANELS."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {title: {} for title, _ in PANELS}
    for row in rows:
        for name, value in row.items():
            title = panel_of(name)
            if title is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if math.isfinite(value):
                steps, values = found[title].setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {title: series for title, series in found.items() if series}


def panel_of(name: str) -> str | None:
    """The panel of a metric by the words of its name (`eval/clip_fraction` has three)."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if "eval" in words and words & _NOT_DRAWN:
        return None
    return next((title for title, wanted in PANELS if words & wanted), None)


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"

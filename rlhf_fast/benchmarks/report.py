"""What comes out of a run: the machine, a table, JSON, CSV, plots, and the comparison of two runs."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf_fast import _backend
from rlhf_fast.benchmarks.suite import LIMIT, Row

SCHEMA = 1
PACKAGES = (
    "rlhf-fast", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl",
    "torchrl", "accelerate", "numpy",
)  # fmt: skip
COLORS = {"ok": "", "loose": "yellow", "skipped": "dim", "wrong": "red", "failed": "red"}


# ---- the machine ------------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit: what a number means nothing without."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": _memory_gb(),
            "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        },
        "versions": {"python": platform.python_version(), "os": platform.system()} | _versions(),
        "backends": {op: _backend.backend(device, op) for op in _backend.OPS},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["hardware"]["gpu"] = properties.name
        info["hardware"]["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        info["versions"]["cuda"] = torch.version.cuda
    return info


def hardware_line(info: dict[str, Any]) -> str:
    """One line for the head of a table; it says so when ours is measured without its compiled kernels."""
    h, v = info["hardware"], info["versions"]
    where = h.get("gpu") or f"{h['cpu']}, {h['cores']} cores, {h['threads']} threads"
    slow = [op for op, backend in info.get("backends", {}).items() if backend == "torch"]
    warning = f"; without kernels (see `rlhf-fast doctor`): {', '.join(slow)}" if slow else ""
    return f"{where}; torch {v.get('torch')}; commit {info['commit']}; {info['date']}{warning}"


def commit() -> str:
    """The checkout's commit, with + when the code differs from it; 'unknown' outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    git = lambda *args: subprocess.run(  # noqa: E731
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    ).stdout.strip()
    name = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "rlhf_fast", "kernels", "csrc")
    return name + ("+" if changed else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


# ---- the table --------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table per case: time, distance from the limit and from us, rate, memory, error."""
    return [_table(title, part) for title, part in _cases(rows).items()]


def _cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("provider", no_wrap=True)
    for name in ("ms", "x limit", "x ours", rows[0].rate_unit or "rate", "extra MB", "error"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for row in sorted(rows, key=lambda r: (r.provider != LIMIT, r.ms is None, r.ms or 0.0)):
        worst = max(row.error.values(), default=None)
        note = row.reason if row.status == "ok" else f"{row.status}: {row.reason}"
        cells = (_n(row.ms), _n(row.x_limit), _n(row.ratio), _n(row.rate), _n(row.extra_mb))
        error = "" if worst is None else f"{worst:.1e}"
        table.add_row(row.provider, *cells, error, note, style=COLORS[row.status])
    return table


def _n(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


# ---- files ------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    name: str,
    info: dict[str, Any],
    rows: Sequence[Row],
    extra: dict[str, Any],
    drawn: Sequence[Row] | None = None,
) -> list[Path]:
    """`name`.json and .csv, and .png where matplotlib is installed, of the rows `drawn` (None: all). Returns what was
    written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.json", folder / f"{name}.csv"]
    document = {"schema": SCHEMA, **info, **extra, "rows": [row.asdict() for row in rows]}
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    with written[1].open("w", newline="") as file:
        columns = [name for name in Row.__dataclass_fields__ if name not in ("ms_rounds", "error")]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row.asdict() for row in rows)
    picture = folder / f"{name}.png"
    drawn = rows if drawn is None else drawn
    if any(row.ms is not None for row in drawn) and _plot(picture, hardware_line(info), drawn):
        written.append(picture)
    return written


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A saved run. ValueError when the file is none."""
    try:
        document = json.loads(path.read_text())
        rows = [Row(**row) for row in document.pop("rows")]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a saved benchmark run: {error}") from error
    return document, rows


def _plot(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Bars of time (the limit as a line) and of memory, a pair for each case. False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    cases = {name: [r for r in part if r.ms is not None] for name, part in _cases(rows).items()}
    cases = {name: part for name, part in cases.items() if part}
    figure, axes = plt.subplots(len(cases), 2, figsize=(12, 2.9 * len(cases)), squeeze=False, layout="constrained")
    for (time, memory), (name, part) in zip(axes, cases.items(), strict=True):
        bars = sorted((r for r in part if r.provider != LIMIT), key=lambda r: -r.ms)
        names = [r.provider for r in bars]
        colors = ["#d1495b" if r.provider.startswith("rlhf_fast") else "#8d99ae" for r in bars]
        time.barh(names, [r.ms for r in bars], color=colors)
        for r in part:
            if r.provider == LIMIT:
                time.axvline(r.ms, color="black", linestyle=":", label=f"limit {_n(r.ms)} ms")
                time.legend(loc="lower right", fontsize=8)
        time.set_title(name, fontsize=9, loc="left")
        time.set_xlabel("ms")
        memory.barh(names, [r.extra_mb or 0.0 for r in bars], color=colors)
        memory.set_xlabel("MB beyond inputs and outputs")
        memory.set_yticklabels([])
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


# ---- two runs ---------------------------------------------------------------------------------------------


def compare(a: Sequence[Row], b: Sequence[Row]) -> tuple[Table, dict[tuple, float]]:
    """Rows of both runs side by side, and B / A of the time over the limit: the machine's own mood divides out."""
    table = Table(title="B against A")
    for name in ("case", "provider", "A ms", "B ms", "B/A", "A x limit", "B x limit", "B/A", "A MB", "B MB"):
        table.add_column(name, justify="left" if name in ("case", "provider") else "right")
    before, change = {row.key: row for row in a}, {}
    for row in b:
        old = before.get(row.key)
        if old is None or old.ms is None or row.ms is None:
            continue
        relative = row.x_limit / old.x_limit
        if row.provider != LIMIT:
            change[row.key] = relative
        style = "red" if relative > 1.1 else "green" if relative < 0.9 else ""
        cells = (old.ms, row.ms, row.ms / old.ms, old.x_limit, row.x_limit, relative, old.extra_mb, row.extra_mb)
        table.add_row(row.case, row.provider, *map(_n, cells), style=style)
    return table, change

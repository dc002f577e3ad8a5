"""`rlhf-fast plan CONFIG.yaml [key=value ...]`: the predicted memory of a run, by part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plan(
    config: str | Path, overrides: Sequence[str] = (), *, processes: int | None = None, as_json: bool = False
) -> Any:
    """Print what the run of a YAML file needs of each device's memory, and what makes each part smaller; the plan."""
    from rlhf_fast.trainers.config import load_config
    from rlhf_fast.trainers.plan import plan as predict

    result = predict(load_config(config, overrides), processes=processes)
    if as_json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        show(result)
    return result


def as_dict(result: Any) -> dict[str, Any]:
    """A plan as plain values."""
    phases = {p.name: {part.name: part.bytes for part in p.parts} for p in result.phases}
    return {
        "peak": result.peak,
        "largest_phase": result.largest.name,
        "device": result.device,
        "processes": result.processes,
        "resident": {part.name: part.bytes for part in result.resident},
        "phases": phases,
        "notes": list(result.notes),
    }


def show(result: Any) -> None:
    """Print a plan as a table."""
    from rich.console import Console
    from rich.table import Table

    where = f"each of {result.processes} devices ({result.device})" if result.processes > 1 else result.device
    table = Table(title=f"predicted peak memory, {where}: {size(result.peak)}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("less with")
    for part in result.resident:
        table.add_row(part.name, size(part.bytes), part.knob)
    for phase in result.phases:
        mark = " <- peak" if phase is result.largest else ""
        table.add_section()
        table.add_row(f"[bold]during {phase.name}[/]{mark}", f"[bold]{size(phase.bytes)}[/]", "")
        for part in phase.parts:
            table.add_row(f"  {part.name}", size(part.bytes), part.knob)
    Console().print(table)
    for note in result.notes:
        print(f"# {note}")


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):,.2f} {unit}" if shift == 30 else f"{count / (1 << shift):,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB"

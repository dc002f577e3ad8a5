"""The longest pair that a DPO step takes within a given memory, beside TRL's: `dpo_step`'s model, one pair a step.

For each trainer a fresh process doubles the length of the pair's sequences until the step's peak memory beyond model,
reference and data is over the limit, then halves the gap a few times. The optimiser's state counts.

    python -m rlhf_fast.benchmarks.context TRAINER MEGABYTES DEVICE LONGEST
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

TRAINERS = ("rlhf_fast", "trl")
MEGABYTES = 1000
SHORTEST, LONGEST = 128, 8192
HALVINGS = 3
TIMEOUT = 900
Notify = Callable[[str], None]


def run(
    rounds: int = 1, notify: Notify = lambda text: None, megabytes: int = MEGABYTES, longest: int = LONGEST
) -> dict[str, Any]:
    """The longest length that fits for both trainers. `rounds` is the other steps' option: memory needs no repetition.

    Returns: {"rlhf_fast": {"length", "mb": {length: peak}}, "trl": the same or {"skipped": reason}, "ratio"}.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {}
    for name in TRAINERS:
        notify(f"context: {name}")
        command = [sys.executable, "-m", __name__, name, str(megabytes), device, str(longest)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            result[name] = {"skipped": f"not done after {TIMEOUT} s"}
            continue
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not lines:
            result[name] = {"skipped": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
            continue
        result[name] = json.loads(lines[-1])
    if all("length" in result[name] for name in TRAINERS) and result["trl"]["length"]:
        result["ratio"] = result["rlhf_fast"]["length"] / result["trl"]["length"]
    result["setting"] = dict(megabytes=megabytes, device=device, longest=longest)
    return result


def table(result: dict[str, Any]) -> Table:
    """The longest lengths, and what the lengths around them took."""
    setting = result["setting"]
    title = f"Longest DPO sequences in {setting['megabytes']} MB beyond the models, {setting['device']}"
    out = Table(title=title, title_justify="left")
    for name in ("trainer", "tokens a sequence", "peak MB by length"):
        out.add_column(name, justify="left" if name == "trainer" else "right")
    for name in TRAINERS:
        row = result[name]
        if "skipped" in row:
            out.add_row(name, "", f"skipped: {row['skipped']}", style="dim")
            continue
        found = sorted((int(length), mb) for length, mb in row["mb"].items())
        more = " or more" if row["length"] >= setting["longest"] else ""
        out.add_row(name, f"{row['length']}{more}", ", ".join(f"{length}: {mb:.0f}" for length, mb in found))
    if "ratio" in result:
        out.caption = f"ours / TRL's: {result['ratio']:.2f} of the length"
    return out


def search(peak: Callable[[int], float], limit: float, longest: int = LONGEST) -> dict[str, Any]:
    """Double from SHORTEST to `longest` while `peak(length)` is within the limit, then halve the gap."""
    found: dict[int, float] = {}

    def fits(length: int) -> bool:
        found[length] = peak(length)
        return found[length] <= limit

    good, bad, length = 0, None, SHORTEST
    while bad is None and length <= longest:
        if fits(length):
            good, length = length, 2 * length
        else:
            bad = length
    for _ in range(HALVINGS if bad else 0):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"length": good, "mb": found}


def main(arguments: list[str]) -> None:
    """Search for one trainer and print JSON."""
    import torch

    from rlhf_fast.benchmarks import dpo_step

    name, megabytes, device, longest = arguments
    trainer = {"rlhf_fast": dpo_step.ours, "trl": dpo_step.trl}[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def peak(length: int) -> float:
            rows = dpo_step.make_rows(2, 0, pair=length)
            try:
                steps = trainer(Path(folder), rows, 1, 0, device, pairs=1, length=length + 8)
            except torch.OutOfMemoryError:
                return float("inf")
            if steps.peak_bytes is None:
                raise RuntimeError("peak memory cannot be read here")
            return steps.peak_bytes / 1e6

        peak(SHORTEST)  # the libraries' own first-call memory
        print(json.dumps(search(peak, float(megabytes), int(longest))))


if __name__ == "__main__":
    main(sys.argv[1:])

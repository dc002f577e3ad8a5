"""One GPU hour, used whole: build, test and measure in under ten minutes, the most telling rows first.

    python benchmarks/gpu_visit.py OUTPUT_FOLDER                # on a GPU
    python benchmarks/gpu_visit.py OUTPUT_FOLDER --rehearse     # the same road on the CPU, at tiny shapes

Every stage runs in a process of its own with a time limit: a crash, a hang or a missing package costs its own row and
nothing else. What is measured is on disk as soon as it is known (`rows.jsonl`, one process per case); `visit.json`
and a short table come last. Uses what is installed; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.5
DOCTOR = "import sys; from rlhf_fast.cli.main import app; sys.argv[1:] = ['doctor']; app()"
GPU_TESTS = [
    "tests/test_triton_row_pass.py",
    "tests/test_engine_device.py",
    "tests/test_triton_policy.py",
    "tests/test_divergence_rows.py",
]

# op, shape, dtype, share of zero advantages; the targets of the design's table first
CASES = [
    ("grpo", "qwen3-8b", "bf16", 0.0),
    ("grpo", "qwen2.5-0.5b", "bf16", 0.0),
    ("logprob", "qwen3-8b", "bf16", 0.0),
    ("grpo", "qwen3-8b", "bf16", 0.5),
    ("grpo", "qwen2.5-0.5b@64k", "bf16", 0.0),
    ("logprob_grad", "qwen3-8b", "bf16", 0.0),
    ("cross_entropy", "qwen3-8b", "bf16", 0.0),
    ("cross_entropy", "llama-3.2-1b", "bf16", 0.0),
    ("from_logits_grad", "qwen2.5-0.5b", "bf16", 0.0),
    ("grpo", "gemma-2-2b", "bf16", 0.0),
    ("grpo", "qwen3-8b@64k", "bf16", 0.0),
]
REHEARSAL = [(op, "tiny", dtype, zero) for op, _, dtype, zero in CASES[:4]] + [("nothing", "tiny", "bf16", 0.0)]


def main() -> int:
    """Build, tests, cases, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.rehearse else "cuda"
    if args.case:
        return _one_case(args.output, device, *json.loads(args.case))
    end = time.monotonic() + 60 * args.minutes
    stages: list[dict[str, Any]] = []
    if not (args.no_build or args.rehearse):
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        stages.append(_stage("build", install, args.output, end, 150))
    stages.append(_stage("doctor", [sys.executable, "-c", DOCTOR], args.output, end, 60))
    cases = REHEARSAL if args.rehearse else CASES
    this = [sys.executable, str(Path(__file__).resolve()), str(args.output), *(["--rehearse"] if args.rehearse else [])]
    for i, case in enumerate(cases):
        stages.append(_stage(f"case {case}", [*this, "--case", json.dumps(case)], args.output, end, 120))
        if i == 1:  # the two rows that count most come before the tests, the others after them
            tests = GPU_TESTS[:1] if args.rehearse else GPU_TESTS
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *(str(ROOT / t) for t in tests)]
            stages.append(_stage("tests", command, args.output, end, 180))
    return _finish(args.output, device, stages)


def _stage(name: str, command: list[str], output: Path, end: float, limit: float) -> dict[str, Any]:
    """Run a command within its limit and what is left of the visit; its words go to a log."""
    left = end - time.monotonic()
    if left < 5:
        return {"stage": name, "status": "no time left", "seconds": 0.0}
    start = time.monotonic()
    with (output / "visit.log").open("a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        try:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=min(limit, left)
            )
            status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "time limit"
    seconds = time.monotonic() - start
    print(f"{seconds:6.1f} s  {status:16} {name}", flush=True)
    return {"stage": name, "status": status, "seconds": round(seconds, 1)}


def _one_case(output: Path, device: str, op: str, shape: str, dtype: str, zero_rows: float) -> int:
    from rlhf_fast.benchmarks import cases, suite

    case = cases.Case(op, cases.parse_shape(shape), dtype, zero_rows, device)
    providers = [name for name in suite.PROVIDERS if not (device == "cpu" and name != "rlhf_fast" and name != "torch")]
    options = suite.Options(providers=tuple(providers), rounds=5, warmup=2, memory=device == "cuda")
    rows = suite.run([case], options)
    with (output / "rows.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps(row.asdict()) + "\n")
    return int(any(row.status in ("failed", "wrong") for row in rows))


def _finish(output: Path, device: str, stages: list[dict[str, Any]]) -> int:
    from rich.console import Console

    from rlhf_fast.benchmarks import report
    from rlhf_fast.benchmarks.suite import Row

    lines = (output / "rows.jsonl").read_text().splitlines() if (output / "rows.jsonl").exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    info = report.environment(device)
    report.save(output, "visit", info, rows, {"stages": stages})
    console = Console(width=120)
    console.print(report.hardware_line(info))
    for row in rows:  # short: what a terminal's last lines can hold
        if row.provider in ("limit", "rlhf_fast") or row.status in ("wrong", "failed"):
            ms = "" if row.ms is None else f"{row.ms:9.3f} ms {row.x_limit:6.2f} x limit {row.extra_mb or 0:8.0f} MB"
            console.print(
                f"{row.op:16} {row.shape:18} {row.zero_rows:3.1f} {row.provider:10} {ms} {row.status} {row.reason}"
            )
    failed = [s for s in stages if s["status"] != "ok"]
    console.print(f"{len(rows)} rows; stages not ok: {[s['stage'] for s in failed] or 'none'}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

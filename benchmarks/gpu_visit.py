"""A run on a GPU of under ten minutes: build, test and measure, the most telling rows first.

    python benchmarks/gpu_visit.py OUTPUT_FOLDER                # on a GPU; --minutes 6: the same order, cut shorter
    python benchmarks/gpu_visit.py OUTPUT_FOLDER --rehearse     # the same road on the CPU, at tiny shapes

Every stage runs in a process of its own with a time limit: a crash, a hang or a missing package costs its own row and
nothing else. What is measured is on disk as soon as it is known (`rows.jsonl`, one process per case; `tests.jsonl` and
`tests/`, one process per test file); `visit.json` and a short table come last. Uses what is installed; nothing is
downloaded. Peers that are not there leave their rows with the reason. A build that fails costs the compiled modules.

The order: build, doctor; the two rows that the design's table names first; every op at small shapes against fp64;
the GPU tests; the rows that show one thing each (forward, scans, zero rows, memory at 64k, the peers' best op); GRPO,
PPO and a DPO step end to end; the other rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.5
RESERVE = 12.0
"""Seconds kept for the last table."""

DOCTOR = "import sys; from rlhf_fast.cli.main import app; sys.argv[1:] = ['doctor']; app()"
RUNS = {"grpo": dict(rollouts=24), "ppo": dict(steps=6)}
REHEARSED = {"grpo": dict(rollouts=1), "ppo": dict(steps=1)}

# op, shape, dtype, share of zero advantages, share of masked tokens
FIRST = [
    ("grpo", "qwen3-8b", "bf16", 0.0, 0.0),
    ("grpo", "qwen2.5-0.5b", "bf16", 0.0, 0.0),
]
TELLING = [
    ("logprob", "qwen3-8b", "bf16", 0.0, 0.0),
    ("gae", "16m", "fp32", 0.0, 0.0),
    ("policy", "4m", "fp32", 0.0, 0.0),
    ("grpo", "qwen3-8b", "bf16", 0.5, 0.0),
    ("cross_entropy", "qwen3-8b", "bf16", 0.0, 0.0),
    ("grpo", "qwen2.5-0.5b@64k", "bf16", 0.0, 0.0),
    ("dpo", "qwen2.5-0.5b", "bf16", 0.0, 0.0),
    ("forward_kl", "qwen2.5-0.5b", "bf16", 0.0, 0.0),
]
REST = [
    ("gae", "cpu", "fp32", 0.0, 0.0),  # a million tokens
    ("advantages", "4m", "fp32", 0.0, 0.0),
    ("logprob_grad", "qwen3-8b", "bf16", 0.0, 0.0),
    ("ppo", "qwen2.5-0.5b", "bf16", 0.0, 0.0),
    ("grpo", "gemma-2-2b", "bf16", 0.0, 0.0),
    ("cross_entropy", "llama-3.2-1b", "bf16", 0.0, 0.0),
    ("from_logits_grad", "qwen2.5-0.5b", "bf16", 0.0, 0.0),
    ("grpo", "qwen3-8b", "bf16", 0.9, 0.0),
    ("grpo", "qwen2.5-0.5b", "bf16", 0.0, 0.5),
    ("grpo", "qwen3-8b@2k", "bf16", 0.0, 0.0),
    ("jsd", "llama-3.2-1b", "bf16", 0.0, 0.0),
    ("whiten", "4m", "fp32", 0.0, 0.0),
    ("group", "16m", "fp32", 0.0, 0.0),
    ("grpo", "qwen3-8b@64k", "bf16", 0.0, 0.0),
]
BROKEN = ("nothing", "tiny", "bf16", 0.0, 0.0)
SWEEP = dict(shapes=["tiny", "tiny-softcap", "small"], dtypes=["bf16", "fp32"], zero_rows=[0.5], masked=[0.0, 0.25])
SHORT_SWEEP = dict(shapes=["tiny"], dtypes=["fp32"], zero_rows=[0.5], masked=[0.25])


def main() -> int:
    """Build, tests, cases, trainers, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--no-build", action="store_true")
    for inner in ("--case", "--sweep", "--trainer", "--tests"):  # one stage, in a process of its own
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.rehearse else "cuda"
    if args.case:
        return _one_case(args.output, device, args.seconds, *json.loads(args.case))
    if args.sweep:
        return _sweep(args.output, device, json.loads(args.sweep))
    if args.tests:
        return _tests(args.output, json.loads(args.tests), args.seconds)
    if args.trainer:
        return _trainer(args.output, device, args.trainer, args.rehearse)
    return _visit(args.output, device, args.rehearse, 60 * args.minutes, build=not (args.no_build or args.rehearse))


def _visit(output: Path, device: str, rehearse: bool, seconds: float, build: bool) -> int:
    end = time.monotonic() + seconds - RESERVE
    stages: list[dict[str, Any]] = []

    patience = 6 if rehearse else 1  # a CPU that others use too

    def stage(name: str, command: list[str], limit: float) -> bool:
        stages.append(_stage(name, command, output, end, patience * limit))
        return stages[-1]["status"] == "ok"

    this = [sys.executable, str(Path(__file__).resolve()), str(output), *(["--rehearse"] if rehearse else [])]

    def cases(some: list[tuple], limit: float = 70) -> None:
        for case in some:
            left = str(max(5.0, 0.7 * min(limit, end - time.monotonic())))
            stage(f"case {case}", [*this, "--case", json.dumps(case), "--seconds", left], limit)

    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    built = not build or stage("build", install, 150)
    with contextlib.nullcontext() if built else kernels_in_place(ROOT):
        stage("doctor", [sys.executable, "-c", DOCTOR], 60)
        cases(FIRST[:1] if rehearse else FIRST, 100)
        stage("sweep", [*this, "--sweep", json.dumps(SHORT_SWEEP if rehearse else SWEEP)], 90)
        found = device_tests()
        chosen = [t for t in found if "policy_op" in t] if rehearse else found
        left = str(max(5.0, min(patience * 120, end - time.monotonic()) - 5))  # it ends by itself, with its results
        stage("tests", [*this, "--tests", json.dumps(chosen), "--seconds", left], 120)
        cases([BROKEN] if rehearse else TELLING)
        for trainer in ("grpo", "ppo", "dpo"):
            stage(f"trainer {trainer}", [*this, "--trainer", trainer], 75)
        cases([] if rehearse else REST)
    return _finish(output, device, stages)


@contextlib.contextmanager
def kernels_in_place(root: Path) -> Iterator[None]:
    """After a build that failed: Triton kernels inside the checkout's package, where only an install puts them."""
    print("the build failed, see visit.log: Triton from the checkout, C++ and CUDA if built before", flush=True)
    link = root / "rlhf_fast" / "kernels"
    if link.is_symlink():  # a visit before this one was killed
        link.unlink()
    link.symlink_to(root / "kernels")
    try:
        yield
    finally:
        link.unlink()


def device_tests() -> list[str]:
    """The test files that have a test which runs on the device: one that takes the fixture of that name."""
    taking = re.compile(r"^def test\w*\([^)]*\bdevice\b", re.MULTILINE)
    return [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if taking.search(path.read_text())]


def _stage(name: str, command: list[str], output: Path, end: float, limit: float) -> dict[str, Any]:
    """Run a command within its limit and what is left of the visit; its words go to a log."""
    left = end - time.monotonic()
    if left < 5:
        return {"stage": name, "status": "no time left", "seconds": 0.0}
    start = time.monotonic()
    with (output / "visit.log").open("a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # peers may stand there
        environment = os.environ | {"PYTHONPATH": path}
        where = dict(cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        with subprocess.Popen(command, start_new_session=True, **where) as process:
            try:
                code = process.wait(min(limit, left))
                status = "ok" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                status = "time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started would disturb the next stage
    seconds = time.monotonic() - start
    print(f"{seconds:6.1f} s  {status:16} {name}", flush=True)
    return {"stage": name, "status": status, "seconds": round(seconds, 1)}


# ---- stages, each in its own process ----------------------------------------------------------------------


def _one_case(
    output: Path, device: str, seconds: float, op: str, shape: str, dtype: str, zero: float, out: float
) -> int:
    """One row of the table; an op that does not exist is the rehearsal's broken one."""
    from rlhf_fast.benchmarks import cases, suite

    shape = "tiny" if device == "cpu" else shape
    case = cases.Case(op, cases.parse_shape(shape, op), dtype, zero, device, out)
    some = {"providers": ("rlhf_fast", "torch")} if device == "cpu" else {}
    return _save(output, suite.run([case], suite.Options(seconds=seconds, budget=3.0, **some)))


def _tests(output: Path, files: list[str], seconds: float) -> int:
    """The test files at the same time, a process each: most of their time is compilation. A row for each file goes to
    tests.jsonl as it ends, or as it is stopped after `seconds`, with what had passed and failed by then."""
    end, running = time.monotonic() + seconds, {}
    pytest = [sys.executable, "-u", "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "--no-header", "--on-device"]
    (output / "tests").mkdir(exist_ok=True)
    for file in files:
        log = output / "tests" / f"{Path(file).stem}.log"
        with log.open("w") as words:
            running[log] = subprocess.Popen([*pytest, file], stdout=words, stderr=subprocess.STDOUT)
    codes = []
    while running:
        late = time.monotonic() > end
        for log, process in list(running.items()):
            if process.poll() is None and not late:
                continue
            process.kill()
            code = process.wait()
            codes.append(code)
            status = "time limit" if code == -signal.SIGKILL and late else "ok" if code == 0 else f"exit status {code}"
            _report_tests(output, log, status)
            del running[log]
        time.sleep(0.2)
    return int(any(codes))


def _report_tests(output: Path, log: Path, status: str) -> None:
    """The row of one test file, and the tail of its log."""
    words = log.read_text(errors="replace")
    counted = Counter(re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", words, re.MULTILINE))
    row = {"file": f"{log.stem}.py", "status": status, **{k.lower(): counted[k] for k in sorted(counted)}}
    with (output / "tests.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"---- {row}\n{words[-3000:]}", flush=True)


def _sweep(output: Path, device: str, options: dict[str, Any]) -> int:
    """Every op against fp64, ours and the naive expression alone."""
    from rlhf_fast.benchmarks import cases, suite

    todo = cases.make_cases(cases.OPS, device=device, **options)
    return _save(output, suite.run(todo, suite.Options(("rlhf_fast", "torch"), 1, warmup=1, memory=False)))


def _save(output: Path, rows: list) -> int:
    with (output / "rows.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps(row.asdict()) + "\n")
    ours = [row for row in rows if row.provider.startswith("rlhf_fast") or row.provider == "all"]
    return int(any(row.status in ("failed", "wrong") for row in ours))


def _trainer(output: Path, device: str, name: str, rehearse: bool) -> int:
    """A short run end to end on the device, its SFT on the CPU; its numbers go to trainer-NAME.json."""
    if name in RUNS:
        from rlhf_fast.cli.demos import load_demo

        overrides = {} if device == "cpu" else {"use_cpu": False, "bf16": True}
        with tempfile.TemporaryDirectory() as folder:
            run = (REHEARSED if rehearse else RUNS)[name]
            found = load_demo(name)(folder, **run, overrides=overrides, quiet=True)
    else:
        from rlhf_fast.benchmarks import dpo_step

        found = dpo_step.run(rounds=1, steps=1 if rehearse else 6, device=device)
    (output / f"trainer-{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(json.dumps(found, indent=1, default=str))
    return 0


# ---- the record -------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows that were written whole: a stage's time may be up in the middle of one."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"a row was not written whole: {line[:80]}")
    return found


def _finish(output: Path, device: str, stages: list[dict[str, Any]]) -> int:
    from rich.console import Console

    from rlhf_fast.benchmarks import report
    from rlhf_fast.benchmarks.suite import Row

    rows = [Row(**row) for row in _lines(output / "rows.jsonl")]
    large = [row for row in rows if not (row.shape.startswith(("tiny", "small")) and device == "cuda")]
    info = report.environment(device)
    tests = _lines(output / "tests.jsonl")
    trainers = {path.stem: json.loads(path.read_text()) for path in output.glob("trainer-*.json")}
    try:
        report.save(output, "visit", info, rows, {"stages": stages, "tests": tests, **trainers}, drawn=large)
    except Exception as error:  # the plot comes last, and JSON and CSV are there
        print(f"not all of visit.* was written: {type(error).__name__}: {error}")
    console = Console(width=140)
    console.print(report.hardware_line(info))
    for row in rows:  # short: what a terminal's last lines can hold
        best = row.ratio is not None and row.ratio < 1 and row.provider != "limit"
        told = row in large and (row.provider in ("limit", "rlhf_fast") or best)
        if row.status in ("wrong", "failed") or told:
            ms = "" if row.ms is None else f"{row.ms:9.3f} ms {row.x_limit:6.2f} x limit {row.extra_mb or 0:8.0f} MB"
            console.print(f"{row.case:52} {row.provider:14} {ms} {row.status} {row.reason}")
    for name, found in trainers.items():
        brief = {k: v for k, v in found.items() if isinstance(v, (int, float, str))}
        console.print(name, json.dumps(brief | found.get("rlhf_fast", {}))[:400])
    checked = [row for row in rows if row.provider == "rlhf_fast"]
    right = sum(row.status in ("ok", "loose") for row in checked)
    failed = [s for s in stages if s["status"] != "ok"]
    console.print(f"{right} of {len(checked)} of our rows right")
    counts = Counter({k: sum(row.get(k, 0) for row in tests) for k in ("passed", "failed", "error", "skipped")})
    console.print(f"tests: {dict(counts)}; files not ok: {[r for r in tests if r['status'] != 'ok'] or 'none'}")
    console.print(f"stages not ok: {[s['stage'] for s in failed] or 'none'}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

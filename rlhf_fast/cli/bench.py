"""`rlhf-fast bench`: a fair table on your machine, with every peer that is installed beside us."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

STEPS = {
    "grpo_step": "a GRPO step beside TRL's GRPOTrainer",
    "ppo_step": "a PPO step beside a plain loop in torch and transformers (TRL 1.16 has no PPO)",
    "dpo_step": "a DPO step beside TRL's DPOTrainer",
    "context": "the longest sequence of a DPO pair in a given memory, beside TRL's DPOTrainer",
}
DEFAULT_OPS = ["grpo", "policy", "gae"]
OP_HELP = f"An op, `all`, {', '.join(STEPS)}; may be repeated."
ZERO_HELP = "Share of rows without a gradient (zero advantages); may be repeated."
MASKED_HELP = "Share of tokens that do not count; may be repeated."
COMPARE = "compare"


def bench(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[compare A.json B.json]", help="Compare two saved runs.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help=OP_HELP)] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="A name, NAME@N, N,D,V or BxT; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="fp32, bf16 or fp16; may be repeated.")] = None,
    providers: Annotated[str | None, typer.Option("--providers", help="Comma-separated; default: all.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; the median counts.")] = 5,
    budget: Annotated[float, typer.Option("--budget", min=0, help="Seconds of a provider's rounds a case.")] = 5.0,
    zero_rows: Annotated[list[float] | None, typer.Option("--zero-rows", min=0, max=1, help=ZERO_HELP)] = None,
    masked: Annotated[list[float] | None, typer.Option("--masked", min=0, max=0.99, help=MASKED_HELP)] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Memory in a process a provider: slow, the first call's too.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: cuda if there.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON, CSV and PNG.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show ops, shapes and providers.")] = False,
) -> None:
    """Measure the kernels against the machine's limits and against other libraries.

    Every provider gets the same inputs, is checked against fp64 before it is timed, and takes turns with the others.
    Without options: the main ops at the shape that suits the device, in a few minutes. `--op all` takes its time.
    """
    if words:
        return _compare(words)
    if list_:
        return _list()
    import torch

    from rlhf_fast.benchmarks import cases, report, suite

    device = _device(device)
    ops = _chosen("op", op or DEFAULT_OPS, [*cases.OPS, *STEPS])
    dtypes = _chosen("dtype", dtype or (["bf16"] if device == "cuda" else ["fp32", "bf16"]), list(cases.DTYPES))
    shapes = shape or ["qwen2.5-0.5b" if device == "cuda" else "cpu"]
    options = suite.Options(_providers(providers), rounds, memory=memory, fresh=fresh, budget=budget)
    kernels = [name for name in ops if name not in STEPS]
    todo = list(cases.make_cases(kernels, shapes, dtypes, zero_rows or [0.0], masked or [0.0], device))
    if kernels and not todo:
        raise ValueError(f"no op of {', '.join(kernels)} has a shape among {', '.join(shapes)}")
    info = report.environment(device)
    console, status = _console()
    console.print(report.hardware_line(info))
    rows, extra = [], {}
    with status:
        for case in todo:
            rows += (done := suite.run([case], options, status.update))
            for table in report.tables(done):
                console.print(table)
        for step in (name for name in STEPS if name in ops):
            module = importlib.import_module(f"rlhf_fast.benchmarks.{step}")
            extra[step] = module.run(rounds=rounds, notify=status.update)
            console.print(module.table(extra[step]))
    if output is not None:
        name = f"{datetime.now():%Y-%m-%d_%H%M%S}_{device if device == 'cpu' else torch.cuda.get_device_name(0)}"
        for path in report.save(output, name.replace(" ", "-"), info, rows, extra):
            console.print(f"wrote {path}")
    if any(row.provider.startswith("rlhf_fast") and row.status in ("wrong", "failed") for row in rows):
        raise typer.Exit(1)


def _compare(words: Sequence[str]) -> None:
    from rlhf_fast.benchmarks import report

    if words[0] != COMPARE or len(words) != 3:
        raise ValueError(f"expected no arguments or `{COMPARE} A.json B.json`, got {' '.join(words)!r}")
    (info_a, a), (info_b, b) = (report.load(Path(word)) for word in words[1:])
    console, _ = _console()
    for name, info in (("A", info_a), ("B", info_b)):
        console.print(f"{name}: {report.hardware_line(info)}")
    table, change = report.compare(a, b)
    if not change:
        raise ValueError("the two runs have no row in common")
    console.print(table)


def _list() -> None:
    from rlhf_fast.benchmarks.cases import OPS, SHAPES, TOKENS
    from rlhf_fast.benchmarks.providers import PROVIDERS

    for op in OPS.values():
        typer.echo(f"op        {op.name:18} {op.about}")
    for step, about in STEPS.items():
        typer.echo(f"op        {step:18} {about}")
    for shape in SHAPES.values():
        cap = f", soft cap {shape.softcap:g}" if shape.softcap else ""
        typer.echo(f"shape     {shape.name:18} N={shape.n}, D={shape.d}, V={shape.v}{cap}")
    for shape in TOKENS.values():
        typer.echo(f"tokens    {shape.name:18} {shape.n // shape.length} sequences of {shape.length}")
    for provider in PROVIDERS.values():
        typer.echo(f"provider  {provider.name:18} {provider.about}")


def _device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU")
    return device


def _providers(text: str | None) -> tuple[str, ...]:
    from rlhf_fast.benchmarks.providers import PROVIDERS

    if text is None:
        return tuple(PROVIDERS)
    return tuple(_chosen("providers", [name.strip() for name in text.split(",")], list(PROVIDERS)))


def _chosen(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    if "all" in names:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


def _console():
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    return console, console.status("")

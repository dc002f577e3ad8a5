"""`rlhf-fast doctor`: what this installation has, what each op runs on, and what is lost without the rest."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "trl", "flash-attn")
LOST = {
    "_C": "on the CPU, log-probabilities and advantages run in plain torch: several times slower, more memory. "
    "Install a C++ compiler, then install rlhf-fast again",
    "_cuda": "on the GPU, GAE, whitening and group statistics run in plain torch. Install nvcc, then install "
    "rlhf-fast again with RLHF_FAST_CUDA=on",
    "triton": "on the GPU, log-probabilities and policy losses run in plain torch: slower, more memory. Install triton",
}


def collect() -> dict[str, Any]:
    """Everything `doctor` shows, as plain data."""
    import torch

    from rlhf_fast import _backend

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    report: dict[str, Any] = {
        "versions": {"rlhf-fast": _version("rlhf-fast"), "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "cpu": {"machine": platform.machine(), "threads": _backend.num_threads(), "isa": None, "openmp": None},
        "gpu": [_gpu(torch, i) for i in range(torch.cuda.device_count())] if "cuda" in kinds else [],
        "extensions": {name: _backend.unavailable_reason(name) or "present" for name in ("_C", "_cuda")},
        "requested_backend": _backend.requested_backend(),
        "backends": {op: {kind: _chosen(_backend, kind, op) for kind in ("cpu", "cuda")} for op in _backend.OPS},
    }
    if _backend.cpp_available():
        module = _backend.cpp_module()
        report["cpu"].update(isa=module.isa(), openmp=module.openmp)
    elif report["extensions"]["_C"] == "present":
        report["extensions"]["_C"] = "out of date: install rlhf-fast again"
    missing = [name for name, state in report["extensions"].items() if state != "present"]
    missing += [] if _backend.triton_available() else ["triton"]
    report["lost"] = {name: LOST[name] for name in missing}
    return report


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions, hardware, compiled parts and the backend of each op."""
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _chosen(backend: Any, kind: str, op: str) -> str:
    try:
        return backend.backend(kind, op)
    except (RuntimeError, ValueError) as error:  # RLHF_FAST_BACKEND asks for what cannot run here
        return f"error: {error}"


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    cpu = report["cpu"]
    rows = [(name, version or "[yellow]not installed[/]") for name, version in report["versions"].items()]
    rows.append(("CPU", f"{cpu['machine']}, {cpu['threads']} threads, kernels: {cpu['isa'] or 'none'}"))
    rows.append(("OpenMP", {True: "yes", False: "no: std::thread", None: "-"}[cpu["openmp"]]))
    for gpu in report["gpu"]:
        rows.append(("GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"))
    if not report["gpu"]:
        rows.append(("GPU", "none that torch can use"))
    rows += [(f"rlhf_fast.{name}", state) for name, state in report["extensions"].items()]
    if report["requested_backend"]:
        rows.append(("RLHF_FAST_BACKEND", report["requested_backend"]))
    installation = Table(title="Installation", show_header=False)
    for row in rows:
        installation.add_row(*row)
    console.print(installation)

    ops = Table("op", "cpu", "cuda", title="Backend of each op")
    for op, chosen in report["backends"].items():
        ops.add_row(op, chosen["cpu"], chosen["cuda"])
    console.print(ops)
    for name, loss in report["lost"].items():
        console.print(f"[yellow]Without {name}:[/] {loss}.")

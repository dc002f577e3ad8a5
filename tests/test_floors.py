"""Imports go down only: every import of the package, read from the source, against the floors of the design.

0  kernels, reference, types     1  _checks, _backend, packing     2  ops     3  losses
4  trainers, integrations        5  cli, benchmarks
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "rlhf_fast.kernels": 0,
    "rlhf_fast.reference": 0,
    "rlhf_fast.types": 0,
    "rlhf_fast._checks": 1,
    "rlhf_fast._backend": 1,
    "rlhf_fast._backend_policy": 1,
    "rlhf_fast._backend_scans": 1,
    "rlhf_fast._backend_divergence": 1,
    "rlhf_fast._C": 1,
    "rlhf_fast._cuda": 1,
    "rlhf_fast.packing": 1,
    "rlhf_fast.ops": 2,
    "rlhf_fast.losses": 3,
    "rlhf_fast": 3,  # the package itself: the public ops and losses
    "rlhf_fast.trainers": 4,
    "rlhf_fast.integrations": 4,
    "rlhf_fast.cli": 5,
    "rlhf_fast.__main__": 5,
    "rlhf_fast.benchmarks": 5,
}
# What each floor may import from elsewhere, beyond the standard library; None: anything.
OUTSIDE = {0: {"torch"}, 1: {"torch"}, 2: {"torch"}, 3: {"torch"}, 4: None, 5: None}


def sources() -> dict[str, str]:
    """Module name -> source, with kernels/ under the name it is installed as."""
    found = {}
    for folder, package in (("rlhf_fast", "rlhf_fast"), ("kernels", "rlhf_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts])] = path.read_text()
    return found


def floor_of(module: str) -> int | None:
    """The floor of the longest listed prefix; None outside the package."""
    while module:
        if module in FLOORS:
            return FLOORS[module]
        module = module.rpartition(".")[0]
    return None


def imports(module: str, source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import, inside functions too, relative and by name at run time."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in known or name in FLOORS else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def breaches(modules: dict[str, str]) -> list[str]:
    """One line for each import that goes up, or outside what its floor may use."""
    found = []
    known = {name.removesuffix(".__init__") for name in modules}
    for module, source in modules.items():
        home = floor_of(module)
        for line, target in imports(module, source, known):
            where = f"{module}:{line} imports {target}"
            floor = floor_of(target)
            if floor is None:
                allowed = OUTSIDE[home]
                top = target.partition(".")[0]
                if module.startswith("rlhf_fast.kernels") or (module == "rlhf_fast._backend" and home == 1):
                    allowed = {"torch", "triton"}
                if allowed is not None and top not in allowed | sys.stdlib_module_names:
                    found.append(f"{where}: floor {home} uses {', '.join(sorted(allowed))} alone")
            elif module != "rlhf_fast.__init__" and floor > home:
                found.append(f"{where}: from floor {home} up to {floor}")
            elif module.startswith("rlhf_fast.kernels") and not target.startswith("rlhf_fast.kernels"):
                found.append(f"{where}: kernels stand alone")
            if target in ("rlhf_fast._C", "rlhf_fast._cuda") and module != "rlhf_fast._backend":
                found.append(f"{where}: only _backend opens the compiled modules")
            inner = module.startswith(("rlhf_fast.kernels", "rlhf_fast.ops", "rlhf_fast.benchmarks"))
            if target.startswith("rlhf_fast.kernels") and not inner:
                found.append(f"{where}: only ops use the kernels")
    return found


def test_imports_go_down_only():
    modules = sources()
    assert len(modules) > 20
    assert not breaches(modules), "\n".join(breaches(modules))


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("rlhf_fast.ops.gae", "from rlhf_fast.trainers import sft", "up to 4"),
        ("rlhf_fast.ops.gae", "from ..losses import policy", "up to 3"),
        ("rlhf_fast.ops.gae", "from .. import losses", "up to 3"),
        ("rlhf_fast.ops.gae", "def f():\n    import rlhf_fast.cli.main", "up to 5"),
        ("rlhf_fast.ops.gae", "from rlhf_fast import gae", "up to 3"),
        ("rlhf_fast.ops.gae", "import transformers", "torch alone"),
        ("rlhf_fast.ops.gae", "from rlhf_fast import _C", "only _backend"),
        ("rlhf_fast.ops.gae", "importlib.import_module('rlhf_fast._cuda')", "only _backend"),
        ("rlhf_fast.losses.policy", "import triton.language as tl", "torch alone"),
        ("rlhf_fast.losses.policy", "from rlhf_fast.kernels import row_pass", "only ops"),
        ("rlhf_fast.kernels.row_pass", "from rlhf_fast.types import LogProb", "stand alone"),
        ("rlhf_fast.reference.value", "from rlhf_fast import _backend", "up to 1"),
    ],
)
def test_a_planted_breach_is_found(module, line, complaint):
    modules = {"rlhf_fast.kernels.row_pass": "", "rlhf_fast.trainers.sft": "", "rlhf_fast.losses.policy": ""}
    found = breaches({**modules, module: line})
    assert len(found) == 1
    assert complaint in found[0]


def test_what_may_go_down_is_let_through():
    good = {
        "rlhf_fast.kernels.row_pass": "import triton\nfrom ._common import block\nimport torch",
        "rlhf_fast.ops.rows": "import math, torch\nfrom rlhf_fast import _backend\nfrom ..kernels import row_pass",
        "rlhf_fast.trainers.sft": "import transformers\nfrom rlhf_fast import fused_linear_loss\nfrom . import data",
        "rlhf_fast.cli.main": "from rlhf_fast.trainers.sft import train",
    }
    assert not breaches(good)


def test_import_needs_torch_alone():
    optional = ["triton", "transformers", "accelerate", "peft", "datasets", "trl", "numpy", "matplotlib", "yaml"]
    code = f"""
import sys, torch
before = set(sys.modules)
import rlhf_fast
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert not new & set({optional!r}), new & set({optional!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)

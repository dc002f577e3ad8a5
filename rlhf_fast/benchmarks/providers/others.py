"""Cut Cross-Entropy, quack, verl."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import Tensor

from rlhf_fast.benchmarks.cases import Case
from rlhf_fast.benchmarks.inputs import Inputs
from rlhf_fast.benchmarks.providers.base import (
    Builder,
    EntropyFn,
    LogprobFn,
    Provider,
    Step,
    Unavailable,
    head_ops,
    ignoring,
    load,
    logits_ops,
    needs_gpu,
    no_softcap,
    scalar,
)

# ---- Cut Cross-Entropy ------------------------------------------------------------------------------------


def _cce(impl: str) -> dict[str, Builder]:
    def get(case: Case) -> Callable:
        if impl == "cce":
            needs_gpu(case)
        if impl == "cce" and case.dtype == "fp32":
            raise Unavailable("takes 16-bit inputs only")
        fn, softcap = load("cut_cross_entropy").linear_cross_entropy, case.shape.softcap
        return lambda *args, reduction: fn(*args, reduction=reduction, impl=impl, softcap=softcap)

    def logprob(case: Case) -> LogprobFn:
        fn = get(case)
        return lambda *args: -fn(*args, reduction="none")

    def cross_entropy(case: Case, x: Inputs) -> Step:
        fn = get(case)
        return scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target, reduction="mean"))

    return head_ops(logprob) | {"cross_entropy": cross_entropy}


# ---- quack ------------------------------------------------------------------------------------------------


def _quack_cross_entropy(case: Case, x: Inputs) -> Step:
    needs_gpu(case, "CuTe kernels")
    no_softcap(case)
    fn = load("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return scalar(case, x, lambda hidden, weight: fn(hidden, weight, x.target))


def _quack_from_logits(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    needs_gpu(case, "CuTe kernels")
    fn = load("quack.cross_entropy").cross_entropy
    return lambda logits, target: -fn(logits, target, reduction="none")


# ---- verl -------------------------------------------------------------------------------------------------


def _verl_module(name: str) -> ModuleType:
    """A module of verl. Without all that the package itself imports (ray), its folders stand in for it meanwhile."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pass
    spec = importlib.util.find_spec("verl") if "verl" not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("cannot import verl: it is not installed")
    root, before = Path(next(iter(spec.submodule_search_locations))), set(sys.modules)
    try:
        for parent, folder in (("verl", root), ("verl.utils", root / "utils")):
            sys.modules[parent] = shell = ModuleType(parent)
            shell.__path__ = [str(folder)]
        return load(name)
    finally:
        for added in set(sys.modules) - before:
            if added.split(".")[0] == "verl":
                del sys.modules[added]


def _verl_head(case: Case) -> EntropyFn:
    no_softcap(case)
    return ignoring(_verl_module("verl.utils.experimental.torch_functional").FusedLinearForPPO())


def _verl_kernel(case: Case) -> EntropyFn:
    needs_gpu(case)
    no_softcap(case)
    fn = _verl_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return ignoring(lambda hidden, weight, target: fn(hidden, weight, target, 1.0, "none"))


def _first(get: Callable[[Case], EntropyFn]) -> Callable[[Case], LogprobFn]:
    def logprob(case: Case) -> LogprobFn:
        fn = get(case)
        return lambda *args: fn(*args)[0]

    return logprob


PROVIDERS = [
    Provider("cce", "Cut Cross-Entropy", _cce("cce")),
    Provider("cce-compile", "Cut Cross-Entropy's torch_compile", _cce("torch_compile")),
    Provider(
        "quack",
        "quack's chunked linear cross-entropy and cross-entropy",
        {"cross_entropy": _quack_cross_entropy} | logits_ops(_quack_from_logits),
    ),
    Provider("verl", "verl's FusedLinearForPPO", head_ops(_first(_verl_head), _verl_head)),
    Provider("verl-kernel", "verl's Triton linear cross-entropy", head_ops(_first(_verl_kernel), _verl_kernel)),
]

"""The public surface: what `import rlhf_fast` brings, that every op has its oracle, that the examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast
from rlhf_fast import reference
from rlhf_fast.losses import preference_kinds, registry

NOT_OPS = ("register", "options")
OPS = [
    name
    for name in rlhf_fast.__all__
    if inspect.isfunction(getattr(rlhf_fast, name)) and not any(part in name for part in NOT_OPS)
]


def test_import_needs_torch_alone():
    """Nothing that is not torch's own may be imported; checked in a process of its own."""
    code = (
        "import sys, torch; before = set(sys.modules); import rlhf_fast; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "heavy = {'triton', 'transformers', 'accelerate', 'matplotlib', 'typer', 'rich', 'trl', 'datasets'}; "
        "print(sorted(new & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_oracle(name):
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", OPS)
def test_docstrings_are_complete_and_their_examples_run(name):
    fn = getattr(rlhf_fast, name)
    for part in (
        "Args:",
        "Returns:" if name != "entropy_from_logits" else "Args:",
        "Raises:",
        "Source:",
        "Notes:",
        "Example:",
    ):
        assert part in fn.__doc__, f"{name} has no {part}"
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    names = {**vars(rlhf_fast), "torch": torch}
    test = doctest.DocTestParser().get_doctest(fn.__doc__, names, name, None, None)
    assert test.examples
    result = runner.run(test)
    assert result.failed == 0


@pytest.mark.parametrize("name", OPS)
def test_annotations_on_public_functions(name):
    signature = inspect.signature(getattr(rlhf_fast, name))
    assert signature.return_annotation is not inspect.Signature.empty
    missing = [p for p, q in signature.parameters.items() if q.annotation is inspect.Parameter.empty]
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize(
    "module", ["losses.variants", *(f"reference.{m.name}" for m in pkgutil.iter_modules(reference.__path__))]
)
def test_annotations_of_formulas(module):
    """Of every public function there: these are what people read, and write their own after."""
    module = importlib.import_module(f"rlhf_fast.{module}")
    here = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    functions = [f for f in here if not f.__name__.startswith("_")]
    assert functions
    for function in functions:
        untyped = {*inspect.signature(function).parameters, "return"} - set(function.__annotations__)
        assert not untyped, f"{function.__name__}: {untyped}"


SOURCE = Path(rlhf_fast.__file__).parent
EXAMPLES = [p.relative_to(SOURCE).with_suffix("") for p in sorted(SOURCE.rglob("*.py")) if ">>> " in p.read_text()]
NEEDS = {"trainers": "transformers", "integrations": "transformers"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.as_posix())
def test_every_example_runs(path, monkeypatch, tmp_path):
    """Of all modules, not of the public ops alone: classes, registration, trainers, integrations."""
    if path.parts[0] in NEEDS:
        pytest.importorskip(NEEDS[path.parts[0]])
    monkeypatch.chdir(tmp_path)
    for module in (preference_kinds, registry):  # what an example registers is gone after it
        monkeypatch.setattr(module, "_VARIANTS", dict(module._VARIANTS))
    module = importlib.import_module(".".join(("rlhf_fast", *path.parts)))
    names = {name: getattr(rlhf_fast, name) for name in rlhf_fast.__all__} | {"torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    tests = [t for t in doctest.DocTestFinder().find(module, extraglobs=names) if t.examples]
    assert tests
    assert sum(runner.run(t).failed for t in tests) == 0


def test_the_table_of_pitfalls_names_tests_that_exist():
    folder = Path(__file__).parent
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", (folder / "README.md").read_text())
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (folder / file).read_text()]
    assert missing == []

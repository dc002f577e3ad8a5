"""Hosts for the integration tests: their own source files, without the engines around them.

A host is taken from the environment if it is installed there, else from a folder of unpacked wheels: the environment's
own `hosts`, which `make test` fills with what hosts.txt names, or the one that RLHF_FAST_HOSTS names.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from packaging.specifiers import SpecifierSet


class _Stub(ModuleType):
    """A module that has everything and does nothing."""

    __path__: list[str] = []
    __version__ = "0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Stubs:
    """Finder and loader of stubs for every module under some names."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def find_spec(self, name: str, path=None, target=None):
        if any(f"{known}.".startswith(f"{name}.") or name.startswith(f"{known}.") for known in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def stubbed(names: Sequence[str]) -> Iterator[None]:
    """Modules that are not installed can be imported inside the block, and do nothing."""
    missing = [n for n in names if n not in sys.modules and importlib.util.find_spec(n.partition(".")[0]) is None]
    finder = _Stubs(missing)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for key in [k for k, m in sys.modules.items() if isinstance(m, _Stub)]:
            del sys.modules[key]


@contextmanager
def instead(replaced: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside the block, stubs in the place of installed packages, with the given attributes by module name."""
    tops = {name.partition(".")[0] for name in replaced}
    kept = {k: m for k, m in sys.modules.items() if k.partition(".")[0] in tops}
    for key in kept:
        del sys.modules[key]
    for name, attributes in replaced.items():
        sys.modules[name] = module = _Stub(name)
        vars(module).update(attributes)
    try:
        yield
    finally:
        for key in [k for k in sys.modules if k.partition(".")[0] in tops]:
            del sys.modules[key]
        sys.modules.update(kept)


@contextmanager
def host(
    name: str,
    modules: Sequence[str],
    stubs: Sequence[str] = (),
    replaced: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[list[ModuleType]]:
    """The host's own modules, imported with stubs in the place of what is not installed, or is another version than it
    wants (`replaced`). Skips without the host, and where it does not serve this Python.
    """
    folders: list[str] = []
    if importlib.util.find_spec(name) is None:
        folder = Path(os.environ.get("RLHF_FAST_HOSTS") or Path(sys.prefix, "hosts"))
        roots = [folder, *folder.glob("*.data/purelib")]  # a wheel for one platform keeps its sources there
        if not any((root / name / "__init__.py").is_file() for root in roots):
            pytest.skip(f"{name} is neither installed nor in {folder}: `make test` fetches it, given a network")
        folders = [str(root) for root in roots]
        sys.path[:0] = folders
        importlib.invalidate_caches()
    try:
        wants = importlib.metadata.metadata(name).get("Requires-Python", "")
        if platform.python_version() not in SpecifierSet(wants):
            pytest.skip(f"{name} needs Python {wants}")
        with stubbed(stubs), instead(replaced or {}):
            found = [importlib.import_module(module) for module in modules]
        yield found
    finally:
        if folders:
            sys.path[:] = [entry for entry in sys.path if entry not in folders]
            for key in [k for k in sys.modules if k == name or k.startswith(name + ".")]:
                del sys.modules[key]

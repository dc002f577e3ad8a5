"""Putting our functions in the place of a host's, and taking them back: the part that all hosts share.

A `Patch` is a list of changes to a host package. Everything is checked before anything is changed: the host's version,
the signature of each symbol, and that the symbol is still the host's own. What does not match is refused with
`PatchError`; a host is never patched blindly or half.

    PATCH = Patch("openrlhf", ">=0.11,<0.12", [Replace("openrlhf.models.loss", "PolicyLoss", new=..., signatures=...)])
    PATCH.apply()                 # until PATCH.undo()
    with PATCH.apply(): ...       # or inside the block
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class PatchError(RuntimeError):
    """The host is not what the patch was written for; nothing has been changed."""


@dataclass
class Replace:
    """One symbol of the host replaced, in its own module and wherever the host has imported it by name.

    Args:
        module: where the host defines it, "package.module".
        name: "function", "Class", or "Class.method".
        new: what takes its place. Called as the host calls the old one.
        signatures: what the symbol must look like, without annotations: {"": "(logits, labels, temperature=1.0)"} for
            the symbol itself, {"forward": "(self, x)"} for a member of it; a tuple where several are served.
        origin: prefix of the module that the symbol says it comes from; `module` by default. A symbol that comes from
            elsewhere has been patched by somebody else.
    """

    module: str
    name: str
    new: Any
    signatures: Mapping[str, str | tuple[str, ...]]
    origin: str | None = None
    _old: Any = field(default=None, init=False, repr=False)

    def check(self) -> None:
        """Raise PatchError unless the symbol is the host's own and has an expected signature."""
        old = self._current()
        plain = getattr(old, "__func__", old)
        came_from = getattr(plain, "__module__", None) or ""
        if not came_from.startswith(self.origin or self.module):
            raise PatchError(
                f"{self} has been replaced by somebody else already: it comes from {came_from or repr(old)}. Undo that "
                "patch first"
            )
        _check_signatures(plain, str(self), self.signatures)

    def apply(self) -> None:
        """Put the new symbol in."""
        self._old = self._current()
        for owner, name in self._holders(self._old):
            setattr(owner, name, self.new)

    def check_ours(self) -> None:
        """Raise PatchError when somebody else has replaced the symbol since."""
        current = self._current()
        if current is not self.new:
            came_from = getattr(current, "__module__", None) or repr(current)
            raise PatchError(f"{self} has been replaced again since, by {came_from}: undo that patch first")

    def undo(self) -> None:
        """Put the old symbol back, wherever the host holds the new one by now."""
        for owner, name in self._holders(self.new):
            setattr(owner, name, self._old)
        self._old = None

    @property
    def original(self) -> Any:
        """The host's own, while it is replaced."""
        return self._old

    def _owner(self) -> tuple[Any, str]:
        return _find(self.module, self.name)

    def _current(self) -> Any:
        """As it stands in its owner: a staticmethod stays one."""
        owner, name = self._owner()
        return vars(owner)[name]

    def _holders(self, value: Any) -> Iterator[tuple[Any, str]]:
        """The owner, and every loaded module of the host that holds the value under some name."""
        owner, name = self._owner()
        yield owner, name
        if inspect.isclass(owner):
            return
        host = self.module.partition(".")[0]
        for key, module in list(sys.modules.items()):
            if module is not None and module is not owner and (key == host or key.startswith(host + ".")):
                yield from [(module, n) for n, v in list(vars(module).items()) if v is value]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Expect:
    """A symbol of the host that a replacement relies on: checked as in `Replace`, never changed."""

    module: str
    name: str
    signatures: Mapping[str, str | tuple[str, ...]]

    def check(self) -> None:
        """Raise PatchError unless the symbol has an expected signature."""
        owner, name = _find(self.module, self.name)
        _check_signatures(vars(owner)[name], f"{self.module}.{self.name}", self.signatures)

    def check_ours(self) -> None:
        """Nothing to check."""

    def apply(self) -> None:
        """Nothing to do."""

    def undo(self) -> None:
        """Nothing to do."""


@dataclass
class Register:
    """One entry of a registry of the host: a dict of functions by name.

    Args:
        module, registry: the dict, "package.module" and its name there.
        key, new: the entry.
    """

    module: str
    registry: str
    key: str
    new: Any

    def check(self) -> None:
        """Raise PatchError unless the registry is a dict without that key."""
        found = self._dict().get(self.key)
        if found is not None:
            raise PatchError(f"{self.module}.{self.registry} has an entry {self.key!r} already: {found}")

    def apply(self) -> None:
        """Enter it."""
        self._dict()[self.key] = self.new

    def check_ours(self) -> None:
        """Nothing to check: an entry that is no longer ours is left alone."""

    def undo(self) -> None:
        """Take it out; an entry that somebody else has put in its place stays."""
        if self._dict().get(self.key) is self.new:
            del self._dict()[self.key]

    def _dict(self) -> dict:
        found = getattr(_import(self.module), self.registry, None)
        if not isinstance(found, dict):
            raise PatchError(f"{self.module}.{self.registry} must be a dict, got {found!r}")
        return found


Change = Replace | Register | Expect


class Patch:
    """Changes to one host that are made and taken back together.

    Args:
        host: the distribution's name; its installed version is checked.
        versions: as pip writes them, ">=1.16,<1.20".
        changes: `Replace`s, `Register`s and `Expect`s.
    """

    def __init__(self, host: str, versions: str, changes: Sequence[Change]):
        self.host, self.versions, self.changes = host, versions, list(changes)
        self.active = False

    def apply(self, *, any_version: bool = False) -> Patch:
        """Make all changes, or none.

        Args:
            any_version: leave the judgement to the signatures alone.
        Raises: PatchError when applied twice, on a version outside the range, a symbol that is missing, has another
            signature, or has been replaced by somebody else.
        """
        if self.active:
            raise PatchError(f"{self.host} is patched already: call unpatch() first")
        if not any_version:
            check_version(self.host, self.versions)
        for change in self.changes:
            change.check()
        done: list[Change] = []
        try:
            for change in self.changes:
                change.apply()
                done.append(change)
        except BaseException:
            for change in reversed(done):
                change.undo()
            raise
        self.active = True
        return self

    def undo(self) -> None:
        """Take all changes back. Nothing to do when there are none."""
        if not self.active:
            return
        for change in self.changes:
            change.check_ours()
        for change in reversed(self.changes):
            change.undo()
        self.active = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def check_version(host: str, versions: str) -> None:
    """Raise PatchError unless the installed version of a distribution lies in the range."""
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        raise PatchError(f"{host} is not installed") from None
    if not SpecifierSet(versions, prereleases=True).contains(version):
        raise PatchError(
            f"{host} {version} is outside {versions}, the versions this patch was tried with; any_version=True leaves "
            "it to the signatures"
        )


def _find(module: str, name: str) -> tuple[Any, str]:
    """(owner, attribute) of "Class.method" or "function"; the owner must define it itself."""
    owner: Any = _import(module)
    *classes, attribute = name.split(".")
    for part in classes:
        owner = getattr(owner, part, None)
    if owner is None or attribute not in vars(owner):
        raise PatchError(f"{module}.{name} does not exist")
    return owner, attribute


def _check_signatures(symbol: Any, label: str, signatures: Mapping[str, str | tuple[str, ...]]) -> None:
    for member, expected in signatures.items():
        name = f"{label}.{member}" if member else label
        accepted = (expected,) if isinstance(expected, str) else expected
        if member and not hasattr(symbol, member):
            raise PatchError(f"{name} does not exist")
        got = _signature(getattr(symbol, member) if member else symbol, name)
        if got not in accepted:
            raise PatchError(f"{name} has the signature {got}; this patch knows {' and '.join(accepted)}")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PatchError(f"{module} cannot be imported: {error}") from error


def _signature(function: Any, name: str) -> str:
    """ "(a, b=1, *, c)": names, kinds and defaults without annotations."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise PatchError(f"the signature of {name} cannot be read: {error}") from None
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))

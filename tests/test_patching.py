"""Patching a host: everything checked first, all or nothing, taken back wherever the host has copied it."""

from __future__ import annotations

import importlib
import sys

import pytest

from rlhf_fast.integrations import _patching
from rlhf_fast.integrations._patching import Expect, Patch, PatchError, Register, Replace

SOURCES = {
    "__init__.py": "from hosty.maths import score\n",
    "maths.py": """
REGISTRY = {"own": len}
def score(x: int, scale: float = 1.0) -> float:
    return x * scale
class Loss:
    def __init__(self, eps=0.2):
        self.eps = eps
    def forward(self, x):
        return score(x)
    @staticmethod
    def half(x):
        return x / 2
class Child(Loss):
    pass
""",
    "user.py": "from hosty.maths import Loss, score as renamed\ndef use(x):\n    return renamed(x)\n",
    "late.py": "from hosty.maths import score\n",
}
SCORE = {"": "(x, scale=1.0)"}


def new_score(x, scale=1.0):
    return -x


@pytest.fixture
def host(tmp_path, monkeypatch):
    package = tmp_path / "hosty"
    package.mkdir()
    for name, source in SOURCES.items():
        (package / name).write_text(source)
    info = tmp_path / "hosty-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hosty\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("hosty.user")
    for name in [n for n in sys.modules if n == "hosty" or n.startswith("hosty.")]:
        del sys.modules[name]


def patch(*changes, versions=">=1.2,<2"):
    return Patch("hosty", versions, changes)


def test_every_copy_is_replaced_and_put_back(host):
    import hosty

    own = hosty.score
    with patch(Replace("hosty.maths", "score", new_score, SCORE)):
        pass  # made only by apply
    assert host.use(3) == 3.0
    with patch(Replace("hosty.maths", "score", new_score, SCORE)).apply() as applied:
        assert applied.active
        assert host.use(3) == -3
        assert hosty.score is hosty.maths.score is new_score
        late = importlib.import_module("hosty.late")  # imports the new one by name
        assert late.score is new_score
    assert host.use(3) == 3.0
    assert late.score is hosty.score is hosty.maths.score is own


def test_a_method_of_a_class(host):
    forward = {"": "(self, x)"}
    own = host.Loss.forward
    half = staticmethod(lambda x: -x)
    changes = (
        Expect("hosty.maths", "Loss", {"__init__": "(self, eps=0.2)"}),
        Replace("hosty.maths", "Loss.forward", lambda self, x: self.eps, forward),
        Replace("hosty.maths", "Loss.half", half, {"": "(x)"}),
    )
    with patch(*changes).apply():
        assert changes[1].original is own
        assert host.Loss(0.5).forward(1) == 0.5
        assert host.Loss.half(1) == -1
    assert host.Loss.forward is own
    assert host.Loss.half(1) == 0.5


def test_registries(host):
    import hosty.maths as maths

    with patch(Register("hosty.maths", "REGISTRY", "ours", new_score)).apply():
        assert maths.REGISTRY["ours"] is new_score
    assert list(maths.REGISTRY) == ["own"]
    with pytest.raises(PatchError, match="has an entry 'own' already"):
        patch(Register("hosty.maths", "REGISTRY", "own", new_score)).apply()
    with pytest.raises(PatchError, match=r"hosty\.maths\.score must be a dict"):
        patch(Register("hosty.maths", "score", "x", new_score)).apply()
    applied = patch(Register("hosty.maths", "REGISTRY", "ours", new_score)).apply()
    maths.REGISTRY["ours"] = len  # somebody else's by now
    applied.undo()
    assert maths.REGISTRY.pop("ours") is len


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            Replace("hosty.maths", "score", new_score, {"": "(x)"}),
            r"\(x, scale=1.0\); this patch knows \(x\)",
        ),
        (Replace("hosty.maths", "score", new_score, {"": ("(x)", "(y)")}), r"knows \(x\) and \(y\)"),
        (Replace("hosty.maths", "Loss", object, {"forward": "(self, y)"}), r"Loss\.forward has the signature"),
        (Replace("hosty.maths", "gone", new_score, SCORE), r"hosty\.maths\.gone does not exist"),
        (Replace("hosty.maths", "Loss", object, {"gone": "()"}), r"Loss\.gone does not exist"),
        (Replace("hosty.maths", "Child.forward", new_score, SCORE), r"Child\.forward does not exist"),  # inherited
        (Expect("hosty.maths", "Loss", {"__init__": "(self, eps)"}), r"Loss\.__init__ has the signature"),
        (Replace("hosty.away", "score", new_score, SCORE), r"hosty\.away cannot be imported"),
    ],
)
def test_what_does_not_match_is_refused_and_nothing_is_changed(host, change, complaint):
    attempt = patch(Replace("hosty.maths", "Loss.half", staticmethod(abs), {"": "(x)"}), change)
    with pytest.raises(PatchError, match=complaint):
        attempt.apply()
    assert not attempt.active
    assert host.Loss.half(3) == 1.5


def test_versions(host, monkeypatch):
    replace = Replace("hosty.maths", "score", new_score, SCORE)
    with pytest.raises(PatchError, match=r"hosty 1\.2\.3 is outside >=1\.3, .* any_version=True"):
        patch(replace, versions=">=1.3").apply()
    with patch(replace, versions=">=1.3").apply(any_version=True):
        assert host.use(1) == -1
    with pytest.raises(PatchError, match="nohost is not installed"):
        _patching.check_version("nohost", ">=1")
    monkeypatch.setattr(_patching.importlib.metadata, "version", lambda _: "1.4.0.dev3")
    _patching.check_version("hosty", ">=1.3,<2")  # a development version is in the range too


def test_twice_and_over_one_another(host):
    import hosty.maths as maths

    replace = Replace("hosty.maths", "score", new_score, SCORE)
    first = patch(replace)
    first.undo()  # nothing to take back
    first.apply()
    with pytest.raises(PatchError, match=r"hosty is patched already: call unpatch\(\) first"):
        first.apply()
    with pytest.raises(PatchError, match=r"somebody else already: it comes from test_patching"):
        patch(Replace("hosty.maths", "score", lambda x: x, SCORE)).apply()
    maths.score = len  # somebody patches over ours
    with pytest.raises(PatchError, match=r"replaced again since, by builtins"):
        first.undo()
    maths.score = new_score
    first.undo()
    assert host.use(3) == 3.0


def test_a_change_that_fails_half_way_takes_the_others_back(host, monkeypatch):
    first = Replace("hosty.maths", "score", new_score, SCORE)
    second = Register("hosty.maths", "REGISTRY", "ours", new_score)
    monkeypatch.setattr(second, "apply", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch(first, second).apply()
    assert host.use(3) == 3.0

"""The script of a run on a GPU, rehearsed on the CPU: every stage runs, a broken row costs itself alone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.benchmarks.cases import OPS

VISIT = Path(__file__).parents[1] / "benchmarks" / "gpu_visit.py"


def _visit(folder, *options):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(VISIT), str(folder), "--rehearse", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


def test_rehearsal(tmp_path):
    """Rows of every op are right; the planted stage, and no other, fails; all of it is in the record."""
    pytest.importorskip("transformers")
    done = _visit(tmp_path, "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "visit.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in record["stages"]}
    broken = [name for name in status if "nothing" in name]
    assert [status.pop(name) for name in broken] == ["exit status 1"]
    assert set(status.values()) == {"ok"}, (status, (tmp_path / "visit.log").read_text()[-4000:])
    assert len(status) == 7
    ours = [row for row in record["rows"] if row["provider"] == "rlhf_fast"]
    assert {row["op"] for row in ours} == set(OPS)
    assert all(row["status"] in ("ok", "loose") for row in ours)
    assert [row["file"] for row in record["tests"]] == ["test_policy_op.py"]
    assert record["tests"][0]["status"] == "ok"
    assert record["tests"][0]["passed"] > 5
    assert record["trainer-grpo"]["steps"] == 2
    assert record["trainer-ppo"]["steps"] == 1
    assert record["trainer-dpo"]["rlhf_fast"]["step_seconds"] > 0
    assert f"{len(ours)} of {len(ours)} of our rows right" in done.stdout


def test_without_time_left_there_is_still_a_record(tmp_path):
    done = _visit(tmp_path, "--minutes", "0.2")
    record = json.loads((tmp_path / "visit.json").read_text())
    assert {stage["status"] for stage in record["stages"]} == {"no time left"}
    assert done.returncode == 1


@pytest.fixture
def visit():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_visit", VISIT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_test_file_that_hangs_costs_its_own_rest(visit, tmp_path, capsys):
    """What had ended by the time limit counts, in the other files and in that one."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--on-device', action='count')"
    )
    files = {
        "test_good.py": "def test_one(): pass",
        "test_bad.py": "def test_one(): pass\ndef test_two(): raise KeyError('planted')",
        "test_hangs.py": "import time\ndef test_one(): pass\ndef test_two(): time.sleep(600)",
    }
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    assert visit._tests(tmp_path, [str(tmp_path / name) for name in files], 15.0) == 1
    rows = {row.pop("file"): row for row in visit._lines(tmp_path / "tests.jsonl")}
    assert rows == {
        "test_good.py": {"status": "ok", "passed": 1},
        "test_bad.py": {"status": "exit status 1", "passed": 1, "failed": 1},
        "test_hangs.py": {"status": "time limit", "passed": 1},
    }
    told = capsys.readouterr().out
    assert "KeyError: 'planted'" in told
    assert told.index("test_hangs.py") > max(told.index("test_good.py"), told.index("test_bad.py"))


def test_without_a_build_the_kernels_are_there(visit, tmp_path):
    """In a checkout that nobody has installed; afterwards it is as it was."""
    pytest.importorskip("triton")
    for name in ("rlhf_fast", "kernels"):
        shutil.copytree(VISIT.parents[1] / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in type(f).__module__ + repr(f)];"
        "import rlhf_fast.kernels.row_pass as found; print(found.__file__)"
    )

    def load():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert "No module named 'rlhf_fast.kernels'" in load().stderr
    with visit.kernels_in_place(tmp_path):
        done = load()
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == tmp_path / "rlhf_fast" / "kernels" / "row_pass.py"
    assert not (tmp_path / "rlhf_fast" / "kernels").exists()


def test_a_build_that_fails_costs_itself_alone(visit, tmp_path, monkeypatch):
    """The other stages run, with the kernels in place."""
    ran, linked = [], []

    def stage(name, command, *_):
        ran.append(name)
        linked.append((tmp_path / "rlhf_fast" / "kernels").exists())
        return {"stage": name, "status": "exit status 1" if name == "build" else "ok", "seconds": 1.0}

    for name in ("rlhf_fast", "kernels"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(visit, "ROOT", tmp_path)
    monkeypatch.setattr(visit, "_stage", stage)
    monkeypatch.setattr(visit, "_finish", lambda *_: 0)
    assert visit._visit(tmp_path, "cuda", False, 600.0, build=True) == 0
    assert ran[0] == "build"
    assert len(ran) > 10
    assert linked == [False] + [True] * (len(ran) - 1)
    assert not (tmp_path / "rlhf_fast" / "kernels").exists()

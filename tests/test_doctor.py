"""`rlhf-fast doctor` says what is there, what runs where, and what is lost."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from rlhf_fast import _backend
from rlhf_fast.cli.doctor import collect, doctor


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(doctor)

    def invoke(*args: str) -> str:
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        return result.output

    return invoke


def test_json_report(run):
    report = json.loads(run("--json"))
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["backends"]) == set(_backend.OPS)
    for op, chosen in report["backends"].items():
        assert chosen == {kind: _backend.backend(kind, op) for kind in ("cpu", "cuda")}
    assert len(report["gpu"]) == torch.cuda.device_count()
    if _backend.cpp_available():
        assert report["cpu"]["isa"] == _backend.cpp_module().isa()
        assert "_C" not in report["lost"]


def test_command_line_passes_the_option_on():
    from rlhf_fast.cli.main import app

    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["versions"].keys() >= {"torch", "triton"}


def test_table_names_versions_and_ops(run):
    output = run()
    assert torch.__version__.split("+")[0] in output
    for op in _backend.OPS:
        assert op in output


def test_missing_extensions_are_named_with_their_cost(run, monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda name: (None, "not built in this installation"))
    monkeypatch.setattr(_backend, "triton_available", lambda: False)
    report = json.loads(run("--json"))
    assert set(report["lost"]) == {"_C", "_cuda", "triton"}
    assert report["cpu"]["isa"] is None
    assert {name for chosen in report["backends"].values() for name in chosen.values()} == {"torch"}
    output = " ".join(run().split())
    assert "not built in this installation" in output
    assert "Install a C++ compiler" in output
    assert "Without _cuda" in output


def test_a_backend_that_cannot_run_is_shown_not_raised(run, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cpp")
    report = collect()
    assert report["requested_backend"] == "cpp"
    assert report["backends"]["row_pass"]["cuda"].startswith("error: ")
    run()


def test_gpu_is_described(run, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Test GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert json.loads(run("--json"))["gpu"] == [{"name": "Test GPU", "capability": "9.0", "memory_gib": 80.0}]
    assert "Test GPU, capability 9.0, 80.0 GiB" in run()

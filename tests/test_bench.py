"""The benchmark suite itself: it runs, it rejects wrong results, it sees memory."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from rlhf_fast.benchmarks import cases, measure, memory, providers, report, suite
from rlhf_fast.cli.main import app

QUICK = suite.Options(providers=("rlhf_fast", "torch"), rounds=1, warmup=1, memory=False)


@pytest.mark.parametrize("op", list(cases.OPS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_answers_agree_with_autograd_in_fp64(op, dtype):
    """The suite's own fp64 answer, formed in blocks, is what autograd gives for the plain expression."""
    case = cases.Case(op, cases.SHAPES["tiny"], dtype)
    x = cases.make_inputs(case)
    wide = x._replace(**{k: getattr(x, k).detach().double().requires_grad_() for k in _leaves(x)})
    logits = wide.logits if x.logits is not None else wide.hidden @ wide.weight.t()
    logprob = torch.log_softmax(logits, -1).gather(-1, x.target[:, None])[:, 0]
    loss = cases._objective(case, x)(logprob)
    grads = torch.autograd.grad(loss, wide.leaves)
    names = ("dhidden", "dweight") if x.logits is None else ("dlogits",)
    want = {"logprob": logprob, "loss": loss, **dict(zip(names, grads, strict=True))}
    for name, value in cases.answer(case, x).items():
        torch.testing.assert_close(value, want[name].detach(), rtol=1e-10, atol=1e-12)


def _leaves(x):
    return ("hidden", "weight") if x.logits is None else ("logits",)


def test_blocks_of_rows_change_nothing(monkeypatch):
    case = cases.Case("grpo", cases.SHAPES["tiny"], "fp32")
    x = cases.make_inputs(case)
    whole = cases.answer(case, x)
    monkeypatch.setattr(cases, "BLOCK_BYTES", 7 * 8 * 507)
    for name, value in cases.answer(case, x).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


def _planted(error):
    """Naive torch with `error` applied to its outputs."""

    def build(case, x):
        inner = providers.PROVIDERS["torch"].ops[case.op](case, x)
        return lambda: error(inner())

    return providers.Provider("planted", "", dict.fromkeys(cases.OPS, build))


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (lambda out: out, "ok", ""),
        (lambda out: {**out, "dweight": out["dweight"] * 1.01}, "wrong", "dweight off by"),
        (lambda out: {**out, "logprob": out["logprob"] + 0.01}, "wrong", "logprob off by"),
        (lambda out: {**out, "dhidden": out["dhidden"] * float("nan")}, "wrong", "dhidden off by nan"),
        (lambda out: {**out, "logprob": out["logprob"] + 1e-4}, "loose", "less exact"),
        (lambda out: {**out, "dweight": out["dweight"].t()}, "failed", "dweight must be"),
        (lambda out: 1 / 0, "failed", "ZeroDivisionError"),
    ],
    ids=["right", "gradient", "logprob", "nan", "inexact", "shape", "raises"],
)
def test_wrong_results_are_not_timed(monkeypatch, error, status, reason):
    monkeypatch.setitem(providers.PROVIDERS, "planted", _planted(error))
    options = suite.Options(providers=("planted", "rlhf_fast"), rounds=1, warmup=1, memory=False)
    limit, planted, ours = suite.run_case(cases.Case("logprob_grad", cases.SHAPES["tiny"], "fp32"), options)
    assert planted.status == status
    assert reason in planted.reason
    assert (planted.ms is not None) == (status in ("ok", "loose"))
    assert limit.ms > 0
    assert ours.status == "ok"
    assert ours.ratio == 1


def test_a_broken_case_leaves_a_row_and_the_run_goes_on(monkeypatch):
    make = suite.make_inputs

    def broken(case, seed):
        if case.op == "grpo":
            raise RuntimeError("out of memory")
        return make(case, seed)

    monkeypatch.setattr(suite, "make_inputs", broken)
    todo = [cases.Case(op, cases.SHAPES["tiny"], "fp32") for op in ("grpo", "logprob")]
    rows = suite.run(todo, QUICK)
    assert (rows[0].op, rows[0].status, rows[0].reason) == ("grpo", "failed", "RuntimeError: out of memory")
    assert [r.provider for r in rows[1:]] == ["limit", "rlhf_fast", "torch"]


def test_zero_rows_reach_the_inputs():
    case = cases.Case("grpo", cases.Shape("x", 640, 16, 50), "fp32", zero_rows=0.5)
    assert int((cases.make_inputs(case).advantages == 0).sum()) == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_sees_a_planted_allocation():
    def call():
        scratch = torch.ones(25_000_000)  # 100 MB that are gone when it returns
        return {"out": torch.full((5_000_000,), float(scratch[0]))}  # 20 MB of result do not count

    idle = memory.extra_bytes(lambda: {"out": torch.ones(5_000_000)})
    assert abs(idle) < 8e6
    assert memory.extra_bytes(call) == pytest.approx(100e6, abs=8e6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_provider_in_a_fresh_process():
    """Naive torch keeps logits and log-softmax, (4096, 4096) fp32 each: 134 MB; ours must stay far below."""
    case = cases.Case("logprob_grad", cases.Shape("x", 4096, 16, 4096), "fp32")
    assert memory.in_fresh_process("torch", case).steady > 130e6
    with pytest.raises(memory.Unmeasured, match="KeyError"):
        memory.in_fresh_process("nobody", case)


def test_interleaved_takes_turns(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = measure.interleaved(calls, "cpu", rounds=3)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"  # the first of each pair is not timed
    assert all(len(t.rounds) == 3 and t.best <= t.median for t in timings.values())


def test_race_gives_close_ones_more_rounds(monkeypatch):
    seconds = {"limit": 1.0, "fast": 2.0, "close": 3.0, "slow": 9.0}
    monkeypatch.setattr(measure, "once", lambda fn, device, repeat=1: fn())
    timings = measure.race({name: (lambda s=s: s) for name, s in seconds.items()}, "cpu", 2, "limit")
    assert {name: len(t.rounds) for name, t in timings.items()} == {"limit": 6, "fast": 6, "close": 6, "slow": 2}


def test_shapes_are_parsed():
    assert cases.parse_shape("64,8,100")[1:] == (64, 8, 100)
    assert cases.parse_shape("cpu")[1:] == (2048, 512, 32000)
    with pytest.raises(ValueError, match="shape must be N,D,V or one of tiny, .*, got '8,9'"):
        cases.parse_shape("8,9")


def _cli(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_command_line(tmp_path):
    """A run of the smallest shape through the command: table, JSON, CSV; then that run against itself."""
    args = ["--op", "grpo", "--shape", "tiny", "--dtype", "fp32", "--providers", "rlhf_fast,torch", "--rounds", "2"]
    done = _cli(*args, "--no-memory", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "grpo (128, 32, 507) fp32" in done.stdout
    (saved,) = tmp_path.glob("*.json")
    info, rows = report.load(saved)
    assert [r.provider for r in rows] == ["limit", "rlhf_fast", "torch"]
    assert all(r.status == "ok" and r.ms > 0 and len(r.ms_rounds) in (2, 6) for r in rows)
    assert {"commit", "date", "hardware", "versions"} <= set(info)
    assert torch.__version__.startswith(info["versions"]["torch"].split("+")[0])
    (table,) = tmp_path.glob("*.csv")
    assert table.read_text().count("\n") == 4
    done = _cli("compare", str(saved), str(saved))
    assert done.exit_code == 0, done.output
    assert "B against A" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "op must be one of logprob, "),
        (["--providers", "torch,nobody"], "providers must be one of rlhf_fast, "),
        (["compare", "one.json"], "expected no arguments or `compare A.json B.json`"),
    ],
)
def test_command_line_errors(arguments, message):
    done = _cli(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_comparison_divides_by_the_limit(tmp_path):
    """A machine twice as slow, with the same distance from its limit, is no regression."""
    rows = suite.run([cases.Case("logprob", cases.SHAPES["tiny"], "fp32")], QUICK)
    slow = [suite.Row(**{**r.asdict(), "ms": 2 * r.ms}) for r in rows]
    _, change = report.compare(rows, slow)
    assert list(change.values()) == [1.0, 1.0]
    worse = [suite.Row(**{**r.asdict(), "x_limit": 1.5 * r.x_limit}) for r in rows]
    assert list(report.compare(rows, worse)[1].values()) == pytest.approx([1.5, 1.5])
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"rows": [{"nothing": 1}]}))
    with pytest.raises(ValueError, match="is not a saved benchmark run"):
        report.load(bad)

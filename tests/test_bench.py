"""The benchmark suite itself: it runs, it rejects wrong results, it sees memory."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from rlhf_fast._backend import OPS, use_backend
from rlhf_fast.benchmarks import cases, context, inputs, measure, memory, providers, report, suite
from rlhf_fast.cli.main import app

QUICK = suite.Options(providers=("rlhf_fast", "torch"), rounds=1, warmup=1, memory=False)


HEADS = [op for op in cases.OPS if not cases.on_tokens(op)]
TOKENS = [op for op in cases.OPS if cases.on_tokens(op)]


def _plain(case, x):
    """The op's scalar by plain torch expressions over whole fp64 logits, and the leaves it hangs on."""
    wide = x._replace(**{k: getattr(x, k).detach().double().requires_grad_() for k in _leaves(x)})
    cap, counts = case.shape.softcap, x.target != -100
    bend = lambda z: z if cap is None else cap * torch.tanh(z / cap)  # noqa: E731
    log_p = torch.log_softmax(wide.logits if x.logits is not None else bend(wide.hidden @ wide.weight.t()), -1)
    pick = lambda log_p: log_p.gather(-1, x.target.clamp(min=0)[:, None])[:, 0] * counts  # noqa: E731
    logprob, ref = pick(log_p), None
    if x.ref_hidden is not None:
        log_q = torch.log_softmax(bend(x.ref_hidden.double() @ x.ref_weight.double().t()), -1)
        ref = pick(log_q)
    if case.op == "forward_kl":
        loss = ((log_q.exp() * (log_q - log_p)).sum(-1) * counts).sum() / counts.sum()
    elif case.op == "jsd":
        mean = (log_p.exp() + log_q.exp()) / 2
        halves = [(p.exp() * (p - mean.log())).sum(-1) / 2 for p in (log_p, log_q)]
        loss = (sum(halves) * counts).sum() / counts.sum()
    else:
        loss = inputs.objective(case, x, ref)(logprob, -(log_p.exp() * log_p).sum(-1))
    return wide, logprob, loss


@pytest.mark.parametrize("shape", ["tiny", "tiny-softcap"])
@pytest.mark.parametrize("op", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_answers_agree_with_autograd_in_fp64(op, dtype, shape):
    """The suite's own fp64 answer, formed in blocks, is what autograd gives for the plain expression."""
    masked = 0.25 if "masked" in cases.OPS[op].uses and shape == "tiny" else 0.0
    case = cases.Case(op, cases.SHAPES[shape], dtype, masked=masked)
    if case.shape.softcap and cases.OPS[op].passes:
        case = case._replace(shape=case.shape._replace(softcap=None))  # logits that exist are capped already
    x = inputs.make_inputs(case)
    wide, logprob, loss = _plain(case, x)
    grads = torch.autograd.grad(loss, wide.leaves)
    names = ("dhidden", "dweight") if x.logits is None else ("dlogits",)
    want = {"logprob": logprob, "loss": loss, **dict(zip(names, grads, strict=True))}
    for name, value in inputs.answer(case, x).items():
        torch.testing.assert_close(value, want[name].detach(), rtol=1e-8, atol=1e-12)


def _leaves(x):
    return ("hidden", "weight") if x.logits is None else ("logits",)


@pytest.mark.parametrize("op", ["ppo", "jsd"])
def test_blocks_of_rows_change_nothing(monkeypatch, op):
    case = cases.Case(op, cases.SHAPES["tiny"], "fp32")
    x = inputs.make_inputs(case)
    whole = inputs.answer(case, x)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 7 * 8 * 507)
    for name, value in inputs.answer(case, x).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("op", TOKENS)
@pytest.mark.parametrize("masked", [0.0, 0.25])
def test_answers_on_tokens_agree_with_other_expressions(op, masked):
    """Against sums over k, autograd, and statistics of lists: nothing that the answers use."""
    case = cases.Case(op, cases.TOKENS["tiny"], "fp32", masked=masked)
    x = inputs.make_inputs(case)
    got = inputs.answer(case, x)
    if op == "policy":
        leaf = x.logprob.detach().double().requires_grad_()
        ratio, a = torch.exp(leaf - x.old_logprob.double()), x.advantages.double()[:, None]
        loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        loss = torch.stack([row[m].mean() for row, m in zip(loss, x.mask, strict=True)]).mean()
        want = {"loss": loss.detach(), "dlogprob": torch.autograd.grad(loss, leaf)[0]}
    elif op == "group":
        want = {"advantages": torch.cat([(r - r.mean()) / (r.std() + 1e-4) for r in x.group_rewards.double().split(8)])}
    elif op == "whiten":
        chosen = x.values.double()[x.mask]
        want = {
            "whitened": torch.where(x.mask, (x.values.double() - chosen.mean()) / (chosen.var() + 1e-8).sqrt(), 0.0)
        }
    else:
        rewards = x.rewards.double()
        if op == "advantages":
            rewards = -0.05 * (x.logprob.detach().double() - x.ref_logprob.double())
            rewards[:, int(x.mask[0].sum()) - 1] += x.scores.double()
        t = int(x.mask[0].sum()) if op == "advantages" else rewards.shape[1]
        values = x.values.double()[:, :t]
        delta = rewards[:, :t] + 0.99 * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
        powers = 0.9405 ** (torch.arange(t)[:, None] - torch.arange(t)).double()
        advantages = delta @ powers.tril()
        returns = advantages + values
        if op == "advantages":
            advantages = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        fill = (0, rewards.shape[1] - t)
        want = {"advantages": advantages, "returns": returns}
        want = {k: torch.nn.functional.pad(v, fill) for k, v in want.items()}
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-11)


ANYWHERE = ("rlhf_fast", "rlhf_fast-torch", "rlhf_fast-loss_fn", "rlhf_fast-apart", "rlhf_fast-ids", "torch")
SLOW_TO_BUILD = ("compile", "liger", "real")  # compilers; the peers' own tests are not ours


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("op", list(cases.OPS))
def test_every_provider_gives_the_answer_or_says_why_not(op, masked):
    if masked and "masked" not in cases.OPS[op].uses:
        pytest.skip("the op leaves no token out")
    case = cases.Case(op, cases.parse_shape("tiny", op), "fp32", masked=masked)
    x = inputs.make_inputs(case)
    truth = inputs.answer(case, x)
    for name, provider in providers.PROVIDERS.items():
        if op not in provider.ops or name.removesuffix("-8").endswith(SLOW_TO_BUILD):
            continue
        row = suite._row(case, name)
        suite._checked(provider, case, x, truth, dict.fromkeys(truth, float("inf")), row, 1)
        assert row.status in ("ok", "skipped"), (name, row.reason)
        assert row.status == "ok" or row.reason, name
        assert row.status == "ok" or name not in ANYWHERE, (name, row.reason)


def test_options_reach_only_the_ops_that_use_them():
    made = list(cases.make_cases(["grpo", "gae", "dpo"], ["tiny", "cpu"], ["fp32", "bf16"], [0.0, 0.5], [0.0, 0.25]))
    count = lambda op: sum(case.op == op for case in made)  # noqa: E731
    assert (count("grpo"), count("dpo"), count("gae")) == (2 * 2 * 2 * 2, 2 * 2 * 2, 2)
    assert [c.shape.n for c in made if c.op == "gae"] == [256, 256 * 4096]
    assert [s.name for s in cases.shapes_for("gae", ["qwen3-8b", "gemma-2-2b", "16m"])] == ["4m", "16m"]
    assert cases.shapes_for("grpo", ["16m"]) == []


def test_masked_and_zero_rows_reach_the_inputs():
    case = cases.Case("grpo", cases.Shape("x", 640, 16, 50), "fp32", zero_rows=0.5, masked=0.25)
    x = inputs.make_inputs(case)
    assert int((x.advantages == 0).sum()) == 5
    assert int((x.target == -100).sum()) == 160
    assert float(x.share.sum()) == pytest.approx(1)
    assert measure.flops(case) == 3 * 2 * 480 * 16 * 50
    assert int((~inputs.make_inputs(cases.Case("gae", cases.TOKENS["tiny"], "fp32", masked=0.25)).mask).sum()) == 64


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


def test_the_slow_get_fewer_rounds_and_the_slowest_one_call(monkeypatch):
    calls = []
    seconds = {"fast": 0.5, "slow": 2.0, "slowest": 9.0}
    monkeypatch.setattr(measure, "once", lambda fn, device, repeat=1, ahead=0.0: fn())
    timed = {name: (lambda n=name, s=s: calls.append(n) or s) for name, s in seconds.items()}
    timings = measure.interleaved(timed, "cpu", 5, budget=8.0)
    assert {name: len(t.rounds) for name, t in timings.items()} == {"fast": 5, "slow": 2, "slowest": 1}
    assert calls.count("slowest") == 1


def test_dtypes_without_units_are_left_to_those_who_can(monkeypatch):
    """Where a bf16 product takes many times fp32's, peers are skipped with that reason; ours and the limit stay."""
    monkeypatch.setattr(measure, "_against_fp32", lambda dtype: 80.0)
    rows = suite.run([cases.Case("grpo", cases.SHAPES["tiny"], "bf16")], QUICK)
    assert [(r.provider, r.status) for r in rows] == [("limit", "ok"), ("rlhf_fast", "ok"), ("torch", "skipped")]
    assert "80 times as long" in rows[2].reason
    assert "fp32" in rows[0].reason


def test_race_gives_close_ones_more_rounds(monkeypatch):
    seconds = {"limit": 1.0, "fast": 2.0, "close": 3.0, "slow": 9.0}
    monkeypatch.setattr(measure, "once", lambda fn, device, repeat=1, ahead=0.0: fn())
    timings = measure.race({name: (lambda s=s: s) for name, s in seconds.items()}, "cpu", 2, "limit")
    assert {name: len(t.rounds) for name, t in timings.items()} == {"limit": 2, "fast": 2, "close": 2, "slow": 1}


def test_the_host_of_a_gpu_is_let_ahead(monkeypatch):
    """Short calls are queued behind a sleep that lasts longer than queueing them; long ones wait for nothing."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 0.1  # ms

    monkeypatch.setattr(measure.torch.cuda, "Event", Event)
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure.torch.cuda, "_sleep", lambda cycles: events.append(cycles))
    measure.interleaved({"short": lambda: events.append("call")}, "cuda", rounds=1)
    first, sample = events[:3], events[3:]
    assert first == ["record", "call", "record"]  # how long is one?
    assert sample[0] == "call"  # not timed
    assert sample[1] >= measure.QUEUED * 1e-4 * measure.CYCLES
    assert sample[2:] == ["record", *["call"] * measure.QUEUED, "record"]


def test_a_case_whose_time_is_up_gives_up_who_is_not_ready(monkeypatch):
    """A compilation that takes too long leaves a row; who was ready before it is timed."""

    def ready(case, x):
        return lambda: {"logprob": inputs.answer(case, x)["logprob"].float()}

    def late(case, x):
        time.sleep(60)

    own = {name: suite.Provider(name, "", {"logprob": fn}) for name, fn in (("ready", ready), ("late", late))}
    monkeypatch.setattr(suite, "PROVIDERS", suite.PROVIDERS | own)
    start = time.perf_counter()
    options = suite.Options(("ready", "late", "torch"), 1, warmup=1, memory=False, seconds=3.0)
    rows = {r.provider: r for r in suite.run([cases.Case("logprob", cases.SHAPES["tiny"], "fp32")], options)}
    assert time.perf_counter() - start < 50
    assert rows["ready"].ms > 0
    assert (rows["late"].status, rows["late"].reason) == ("skipped", "not ready within 3 s")
    assert (rows["torch"].status, rows["torch"].reason) == ("skipped", "not begun within 3 s")


def test_who_fails_in_the_race_leaves_it(monkeypatch):
    """Right when it was checked, out of memory beside the others' buffers."""
    calls = []

    def build(case, x):
        right = suite.PROVIDERS["torch"].ops["logprob"](case, x)

        def step():
            calls.append("call")
            if len(calls) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right()

        return step

    full = suite.Provider("full", "holds on to memory", {"logprob": build})
    monkeypatch.setattr(suite, "PROVIDERS", suite.PROVIDERS | {"full": full})
    options = suite.Options(("full", "rlhf_fast"), 2, warmup=1, memory=True)
    rows = {r.provider: r for r in suite.run([cases.Case("logprob", cases.SHAPES["tiny"], "fp32")], options)}
    assert (rows["full"].status, rows["full"].reason) == ("failed", "OutOfMemoryError: CUDA out of memory")
    assert rows["full"].ms is None
    assert rows["rlhf_fast"].status == "ok"
    assert rows["rlhf_fast"].x_limit > 0
    assert len(calls) == 2


def test_shapes_are_parsed():
    assert cases.parse_shape("64,8,100")[1:4] == (64, 8, 100)
    assert cases.parse_shape("cpu")[1:4] == (2048, 512, 32000)
    assert cases.parse_shape("gemma-2-2b@64k") == ("gemma-2-2b@64k", 65536, 2304, 256000, 64, 30.0)
    assert cases.parse_shape("3x40", "gae") == ("custom", 120, 0, 0, 40, None)
    with pytest.raises(ValueError, match="shape of logprob must be N,D,V, NAME@N or one of tiny, .*, got '8,9'"):
        cases.parse_shape("8,9")
    for text in ("8,9,10", "cpu@x", "nobody"):
        with pytest.raises(ValueError, match="shape of gae must be BxT or one of"):
            cases.parse_shape(text, "gae")
    for op in ("gae", "grpo"):
        with pytest.raises(ValueError, match=f"shape of {op} must be .* got 'nobody'"):
            cases.shapes_for(op, ["nobody"])


def test_the_longest_context_is_found_by_doubling_and_halving():
    asked = []

    def peak(length):
        asked.append(length)
        return length / 2

    found = context.search(peak, limit=410, longest=4096)
    assert asked == [128, 256, 512, 1024, 768, 896, 832]
    assert (found["length"], found["mb"][832]) == (768, 416)
    assert context.search(lambda length: 0.0, limit=1, longest=1024)["length"] == 1024
    assert context.search(lambda length: 9.0, limit=1)["length"] == 0


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
    assert all(r.status == "ok" and r.ms > 0 and len(r.ms_rounds) in (1, 2) for r in rows)
    assert {"commit", "date", "hardware", "versions"} <= set(info)
    assert torch.__version__.startswith(info["versions"]["torch"].split("+")[0])
    (table,) = tmp_path.glob("*.csv")
    assert table.read_text().count("\n") == 4
    done = _cli("compare", str(saved), str(saved))
    assert done.exit_code == 0, done.output
    assert "B against A" in done.stdout


def test_the_head_of_a_table_says_what_has_no_kernels():
    with use_backend("torch"):
        line = report.hardware_line(report.environment())
    assert line.endswith("without kernels (see `rlhf-fast doctor`): " + ", ".join(OPS))
    report_of_all = report.environment() | {"backends": dict.fromkeys(OPS, "cpp") | {"gae": "torch"}}
    assert report.hardware_line(report_of_all).endswith("doctor`): gae")
    assert "without" not in report.hardware_line(report_of_all | {"backends": dict.fromkeys(OPS, "cpp")})


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

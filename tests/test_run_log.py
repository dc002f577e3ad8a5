"""The files that every run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlhf_fast.trainers.run_log import CSV_NAME, LOG_NAME, RunLog, draw_curves, panel_of, read_log


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_one_json_line_per_call_readable_at_once(tmp_path):
    log = RunLog(tmp_path / "deep" / "run")
    log.log(1, {"loss": 2.0, "note": "é\n"})
    log.log(2, {"loss": torch.tensor(1.5), "reward": np.float32(0.25)})
    lines = (tmp_path / "deep" / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [strict_json(line) for line in lines if line]  # not closed: the lines are there already
    assert [r["step"] for r in rows] == [1, 2]
    assert rows[0]["note"] == "é\n"
    assert rows[1]["loss"] == 1.5
    assert rows[1]["reward"] == 0.25
    assert rows[1]["seconds"] >= rows[0]["seconds"] >= 0


def test_non_finite_values_are_null_in_json_and_nan_in_csv(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, {"a": math.nan, "b": math.inf, "c": None, "d": torch.tensor(-math.inf), "e": [math.nan, 1.0]})
    row = strict_json((tmp_path / "trainer_log.jsonl").read_text())
    assert [row[k] for k in "abcde"] == [None, None, None, None, [None, 1.0]]
    (cells,) = read_csv(tmp_path / "training_metrics.csv")
    assert (cells["a"], cells["b"], cells["c"], cells["d"], cells["e"]) == (
        "nan",
        "inf",
        "",
        "-inf",
        "[null, 1.0]",
    )
    summary = log.summary(x=math.nan, y={"z": torch.tensor(math.inf)})
    assert strict_json((tmp_path / "summary.json").read_text()) == summary == {"x": None, "y": {"z": None}}


def test_columns_that_appear_later(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, {"loss": 3.0})
    log.log(2, {"eval_loss": 2.5})
    log.log(3, {"loss": 2.0, "kl": 0.1})
    log.log(4, {"kl": 0.2})
    rows = read_csv(tmp_path / "training_metrics.csv")
    assert [r["loss"] for r in rows] == ["3.0", "", "2.0", ""]
    assert [r["eval_loss"] for r in rows] == ["", "2.5", "", ""]
    assert [r["kl"] for r in rows] == ["", "", "0.1", "0.2"]
    assert list(rows[0]) == ["step", "seconds", "loss", "eval_loss", "kl"]


def test_summary_merges_and_leaves_no_part_files(tmp_path):
    log = RunLog(tmp_path)
    log.summary(accuracy_before=0.5, steps=3)
    log.summary(accuracy_after=0.9, steps=4)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "accuracy_before": 0.5,
        "steps": 4,
        "accuracy_after": 0.9,
    }
    (tmp_path / "summary.json").write_text("{broken")
    with pytest.warns(UserWarning, match=r"summary\.json"):
        log.summary(steps=5)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 5}
    assert not list(tmp_path.glob(".*part"))


def test_a_new_run_replaces_and_a_resumed_one_continues(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step)})
    with open(tmp_path / "trainer_log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # cut off by a kill
    with RunLog(tmp_path, resume_step=2) as log:
        log.log(3, {"loss": 30.0, "kl": 0.0})
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [r["loss"] for r in read_csv(tmp_path / "training_metrics.csv")] == ["1.0", "2.0", "30.0"]
    with RunLog(tmp_path) as log:
        log.log(1, {"loss": 9.0})
    assert [r["loss"] for r in read_log(tmp_path)] == [9.0]
    with pytest.raises(ValueError, match="close"):
        log.log(2, {})


@pytest.mark.parametrize("cut", ['{"step": 3, "rew', "\0" * 64, '{"step": 3}garbage', "\n\n[]\n"])
def test_what_a_power_cut_leaves_is_read_and_mended(tmp_path, cut):
    with RunLog(tmp_path, main=True) as log:
        log.log(1, {"reward": 0.5})
        log.log(2, {"reward": 0.75})
    with open(tmp_path / LOG_NAME, "a") as file:
        file.write(cut)
    (tmp_path / CSV_NAME).write_text("step,sec")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    with RunLog(tmp_path, main=True, resume_step=2) as log:
        log.log(3, {"reward": 1.0})
    rows = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.5), (2, 0.75), (3, 1.0)]
    with open(tmp_path / CSV_NAME) as file:
        assert [row["reward"] for row in csv.DictReader(file)] == ["0.5", "0.75", "1.0"]


def test_rows_are_readable_at_once_and_on_the_disk_after_a_save(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("os.fsync", lambda handle: held.append(os.fstat(handle).st_size))
    with RunLog(tmp_path, main=True) as log:
        log.log(1, {"reward": 0.5})
        held.clear()
        sizes = [(tmp_path / name).stat().st_size for name in (LOG_NAME, CSV_NAME)]
        log.sync()
        assert held == sizes
        log.log(2, {"reward": 0.5})
        held.clear()
    assert held == [(tmp_path / name).stat().st_size for name in (LOG_NAME, CSV_NAME)]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path / "out")
    log.log(1, {"loss": 1.0})
    assert log.curves() is None
    log.summary(a=1)
    assert not (tmp_path / "out").exists()


def test_curves_png_of_gappy_and_long_series(tmp_path):
    log = RunLog(tmp_path)
    assert log.curves() is None
    log.log(0, {"note": "text only", "flag": True})
    assert log.curves() is None
    for step in range(1, 150):
        metrics = {
            "reward": math.nan if step % 7 == 0 else step,
            "kl": 0.1 * step,
            "learning_rate": 1e-3,
            "loss": -step,
        }
        log.log(step, metrics | ({"eval_accuracy": step / 150} if step % 50 == 0 else {}))
    path = log.curves()
    assert path == tmp_path / "training_curves.png"
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert 2 * width < 6 * height  # five panels: two lines of three
    assert width > height


def test_smoothed_line_is_the_running_mean():
    from rlhf_fast.trainers import run_log

    class Axis:
        def __init__(self):
            self.lines = []

        def plot(self, steps, values, **kwargs):
            self.lines.append(values)
            return (type("Line", (), {"get_color": lambda self: "k"})(),)

    axis, values = Axis(), [float(i % 10) for i in range(200)]
    run_log._draw(axis, "x", list(range(200)), values)
    assert axis.lines[0] == values
    np.testing.assert_allclose(axis.lines[1][50], np.mean(values[43:51]), rtol=1e-12)
    np.testing.assert_allclose(axis.lines[1][3], np.mean(values[:4]), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "panel"),
    [
        ("reward_mean", "reward"),
        ("rewards/exact_match", "reward"),
        ("clip_fraction", "clip fraction"),
        ("kl", "KL"),
        ("entropy", "entropy"),
        ("eval_loss", "loss"),
        ("policy/loss", "loss"),
        ("eval_accuracy", "accuracy"),
        ("completion_length", "length"),
        ("learning_rate", "learning rate"),
        ("tokens_per_second", "tokens / s"),
        ("peak_memory_mb", "memory, MB"),
        ("epoch", None),
        ("step", None),
        ("kl_k3", "KL"),
        ("zero_std_groups", "groups of equal rewards"),
        ("sampler_logprob_gap_max", "sampler against trainer"),
        ("rollout_ess", "sampler against trainer"),
        ("eval_exact_match", "evaluation"),
        ("eval_reward", "reward"),
        ("eval_samples_per_second", None),
    ],
)
def test_panel_of(name, panel):
    assert panel_of(name) == panel


def test_draw_curves_without_a_finite_value(tmp_path):
    assert draw_curves([{"step": 1, "loss": math.nan}], tmp_path / "c.png") is None
    assert not (tmp_path / "c.png").exists()


def test_a_folder_that_cannot_be_made_is_called_by_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^output_dir: .*file/run cannot be made: Not a directory"):
        RunLog(tmp_path / "file" / "run")


def run_python(code):
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return out.stdout.split()


def test_peak_memory_is_of_this_process():
    """In its own process: a high-water mark does not move where earlier tests have been higher."""
    code = """
import rlhf_fast.trainers.run_log as r
a = r.peak_memory_mb(); block = bytearray(b"x") * 200_000_000; b = r.peak_memory_mb(); del block
print(a, b, r.peak_memory_mb())"""
    before, during, after = map(float, run_python(code))
    assert 1 < before < 1000
    assert 180 < during - before < 230
    assert after > during - 5  # freed, and still the peak; the kernel counts in batches of pages


def test_import_is_light():
    code = """
import sys, rlhf_fast.trainers.run_log
print("transformers" in sys.modules, "matplotlib" in sys.modules)"""
    assert run_python(code) == ["False", "False"]

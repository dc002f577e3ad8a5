"""Checkpoints: whole or not there, verified before use, never lost to rotation or to a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import resume_cases as cases
from test_loop import make

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers import restore

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


def write(folder, text="weights", **options):
    about = dict(step=int(folder.name[11:]), stage="sft") | options.pop("about", {})
    with files.writing(folder, ALONE, **options, **about) as part:
        (part / "inner").mkdir()
        (part / "inner" / "a.bin").write_text(text)
        (part / "b.bin").write_bytes(b"")
    return folder


def test_a_checkpoint_names_its_files_with_sizes_and_hashes(tmp_path):
    folder = write(tmp_path / "checkpoint-2")
    marker = json.loads((folder / files.MARKER).read_text())
    sums = subprocess.run(["sha256sum", folder / "inner" / "a.bin"], capture_output=True, text=True, check=True)
    assert marker["files"] == {"b.bin": [0, marker["files"]["b.bin"][1]], "inner/a.bin": [7, sums.stdout.split()[0]]}
    assert (marker["step"], marker["stage"]) == (2, "sft")
    assert files.flaw(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_files_and_folders_are_flushed_before_the_rename(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "flush", lambda path: seen.append(path.relative_to(tmp_path).as_posix()))
    rename = type(tmp_path).rename
    monkeypatch.setattr(type(tmp_path), "rename", lambda a, b: (seen.append(f"{a.name} -> {b.name}"), rename(a, b))[1])
    write(tmp_path / "checkpoint-2")
    part = ".checkpoint-2.part"
    assert seen == [
        f"{part}/b.bin", f"{part}/inner/a.bin", f"{part}/complete.json", f"{part}/inner", part,
        f"{part} -> checkpoint-2", ".",
    ]  # fmt: skip


def spoil(folder, how):
    path = folder / "inner" / "a.bin"
    if how == "no marker":
        (folder / files.MARKER).unlink()
    elif how == "half a marker":
        (folder / files.MARKER).write_text((folder / files.MARKER).read_text()[:40])
    elif how == "a file gone":
        path.unlink()
    elif how == "a file cut":
        path.write_text("weight")
    else:
        path.write_text("weighty"[:7])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no marker", "incomplete: it has no complete.json"),
        ("half a marker", "corrupt: complete.json is not to be read"),
        ("a file gone", "incomplete: inner/a.bin is missing"),
        ("a file cut", "corrupt: inner/a.bin has 6 bytes, it was written with 7"),
        ("other bytes", "corrupt: inner/a.bin is not what was written"),
    ],
)
def test_the_newest_complete_one_is_taken_and_others_are_named(tmp_path, how, words):
    write(tmp_path / "checkpoint-2")
    spoil(write(tmp_path / "checkpoint-10"), how)
    with pytest.warns(UserWarning, match=f"checkpoint-10 is {words}.*; it is skipped"):
        assert files.find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    with pytest.raises(ValueError, match=f"checkpoint-10 is {words}"):
        files.find_checkpoint(tmp_path, tmp_path / "checkpoint-10")


def test_where_there_is_none(tmp_path):
    assert files.find_checkpoint(tmp_path, None) is None
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        files.find_checkpoint(tmp_path, True)
    with pytest.raises(ValueError, match="checkpoint-7 is no folder"):
        files.find_checkpoint(tmp_path, tmp_path / "checkpoint-7")
    write(tmp_path / "checkpoint-3", about=dict(resumable=False))
    with pytest.warns(UserWarning, match="save_only_model"), pytest.raises(ValueError, match="no complete checkpoint"):
        files.find_checkpoint(tmp_path, True)


def test_a_new_run_in_an_old_folder_goes_on_from_its_own(tmp_path):
    """By the time of writing, not by the number."""
    write(tmp_path / "checkpoint-100")
    write(tmp_path / "checkpoint-20")
    assert files.find_checkpoint(tmp_path, True).name == "checkpoint-20"
    write(tmp_path / "checkpoint-40", limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-40"]


def test_rotation_keeps_the_best_and_the_newest_and_what_is_none_of_its_own(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # no marker: not written here
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 4, 6, 8):
        write(tmp_path / f"checkpoint-{step}", limit=1, best=tmp_path / "checkpoint-4")
    kept = ["checkpoint-1", "checkpoint-4", "checkpoint-8", "checkpoint-best"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_no_limit_keeps_all(tmp_path, limit):
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}", limit=limit)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path / "checkpoint-2", "old")

    def fail():
        with files.writing(tmp_path / "checkpoint-2", ALONE, needed=1234, step=2) as part:
            (part / "a").write_text("half")
            raise OSError("no such luck")

    words = "checkpoint-2 could not be written: no such luck. It needs about 1,234 bytes, "
    with pytest.raises(files.CheckpointError, match=words + r"[\d,]+ are free; checkpoint-2 is complete"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "inner" / "a.bin").read_text() == "old"
    (tmp_path / ".checkpoint-3.part").mkdir()  # of a killed process
    write(tmp_path / "checkpoint-2", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "inner" / "a.bin").read_text() == "new"


# ---- what does not fit


def test_another_stage_is_refused_and_changed_options_are_named(tmp_path):
    about = dict(processes=2, options=dict(learning_rate=0.1, seed=1, save_steps=5, gone=1))
    folder = write(tmp_path / "checkpoint-2", about=about)
    with pytest.raises(ValueError, match="checkpoint-2 is of sft, this run is dpo"):
        restore.check_fits(folder, stage="dpo", processes=2, options={})
    with pytest.warns(UserWarning, match=r"options changed since it was written: learning_rate \(0.1 -> 0.2\)$"):
        restore.check_fits(
            folder, stage="sft", processes=2, options=dict(learning_rate=0.2, seed=1, save_steps=9, new=1)
        )
    with pytest.warns(UserWarning, match="written by 2 processes, this run has 1: data order"):
        assert restore.check_fits(folder, stage="sft", processes=1, options={}) == 2


def test_another_model_or_optimiser_is_refused(tmp_path):
    loop, _ = make(tmp_path, save_steps=1)
    loop.start(1, 1.0)
    loop.update([], None)
    loop.end_step({})
    groups = torch.optim.AdamW([dict(params=[p]) for p in loop.unwrapped.parameters()])
    with pytest.raises(ValueError, match=r"checkpoint-1 has parameter groups of \[\d+.*\] tensors, this run's of \[1"):
        restore.load_optimizer(groups, tmp_path / "checkpoint-1")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "checkpoint-1" / restore.OPTIMIZER)  # as ZeRO's
    with pytest.raises(ValueError, match="checkpoint-1 was written under DeepSpeed and goes on under it alone"):
        restore.load_optimizer(groups, tmp_path / "checkpoint-1")
    wide = type(loop.unwrapped)(
        type(loop.unwrapped.config)(**{**loop.unwrapped.config.to_dict(), "intermediate_size": 40})
    )
    with pytest.raises(ValueError, match="holds another model: .*size mismatch"):
        restore.load_weights(wide, tmp_path / "checkpoint-1")


def test_a_run_of_another_stage_or_model_does_not_resume(tmp_path):
    folder = cases.prepare(tmp_path, "sft")
    cases.train(folder, "out", "sft by length", max_steps=2, save_steps=2)
    other = dict(max_steps=4, resume_from_checkpoint=True, per_device_train_batch_size=4)
    with (
        pytest.warns(UserWarning, match=r"max_steps \(2 -> 4\), per_device_train_batch_size \(2 -> 4\)"),
        pytest.raises(ValueError, match="holds another model"),
    ):
        cases.train(folder, "out", "sft by length", finetuning_type="lora", lora_rank=2, **other)
    rows = folder / "pairs.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in cases.PAIRS))
    with pytest.raises(ValueError, match="is of SFTTrainer, this run is DPOTrainer"):
        cases.train(folder, "out", "dpo", dataset=str(rows), **other)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_full_disk_leaves_the_checkpoints_and_ends_the_run(tmp_path, small_disk, stage):
    case = "sft by length" if stage == "sft" else stage
    folder = cases.prepare(tmp_path, stage)
    values = cases.options(folder, "out", case, output_dir=str(small_disk / "out"), save_steps=1, max_steps=200)
    done = subprocess.run(cases.command(folder, values), capture_output=True, text=True, env=cases.environment())
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert "could not be written" in line
    assert "It needs about" in line
    last = files.last_checkpoint(small_disk / "out")
    assert f"{last.name} is complete" in line
    assert files.step_of(last) >= 1
    assert not list((small_disk / "out").glob(".checkpoint*"))

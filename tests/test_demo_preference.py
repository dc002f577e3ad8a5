"""The demos rm, dpo and kto, shortened, after one SFT: what they train on is right, and it teaches."""

import json

import pytest

pytest.importorskip("transformers")

from rlhf_fast.cli.demos import dpo, kto, rm, samples, task

PROMPTS = 1500


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The SFT that all demos begin with, done once."""
    return task.start(tmp_path_factory.mktemp("start"), 0, PROMPTS, title="test", quiet=True)


@pytest.fixture
def shared(start, monkeypatch, tmp_path):
    def instead(output, seed, prompts, **options):
        (output / "data").mkdir(parents=True, exist_ok=True)
        return start._replace(output=output)

    monkeypatch.setattr(task, "start", instead)
    return tmp_path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_judged_and_finished(start):
    found = samples.sample(start.sft, start.prompts, 0, mixed=40)
    assert len(samples.both(found)) >= 40
    assert len(found) == samples.BATCH  # the first batch had enough
    for judged, row in zip(found, rows_of(start.prompts), strict=False):
        assert judged.prompt == row["prompt"]
        assert set(judged.right) <= {row["answer"]}
        assert row["answer"] not in judged.wrong
        assert len(judged.right) + len(judged.wrong) <= samples.PER_PROMPT
        assert all(len(text) < task.COMPLETION and text.replace(">", "").isdigit() for text in judged.wrong if text)
    assert 0 < sum(len(j.right) for j in found) < len(found) * samples.PER_PROMPT
    assert samples.sample(start.sft, start.prompts, 0, mixed=40) == found
    assert samples.sample(start.sft, start.prompts, 1, mixed=40) != found


def test_dpo_raises_accuracy(shared):
    summary = dpo.demo(shared, overrides=dict(num_train_epochs=1, plot_loss=False), pairs=800, quiet=True)
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.05
    pairs = rows_of(shared / "data" / "pairs.jsonl")
    assert len(pairs) == summary["pairs"] == summary["data"]["kept"]
    for pair in pairs:
        right = "".join(sorted(pair["prompt"][:6]))
        assert pair["chosen"] == right != pair["rejected"]
    assert json.loads((shared / "summary.json").read_text()) == summary


def test_kto_raises_accuracy(shared):
    summary = kto.demo(
        shared, overrides=dict(num_train_epochs=3, per_device_train_batch_size=128, plot_loss=False), quiet=True
    )
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.05
    rows = rows_of(shared / "data" / "judged.jsonl")
    assert sum(row["label"] for row in rows) * 2 == len(rows) == summary["answers"]
    assert all(row["label"] == (row["completion"] == "".join(sorted(row["prompt"][:6]))) for row in rows)


def test_the_reward_model_ranks_pairs_that_it_has_not_seen(shared):
    overrides = dict(max_steps=60, warmup_steps=5, eval_steps=60, plot_loss=False)
    summary = rm.demo(shared, overrides=overrides, pairs=700, quiet=True)
    assert summary["pair_accuracy"] > 0.7
    assert summary["accuracy_after"] > summary["sampled_accuracy"] + 0.1
    assert summary["accuracy_after"] <= summary["any_of_8"]
    seen, held = (
        {row["prompt"] for row in rows_of(shared / "data" / f"{name}.jsonl")} for name in ("pairs", "held_out_pairs")
    )
    assert seen
    assert held
    assert not seen & held


def test_too_few_prompts_for_pairs_are_named(shared, monkeypatch):
    found = [samples.Judged("1>", ["1"], ["2"]), samples.Judged("2>", [], ["3"])]
    monkeypatch.setattr(samples, "sample", lambda *args, **options: found)
    with pytest.raises(ValueError, match="only 1 of 2 prompts have a right and a wrong sample"):
        rm.demo(shared, pairs=100, quiet=True)

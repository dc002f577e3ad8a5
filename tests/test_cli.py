"""The command line, in its own processes where it matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import yaml
from test_data import word_tokenizer
from test_sft import make_rows, tiny_model
from typer.testing import CliRunner

from rlhf_fast.cli import main
from rlhf_fast.cli.demos import DEMOS


def invoke(*args):
    return CliRunner().invoke(main.app, [str(a) for a in args])


@pytest.fixture
def config(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_rows()))
    values = dict(
        stage="sft",
        model_name_or_path=str(tmp_path / "model"),
        dataset=str(tmp_path / "train.jsonl"),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        use_cpu=True,
        disable_tqdm=True,
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_help_lists_the_commands_and_imports_no_trainer():
    code = (
        "import sys\nfrom rlhf_fast.cli.main import app\n"
        "try:\n    app(['--help'])\n"
        "finally:\n    print([m for m in ('transformers', 'matplotlib', 'accelerate') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for command in ("train", "demo", "doctor"):
        assert command in out.stdout
    assert out.stdout.rstrip().endswith("[]")


def test_train_as_a_process(config):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from rlhf_fast.cli.main import app; app()", "train", str(config), "max_steps=3"]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    summary = json.loads((config.parent / "out" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert "sft done" in out.stdout
    assert str(config.parent / "out") in out.stdout.replace("\n", "")


def test_dry_run_prints_config_counts_and_memory_and_writes_nothing(config):
    result = invoke("train", config, "--dry-run", "val_size=4", "per_device_train_batch_size=5", "max_steps=-1")
    assert result.exit_code == 0, result.output
    text, _, table = result.output.partition("predicted peak memory")
    shown = yaml.safe_load(text)
    assert (shown["stage"], shown["val_size"], shown["learning_rate"]) == ("sft", 4.0, 1e-5)
    assert "# train: 12 of 12 rows" in text
    assert "# evaluation: 4 of 4 rows" in text
    assert "# 3 steps" in text
    for part in ("weights", "optimizer states", "tile of logits", "gradient_checkpointing"):
        assert part in table
    assert not (config.parent / "out").exists()


ROWS = {
    "rm": {"prompt": "a b", "chosen": "c", "rejected": "d e"},
    "dpo": {"prompt": "a b", "chosen": "c", "rejected": "d e"},
    "kto": {"prompt": "a b", "completion": "c", "label": True},
    "grpo": {"prompt": "a b c", "answer": "c"},
    "ppo": {"prompt": "a b c", "answer": "c"},
}
# 6 rows: tokens with EOS, and steps of 2 rows (rollouts of 2 sequences)
COUNTS = {"rm": (6 * (3 + 1 + 3 + 2), 3), "dpo": (6 * 9, 3), "kto": (6 * 4, 3), "grpo": (6 * 3, 6), "ppo": (6 * 3, 3)}


@pytest.mark.parametrize("stage", list(ROWS))
def test_dry_run_of_every_stage(config, stage):
    (config.parent / "train.jsonl").write_text((json.dumps(ROWS[stage]) + "\n") * 6)
    values = [f"stage={stage}", "per_device_train_batch_size=2", "max_steps=-1"]
    if stage in ("grpo", "ppo"):
        values += ["reward_funcs=rlhf_fast.trainers.rewards:exact_match", "max_completion_length=8"]
    if stage == "grpo":
        values += ["num_generations=2"]
    result = invoke("train", config, "--dry-run", *values)
    assert result.exit_code == 0, result.output
    tokens, steps = COUNTS[stage]
    assert f"{tokens} tokens" in result.output
    assert f"# {steps} steps" in result.output
    assert "predicted peak memory" in result.output


def test_plan_as_table_and_as_json(config):
    table = invoke("plan", config, "max_steps=1")
    assert table.exit_code == 0, table.output
    assert "during backward" in table.output
    assert "<- peak" in table.output
    told = json.loads(invoke("plan", config, "--json", "--processes", "2").output)
    assert told["peak"] == sum(told["resident"].values()) + sum(told["phases"][told["largest_phase"]].values())
    assert (told["processes"], told["device"]) == (2, "cpu")
    error = invoke("plan", config, "lora_rnk=3")
    assert (error.exit_code, error.stderr) == (
        2,
        f"error: {config}: unknown key 'lora_rnk'; did you mean 'lora_rank'?\n",
    )
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["model_name_or_path=/no/where"], "model_name_or_path: no folder /no/where"),
        (["dataset=gone.jsonl"], "dataset: no file or folder gone.jsonl"),
        (["cutoff_len=0"], "cutoff_len must be at least 1, got 0"),
        (["cutoff_len=1"], "no row is left to train on"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(config, overrides, message):
    result = invoke("train", config, *overrides)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_traceback_on_request(config):
    for args in (["--traceback", "train", config, "seed=x"], ["train", config, "seed=x", "--traceback"]):
        result = invoke(*args)
        assert isinstance(result.exception, ValueError)
        assert "seed must be an integer" in str(result.exception)
    assert invoke("train", config, "seed=x").exit_code == 2  # not remembered


def test_bugs_are_not_dressed_up_as_user_errors(config, monkeypatch):
    def broken(*args, **kwargs):
        raise AttributeError("a bug")

    monkeypatch.setattr("rlhf_fast.cli.train.train", broken)
    result = invoke("train", config)
    assert isinstance(result.exception, AttributeError)


def test_missing_config_and_missing_library(tmp_path, config, monkeypatch):
    result = invoke("train", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "no configuration file" in result.stderr

    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr("rlhf_fast.cli.train.train", missing)
    result = invoke("train", config)
    assert result.exit_code == 2
    assert "pip install 'rlhf-fast[train]'" in result.stderr
    words = "No package metadata was found for The 'deepspeed>=0.9.3' distribution was not found"
    for text in ("No module named 'deepspeed.runtime'", words):
        error = ModuleNotFoundError(text, name="deepspeed")
        monkeypatch.setattr("rlhf_fast.cli.train.train", lambda *args, error=error, **kwargs: raise_(error))
        assert "(pip install deepspeed)" in invoke("train", config).stderr


def raise_(error):
    raise error


def test_interrupt_has_its_own_code(config, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_fast.cli.train.train", stop)
    assert invoke("train", config).exit_code == 130


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("rlhf_fast.cli.demos.demo", lambda *a, **k: seen.append((a, k)), raising=False)
    assert invoke("demo", "grpo", "--output", tmp_path, "--seed", "3").exit_code == 0
    assert invoke("demo").exit_code == 0
    assert seen == [(("grpo", tmp_path, 3), {}), (("grpo", None, 0), {})]


def test_demo_help_lists_the_demos():
    shown = invoke("demo", "--help").output
    for name in (*DEMOS, "all"):
        assert name in shown


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip()[0].isdigit()

"""`rlhf-fast train` in every stage on inputs that cannot be trained on: exit code 2, one line with what and where."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from stage_cases import folders, run_options, tiny_config
from test_cli import invoke

from rlhf_fast.cli.demos.task import make_tokenizer

ROWS = {
    "sft": {"prompt": "25>", "completion": "25"},
    "rm": {"prompt": "25>", "chosen": "25", "rejected": "2"},
    "dpo": {"prompt": "25>", "chosen": "25", "rejected": "2"},
    "kto": {"prompt": "25>", "completion": "25", "label": True},
    "grpo": {"prompt": "25>", "answer": "25"},
    "ppo": {"prompt": "25>", "answer": "25"},
}
ROLLOUTS = ("grpo", "ppo")
LONG = "1" * 99 + ">"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(stage, rows or bytes, *overrides) -> what the command line gave."""
    folders(tmp_path, [])
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(stage, rows, *overrides):
        data = rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows).encode()
        (tmp_path / "train.jsonl").write_bytes(data)
        values = run_options(tmp_path, max_steps=1, stage=stage)
        if stage in ROLLOUTS:
            values |= dict(
                reward_funcs="rlhf_fast.trainers.rewards:exact_match", max_completion_length=4, cutoff_len=32
            )
        if stage == "grpo":
            values |= dict(num_generations=2)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return invoke("train", tmp_path / "run.yaml", *overrides)

    call.folder = tmp_path
    return call


def refused(result, *words: str) -> None:
    """One line, the words in it, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


class ModelIsLoaded(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("stage", ROWS)
def test_data_is_refused_before_the_model_loads(run, stage, monkeypatch):
    def too_early(*_, **__):
        raise ModelIsLoaded

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", too_early)
    row = ROWS[stage]
    good, line = json.dumps(row).encode() + b"\n", "train.jsonl, line 2: "
    refused(run(stage, b""), "the dataset is empty: no row in ", "train.jsonl")
    refused(run(stage, good + b"{"), line, "not valid JSON")
    refused(run(stage, good + b'{"prompt": "\xff"}\n'), line, "not UTF-8 text")
    refused(run(stage, good + b'{"prompt": "1", "prompt": "2"}'), line, "'prompt' is given twice")
    refused(run(stage, good + b"[1, 2]"), line, "expected an object")
    refused(run(stage, [row, {"x": 1}]), line, "its columns are x")
    refused(run(stage, [row, {**row, "prompt": 3}]), line, "prompt must be a string, got 3 (int)")
    nulls = {key: None for key in row}
    refused(run(stage, [row, {**row, **nulls}]), line, "(null)")
    refused(run(stage, [{**row, "prompt": LONG}], "cutoff_len=32"), " is left", "1 dropped (overlong prompt)")
    refused(run(stage, [row, {**row, "prompt": LONG}], "cutoff_len=32", "overlong_prompt=error"), line, "100 tokens")
    refused(run(stage, [row], "overlong_prompt=keep"), "overlong_prompt must be one of drop, truncate, error")
    refused(run(stage, [row], "learning_rate=.nan"), "learning_rate must be at least 0 and finite, got nan")
    refused(run(stage, [row], "seed=-1"), "seed must be in [0, 2^32), got -1")
    with pytest.raises(ModelIsLoaded):  # the rows by themselves are good
        run(stage, [row])


@pytest.mark.parametrize("stage", ROWS)
def test_long_prompts_are_counted(run, stage):
    row = ROWS[stage]
    rows = [row, {**row, "prompt": "7>"}] * 2 + [{**row, "prompt": LONG}]
    for policy, name in (("drop", "dropped_overlong_prompt"), ("truncate", "truncated_prompts")):
        result = run(stage, rows, "cutoff_len=32", f"overlong_prompt={policy}")
        assert result.exit_code == 0, result.output
        data = json.loads((run.folder / "out" / "summary.json").read_text())["data"]
        assert (data["rows"], data[name]) == (5, 1)


@pytest.mark.parametrize("stage", ROWS)
def test_ids_beyond_the_embedding_are_named(run, stage):
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(tiny_config(vocab_size=8)).save_pretrained(run.folder / "model")
    rows = [{**ROWS[stage], "prompt": "1>"}, {**ROWS[stage], "prompt": "9>"}]
    refused(run(stage, rows), "train.jsonl, line ", "is outside the model's vocabulary 0..7")


@pytest.mark.parametrize(("stage", "pad"), [*zip(ROWS, ["none", "eos"] * 3, strict=True)])
def test_tokenizers_without_padding_or_with_eos_for_it(run, stage, pad):
    """The same losses as with a padding token of its own."""
    losses = []
    for changed in (False, True):
        tokenizer = make_tokenizer()
        if changed:
            tokenizer.pad_token = None if pad == "none" else tokenizer.eos_token
        tokenizer.save_pretrained(run.folder / "model")
        rows = [ROWS[stage], {**ROWS[stage], "prompt": "7>"}] * 4
        result = run(stage, rows)
        assert result.exit_code == 0, result.output
        log = (run.folder / "out" / "trainer_log.jsonl").read_text().splitlines()
        losses.append({k: v for k, v in json.loads(log[0]).items() if k in ("loss", "grad_norm", "reward")})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, nan_ok=True)
    assert all(map(math.isfinite, losses[0].values()))


def test_windows(run):
    """Positions that are computed are worth a warning, those from a table an error."""
    torch.manual_seed(0)
    rows = [{**ROWS["sft"], "prompt": "1" * 70 + ">"}] * 4
    with pytest.warns(UserWarning, match="the longest row has 74 tokens, the model's window is 64"):
        assert run("sft", rows).exit_code == 0
    sizes = dict(vocab_size=15, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=2, bos_token_id=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(run.folder / "model")
    refused(run("sft", rows), "the longest row has 74 tokens, the model's window is 64", "set cutoff_len")
    rows = [{**row, "answer": "25"} for row in rows]
    refused(run("grpo", rows, "cutoff_len=99"), "the longest prompt with its completion has 75 tokens")


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def without_a_weight(path):
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES = {
    "cut weights": ("model.safetensors", lambda path: cut(path, 1000), "SafetensorError: Error while deserializing"),
    "no header": ("model.safetensors", lambda path: cut(path, 4), "header too small"),
    "a weight is missing": ("model.safetensors", without_a_weight, "lacks 1 of the weights"),
    "cut config": ("config.json", lambda path: cut(path, 50), "not a valid JSON file"),
    "a list": ("config.json", lambda path: path.write_text("[]"), "must be a mapping, not list"),
    "another width": (
        "config.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40})),
        "RuntimeError: ",
    ),
    "a word for a number": (
        "config.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "x"})),
        "Validation error for field 'hidden_size'",
    ),
    "cut tokenizer": ("tokenizer.json", lambda path: cut(path, 50), "no tokenizer could be loaded"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "has no vocabulary: tokenizer.json is missing"),
}


@pytest.mark.parametrize("stage", ["sft", "rm", "grpo"])
def test_damaged_model_folders_are_named(run, stage):
    whole = run.folder / "whole"
    shutil.copytree(run.folder / "model", whole)
    for name, damage, words in DAMAGES.values():
        damage(run.folder / "model" / name)
        refused(run(stage, [ROWS[stage]] * 4), "model_name_or_path: ", str(run.folder / "model"), words)
        shutil.rmtree(run.folder / "model")
        shutil.copytree(whole, run.folder / "model")


def test_a_reward_module_beside_the_configuration_is_found_and_a_broken_one_named(run, tmp_path):
    """By the console script, whose path has neither the working directory nor the configuration's folder."""
    (tmp_path / "beside.py").write_text("def score(completions, **_):\n    return [1.0 for _ in completions]\n")
    for name, text in {
        "torn": "def f(:\n",
        "raises": "x = 1\ny = x / 0\n",
        "needs": "import nothing_like_it\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    words = {
        "torn": "torn cannot be imported: SyntaxError: invalid syntax (torn.py, line 1)",
        "raises": "raises cannot be imported: ZeroDivisionError: division by zero (raises.py, line 2)",
        "needs": "needs cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'",
        "absent": "no module 'absent' on Python's path, to which `rlhf-fast train` adds the working directory",
    }
    for name, text in words.items():
        refused(
            run("grpo", [ROWS["grpo"]] * 4, f"reward_funcs={name}:score"), f"reward function '{name}:score': {text}"
        )
    program = "import sys; sys.path = [p for p in sys.path if p]; from rlhf_fast.cli.main import app; app()"
    command = [sys.executable, "-c", program, "train", str(tmp_path / "run.yaml"), "reward_funcs=beside:score"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stage", ROWS)
def test_a_padding_token_outside_of_the_embedding(run, stage):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(run.folder / "model")
    words = "the tokenizer's pad_token '[PAD]' has id 15, the model's embedding 15 rows: "
    refused(run(stage, [ROWS[stage]] * 4), words, "model.resize_token_embeddings")


def test_what_would_be_lost_or_is_not_there(run):
    rows = [ROWS["sft"]] * 4
    refused(
        run("sft", rows, f"output_dir={run.folder}/model/../model"), "output_dir is the folder of model_name_or_path"
    )
    refused(
        run("sft", rows, "resume_from_checkpoint=latest"), "no complete checkpoint", "one is written every save_steps"
    )
    refused(run("grpo", rows, "pass_at_k=4"), "pass_at_k=4 of num_generations=2 completions")
    assert run("sft", rows, "save_steps=1").exit_code == 0
    words = ["resume_from_checkpoint=latest", "max_steps=2", "optim=sgd"]
    refused(run("sft", rows, *words), "the optimiser in ", "checkpoint-1 is AdamW, this run's SGD")
    assert run("sft", rows, *words[:2], "optim=adamw_torch").exit_code == 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without an accelerator")
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_bf16_on_a_machine_without_an_accelerator(run, stage):
    done = run(stage, [ROWS[stage]] * 4, "bf16=true", "use_cpu=false")
    assert done.exit_code == 0, done.stderr


def test_options_that_only_a_library_can_judge(run):
    rows = [ROWS["grpo"]] * 4
    refused(run("grpo", rows, "lr_scheduler_type=bogus"), "lr_scheduler_type must be one of ", "got 'bogus'")
    words = "lr_scheduler_type=warmup_stable_decay"
    refused(run("grpo", rows, words), words, "num_decay_steps")
    refused(run("sft", [ROWS["sft"]], words), words, "lr_scheduler_kwargs: ", "num_decay_steps")
    plateau = ["lr_scheduler_type=reduce_lr_on_plateau", "val_size=1", "eval_steps=1"]
    refused(run("grpo", rows, *plateau), "reduce_lr_on_plateau follows a metric")
    for stage in ("sft", "grpo"):
        refused(run(stage, [ROWS[stage]] * 4, "report_to=bogus"), "report_to: bogus is not supported, only ")
        refused(run(stage, [ROWS[stage]] * 4, "report_to='all, bogus'"), "report_to: bogus is not supported, only ")
        if importlib.util.find_spec("wandb") is None:
            refused(run(stage, [ROWS[stage]] * 4, "report_to=wandb"), "report_to: ", "requires wandb")


def test_best_models_without_a_measure(run):
    rows = [{**ROWS["sft"], "prompt": f"{i}>"} for i in range(4)]
    refused(run("sft", rows, "load_best_model_at_end=true"), "load_best_model_at_end goes by evaluations")
    best = ["load_best_model_at_end=true", "eval_steps=1", "save_steps=1", "val_size=1"]
    words = "metric_for_best_model: the evaluation has no 'eval_bogus', it has "
    refused(run("sft", rows, *best, "metric_for_best_model=eval_bogus"), words, "eval_loss")
    del best[2]
    refused(run("grpo", [ROWS["grpo"]] * 4, *best, "metric_for_best_model=bogus"), words)


def test_a_limit_that_would_keep_no_checkpoint(run):
    for stage in ("sft", "grpo"):
        refused(run(stage, [ROWS[stage]] * 4, "save_total_limit=-1"), "save_total_limit must be at least 1 or null")


@pytest.mark.parametrize("stage", ROLLOUTS)
def test_a_policy_of_nan_does_not_sample(run, stage):
    """Its completions are alike, and without advantages there would be no broken gradient to skip."""
    weights = load_file(run.folder / "model" / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, run.folder / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(
        run(stage, [ROWS[stage]] * 4), "log-probabilities of sampled tokens are NaN (", "the model's weights are NaN"
    )


REWARDS = """
import math, time
def raises(completions, **_):
    return [1 / 0 for c in completions]
def hangs(completions, **_):
    time.sleep(20)
async def waits(completions, **_):
    import asyncio
    await asyncio.sleep(20)
def short(completions, **_):
    return [1.0]
def words(completions, **_):
    return ["good"] * len(completions)
def nested(completions, **_):
    return [[[1.0]]] * len(completions)
def exits(completions, **_):
    raise SystemExit("no")
async def leaves(completions, **_):
    raise SystemExit(0)
def nothing(completions, **_):
    return None
constant = 3
"""
COMPLAINTS = {
    "raises": ("'raises' raised ZeroDivisionError in row 0",),
    "hangs": ("'hangs' took longer than reward_timeout=0.3 s",),
    "waits": ("'waits' took longer than reward_timeout=0.3 s",),
    "short": ("'short' must return 4 rewards, got 1; row 1 is the first without one",),
    "words": ("'words' must return numbers or None, got 'good' (str) in row 0",),
    "nested": ("'nested', row 0: a step is (index of its last token, reward)",),
    "exits": ("'exits' raised SystemExit",),
    "leaves": ("'leaves' one raised SystemExit",),
    "nothing": ("'nothing' must return a list of 4 numbers, got NoneType",),
    "constant": ("reward function 'hostile_rewards:constant' is not callable but int",),
    "gone": ("hostile_rewards has no 'gone'",),
}


@pytest.mark.parametrize("stage", ROLLOUTS)
def test_reward_functions_that_fail_are_named_and_no_step_is_made(run, stage):
    (run.folder / "hostile_rewards.py").write_text(REWARDS)
    sys.modules.pop("hostile_rewards", None)
    for name, words in COMPLAINTS.items():
        start = time.perf_counter()
        options = [f"reward_funcs=hostile_rewards:{name}", "reward_timeout=0.3", "per_device_train_batch_size=4"]
        refused(run(stage, [ROWS[stage]] * 4, *options, *["ppo_buffer_size=1"] * (stage == "ppo")), *words)
        assert time.perf_counter() - start < 10
        log = run.folder / "out" / "trainer_log.jsonl"
        assert not log.exists() or not log.read_text()
        assert not (run.folder / "out" / "model.safetensors").exists()


HANGS = """
import asyncio, re, time
from concurrent.futures import ThreadPoolExecutor
def holds_the_lock(completions, **_):
    return [float(bool(re.match("(a+)+$", "a" * 64 + "b"))) for _ in completions]
def executor(completions, **_):
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(lambda _: time.sleep(1e6), completions))
async def thread(completions, **_):
    await asyncio.to_thread(time.sleep, 1e6)
"""


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("holds_the_lock", 1, "in holds_the_lock"),  # nothing in Python can run: the stacks say where
        ("executor", 2, "error: reward function 'executor' took longer than reward_timeout=0.5 seconds"),
        ("thread", 2, "error: of the reward functions 'thread' one blocks the others"),
    ],
)
def test_the_process_ends_without_a_reward_function_that_never_does(run, name, code, words):
    """Python's shutdown would wait for executors, and a regular expression keeps everything else from running."""
    (run.folder / "hangs.py").write_text(HANGS)
    run("grpo", [ROWS["grpo"]] * 4, "max_steps=0")  # writes the files
    command = [sys.executable, "-c", f"import rlhf_fast.trainers.reward_calls as c; c.HELD = 1.0; {MAIN}"]
    command += ["train", str(run.folder / "run.yaml"), f"reward_funcs=hangs:{name}", "reward_timeout=0.5"]
    env = os.environ | {"PYTHONPATH": str(run.folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr[-3000:]


MAIN = "from rlhf_fast.cli.main import main; main()"


def test_a_rollout_server_that_is_gone(run):
    options = ["sampler=server", "rollout_server_url=http://127.0.0.1:9", "rollout_server_attempts=2"]
    refused(run("grpo", [ROWS["grpo"]] * 4, *options), "http://127.0.0.1:9/v1/models: no usable answer in 2 attempts")

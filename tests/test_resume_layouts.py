"""Two processes, DDP or FSDP2: a resumed run is the unbroken one bit for bit, in every stage.

A checkpoint goes on under the other layout, and on another number of processes with what all of them have alike.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")

import resume_cases as cases
import resume_ranks
from grpo_cases import exact_norms
from ranks import torchrun
from safetensors.torch import load_file

from rlhf_fast.trainers.config import make_config, run
from rlhf_fast.trainers.grpo import GRPOTrainer
from rlhf_fast.trainers.models import hf_utils
from rlhf_fast.trainers.ppo import PPOTrainer
from rlhf_fast.trainers.restore import OWN, load_state, load_tensors

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(os.name == "nt", reason="gloo through the loopback device"),
]
WORST = dict(load_best_model_at_end=True, greater_is_better=True)  # as the best model: it is not the last
LORA = dict(finetuning_type="lora", lora_rank=2, lora_dropout=0.3, disable_dropout=False, sync_ref_model=False)
CASES = {
    "sft": dict(
        per_device_train_batch_size=1, eval_steps=2, training_arguments=WORST | dict(metric_for_best_model="eval_loss")
    ),
    "rm": dict(per_device_train_batch_size=1),
    "dpo": dict(per_device_train_batch_size=2),
    "dpo ahead": dict(  # an odd number of batches
        per_device_train_batch_size=2, sync_ref_model=False, precompute_ref_log_probs=True, precompute_ref_batch_size=3
    ),
    "kto": dict(per_device_train_batch_size=2),
    "grpo": dict(share_prompts=False, max_tokens_per_micro_batch=24),  # not as many micro-batches on every process
    "ppo": LORA,
    "ppo shared": dict(critic="shared", per_device_train_batch_size=2),
}


def options(folder: Path, name: str, case: str, **changes):
    sizes = dict(max_steps=4, save_steps=2, logging_steps=4, ddp_timeout=60, save_total_limit=2)
    values = cases.options(folder, name, case.split()[0], **sizes | CASES[case])
    values |= dict(eval_dataset=values["dataset"]) if "eval_steps" in values else {}
    if not values.get("sync_ref_model"):
        values = {key: value for key, value in values.items() if not key.startswith("ref_model")}
    return values | changes


def launch(folder: Path, ranks: int, plans: list[dict]) -> None:
    (folder / "runs.json").write_text(json.dumps(plans))
    torchrun(resume_ranks.__file__, ranks, folder)


def resumed(values: dict, after: Path, *, fsdp2: bool) -> dict:
    return dict(options=values | dict(resume_from_checkpoint="latest"), fsdp2=fsdp2, after=str(after))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """case -> folder of runs of two processes: by layout whole, and resumed after 2 of 4 steps; `crossed`: after the
    checkpoint of DDP under FSDP2."""
    root, folders, plans = tmp_path_factory.mktemp("runs"), {}, []
    for case in CASES:
        folder = folders[case] = root / case
        folder.mkdir()
        cases.prepare(folder, case.split()[0])
        for layout in ("ddp", "fsdp2"):
            sharded = dict(fsdp2=layout == "fsdp2")
            plans.append(dict(options=options(folder, layout, case), **sharded))
            again = options(folder, f"{layout} again", case)
            plans.append(resumed(again, folder / layout / "checkpoint-2", **sharded))
        crossed = options(folder, "crossed", case)
        plans.append(resumed(crossed, folder / "ddp" / "checkpoint-2", fsdp2=True))
    plans.append(dict(options=options(folders["rm"], "each step", "rm", logging_steps=1), fsdp2=False))
    best = WORST | dict(metric_for_best_model="eval_rising_reward", eval_reward_funcs=["resume_cases:rising_reward"])
    best |= dict(greater_is_better=False, eval_dataset=str(folders["grpo"] / "train.jsonl"), eval_steps=2, save_steps=4)
    plans.append(dict(options=options(folders["grpo"], "best", "grpo", **best), fsdp2=True))
    launch(root, 2, plans)
    return folders


def state(folder: Path) -> dict:
    """Everything in a checkpoint by file and key."""
    found = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    for path in folder.glob("*.pt*"):
        found[path.name] = torch.load(path, weights_only=False)
        if "parts" in found[path.name]:
            del found[path.name]["parts"]["loop"]["tokens"]  # and when they were logged
    assert len(found) > 3
    return found


def differences(a, b, where="", close=None) -> list[str]:
    """Where two nests of dicts, lists, tensors and values differ, but for timings; `close` widens floats."""
    if where.rpartition("/")[2].startswith(cases.TIMINGS):
        return []
    if isinstance(a, np.ndarray):
        a, b = a.tolist(), b.tolist()
    if isinstance(a, dict):
        found = [f"{where}/{key}" for key in a.keys() ^ b.keys()]
        both = sorted(a.keys() & b.keys(), key=str)
        return found + [d for key in both for d in differences(a[key], b[key], f"{where}/{key}", close)]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, x in enumerate(a) for d in differences(x, b[i], f"{where}/{i}", close)]
    if isinstance(a, torch.Tensor):
        tolerance = close if close and a.is_floating_point() else 0
        if a.shape != b.shape:
            return [where]
        return [] if torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) else [where]
    if isinstance(a, float) and close:
        return [] if a == pytest.approx(b, rel=close, abs=close, nan_ok=True) else [where]
    return [] if a == b or (a != a and b != b) else [where]


def model(folder: Path) -> dict:
    """The models of a run or a checkpoint."""
    return {name: weight for name, weight in cases.weights(folder).items() if not name.startswith(OWN)}


def told(folder: Path) -> list[str]:
    """Warnings of a run that speak of its checkpoint."""
    found = json.loads((folder / "warnings.json").read_text())
    return [text for text in found if "checkpoint-" in text or "given up" in text]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(runs, case, layout):
    whole, again = runs[case] / layout, runs[case] / f"{layout} again"
    assert told(again) == []
    assert differences(state(whole / "checkpoint-4"), state(again / "checkpoint-4")) == []
    assert differences(model(whole), model(again)) == []
    assert cases.rows(whole) == cases.rows(again)
    assert len(differences(state(whole / "checkpoint-2"), state(whole / "checkpoint-4"))) > 50


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_the_same_under_both_layouts_and_goes_on_under_the_other(runs, case):
    """In fp64: some thousand roundings of numbers near 1; what is kept in fp32 rounds alike."""
    ddp, fsdp2 = (state(runs[case] / layout / "checkpoint-2") for layout in ("ddp", "fsdp2"))
    found = differences(ddp, fsdp2, close=1e-11)
    if case == "grpo":  # FSDP2 has as many micro-batches on every process
        assert [name for name in found if name.endswith("/micros")] == found != []
    else:
        assert found == []
    want = state(runs[case] / "ddp" / "checkpoint-4")
    for name in ("fsdp2", "crossed"):
        assert differences(want, state(runs[case] / name / "checkpoint-4"), close=1e-11) == []


@pytest.mark.parametrize("folder", ["sft/ddp", "sft/fsdp2", "sft/fsdp2 again", "grpo/best"])
def test_the_best_model_comes_back_and_stays(runs, folder):
    output = runs["sft"].parent / folder
    assert json.loads((output / "summary.json").read_text())["best_step"] == 2
    best = model(output / "checkpoint-2")
    assert differences(best, model(output)) == []
    assert differences(best, model(output / "checkpoint-4")) != []
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# ---- another number of processes


@pytest.fixture
def alone(runs, monkeypatch):
    """(case, name, checkpoint, **changes) -> the warnings of a run on this process in fp64, after the checkpoint."""
    exact_norms(monkeypatch)
    monkeypatch.setitem(hf_utils.DTYPES, "float32", torch.float64)

    def run_alone(case, name, checkpoint, **changes):
        folder = runs[case]
        resume_ranks.copy_checkpoint(folder / checkpoint, folder / name)
        with warnings.catch_warnings(record=True) as caught, cases.one_thread():
            warnings.simplefilter("always")
            run(make_config(options(folder, name, case, resume_from_checkpoint="latest", **changes)))
        return [str(warning.message) for warning in caught]

    return run_alone


@pytest.mark.parametrize("case", ["grpo", "ppo", "ppo shared"])
def test_one_process_takes_what_two_had_alike(runs, alone, monkeypatch, case):
    """Whatever a process saves comes back, but its generators and its part of a rollout."""
    taken = []

    def only_start(trainer):
        trainer.start()
        taken.append((trainer, torch.initial_seed()))
        return {}

    for trainer_class in (GRPOTrainer, PPOTrainer):
        monkeypatch.setattr(trainer_class, "run", only_start)
    warned = alone(case, "taken", "fsdp2/checkpoint-2")
    ((trainer, seed),), checkpoint, again = taken, runs[case] / "fsdp2" / "checkpoint-2", runs[case] / "taken again"
    assert len([text for text in warned if "written by 2 processes, this run has 1" in text]) == 1
    assert [text for text in warned if "2 updates of a rollout" in text] or case != "grpo"

    saved = load_state(checkpoint / "process_0.pt")["parts"]
    now = {name: part.state_dict() for name, part in trainer.loop.snapshot._stateful().items()}
    begun = {"/".join(name.split("/")[:3]) for name in differences(saved, now)} - {"/loop/tokens"}  # a clock
    rollout = {"/trainer/todo", "/trainer/built", "/trainer/metrics"} if case == "grpo" else set()
    assert begun == {"/trainer/shuffle", "/trainer/sampler"} | rollout
    assert differences(load_state(checkpoint / "optimizer.pt"), trainer.loop.optimizer.state_dict()) == []
    reference = {} if trainer.reference is None else trainer.reference.state_dict()
    assert differences(load_tensors(checkpoint / "reference.safetensors"), dict(reference)) == []
    trainer.loop.snapshot.save_model(again)
    assert differences(model(checkpoint), model(again)) == []
    assert trainer.loop.state.global_step == 2
    seeds = {seed, trainer.shuffle.initial_seed(), trainer.sampler.generator.initial_seed()}
    assert not seeds & {trainer.config.seed, trainer.config.seed + 1}  # whose numbers the first rollouts had


def test_two_processes_go_on_from_one(runs, alone):
    plans = []
    for case in ("sft", "dpo", "grpo", "ppo"):
        alone(case, "one", "ddp/checkpoint-2")
        two = options(runs[case], "two", case, max_steps=6)
        plans.append(resumed(two, runs[case] / "one" / "checkpoint-4", fsdp2=True))
    launch(runs["sft"].parent, 2, plans)
    for plan in plans:
        folder = Path(plan["options"]["output_dir"])
        assert len([text for text in told(folder) if "written by 1 process, this run has 2" in text]) == 1
        steps = load_state(folder / "checkpoint-6" / "optimizer.pt")["state"][0]["step"]
        stage = plan["options"]["stage"]
        assert steps == (24 if stage == "ppo" else 6)
        if stage in ("grpo", "ppo"):
            own = [load_state(folder / "checkpoint-6" / f"process_{r}.pt") for r in range(2)]
            apart = {name.split("/")[1] for name in differences(*(o["parts"]["trainer"] for o in own))}
            assert {"shuffle", "sampler"} <= apart
            assert not apart & {"order", "queue", "prompts_seen", "kl", "score_stats", "reward"}
            assert differences(own[0]["random"], own[1]["random"]) != []


def test_a_log_row_goes_on_with_the_sums_of_all_processes(runs, alone):
    alone("rm", "one", "ddp/checkpoint-2")
    alone("rm", "one, each step", "each step/checkpoint-2", logging_steps=1)
    (row,) = cases.rows(runs["rm"] / "one")
    each = cases.rows(runs["rm"] / "one, each step")  # the first two are of two processes
    assert [r["step"] for r in each] == [1, 2, 3, 4]
    means = row.keys() - {"step", "epoch", "learning_rate", "grad_norm", "rewards/std"}
    assert len(means) == 7
    for name in means:
        values = [r[name] for r in each]
        want = {"_max": max(values), "_min": min(values)}.get(name[-4:], sum(values) / 4)
        assert row[name] == pytest.approx(want, rel=1e-6), name

"""Whole runs on two processes: YAML, a launcher, prompts that do not divide, sampling, evaluation, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml

pytest.importorskip("transformers")

import launch_runs  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from ranks import torchrun  # noqa: E402
from stage_cases import folders, run_options  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from rlhf_fast.trainers.sharding import check_launch  # noqa: E402

gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or os.name == "nt", reason="torch without gloo"
)
ROWS = [{"prompt": f"{i}{9 - i}4>", "completion": "123456"[: 1 + i % 6]} for i in range(8)]  # 5 and 3 to evaluate
SIZES = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1)
RL = SIZES | dict(reward_funcs="launch_runs:score", max_completion_length=4, cutoff_len=32, val_size=3, eval_steps=1)


def write_runs(folder: Path, **changes) -> dict[str, Path]:
    """Configurations in `folder`; output folders by stage."""
    stages = dict(sft=SIZES | dict(val_size=3, eval_steps=1), ppo=RL, grpo=RL | dict(num_generations=2, beta=0.1))
    for stage, options in stages.items():
        values = run_options(folder, f"{stage}-out", stage=stage, save_steps=2, **options) | changes
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return {stage: folder / f"{stage}-out" for stage in stages}


def check_runs(outputs: dict[str, Path]) -> None:
    for stage, folder in outputs.items():
        rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "grad_norm" in row]
        assert steps == [1, 2], stage  # once, not once a process
        if stage != "sft":
            assert all(row["sampler_logprob_gap"] < 1e-5 for row in rows), stage
            assert all(1 <= row["eval_completion_length"] <= 4 for row in rows), stage
        for where in (folder, folder / "checkpoint-2"):
            weights = AutoModelForCausalLM.from_pretrained(where).state_dict()
            assert all(bool(w.isfinite().all()) for w in weights.values())
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 2
        assert summary["tokens_per_second"] > 0
        first, second = (float((folder.parent / f"{stage}-{rank}.peak").read_text()) for rank in range(2))
        for row in (summary, rows[0]):  # the largest of all processes
            assert first + 100 < row["peak_memory_mb"] <= second + 0.1, stage


@gloo
def test_stages_under_torchrun(tmp_path):
    outputs = write_runs(folders(tmp_path, ROWS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, launch_runs.__file__, str(tmp_path)], text=True, capture_output=True, timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"), cwd=Path(launch_runs.__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_runs(outputs)
    for stage, folder in outputs.items():
        assert done.stdout.count(f"{stage} done") == 1, stage
        assert (folder / "checkpoint-2" / "optimizer.pt").is_file() or stage != "sft"


@gloo
def test_stages_under_fsdp2(tmp_path):
    outputs = write_runs(folders(tmp_path, ROWS), bf16=True, gradient_checkpointing=True)
    pairs = [dict(prompt=r["prompt"], chosen=r["completion"], rejected="7") for r in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    values = run_options(tmp_path, "dpo-out", stage="dpo", save_steps=0, **SIZES)
    values |= dict(dataset=str(tmp_path / "pairs.jsonl"), bf16=True, gradient_checkpointing=True)
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(values))
    torchrun(launch_runs.__file__, 2, tmp_path, "fsdp2")
    check_runs(outputs)
    config = json.loads((outputs["ppo"] / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    first = [json.loads((outputs[s] / "trainer_log.jsonl").read_text().splitlines()[0]) for s in ("ppo", "grpo")]
    assert [row["kl"] for row in first] == [0.0, 0.0]  # the reference is the policy, under the same roundings
    margins = [json.loads(x)["rewards/margins"] for x in (tmp_path / "dpo-out/trainer_log.jsonl").open()]
    assert margins[0] == 0.0 != margins[1]


def accelerator(kind, plugin=None):
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=plugin is not None and plugin.fsdp_version == 2, state=state)


def test_launches_that_a_loop_cannot_follow():
    for kind, plugin in ((DistributedType.MEGATRON_LM, None), (DistributedType.FSDP, SimpleNamespace(fsdp_version=1))):
        with pytest.raises(
            ValueError, match=f"'ppo' runs on one process, under DDP, DeepSpeed or FSDP2 .* got {kind.value}"
        ):
            check_launch(accelerator(kind, plugin), "ppo")
    options = dict(fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False)
    check_launch(accelerator(DistributedType.FSDP, SimpleNamespace(**options)), "ppo")
    check_launch(accelerator(DistributedType.MULTI_CPU), "ppo")
    check_launch(accelerator(DistributedType.DEEPSPEED), "ppo")
    for key in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        with pytest.raises(ValueError, match=f"fsdp_{key} must be false"):
            check_launch(accelerator(DistributedType.FSDP, SimpleNamespace(**options | {key: True})), "ppo")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(zero_optimization=dict(stage=0)), "zero_optimization.stage .* must be 1, 2 or 3, got 0"),
        (dict(fp16=dict(enabled=True)), "fp16.enabled .* must be false: take bf16, got True"),
        (dict(torch_autocast=dict(enabled=True)), "torch_autocast.enabled .* must be false"),
        (dict(bf16=dict(enabled=True)), "bf16.enabled .* must be the run's own bf16, got True"),
        (dict(optimizer=dict(type="AdamW")), "optimizer .* must be left out"),
        (dict(scheduler=dict(type="WarmupLR")), "scheduler .* must be left out"),
        (
            dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device="cpu"))),
            ".*offload_optimizer.device .* none",
        ),
        (dict(zero_optimization=dict(stage=3, offload_param=dict(device="nvme"))), ".*offload_param.device .* be none"),
    ],
)
def test_deepspeed_configurations_that_a_loop_cannot_follow(config, message):
    from rlhf_fast.trainers.zero import check_config

    fine = dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device="none")), fp16=dict(enabled="auto"))
    check_config(fine, "ppo")
    with pytest.raises(ValueError, match=f"stage 'ppo': {message}"):
        check_config(fine | config, "ppo")
    check_config(fine | dict(bf16=dict(enabled=True)), "ppo", bf16=True)


def test_exact_precision_leaves_what_passes_in_and_out():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from rlhf_fast.trainers.sharding import exact_precision

    half = torch.bfloat16
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy(half, half, half))
    exact_precision(accelerator(DistributedType.FSDP, plugin))
    want = MixedPrecisionPolicy(half, torch.float32, None, cast_forward_inputs=False)
    assert plugin.mixed_precision_policy == want

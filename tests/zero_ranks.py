"""GRPO and PPO under ZeRO, and resuming, for deepspeed_ranks.py: what two ranks do, and one process without DeepSpeed.

fp32: DeepSpeed knows no fp64.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import resume_cases
import rl_ranks
import torch
import torch.distributed as dist
from broken_ranks import break_loss
from grpo_cases import config as grpo_config
from grpo_cases import tiny
from ppo_cases import config as ppo_config

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.grpo import GRPOTrainer
from rlhf_fast.trainers.ppo import PPOTrainer

CLIP = 0.03
STEPS, BROKEN = 3, 0  # the first step's loss is NaN on the last rank; in the second that rank has no score at all
RESUMED = {2: ("grpo", "dpo"), 3: ("ppo", "sft", "dpo")}


def trainers(folder: Path, ranks: int):
    """Those of `rl_ranks`, and with adapters. Gradients are clipped; a gradient that is 0 but for rounding, as that of
    the keys' biases, moves nothing beside this epsilon."""
    common = dict(adam_epsilon=1e-4, max_grad_norm=CLIP)
    yield from rl_ranks.trainers(folder, ranks, dtype=torch.float32, **common)
    common |= dict(use_cpu=True, max_steps=40, learning_rate=1e-2)
    common |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=4 // ranks)
    own = dict(num_generations=rl_ranks.GROUP, num_iterations=2, steps_per_generation=None, beta=0.1)
    yield "grpo, lora", GRPOTrainer(lora(), make_tokenizer(), config=grpo_config(folder / "lora", **common | own))
    own = dict(ppo_epochs=2, ppo_buffer_size=1, critic="shared", kl_coef=0.2, critic_warmup_steps=2)
    yield "ppo, lora", PPOTrainer(lora(), make_tokenizer(), config=ppo_config(folder / "lora ppo", **common | own))


def lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    shape = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(tiny(), shape)


def results(folder: Path) -> dict[str, dict]:
    """By trainer: weights after `STEPS` on the first rank, each step's metrics, how many updates were skipped."""
    out, rank, ranks = {}, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, trainer in trainers(folder, ranks):
        metrics, update = [], trainer.loop.update
        for step in range(STEPS):
            if step == BROKEN and rank == ranks - 1:
                break_loss(trainer, math.nan)
            metrics.append(rl_ranks.make_step(trainer, *rl_ranks.rollout(step, dead=rl_ranks.ROWS // 2)))
            trainer.loop.update = update
        skipped = trainer.loop.broken_steps.skipped
        out[name] = {"weights": rl_ranks.weights_of(trainer), "metrics": metrics, "skipped": skipped}
        if ranks > 1 and name in ("grpo", "ppo, lora"):
            take_back(trainer, folder.parent / "saved" / name)
    return out


def take_back(trainer, folder: Path) -> None:
    """Weights that were saved replace those of a later step, as the best model's do, also in the optimiser."""
    loop, step = trainer.loop, STEPS + 1
    want = rl_ranks.weights_of(trainer)
    loop.snapshot.save_model(folder)
    dist.barrier()
    rl_ranks.make_step(trainer, *rl_ranks.rollout(step))
    changed = rl_ranks.weights_of(trainer)
    assert not want or any(not torch.equal(changed[n], w) for n, w in want.items())
    loop.spread.load_weights(loop.model, folder)
    got = rl_ranks.weights_of(trainer)
    assert all(torch.equal(got[n], w) for n, w in want.items() if n.startswith("policy."))
    for group in loop.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    loop.scheduler.base_lrs = [0.0] * len(loop.scheduler.base_lrs)
    rl_ranks.make_step(trainer, *rl_ranks.rollout(step))
    got = rl_ranks.weights_of(trainer)
    assert all(torch.equal(got[n], w) for n, w in want.items() if n.startswith("policy."))


def resume(folder: Path, case: str, stage: int) -> None:
    """Four steps are two steps, a kill and two more, bit for bit. DeepSpeed's configuration is a file."""
    main = dist.get_rank() == 0
    if main:
        folder.mkdir(parents=True)
        resume_cases.prepare(folder, case)
        zero = {"stage": stage, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        rest = {name: "auto" for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")}
        rest |= dict(bf16={"enabled": "auto"}, gradient_accumulation_steps="auto")
        (folder / "zero.json").write_text(json.dumps(rest | {"zero_optimization": zero}))
    dist.barrier()
    sizes = dict(max_steps=4, save_steps=2, deepspeed=str(folder / "zero.json"))
    want = resume_cases.train(folder, "whole", case, **sizes)
    resume_cases.train(folder, "parts", case, **sizes)
    if main:
        resume_cases.break_off(folder / "parts", 2)
    dist.barrier()
    got = resume_cases.train(folder, "parts", case, **sizes, resume_from_checkpoint="latest")
    if main:
        resume_cases.assert_same(folder, "parts", got, want)
    dist.barrier()

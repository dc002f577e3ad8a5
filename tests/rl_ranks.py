"""GRPO and PPO on any number of processes: `python rl_ranks.py OUT STEPS [fsdp2]` in torchrun's environment.

A step is the same 16 completions of 8 prompts, whoever holds them, in micro-batches of 4: one process has 4, four have
one each. Some completions have no usable score, in one step all of the last process's.
"""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import torch
from grpo_cases import PROMPTS
from grpo_cases import config as grpo_config
from grpo_cases import tiny as tiny_model
from ppo_cases import config as ppo_config
from ranks import save_results

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.grpo import GRPOTrainer
from rlhf_fast.trainers.ppo import PPOTrainer

ROWS, GROUP, MICRO = 16, 2, 4


def rollout(step: int, dead: int = ROWS // 4) -> tuple[list[list[int]], list[float]]:
    """Ragged completions (15 ids, 2 is EOS) and their scores; in some steps the last `dead` have none."""
    g = random.Random(step)
    responses = [[g.randrange(3, 15) for _ in range(g.randrange(5))] + [2] for _ in range(ROWS)]
    scores = [g.choice([0.0, 1.0, g.uniform(-2, 2)]) for _ in range(ROWS)]
    without = range(ROWS - dead, ROWS) if step % 5 == 1 else [g.randrange(ROWS)]
    return responses, [math.nan if row in without else score for row, score in enumerate(scores)]


def trainers(folder: Path, ranks: int, dtype: torch.dtype = torch.float64, **options):
    """(name, trainer): every statistic that could be a process's own is asked for."""
    sizes = dict(
        ddp_timeout=123, max_steps=40, learning_rate=3e-3, weight_decay=0.1, use_cpu=True, gradient_accumulation_steps=1
    )
    common = sizes | dict(per_device_train_batch_size=MICRO, gradient_accumulation_steps=ROWS // MICRO // ranks)
    common |= options
    own = dict(num_generations=GROUP, num_iterations=2, steps_per_generation=None, scale_rewards="batch", beta=0.1)
    options = grpo_config(folder / "grpo", **common | own | dict(loss_type="dapo", share_prompts=False))
    yield "grpo", GRPOTrainer(tiny_model().to(dtype), make_tokenizer(), config=options)
    own = dict(ppo_epochs=2, ppo_buffer_size=1, ppo_score_norm=True, kl_coef=0.2, ppo_target=0.1)
    options = ppo_config(folder / "ppo", **common | own)
    yield "ppo", PPOTrainer(tiny_model().to(dtype), make_tokenizer(), config=options)
    own = dict(ppo_epochs=2, ppo_buffer_size=1, critic="shared", ppo_whiten_rewards=True)
    own |= dict(kl_in="loss", entropy_coef=0.01)
    options = ppo_config(folder / "shared", **common | own)
    yield "ppo, shared critic", PPOTrainer(tiny_model().to(dtype), make_tokenizer(), config=options)


def results(folder: Path, steps: int) -> dict[str, dict]:
    """Weights after the steps and every step's metrics, by trainer."""
    out, ranks = {}, int(os.environ["WORLD_SIZE"])
    for name, trainer in trainers(folder, ranks):
        if ranks > 1:
            backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
            assert backend.options._timeout.total_seconds() == 123, backend.options._timeout
        metrics = [make_step(trainer, *rollout(step)) for step in range(steps)]
        out[name] = {"weights": weights_of(trainer), "metrics": metrics}
    return out


def make_step(trainer, responses: list[list[int]], scores: list[float]) -> dict[str, float]:
    """The metrics of a step on this process's share of the completions."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    queries = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    return trainer.step(queries[mine], responses[mine], torch.tensor(scores, dtype=torch.float64)[mine])


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Those of every role, whole, on the first process."""
    weights = {}
    for role, model in trainer.loop.models.items():
        whole = trainer.loop.spread.state_dict(model)
        whole = trainer.loop.spread.unwrap(model).state_dict() if whole is None else whole
        weights |= {f"{role}.{key}": value.clone() for key, value in whole.items()}
    return weights


if __name__ == "__main__":
    save_results(results)

"""One process of a PPO step over several: `test_ppo_processes.py` starts them."""

import os

import torch
from ppo_cases import PROMPTS, config, tiny

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.ppo import PPOTrainer

RESPONSES = [[3, 4, 2], [5], [6, 7, 8, 9, 3], [4, 2], [10, 11, 2], [12, 13, 14, 3, 4], [3, 2], [9, 8, 7, 2]]
SCORES = [0.5, -1.0, 2.0, 0.3, 1.7, float("nan"), -0.4, 0.9]
NAN = float("nan")
CASES = {
    "own critic": (SCORES, dict(ppo_score_norm=True, kl_coef=0.2)),
    "shared, whitened rewards": (SCORES, dict(critic="shared", ppo_whiten_rewards=True, entropy_coef=0.01)),
    "nothing on the last process": ([*SCORES[:4], NAN, NAN, NAN, NAN], dict(kl_in="loss")),
}


def two_steps(folder, case, rank, world):
    """(metrics of the second step, weights of actor and critic) after two steps on this process's share of the rows."""
    scores, options = CASES[case]
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    options = (
        dict(per_device_train_batch_size=8 // world, ppo_buffer_size=1, ppo_epochs=2, learning_rate=1e-2) | options
    )
    it = PPOTrainer(tiny().double(), make_tokenizer(), config=config(folder, **options))
    critic = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
    for _ in range(2):
        metrics = it.step(PROMPTS[rows], RESPONSES[rows], torch.tensor(scores[rows], dtype=torch.float64))
    weights = {**it.loop.unwrapped.state_dict(), **{f"critic.{n}": p for n, p in critic.state_dict().items()}}
    return metrics, weights


def process(rank, world, port, folder):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(two_steps(f"{folder}/run", case, rank, world), f"{folder}/{case}-{rank}.pt")
    torch.distributed.destroy_process_group()

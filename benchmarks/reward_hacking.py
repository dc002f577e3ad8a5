"""Reward hacking on the demo task: PPO on a weak reward model, and what an ensemble and the KL do about it.

Reward models of few pairs each rank held-out pairs of the SFT model's samples well, but PPO leaves those samples. Every
run starts from the same SFT model, prompts and reward models; only what is in VARIANTS differs. The verifier scores
nothing, it is only logged.

    python benchmarks/reward_hacking.py --seed 0 --output runs/hacking-0      # prints a table, writes results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.cli.demos import ppo, ppo_rm, rm, samples, task
from rlhf_fast.trainers.config import load_config, run

MEMBERS, PAIRS, RM_STEPS, PPO_STEPS = 4, 200, 60, 40
HARD: dict[str, Any] = dict(learning_rate=1e-3, ppo_epochs=2, ppo_buffer_size=2, per_device_train_batch_size=128)
NO_KL: dict[str, Any] = dict(kl_coef=0.0)
KL: dict[str, Any] = dict(kl_coef=0.2, ppo_target=None)
MORE_KL: dict[str, Any] = dict(kl_coef=1.0, ppo_target=None)
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (reward models, options of PPO)
    "one model": (1, NO_KL),
    "one model, KL": (1, KL),
    "one model, more KL": (1, MORE_KL),
    "mean of 4": (MEMBERS, NO_KL | dict(reward_aggregation="mean")),
    "min of 4": (MEMBERS, NO_KL | dict(reward_aggregation="min")),
    "mean - std of 4": (MEMBERS, NO_KL | dict(reward_aggregation="mean_std")),
    "min of 4, KL": (MEMBERS, KL | dict(reward_aggregation="min")),
    "min of 4, more KL": (MEMBERS, MORE_KL | dict(reward_aggregation="min")),
}


def train_members(start: task.Start) -> tuple[list[Path], list[float]]:
    """Reward models of PAIRS pairs each, no pair in two of them, and their accuracies on the same held-out pairs."""
    found = samples.sample(start.sft, start.prompts, start.seed, count=6 * MEMBERS * PAIRS)
    mixed = [j for j in found if j.right and j.wrong]
    held_out, mixed = mixed[:500], mixed[500:]
    data = start.output / "data"
    samples.write_pairs(data / "held_out_pairs.jsonl", held_out, len(held_out))
    folders, accuracies = [], []
    for k in range(MEMBERS):
        pairs = data / f"pairs-{k}.jsonl"
        samples.write_pairs(pairs, mixed[k * PAIRS :], PAIRS)
        options = rm.RM | dict(max_steps=RM_STEPS, eval_steps=RM_STEPS, eval_dataset=str(data / "held_out_pairs.jsonl"))
        folders.append(start.output / f"reward-{k}")
        config = start.config("rm", options, model=start.sft, data=pairs, out=folders[-1])
        accuracies.append(run(load_config(config))["eval_rewards/accuracies"])
    return folders, accuracies


def train_policy(start: task.Start, name: str, folders: list[Path]) -> dict[str, float]:
    """PPO on the first reward models of `folders`; what the learned reward and the verifier said."""
    members, options = VARIANTS[name]
    out = start.output / name.replace(" ", "-").replace(",", "")
    judges = dict(reward_model=[str(f) for f in folders[:members]], reward_normalize=True, ppo_score_norm=False)
    common = dict(eval_dataset=str(start.test), max_steps=PPO_STEPS, eval_steps=5, plot_loss=False)
    options = ppo_rm.PPO | HARD | judges | common | options
    config = start.config("ppo", options, model=start.sft, data=start.prompts, out=out)
    run(load_config(config))
    rows = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [row["eval_reward_exact_match"] for row in rows if row.get("eval_reward_exact_match") is not None]
    scores = learned_scores(out, folders[:members], start)
    return dict(
        learned_score=scores, accuracy_best=max(held_out), accuracy_last=held_out[-1], kl=rows[-1].get("kl_sequence")
    )


def learned_scores(folder: Path, judges: list[Path], start: task.Start) -> float:
    """By how many standard deviations of the SFT model's samples those of `folder` score higher, a mean over judges."""
    from rlhf_fast.trainers.models.reward_model import load_reward_model
    from rlhf_fast.trainers.reward_ensemble import RewardModel

    gains = []
    for judge in judges:
        model = RewardModel(load_reward_model(judge), batch_size=512)
        before, after = (torch.tensor(model(**drawn(policy, start.test))) for policy in (start.sft, folder))
        gains.append(((after.mean() - before.mean()) / before.std()).item())
    return sum(gains) / len(gains)


def drawn(policy: Path, data: Path) -> dict[str, list[list[int]]]:
    """Prompts and one sample each of the model in `policy`, as ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fast.trainers.rollout.samplers import GroupSampler, SamplerSettings

    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = [json.loads(line)["prompt"] for line in data.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer(prompts)["input_ids"]
    ends = dict(eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id)
    settings = SamplerSettings(max_new_tokens=task.COMPLETION, **ends)
    rollout = GroupSampler(AutoModelForCausalLM.from_pretrained(policy), settings)(ids)
    return dict(prompt_ids=ids, completion_ids=rollout.completions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/reward-hacking"))
    arguments = parser.parse_args()
    start = task.start(arguments.output, arguments.seed, PPO_STEPS * ppo.ROLLOUT, title="reward hacking", quiet=True)
    folders, accuracies = train_members(start)
    results: dict[str, Any] = dict(seed=arguments.seed, accuracy_before=task.accuracy(start.before))
    results["pair_accuracy"] = accuracies
    for name in VARIANTS:
        results[name] = train_policy(start, name, folders)
        print(name, json.dumps(results[name]), flush=True)
        (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

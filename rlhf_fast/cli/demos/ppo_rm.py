"""PPO with a learned reward: SFT, a reward model from pairs, PPO on its scores. The verifier only watches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ppo, rm, task

PPO: dict[str, Any] = ppo.PPO | dict(
    reward_weights=[1.0, 0.0],  # the reward model; the verifier, which is logged as reward_exact_match
    ppo_score_norm=True,
    missing_eos_penalty=2.0,  # the reward model has seen finished answers only
)


def demo(
    output: str | Path = "runs/demo-ppo-rm",
    seed: int = 0,
    *,
    steps: int = ppo.STEPS,
    prompts: int = rm.PROMPTS,
    pairs: int = rm.PAIRS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, reward model, PPO; accuracy_before, accuracy_after and pair_accuracy are in the summary.

    Args:
        output: gets the data, the configs, the SFT model under sft/, the reward model under reward/, and the files of
            the PPO run.
        steps: rollouts of PPO; fewer make a shorter run with a schedule of its own.
        prompts, pairs: what the reward model is made of; see `rm.demo`.
        overrides: options of the PPO stage.
    """
    from rlhf_fast.trainers.config import load_config, run

    output = Path(output)
    start = task.start(output, seed, max(prompts, steps * ppo.ROLLOUT), title="ppo-rm", quiet=quiet)
    reward = rm.train_reward_model(start, output / "reward", pairs=pairs)
    judge = dict(reward_model=str(output / "reward"), eval_dataset=str(start.test), max_steps=steps)
    config = start.config("ppo", PPO | judge | dict(overrides or {}), model=start.sft, data=start.prompts, out=output)
    start.console.print(f"\n[bold]PPO[/], {steps} x {ppo.ROLLOUT} prompts: rlhf-fast train {config}")
    summary = run(load_config(config))
    return start.finish("PPO-RM", output, summary, pair_accuracy=reward["eval_rewards/accuracies"])

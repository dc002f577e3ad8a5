"""PPO with a verifiable reward: 60 rollouts of 256 prompts, a critic of its own, the KL held near 6 nats a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import task

ROLLOUT, STEPS, MINIBATCHES = 256, 60, 4

PPO: dict[str, Any] = dict(
    stage="ppo",
    max_completion_length=task.COMPLETION,
    temperature=1.0,
    per_device_train_batch_size=ROLLOUT // MINIBATCHES,
    per_device_eval_batch_size=ROLLOUT,
    ppo_buffer_size=MINIBATCHES,
    ppo_epochs=4,
    critic="own",
    critic_warmup_steps=2,
    critic_learning_rate=1e-3,
    learning_rate=3e-4,
    lr_scheduler_type="linear",
    adam_beta2=0.95,
    max_grad_norm=1.0,
    gamma=1.0,
    lam=0.95,
    kl_coef=0.05,
    ppo_target=6.0,
    reward_funcs=task.VERIFIER,
    eval_on_start=True,
    eval_steps=10,
)


def demo(
    output: str | Path = "runs/demo-ppo",
    seed: int = 0,
    *,
    steps: int = STEPS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, then PPO; accuracy_before and accuracy_after are in the summary.

    Args:
        output: gets the data, the configs, the SFT model under sft/, and the files of the PPO run.
        steps: fewer make a shorter run with a schedule of its own.
        overrides: options of the PPO stage.
    """
    from rlhf_fast.trainers.config import load_config, run

    output = Path(output)
    start = task.start(output, seed, steps * ROLLOUT, title="ppo", quiet=quiet)
    options = PPO | dict(max_steps=steps, eval_dataset=str(start.test)) | dict(overrides or {})
    config = start.config("ppo", options, model=start.sft, data=start.prompts, out=output)
    start.console.print(f"\n[bold]PPO[/], {steps} x {ROLLOUT} prompts: rlhf-fast train {config}")
    return start.finish("PPO", output, run(load_config(config)))

"""GRPO with a verifiable reward: 240 rollouts of 64 prompts x 8 completions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import task

PROMPTS_PER_ROLLOUT, GROUP, ROLLOUTS, MINIBATCHES = 64, 8, 240, 2

GRPO: dict[str, Any] = dict(
    stage="grpo",
    num_generations=GROUP,
    max_completion_length=task.COMPLETION,
    temperature=1.0,
    per_device_train_batch_size=PROMPTS_PER_ROLLOUT * GROUP // MINIBATCHES,
    steps_per_generation=MINIBATCHES,
    reward_funcs=task.VERIFIER,
    scale_rewards="group",
    loss_type="grpo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=0.0,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    warmup_steps=10,
    adam_beta1=0.9,
    adam_beta2=0.95,
    max_grad_norm=1.0,
    eval_on_start=True,
    eval_steps=48,
)


def demo(
    output: str | Path = "runs/demo-grpo",
    seed: int = 0,
    *,
    rollouts: int = ROLLOUTS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, then GRPO; accuracy_before and accuracy_after are in the summary.

    Args:
        output: gets the data, the configs, the SFT model under sft/, and the files of the GRPO run.
        rollouts: fewer make a shorter run with a schedule of its own.
        overrides: options of the GRPO stage.
    """
    from rlhf_fast.trainers.config import load_config, run

    output = Path(output)
    start = task.start(output, seed, rollouts * PROMPTS_PER_ROLLOUT, title="grpo", quiet=quiet)
    options = GRPO | dict(max_steps=rollouts * MINIBATCHES, eval_dataset=str(start.test)) | dict(overrides or {})
    config = start.config("grpo", options, model=start.sft, data=start.prompts, out=output)
    start.console.print(
        f"\n[bold]GRPO[/], {rollouts} x {PROMPTS_PER_ROLLOUT} prompts x {GROUP}: rlhf-fast train {config}"
    )
    return start.finish("GRPO", output, run(load_config(config)))

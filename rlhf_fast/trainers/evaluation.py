"""What PPO and GRPO measure beside training: rewards of the policy's answers to held-out prompts, and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.gauges import Perplexity
from rlhf_fast.trainers.loop import Loop
from rlhf_fast.trainers.reward_ensemble import fixed_statistics
from rlhf_fast.trainers.rewards import Rewards, Scores, finite_mean
from rlhf_fast.trainers.rl_config import RLConfig
from rlhf_fast.trainers.rollout.samplers import Rollout


class Evaluating:
    """The part of `RLTrainer` that evaluates."""

    config: RLConfig
    loop: Loop
    model: nn.Module
    accelerator: Accelerator
    rewards: Rewards | None
    eval_rewards: Rewards | None
    eval_prompts: list[Prompt] | None
    perplexity: Perplexity | None
    sample: Callable[..., Rollout]
    make_sampler: Callable[..., Any]
    score_rollout: Callable[..., Scores]

    @property
    def can_evaluate(self) -> bool:
        return bool(self.eval_prompts) or self.perplexity is not None

    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> dict[str, float]:
        """Means over one completion for each evaluation prompt, greedy unless `eval_do_sample`, and the perplexity.

        The processes share the prompts and get the same means.
        """
        prompts = prompts or self.eval_prompts
        if not prompts and self.perplexity is None:
            raise ValueError("evaluate needs eval_dataset or perplexity_dataset")
        metrics: dict[str, float] = {}
        with self.loop.timed("evaluate"):
            if prompts:
                mine = prompts[self.accelerator.process_index :: self.accelerator.num_processes]
                found = self._evaluation_rows(mine or prompts[:1])  # statistics over processes wait for every one
                every = gather_object([{name: column[: len(mine)] for name, column in found.items()}])
                metrics = {name: finite_mean(torch.tensor([x for part in every for x in part[name]])) for name in found}
            if self.perplexity is not None:
                with self.loop.spread.gathered(self.model):
                    metrics["eval_perplexity"] = self.perplexity(self.loop.unwrapped)
        return metrics

    def _evaluation_rows(self, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """One number a prompt of everything that `evaluate` takes means of."""
        rollout = self.sample(prompts, sampler=self.make_sampler(greedy=not self.config.eval_do_sample))
        columns = {"eval_completion_length": rollout.lengths}
        for rewards in (self.rewards, self.eval_rewards):
            if rewards is None:
                continue
            with fixed_statistics(self.rewards.functions if self.rewards is not None else ()):
                scores = self.score_rollout(prompts, rollout, rewards)
            if rewards is self.rewards:
                columns["eval_reward"] = scores.total
            if rewards is self.eval_rewards or len(rewards.names) > 1:
                prefix = "eval" if rewards is self.eval_rewards else "eval_reward"
                each = zip(rewards.names, scores.each.unbind(1), strict=True)
                columns |= {f"{prefix}_{name}": column for name, column in each}
        return {name: column.double().tolist() for name, column in columns.items()}

    def evaluate_at_start(self) -> None:
        """With `eval_on_start`, the model before its first step, as row 0 of the log; it may be the best there is."""
        loop = self.loop
        if not (self.config.eval_on_start and self.can_evaluate) or loop.checkpoint is not None:
            return
        scores = self.evaluate()
        loop.log.log(0, scores)
        loop.control = loop.callbacks.on_evaluate(loop.arguments, loop.state, loop.control, metrics=scores)
        if loop.control.should_save:
            loop.snapshot.save()
            loop.control.should_save = False

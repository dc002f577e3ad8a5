"""GRPO: sample a group of completions for each prompt, score them, follow the advantage within the group.

    A_i = (r_i - mean(r)) / (std(r) + eps)                       within the group of one prompt
    L   = -mean_i mean_t min(rho A_i, clip(rho, 1 - e_low, 1 + e_high) A_i) + beta KL(pi || pi_ref),  rho = pi / pi_old

Source: Shao et al. 2024, "DeepSeekMath", equations 3 and 4; other losses by `loss_type`.

Departures from the textbook, each exact:
- one forward per micro-batch, in which the fused head forms loss and gradient: logits never exist;
- the first update of a rollout takes no old log-probabilities: there rho is 1 and pi_old is the policy itself. Later
  updates take what the sampler recorded, or one more forward (`old_logprobs: recompute`);
- a sequence of zero advantage has no gradient (without KL and entropy terms): it does not enter the transformer, but
  it counts in the normaliser. A minibatch of nothing else makes no step; the schedule goes on;
- normalisers are counts over the whole minibatch and all processes, so micro-batches change nothing but rounding;
- the policy is updated in eval mode (`disable_dropout`), so that sampler, policy and reference are one function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_fast.ops.advantages import group_advantages
from rlhf_fast.trainers.data import Prompt
from rlhf_fast.trainers.experience import IGNORE, Experience, MicroBatch, MiniBatch, build_experience, collate, cut_rows
from rlhf_fast.trainers.grpo_config import GRPOConfig
from rlhf_fast.trainers.policy import Reference, updating_mode
from rlhf_fast.trainers.rl import RLTrainer, add_metrics, run_rl
from rlhf_fast.trainers.rollout import Rollout

# Losses that are a multiple of the advantage, token by token: without it they have no gradient.
PROPORTIONAL = frozenset(
    (
        "ppo",
        "grpo",
        "dapo",
        "dr_grpo",
        "bnpo",
        "gspo",
        "luspo",
        "cispo",
        "sapo",
        "vespo",
        "gpg",
        "geo_mean",
        "reinforce",
    )
)


class GRPOTrainer(RLTrainer):
    """Group Relative Policy Optimization of a causal LM.

    Args: see `RLTrainer`; `config` is a `GRPOConfig`.
    Example:
        trainer = GRPOTrainer(model, tokenizer, [{"prompt": "2+2="}], reward, GRPOConfig(output_dir="out"))
        summary = trainer.train()
    """

    config: GRPOConfig

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        train_dataset: Sequence[Mapping[str, Any] | Prompt],
        reward_funcs: Any = None,
        config: GRPOConfig | None = None,
        *,
        eval_dataset: Sequence[Mapping[str, Any] | Prompt] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        config = config or GRPOConfig()
        self.loss = config.policy_loss()
        rest = dict(eval_dataset=eval_dataset, callbacks=callbacks)
        super().__init__(model, processing_class, train_dataset, reward_funcs, config, **rest)
        if self.reference is not None:
            self.reference.to(self.accelerator.device)

    def prepare_model(self, model: nn.Module) -> None:
        self.reference = Reference(model) if self.config.beta else None

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` (or `num_train_epochs`), save the model, return what `summary.json` holds."""
        config, loop = self.config, self.loop
        updating_mode(self.model, config.disable_dropout)
        loop.start(self.max_steps, config.num_train_epochs)
        if config.eval_on_start and self.eval_prompts:
            loop.log.log(0, self.evaluate())
        first = last = None
        while not loop.done:
            prompts = self.next_prompts()
            with loop.timed("rollout"):
                rollout = self.sampler([p.ids for p in prompts], config.num_generations)
            with loop.timed("scoring"):
                experience, metrics = self.score(prompts, rollout)
            with loop.timed("update"):
                minibatches = self.minibatches(experience)
            for iteration in range(config.num_iterations):
                for k, minibatch in enumerate(minibatches):
                    if loop.done:
                        break
                    with loop.timed("update"):
                        self.update(minibatch, on_policy=iteration == k == 0)
                    loop.state.epoch = self.epoch
                    loop.end_step(metrics, evaluate=self.evaluate if self.eval_prompts else None)
            first, last = metrics["reward"] if first is None else first, metrics["reward"]
        return loop.finish(reward_first=first, reward_last=last, **(self.evaluate() if self.eval_prompts else {}))

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        per_rollout = self.prompts_per_rollout * self.accelerator.num_processes
        rollouts = max(1, math.ceil(self.config.num_train_epochs * len(self.prompts) / per_rollout))
        return rollouts * self.minibatches_per_rollout * self.config.num_iterations

    # ---- score

    def score(self, prompts: Sequence[Prompt], rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Rewards and advantages of a rollout of `num_generations` completions for each prompt."""
        config, group = self.config, self.config.num_generations
        rows = [prompt for prompt in prompts for _ in range(group)]
        scores = self.score_rollout(rows, rollout)
        device = self.accelerator.device
        gathered = self.accelerator.gather(scores.total.to(device))  # every process has whole groups
        result = group_advantages(
            gathered.cpu(),
            group_size=group,
            scale=config.scale_rewards,
            baseline=config.advantage_baseline,
            lengths=self.accelerator.gather(rollout.lengths.to(device)).cpu(),
        )
        mine = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        stopped = torch.tensor([reason == "stop" for reason in rollout.finish])
        scored = scores.total.isfinite()
        if config.mask_truncated_completions:
            scored &= stopped
        advantages = result.advantages[mine].masked_fill(~scores.total.isfinite(), math.nan)  # counts nowhere
        experience = build_experience([p.ids for p in rows], rollout, advantages, scored)
        self.loop.state.num_input_tokens_seen += int(self.accelerator.gather(rollout.lengths.to(device)).sum())
        metrics = self.rollout_metrics(scores, gathered, rollout)
        return experience, metrics | {"zero_std_groups": float(result.zero_std.float().mean())}

    # ---- advantages to minibatches

    def minibatches(self, experience: Experience) -> list[MiniBatch]:
        """The rollout's sequences in random minibatches, without those that cannot have a gradient."""
        total = len(experience.scored)
        order = torch.randperm(total, generator=self.shuffle).to(experience.ids.device)
        rows = order.chunk(self.minibatches_per_rollout)
        updates = self.minibatches_per_rollout * self.config.num_iterations
        built = [self._minibatch(experience, part) for part in rows]
        if self.reference is not None:
            built = [self._with(b, "ref_logprob", self._reference_logprob) for b in built]
        if self.config.old_logprobs == "recompute" and updates > 1:
            built = [self._with(b, "old_logprob", self._policy_logprob) for b in built]
        return built

    def _minibatch(self, experience: Experience, rows: Tensor) -> MiniBatch:
        config, lengths = self.config, experience.completion_lengths
        live = rows[experience.scored[rows]]
        counts = [(~experience.advantages[rows].isnan()).sum(), lengths[live].sum()]
        if not (config.beta or config.entropy_coef) and config.loss_type in PROPORTIONAL:
            live = live[experience.advantages[live] != 0]
        counts = torch.stack([*counts, lengths[live].sum()]).float()
        sequences, tokens, live_tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        if live_tokens and not len(live):
            live = rows[:1]  # another process has something: DDP needs a backward here too, of weight 0
            experience = experience._replace(scored=torch.zeros_like(experience.scored))
        parts = []
        if len(live):
            whole = experience.cu_seqlens.diff()
            parts = cut_rows(live, whole, config.per_device_train_batch_size, config.max_tokens_per_micro_batch)
        micros = [collate(experience, part, self.tokenizer.pad_token_id) for part in parts]
        return MiniBatch(micros, max(sequences, 1), max(tokens, 1), max(live_tokens, 1))

    def _with(self, minibatch: MiniBatch, field: str, logprob_of: Any) -> MiniBatch:
        return minibatch._replace(micros=[m._replace(**{field: logprob_of(m)}) for m in minibatch.micros])

    @torch.no_grad()
    def _policy_logprob(self, micro: MicroBatch) -> Tensor:
        out = self.model(micro.input_ids, target_ids=micro.target_ids, temperature=self.config.temperature)
        return out.logprob

    @torch.no_grad()
    def _reference_logprob(self, micro: MicroBatch) -> Tensor:
        with self.reference.active() as model, self.accelerator.autocast():
            return model(micro.input_ids, target_ids=micro.target_ids, temperature=self.config.temperature).logprob

    # ---- update

    def update(self, minibatch: MiniBatch, *, on_policy: bool) -> None:
        """One optimiser step."""
        sums: dict[str, Tensor] = {}

        def loss_of(micro: MicroBatch) -> Tensor:
            out = self.fused_loss(micro, minibatch, on_policy=on_policy)
            add_metrics(sums, {"loss": out.loss.detach(), **out.metrics})
            if on_policy:
                gap = (out.logprob - micro.old_logprob)[micro.target_ids != IGNORE].abs()
                largest = gap.max() if gap.numel() else gap.sum()
                share = gap.sum() / minibatch.live_tokens
                add_metrics(sums, {"sampler_logprob_gap": share, "sampler_logprob_gap_max": largest})
            return out.loss

        self.loop.update(minibatch.micros, loss_of)
        kept = {name: self.over_processes(name, value) for name, value in sums.items() if not name.startswith("rows_")}
        self.loop.record(kept | {"no_gradient_steps": float(not minibatch.micros)})

    def fused_loss(self, micro: MicroBatch, minibatch: MiniBatch, *, on_policy: bool) -> Any:
        """`FusedLoss` of a micro-batch: its share of the minibatch's loss, with the gradient already formed."""
        by_token = self.loss.aggregation == "token_mean"
        batch = {
            "advantages": micro.advantages,
            "old_logprob": None if on_policy else micro.old_logprob,
            "ref_logprob": micro.ref_logprob,
            "normalizer": minibatch.tokens if by_token else minibatch.sequences,
            "entropy_normalizer": minibatch.tokens,
            "num_tokens": minibatch.live_tokens,
        }
        return self.model(
            micro.input_ids,
            target_ids=micro.target_ids,
            loss_fn=self.loss,
            batch={name: value for name, value in batch.items() if value is not None},
            segments=micro.cu_seqlens,
            entropy=True,
            temperature=self.config.temperature,
        )


def run_grpo(config: GRPOConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as the configuration says; returns what `summary.json` holds."""
    return run_rl(config, GRPOTrainer, callbacks)


__all__ = ["GRPOConfig", "GRPOTrainer", "run_grpo"]

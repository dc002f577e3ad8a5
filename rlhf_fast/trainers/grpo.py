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
- completions of a prompt may share a row behind one copy of it (`layout`), so the prompt is computed once;
- advantages are per token, since process rewards make them so; an outcome's is the same along its completion;
- normalisers are counts over the whole minibatch and all processes, so micro-batches change nothing but rounding
  (but for clip_cov and kl_cov, which choose their tokens within one);
- the policy is updated in eval mode (`disable_dropout`), so that sampler, policy and reference are one function.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_fast.ops._fused_run import merge_metrics
from rlhf_fast.trainers.beforehand import with_entropy_threshold, with_old, with_reference
from rlhf_fast.trainers.credit import credit
from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.experience import (
    IGNORE,
    Experience,
    MicroBatch,
    MiniBatch,
    as_plain,
    build_experience,
    from_plain,
)
from rlhf_fast.trainers.gauges import kl_by_estimator
from rlhf_fast.trainers.grpo_config import GRPOConfig
from rlhf_fast.trainers.layout import Layout
from rlhf_fast.trainers.models.policy import Reference, updating_mode
from rlhf_fast.trainers.reference_trainer import load_reference
from rlhf_fast.trainers.refill import Batch, as_batch, collect, refilled
from rlhf_fast.trainers.reward_ensemble import fixed_statistics
from rlhf_fast.trainers.rewards import Scores
from rlhf_fast.trainers.rl import RLTrainer, run_rl

# Losses that are a multiple of the advantage, token by token: without it they have no gradient.
CLIPPED = ("ppo", "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "geo_mean")
PROPORTIONAL = frozenset((*CLIPPED, "cispo", "sapo", "vespo", "gpg", "reinforce", "dppo_tv", "dppo_kl"))


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
        train_dataset: Sequence[Mapping[str, Any] | Prompt] | None = None,
        reward_funcs: Any = None,
        config: GRPOConfig | None = None,
        **rest: Any,
    ):
        config = config or GRPOConfig()
        self.loss = config.policy_loss()
        super().__init__(model, processing_class, train_dataset, reward_funcs, config, **rest)
        # Of the rollout: minibatches, updates still to be made (iteration, minibatch), what is logged with each.
        self.built: list[MiniBatch] = []
        self.todo: list[tuple[int, int]] = []
        self.metrics: dict[str, float] = {}
        self.layout = Layout(self.loop.unwrapped, share=config.share_prompts, packed=config.packing)
        droppable = not (config.beta or config.entropy_coef or config.top_entropy_quantile < 1)
        self.drops_zero_advantages = droppable and config.loss_type in PROPORTIONAL

    def prepare_model(self, model: nn.Module) -> None:
        config = self.config
        if config.needs_reference:
            other = load_reference(config) if config.ref_model else None
            self.reference = Reference(model, other, copy=config.sync_ref_model)

    def run(self) -> dict[str, Any]:
        loop = self.loop
        self.start()
        self.evaluate_at_start()
        while not loop.done:
            if not self.todo:  # else a checkpoint fell between the updates of a rollout, and holds them
                self.begin_rollout()
            while self.todo and not loop.done:
                iteration, k = self.todo.pop(0)
                with loop.timed("update"):
                    self.update(self.built[k], on_policy=iteration == k == 0)
                loop.state.epoch = self.epoch
                loop.end_step(self.metrics, evaluate=self.evaluate if self.can_evaluate else None)
        return self.finish()

    def begin_rollout(self) -> None:
        """Completions of the next prompts, their rewards and advantages, the minibatches and the updates over them."""
        config = self.config
        batch, metrics = collect(self, config.num_generations), {}
        if config.dynamic_sampling:
            batch, metrics = refilled(self, batch, config.dynamic_sampling_attempts)
        experience, of_rollout = self.advantages(batch)
        self.metrics = metrics | of_rollout
        self.note_reward(of_rollout["reward"])
        with self.loop.timed("update"):
            self.built = self.minibatches(experience)
        self.todo = [(i, k) for i in range(config.num_iterations) for k in range(len(self.built))]

    def start(self) -> None:
        """Ready for the first update."""
        updating_mode(self.model, self.config.disable_dropout)
        self.loop.start(self.max_steps, self.config.num_train_epochs)

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the run."""
        config = self.config
        per_rollout = self.minibatches_per_rollout * config.num_iterations
        return config.max_steps if config.max_steps > 0 else self.rollouts * per_rollout

    # ---- in the middle of a rollout

    def state_dict(self) -> dict[str, Any]:
        built = [as_plain(minibatch) for minibatch in self.built] if self.todo else []
        return super().state_dict() | {"todo": self.todo, "built": built, "metrics": self.metrics if self.todo else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.todo, self.metrics = [(i, k) for i, k in state["todo"]], dict(state["metrics"])
        built = [from_plain(minibatch, self.accelerator.device) for minibatch in state["built"]]
        self.built = [b._replace(micros=self.loop.even(b.micros, _idle)) for b in built]  # weights may be sharded now

    def load_state_of_others(self, state: Mapping[str, Any]) -> None:
        super().load_state_of_others(state)
        if state["todo"]:
            warnings.warn(f"{len(state['todo'])} updates of a rollout by other processes are given up", stacklevel=2)

    # ---- rewards to advantages

    def advantages(self, batch: Batch) -> tuple[Experience, dict[str, float]]:
        """A scored rollout with its advantages, as training data, and its metrics."""
        config, scores, rollout, group = self.config, batch.scores, batch.rollout, batch.group_size
        baseline = self.greedy_rewards(batch.prompts).repeat_interleave(group) if config.greedy_baseline else None
        across = dict(gather=self.everywhere, process=self.accelerator.process_index)  # each has whole groups
        options, weights = config.advantage_options(), self.reward_weights(scores)
        result = credit(scores, rollout.lengths.cpu(), group, weights, options, baseline=baseline, **across)
        usable = scores.total.isfinite()
        if config.mask_truncated_completions:
            usable &= torch.tensor([reason == "stop" for reason in rollout.finish])
        prompts = [prompt.ids for prompt in batch.prompts for _ in range(group)]
        experience = build_experience(prompts, rollout, result.advantages, usable, group)
        self.loop.state.num_input_tokens_seen += int(self.everywhere(rollout.lengths).sum())
        metrics = self.rollout_metrics(scores, rollout)
        return experience, metrics | {"zero_std_groups": float(self.everywhere(result.zero_std).float().mean())}

    def reward_weights(self, scores: Scores) -> Tensor:
        """(F,) one a reward function; ones for scores of the caller's own."""
        count = scores.each.shape[1]
        own = self.rewards is not None and len(self.rewards.weights) == count
        return self.rewards.weights if own else torch.ones(count)

    def greedy_rewards(self, prompts: Sequence[Prompt]) -> Tensor:
        """(prompts,) reward of each prompt's greedy completion."""
        with self.loop.timed("rollout"):
            rollout = self.sample(prompts, sampler=self.make_sampler(greedy=True))
        with self.loop.timed("scoring"), fixed_statistics(self.reward_functions()):
            return self.score_rollout(prompts, rollout).outcome

    # ---- advantages to minibatches

    def minibatches(self, experience: Experience) -> list[MiniBatch]:
        """The rollout's groups in random minibatches, without the sequences that cannot have a gradient."""
        sizes = torch.unique_consecutive(experience.groups, return_counts=True)[1].tolist()
        groups = torch.arange(len(experience.groups), device=experience.ids.device).split(sizes)
        order = torch.cat([groups[g] for g in torch.randperm(len(groups), generator=self.shuffle).tolist()])
        built = [self._minibatch(experience, rows) for rows in order.chunk(self.minibatches_per_rollout)]
        with self.whole_weights():
            return self._known_beforehand(experience, built)

    def _known_beforehand(self, experience: Experience, built: list[MiniBatch]) -> list[MiniBatch]:
        """With what the loss needs of the reference and of the policy as it is now."""
        config = self.config
        temperature = config.temperature
        if self.reference is not None:
            built = [with_reference(b, self.reference, temperature, self.accelerator) for b in built]
        updates = self.minibatches_per_rollout * config.num_iterations
        unknown = bool(experience.logprob.isnan().any())  # completions from elsewhere
        if config.recomputes or ((unknown or config.old_logprobs == "recompute") and updates > 1):
            built = [with_old(b, self.model, temperature) for b in built]
        if config.top_entropy_quantile < 1:
            built = [with_entropy_threshold(b, config.top_entropy_quantile, self.accelerator) for b in built]
        return built

    def _minibatch(self, experience: Experience, rows: Tensor) -> MiniBatch:
        config, tokens_of = self.config, experience.per_sequence(experience.trained.long())[rows]
        live = tokens_of > 0
        if self.drops_zero_advantages:
            live &= experience.per_sequence((experience.trained & (experience.advantages != 0)).long())[rows] > 0
        counts = torch.stack([experience.counted[rows].sum(), tokens_of.sum(), tokens_of[live].sum()]).float()
        sequences, tokens, live_tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        if live_tokens and not live.any():
            live[0] = True  # another process has something: DDP needs a backward here too, of weight 0
            experience = experience._replace(trained=torch.zeros_like(experience.trained))
        limits = dict(count=config.per_device_train_batch_size, tokens=config.max_tokens_per_micro_batch)
        micros = self.layout.micro_batches(experience, rows[live], self.tokenizer.pad_token_id, **limits)
        micros = self.loop.even(micros, _idle)
        return MiniBatch(micros, max(sequences, 1), max(tokens, 1), max(live_tokens, 1))

    # ---- update

    def update(self, minibatch: MiniBatch, *, on_policy: bool) -> dict[str, Tensor]:
        """One optimiser step; its metrics."""
        sums: dict[str, Tensor] = {}

        def loss_of(micro: MicroBatch) -> Tensor:
            out = self.fused_loss(micro, minibatch, on_policy=on_policy)
            merge_metrics(sums, {"loss": out.loss.detach(), **out.metrics})
            merge_metrics(sums, self.distances(out.logprob, micro, minibatch.live_tokens, on_policy=on_policy))
            return out.loss

        self.loop.update(minibatch.micros, loss_of)
        kept = self.over_processes(sums)
        self.loop.record(kept | {"no_gradient_steps": float(not minibatch.micros)})
        return kept

    def distances(self, logprob: Tensor, micro: MicroBatch, tokens: float, *, on_policy: bool) -> dict[str, Tensor]:
        """How far the policy is from the reference and, where they should be one, from what the sampler recorded."""
        trained, found = micro.target_ids != IGNORE, {}
        if micro.ref_logprob is not None:
            found = kl_by_estimator(logprob[trained], micro.ref_logprob[trained], tokens)
            found |= {} if self.config.beta else {"kl": found["kl_k3"]}  # else the loss says it
        if on_policy:
            gap = (logprob - micro.sampler_logprob)[trained].abs()
            gap = gap[gap.isfinite()]
            largest = gap.max() if gap.numel() else gap.sum()
            found |= {"sampler_logprob_gap": gap.sum() / tokens, "sampler_logprob_gap_max": largest}
        return found

    def fused_loss(self, micro: MicroBatch, minibatch: MiniBatch, *, on_policy: bool) -> Any:
        """`FusedLoss` of a micro-batch: its share of the minibatch's loss, with the gradient already formed."""
        config, by_token = self.config, self.loss.aggregation == "token_mean"
        batch = {
            "advantages": micro.advantages,
            "old_logprob": None if on_policy else micro.old_logprob,
            "logprob": micro.old_logprob if on_policy and config.needs_old else None,
            "ref_logprob": micro.ref_logprob,
            "rollout_logprob": micro.sampler_logprob if config.needs_sampler else None,
            "old_entropy": micro.extra.get("old_entropy"),
            "entropy_threshold": minibatch.entropy_threshold,
            "normalizer": minibatch.tokens if by_token else minibatch.sequences,
            "entropy_normalizer": minibatch.selected_tokens or minibatch.tokens,
            "num_tokens": minibatch.live_tokens,
        }
        return self.model(
            **micro.inputs,
            target_ids=micro.target_ids,
            loss_fn=self.loss,
            batch={name: value for name, value in batch.items() if value is not None},
            segments=micro.cu_seqlens,
            entropy=True,
            temperature=config.temperature,
        )

    # ---- step by step

    def step(self, queries: Sequence[Any], responses: Any, scores: Any) -> dict[str, float]:
        """The updates of one rollout of the caller's own, groups of completions side by side; their metrics.

        Args:
            queries: texts or token ids, one for each group, or one for each completion: then `num_generations`
                neighbours are a group, of one prompt.
            responses: the `Rollout` that `generate` gave, or completions as texts or token ids.
            scores: one number a completion; NaN drops it.
        """
        self.check_open()
        if self.loop.log is None:
            self.start()
        batch = as_batch(queries, responses, scores, self.tokenizer, self.sampler.settings, self.config.num_generations)
        experience, metrics = self.advantages(batch)
        sums: dict[str, Tensor] = {}
        minibatches = self.minibatches(experience)
        for iteration in range(self.config.num_iterations):
            for k, minibatch in enumerate(minibatches):
                sums = self.update(minibatch, on_policy=iteration == k == 0)
                self.loop.end_step(metrics, evaluate=self.evaluate if self.can_evaluate else None)
        return metrics | {name: float(value) for name, value in sums.items()}


def _idle(micro: MicroBatch) -> MicroBatch:
    """The same with nothing to train on."""
    return micro._replace(target_ids=torch.full_like(micro.target_ids, IGNORE))


def run_grpo(config: GRPOConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as the configuration says; returns what `summary.json` holds."""
    return run_rl(config, GRPOTrainer, callbacks)


__all__ = ["GRPOConfig", "GRPOTrainer", "run_grpo"]

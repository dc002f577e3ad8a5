"""PPO: sample, score, let four roles speak about every token, follow clipped ratios and values for some epochs.

    r_t = -c KL_t + [t is the last token] score            actor pi, critic V, reference pi_ref, reward
    A   = whiten(GAE(r, V)),   R = GAE(r, V) + V
    L   = -mean_t min(rho A, clip(rho, 1 - e, 1 + e) A) - h mean_t H + v mean_t max((V - R)^2, (V' - R)^2) / 2

with rho = pi / pi_old and V' = clip(V, V_old - d, V_old + d). One backward reaches actor and critic.

Source: Schulman et al. 2017 (arXiv:1707.06347); for language models Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang
et al. 2022 (arXiv:2203.02155).

Departures from the textbook, each exact:
- one forward of the actor yields the loss with its gradient, the entropy and, on a shared trunk, the values: the fused
  head forms no logits, and three products with the head make an update;
- a step's first update takes no old log-probabilities: there pi_old is the policy itself, and rho is 1;
- pi_old and pi_ref are computed by the same forward, so that the KL is exactly 0 at the start; the sampler's own
  log-probabilities are only compared with them;
- tokens of a tool, and sequences without a usable score, are in no normaliser, no whitening and no scan;
- normalisers are counts over the whole minibatch and all processes, so micro-batches change nothing but rounding;
- all roles are in eval mode (`disable_dropout`), so that sampler, actor and reference are one function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_fast.ops._fused_run import merge_metrics
from rlhf_fast.ops.ppo import ppo_advantages
from rlhf_fast.ops.value import gae, masked_whiten, shape_rewards
from rlhf_fast.ops.value_loss import value_loss
from rlhf_fast.trainers.data.packing import check_packing
from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.loop import Loop
from rlhf_fast.trainers.models.critic import ValueHead, critic_of_policy, load_critic
from rlhf_fast.trainers.models.policy import Reference, enable_checkpointing, updating_mode
from rlhf_fast.trainers.models.reward_model import pool_by_length
from rlhf_fast.trainers.ppo_config import PPOConfig
from rlhf_fast.trainers.ppo_experience import Grid, RoleOutputs, Sequences, join, with_mask
from rlhf_fast.trainers.ppo_metrics import rollout_metrics, rollout_sums
from rlhf_fast.trainers.ppo_roles import Roles
from rlhf_fast.trainers.reference_trainer import load_reference
from rlhf_fast.trainers.rl import RLTrainer, run_rl
from rlhf_fast.trainers.rollout.samplers import Rollout
from rlhf_fast.trainers.running_stats import RunningStats
from rlhf_fast.trainers.stepwise import as_queries, as_rollout


class PPOTrainer(RLTrainer):
    """Proximal Policy Optimization of a causal LM.

    Args: see `RLTrainer`; `config` is a `PPOConfig`. Further:
        critic: a sequence classifier with one label. Default: the config's, else a copy of the policy's trunk.
        ref_model: the reference. Default: the config's, else the policy as it is now.
    Example:
        trainer = PPOTrainer(model, tokenizer, [{"prompt": "2+2="}], reward, PPOConfig(output_dir="out"))
        summary = trainer.train()
    or step by step, with scores from wherever, on a trainer with `max_steps` in its config:
        responses = trainer.generate(queries)
        metrics = trainer.step(queries, responses, scores)
    """

    config: PPOConfig

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        train_dataset: Sequence[Mapping[str, Any] | Prompt] | None = None,
        reward_funcs: Any = None,
        config: PPOConfig | None = None,
        *,
        critic: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        **rest: Any,
    ):
        config = config or PPOConfig()
        self.kl, self.score_stats = config.kl_controller(), RunningStats()
        self._critic, self._ref_model, self._started = critic, ref_model, False
        super().__init__(model, processing_class, train_dataset, reward_funcs, config, **rest)
        critic, pad = self.loop.models["critic"], self.tokenizer.pad_token_id
        self.roles = Roles(config, self.model, critic, self.reference, self.accelerator, pad)

    # ---- the roles

    def prepare_model(self, model: nn.Module) -> None:
        config, other = self.config, self._ref_model
        if config.packing:
            check_packing(model)
        if other is None and config.ref_model:
            other = load_reference(config)
        self.reference = Reference(model, other, copy=config.sync_ref_model) if config.needs_reference else None
        if config.critic == "shared":
            if self._critic is not None:
                raise ValueError("critic is shared, a value head on the policy: give no critic model")
            self.critic: nn.Module = ValueHead(model.get_output_embeddings().weight.shape[-1], model.dtype)
            return
        folder = config.critic_folder
        if self._critic is not None:
            self.critic = pool_by_length(self._critic)
        else:
            self.critic = load_critic(config, folder, self.tokenizer) if folder else critic_of_policy(model)
        if config.packing:
            check_packing(self.critic)
        if config.gradient_checkpointing:
            enable_checkpointing(self.critic)

    def make_loop(self, model: nn.Module, callbacks: Sequence[TrainerCallback]) -> Loop:
        config = self.config
        rates = {"critic": config.critic_learning_rate or config.learning_rate}
        others = {"critic": self.critic}
        return Loop(
            model, self.tokenizer, config, callbacks, config.max_skipped_steps, others=others, learning_rates=rates
        )

    # ---- the run

    def run(self) -> dict[str, Any]:
        config, loop = self.config, self.loop
        self.start()
        self.evaluate_at_start()
        while not loop.done:
            prompts = self.next_prompts()
            with loop.timed("rollout"):
                rollout = self.sample(prompts, config.num_generations)
            rows = [prompt for prompt in prompts for _ in range(config.num_generations)]
            with loop.timed("scoring"):
                scores = self.score_rollout(rows, rollout)
                metrics = self.rollout_metrics(scores, rollout)
            metrics |= self.learn([p.ids for p in rows], rollout, scores.total)
            loop.state.epoch = self.epoch
            self.note_reward(metrics["reward"])
            loop.end_step(metrics, evaluate=self.evaluate if self.can_evaluate else None)
        return self.finish()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kl": self.kl.state_dict(), "score_stats": self.score_stats.state_dict()}

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        super().load_shared_state(state)
        self.kl.load_state_dict(state["kl"])
        self.score_stats.load_state_dict(state["score_stats"])

    def start(self) -> None:
        """Once, before the first step: modes, schedules, log files."""
        if not self._started:
            for module in self.loop.models.values():
                updating_mode(module, self.config.disable_dropout)
            updates = self.config.ppo_epochs * self.minibatches_per_rollout
            self.loop.start(self.max_steps, self.config.num_train_epochs, updates_per_step=updates)
            self._started = True

    @property
    def max_steps(self) -> int:
        """Steps of the run, each a rollout."""
        return self.config.max_steps if self.config.max_steps > 0 else self.rollouts

    def step(
        self,
        queries: Sequence[Any],
        responses: Rollout | Sequence[Any],
        scores: Sequence[float] | Tensor,
        response_masks: Sequence[Any] | None = None,
    ) -> dict[str, float]:
        """One PPO step on completions and scores that the caller has; returns the metrics since the last log row.

        Args:
            queries: texts, or token ids (lists or tensors), one a response.
            responses: what `generate` returned; or texts, which end with EOS, or token ids.
            scores: one number a response; a NaN leaves its row out.
            response_masks: for each response a 0 where a token is not the policy's own (a tool's answer), else 1.
        Notes: learning rate and coefficients follow schedules over `max_steps` such steps. `finish()` saves the models.
        Raises: ValueError naming what does not fit.
        """
        self.check_open()
        self.start()
        rollout = responses
        if not isinstance(responses, Rollout):
            rollout = as_rollout(responses, self.tokenizer, self.sampler.settings)
        if response_masks is not None:
            rollout = with_mask(rollout, response_masks)
        scores = torch.as_tensor([float(s) for s in scores])
        if not len(queries) == len(scores) == len(rollout.lengths):
            raise ValueError(f"got {len(queries)} queries, {len(rollout.lengths)} responses and {len(scores)} scores")
        device = self.accelerator.device
        rollout = rollout._replace(**{k: v.to(device) for k, v in rollout._asdict().items() if isinstance(v, Tensor)})
        every = self.everywhere(scores)
        kept = every[every.isfinite()]
        metrics = {"reward": float(kept.mean()), "reward_std": float(kept.std(correction=0))} if len(kept) else {}
        metrics |= self.learn([prompt.ids for prompt in as_queries(queries, self.tokenizer)], rollout, scores)
        self.loop.record(metrics)
        metrics = self.loop.recorded()
        self.loop.end_step({}, evaluate=self.evaluate if self.can_evaluate else None)
        return metrics

    # ---- one step

    def learn(self, prompts: Sequence[Sequence[int]], rollout: Rollout, scores: Tensor) -> dict[str, float]:
        """The roles' answers, advantages, `ppo_epochs` over the minibatches, the KL controller; returns metrics."""
        loop = self.loop
        with loop.timed("forward"):
            sequences = join(prompts, rollout, scores.isfinite())
            with self.whole_weights():
                outputs = self.roles.ask(sequences)
            outputs, metrics = self.advantages(sequences, outputs, scores.to(sequences.ids.device))
        metrics["kl_coef"] = self.kl.value
        with loop.timed("update"):
            self.optimise(sequences, outputs)
        progress = (loop.state.global_step + 1) / loop.state.max_steps
        self.kl.update(metrics.get("kl_sequence", math.nan), int(metrics.pop("sequences")), progress)
        loop.state.num_input_tokens_seen += int(self.everywhere(rollout.lengths).sum())
        return metrics

    def advantages(
        self, sequences: Sequences, outputs: RoleOutputs, scores: Tensor
    ) -> tuple[RoleOutputs, dict[str, float]]:
        """Score -> shaped rewards -> GAE -> whitening, over all processes."""
        config, offsets = self.config, sequences.cu_trained
        shaped = self.normal_scores(scores, sequences.terminated).nan_to_num(nan=0.0)  # a NaN's sequence has no token
        in_reward = self.reference is not None and config.kl_in == "reward"
        pair = (outputs.logprob, outputs.ref_logprob) if in_reward else (None, None)
        penalty = dict(kl_coef=self.kl.value, kl_estimator=config.estimator, kl_clip=config.kl_clip)
        scan: dict[str, Any] = dict(gamma=config.gamma, lam=config.lam, cu_seqlens=offsets)
        if config.bootstrap_truncated:
            scan |= dict(terminated=sequences.terminated, bootstrap=outputs.bootstrap)
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        if config.ppo_whiten_rewards:
            every = torch.ones_like(outputs.values, dtype=torch.bool)
            rewards = shape_rewards(shaped, *pair, cu_seqlens=offsets, mask=every, **penalty).rewards
            rewards = masked_whiten(rewards, shift_mean=False, process_group=group)
            advantages, returns = gae(rewards, outputs.values, **scan)
        else:  # in one pass
            advantages, returns, rewards, _ = ppo_advantages(
                shaped, outputs.values, *pair, whiten=False, **penalty, **scan
            )
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, process_group=group)
        outputs = outputs._replace(advantages=advantages, returns=returns)
        total = self.sum_everywhere(rollout_sums(sequences, outputs, shaped, rewards, config.estimator))
        return outputs, rollout_metrics(total) | {"sequences": total["sequences"]}

    def normal_scores(self, scores: Tensor, terminated: Tensor) -> Tensor:
        """Scores normalised, clipped, less the penalty of a missing end, as the config says."""
        config = self.config
        if config.ppo_score_norm:
            self.score_stats.update(scores, self.accelerator)
            scores = self.score_stats.normalize(scores)
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        if config.missing_eos_penalty is not None:
            scores = scores - config.missing_eos_penalty * ~terminated
        return scores

    # ---- updates

    def optimise(self, sequences: Sequences, outputs: RoleOutputs) -> None:
        """`ppo_epochs` passes over random minibatches; fewer when the policy has gone far from the rollout's."""
        config, loop = self.config, self.loop
        progress = loop.state.global_step / loop.state.max_steps
        self.loss = config.policy_loss(progress, self.kl.value)
        planned, done, stopped = config.ppo_epochs * self.minibatches_per_rollout, 0, False
        for _ in range(config.ppo_epochs):  # all of them draw an order: where `shuffle` is does not depend on the KL
            order = torch.randperm(len(sequences.lengths), generator=self.shuffle).to(sequences.ids.device)
            for rows in order.tensor_split(self.minibatches_per_rollout):
                if stopped:
                    break
                drift = self.update(sequences, outputs, rows, on_policy=done == 0)
                done += 1
                stopped = config.early_stop_kl is not None and drift > config.early_stop_kl
        loop.pass_updates(planned - done)
        loop.record({"updates": float(done), "epsilon": self.loss.clip_low})

    def update(self, sequences: Sequences, outputs: RoleOutputs, rows: Tensor, *, on_policy: bool) -> float:
        """One optimiser step on the sequences `rows`; returns the mean KL from the rollout's policy before it."""
        counts = self.sum_everywhere(
            {"tokens": sequences.trained[rows].sum(), "rows": (sequences.trained[rows] > 0).sum()}
        )
        live = rows[sequences.trained[rows] > 0]
        if counts["tokens"] and not len(live):
            live = rows[:1]  # another process has something: DDP needs a backward here too, of weight 0
        micros = [grid for grid, _ in self.roles.grids(sequences, live, self.config.per_device_train_batch_size)]
        micros = self.loop.even(micros, Grid.idle)
        sums: dict[str, Tensor] = {}

        def loss_of(grid: Grid) -> Tensor:
            loss, metrics = self.losses(grid, outputs, counts, on_policy=on_policy)
            merge_metrics(sums, {"loss": loss.detach(), **metrics})
            return loss

        self.loop.update(micros, loss_of)
        kept = self.over_processes(sums)
        self.loop.record(kept)
        return float(kept.get("approx_kl", 0.0)) if self.config.early_stop_kl is not None else 0.0

    def losses(
        self, grid: Grid, outputs: RoleOutputs, counts: Mapping[str, float], *, on_policy: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the minibatch's loss, of actor and critic, and its metrics."""
        tokens = max(counts["tokens"], 1)
        if self.loop.state.global_step >= self.config.critic_warmup_steps:
            out, hidden = self.roles.actor(grid, **self.loss_inputs(grid, outputs, counts, on_policy=on_policy))
            loss, metrics = out.loss, {"kl_loss" if name == "kl" else name: v for name, v in out.metrics.items()}
        else:  # the critic learns alone
            with torch.no_grad():
                hidden = self.roles.actor(grid)[1] if self.roles.shared else None
            loss, metrics = 0.0, {}
        values = self.roles.values(grid, hidden, grid.positions)
        old, returns = outputs.values[grid.slots], outputs.returns[grid.slots]
        critic = value_loss(values, old, returns, clip=self.config.cliprange_value, normalizer=tokens)
        share = len(grid.slots) / tokens
        metrics["value_loss"] = critic.loss.detach()
        metrics |= {f"value_{name}": critic.metrics[name] * share for name in ("clip_fraction", "error")}
        return loss + self.config.vf_coef * critic.loss, metrics

    def loss_inputs(
        self, grid: Grid, outputs: RoleOutputs, counts: Mapping[str, float], *, on_policy: bool
    ) -> dict[str, Any]:
        """What the fused head takes to form the actor's loss and gradient in its forward."""
        config, tokens = self.config, max(counts["tokens"], 1)
        by_token = self.loss.aggregation == "token_mean"
        batch = {
            "advantages": grid.spread(outputs.advantages),
            "old_logprob": None if on_policy else grid.spread(outputs.logprob),
            "logprob": grid.spread(outputs.logprob) if on_policy and config.needs_old else None,
            "ref_logprob": grid.spread(outputs.ref_logprob) if self.loss.beta else None,
            "normalizer": tokens if by_token else max(counts["rows"], 1),
            "entropy_normalizer": tokens,
            "num_tokens": tokens,
        }
        batch = {name: value for name, value in batch.items() if value is not None}
        return dict(loss_fn=self.loss, batch=batch, segments=grid.segments, entropy=True)

    # ---- over processes

    def sum_everywhere(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over all processes, in one exchange."""
        device = self.accelerator.device
        stacked = torch.stack([value.to(device, torch.float64) for value in sums.values()])
        return dict(zip(sums, self.accelerator.reduce(stacked, reduction="sum").tolist(), strict=True))


def run_ppo(config: PPOConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as the configuration says; returns what `summary.json` holds."""
    return run_rl(config, PPOTrainer, callbacks)


__all__ = ["PPOConfig", "PPOTrainer", "run_ppo"]

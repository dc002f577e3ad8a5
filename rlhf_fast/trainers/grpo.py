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
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.ops.advantages import group_advantages
from rlhf_fast.trainers.data import Prompt, check_prompt_vocabulary, tokenize_prompts
from rlhf_fast.trainers.experience import IGNORE, Experience, MicroBatch, MiniBatch, build_experience, collate, cut_rows
from rlhf_fast.trainers.grpo_config import GRPOConfig
from rlhf_fast.trainers.hf_utils import load_model, load_tokenizer, ready_tokenizer, vocabulary_size
from rlhf_fast.trainers.loop import Loop
from rlhf_fast.trainers.policy import Reference, enable_checkpointing, updating_mode
from rlhf_fast.trainers.readers import Rows, read_rows
from rlhf_fast.trainers.rewards import RewardFunction, Rewards, Scores
from rlhf_fast.trainers.rollout import Rollout, SamplerSettings, make_sampler

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


class GRPOTrainer:
    """Group Relative Policy Optimization of a causal LM.

    Args:
        model: a transformers causal LM, plain or a PEFT model; its head is fused here.
        processing_class: the tokenizer.
        train_dataset: rows (dicts with "prompt" or "messages"; other columns go to the reward functions) or `Prompt`s.
        reward_funcs: callables or import paths; see `rlhf_fast.trainers.rewards`. Default: the config's.
        config: `GRPOConfig`.
        eval_dataset: prompts on which `evaluate` measures the rewards.
        callbacks: `TrainerCallback`s.
    Example:
        trainer = GRPOTrainer(model, tokenizer, [{"prompt": "2+2="}], reward, GRPOConfig(output_dir="out"))
        summary = trainer.train()
    """

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
        self.config = config = config or GRPOConfig()
        if not config.output_dir:
            raise ValueError("output_dir is required")
        self.tokenizer = ready_tokenizer(processing_class)
        self.rewards = Rewards(config.reward_funcs if reward_funcs is None else reward_funcs, config.reward_weights)
        self.prompts = as_prompts(train_dataset, self.tokenizer, config, vocabulary_size(model))
        self.eval_prompts = eval_dataset and as_prompts(eval_dataset, self.tokenizer, config, vocabulary_size(model))
        self.loss = config.policy_loss()
        self.reference = Reference(model) if config.beta else None
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.loop = Loop(fuse_lm_head(model), self.tokenizer, config, callbacks, config.max_skipped_steps)
        self.model, self.accelerator = self.loop.model, self.loop.accelerator
        if self.reference is not None:
            self.reference.to(self.accelerator.device)
        self.prompts_per_rollout, self.minibatches_per_rollout = config.sizes(self.accelerator.num_processes)
        self.sampler = self._sampler(greedy=False)
        self.order = torch.Generator().manual_seed(config.seed)  # of the prompts
        self.shuffle = torch.Generator().manual_seed(config.seed + 1 + self.accelerator.process_index)
        self._queue: list[int] = []
        self._prompts_seen = 0

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` (or `num_train_epochs`), save the model, return what `summary.json` holds."""
        config, loop = self.config, self.loop
        updating_mode(self.model, config.disable_dropout)
        loop.start(self.max_steps, config.num_train_epochs)
        if config.eval_on_start and self.eval_prompts:
            loop.log.log(0, self.evaluate())
        first = last = None
        while not loop.done:
            prompts = self._next_prompts()
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
                    loop.state.epoch = round(self._prompts_seen / len(self.prompts), 4)
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

    # ---- rollout

    def _sampler(self, *, greedy: bool) -> Any:
        config, model = self.config, self.loop.unwrapped
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
        settings = SamplerSettings(
            max_new_tokens=config.max_completion_length,
            eos_token_ids=tuple(sorted(eos)),
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=config.temperature,
            top_k=0 if greedy else config.top_k,
            top_p=1.0 if greedy else config.top_p,
            greedy=greedy,
        )
        seed = config.seed + self.accelerator.process_index
        return make_sampler(config.sampler, model, settings, seed=seed, batch_size=config.rollout_batch_size)

    def _next_prompts(self) -> list[Prompt]:
        """This process's prompts of the next rollout, from a stream of shuffled epochs that is the same on all."""
        count, processes = self.prompts_per_rollout, self.accelerator.num_processes
        while len(self._queue) < count * processes:
            self._queue += torch.randperm(len(self.prompts), generator=self.order).tolist()
        taken, self._queue = self._queue[: count * processes], self._queue[count * processes :]
        self._prompts_seen += len(taken)
        mine = taken[self.accelerator.process_index * count :][:count]
        return [self.prompts[i] for i in mine]

    # ---- score

    def score(self, prompts: Sequence[Prompt], rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Rewards and advantages of a rollout of `num_generations` completions for each prompt."""
        config, group = self.config, self.config.num_generations
        rows = [prompt for prompt in prompts for _ in range(group)]
        scores = self._rewards(rows, rollout)
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
        return experience, self._rollout_metrics(scores, gathered, result, rollout, stopped)

    def _rewards(self, rows: Sequence[Prompt], rollout: Rollout) -> Scores:
        ids = rollout.completions()
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chat = [isinstance(p.columns.get("prompt"), list) for p in rows]
        prompts = [p.columns["prompt"] if c else p.text for p, c in zip(rows, chat, strict=True)]
        texts = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)]
        reserved = {"prompt", "prompts", "completion", "completions", "completion_ids", "finish_reasons"}
        names = dict.fromkeys(name for p in rows for name in p.columns if name not in reserved)
        columns = {name: [p.columns.get(name) for p in rows] for name in names}
        return self.rewards(prompts, texts, columns, completion_ids=ids, finish_reasons=list(rollout.finish))

    def _rollout_metrics(
        self, scores: Scores, rewards: Tensor, advantages: Any, rollout: Rollout, stopped: Tensor
    ) -> dict[str, float]:
        """Of the rollout; rewards over all processes, lengths and single functions of this one."""
        kept, lengths = rewards[rewards.isfinite()], rollout.lengths.float()
        metrics = {
            "reward": kept.mean() if len(kept) else math.nan,
            "reward_std": kept.std(correction=0) if len(kept) else math.nan,
            "zero_std_groups": advantages.zero_std.float().mean(),
            "dropped_rows": (~rewards.isfinite()).sum(),
            "completion_length": lengths.mean(),
            "completion_length_min": lengths.min(),
            "completion_length_max": lengths.max(),
            "truncated_completions": 1 - stopped.float().mean(),
        }
        if len(self.rewards.names) > 1:
            for name, column in zip(self.rewards.names, scores.each.unbind(1), strict=True):
                metrics[f"reward_{name}"] = column[column.isfinite()].mean()
        return {name: float(value) for name, value in metrics.items()}

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
            _add_metrics(sums, {"loss": out.loss.detach(), **out.metrics})
            if on_policy:
                gap = (out.logprob - micro.old_logprob)[micro.target_ids != IGNORE].abs()
                largest = gap.max() if gap.numel() else gap.sum()
                share = gap.sum() / minibatch.live_tokens
                _add_metrics(sums, {"sampler_logprob_gap": share, "sampler_logprob_gap_max": largest})
            return out.loss

        self.loop.update(minibatch.micros, loss_of)
        kept = {name: self._over_processes(name, value) for name, value in sums.items() if not name.startswith("rows_")}
        self.loop.record(kept | {"no_gradient_steps": float(not minibatch.micros)})

    def _over_processes(self, name: str, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        every = self.accelerator.gather(value.reshape(1).to(self.accelerator.device))
        return every.max() if name.endswith("_max") else every.min() if name.endswith("_min") else every.sum()

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

    # ---- evaluation

    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> dict[str, float]:
        """Mean rewards of one completion for each evaluation prompt, greedy unless `eval_do_sample`."""
        prompts = prompts or self.eval_prompts
        if not prompts:
            raise ValueError("evaluate needs eval_dataset")
        start = time.perf_counter()
        rollout = self._sampler(greedy=not self.config.eval_do_sample)([p.ids for p in prompts])
        scores = self._rewards(prompts, rollout)
        metrics = {"eval_reward": scores.total, "eval_completion_length": rollout.lengths.float()}
        if len(self.rewards.names) > 1:
            metrics |= {f"eval_reward_{n}": c for n, c in zip(self.rewards.names, scores.each.unbind(1), strict=True)}
        self.loop.seconds["evaluate"] += time.perf_counter() - start
        return {name: float(value[value.isfinite()].mean()) for name, value in metrics.items()}


def as_prompts(rows: Any, tokenizer: Any, config: GRPOConfig, vocabulary: int) -> list[Prompt]:
    """`Prompt`s of rows (or as they are), their ids within the model's vocabulary."""
    if len(rows) == 0:
        raise ValueError("the dataset is empty")
    prompts = list(rows)
    if not isinstance(rows[0], Prompt):
        rows = rows if isinstance(rows, Rows) else Rows.from_list(map(dict, rows))
        limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
        prompts, _ = tokenize_prompts(rows, tokenizer, **limits)
    check_prompt_vocabulary(prompts, vocabulary)
    return prompts


def _add_metrics(total: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for name, value in new.items():
        pick = torch.maximum if name.endswith("_max") else torch.minimum if name.endswith("_min") else torch.add
        total[name] = pick(total[name], value) if name in total else value


def run_grpo(config: GRPOConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as the configuration says; returns what `summary.json` holds."""
    config.check_paths()
    rewards: list[RewardFunction] = Rewards(config.reward_funcs, config.reward_weights).functions  # before the model
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    limits = dict(max_length=config.prompt_length, overlong_prompt=config.overlong_prompt)
    prompts, _ = tokenize_prompts(read_rows(config.dataset_paths(), limit=config.max_samples), tokenizer, **limits)
    held_out = config.dataset_paths("eval_dataset")
    evaluation = tokenize_prompts(read_rows(held_out), tokenizer, **limits)[0] if held_out else None
    model = load_model(config, tokenizer)
    trainer = GRPOTrainer(model, tokenizer, prompts, rewards, config, eval_dataset=evaluation, callbacks=callbacks)
    return trainer.train()


__all__ = ["GRPOConfig", "GRPOTrainer", "run_grpo"]

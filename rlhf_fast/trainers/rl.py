"""What PPO and GRPO share around their algorithms: prompts, sampler, rewards, evaluation, the run from a config."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.data import Prompt, check_prompt_vocabulary, tokenize_prompts
from rlhf_fast.trainers.hf_utils import load_model, load_tokenizer, ready_tokenizer, vocabulary_size
from rlhf_fast.trainers.loop import Loop
from rlhf_fast.trainers.policy import enable_checkpointing
from rlhf_fast.trainers.readers import Rows, read_rows
from rlhf_fast.trainers.rewards import RewardFunction, Rewards, Scores
from rlhf_fast.trainers.rl_config import RLConfig
from rlhf_fast.trainers.rollout import Rollout, SamplerSettings, make_sampler


class RLTrainer:
    """A policy, its prompts, its rewards and its sampler. Subclasses bring `train`.

    Args:
        model: a transformers causal LM, plain or a PEFT model; its head is fused here.
        processing_class: the tokenizer.
        train_dataset: rows (dicts with "prompt" or "messages"; other columns go to the reward functions) or `Prompt`s.
        reward_funcs: callables or import paths; see `rlhf_fast.trainers.rewards`. Default: the config's.
        config: the stage's options.
        eval_dataset: prompts on which `evaluate` measures the rewards.
        callbacks: `TrainerCallback`s.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        train_dataset: Sequence[Mapping[str, Any] | Prompt],
        reward_funcs: Any,
        config: RLConfig,
        *,
        eval_dataset: Sequence[Mapping[str, Any] | Prompt] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.config = config
        if not config.output_dir:
            raise ValueError("output_dir is required")
        self.tokenizer = ready_tokenizer(processing_class)
        self.rewards = Rewards(config.reward_funcs if reward_funcs is None else reward_funcs, config.reward_weights)
        self.prompts = as_prompts(train_dataset, self.tokenizer, config, vocabulary_size(model))
        self.eval_prompts = eval_dataset and as_prompts(eval_dataset, self.tokenizer, config, vocabulary_size(model))
        self.prepare_model(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.loop = self.make_loop(fuse_lm_head(model), callbacks)
        self.model, self.accelerator = self.loop.model, self.loop.accelerator
        self.prompts_per_rollout, self.minibatches_per_rollout = config.sizes(self.accelerator.num_processes)
        self.sampler = self.make_sampler(greedy=False)
        self.order = torch.Generator().manual_seed(config.seed)  # of the prompts
        self.shuffle = torch.Generator().manual_seed(config.seed + 1 + self.accelerator.process_index)
        self._queue: list[int] = []
        self.prompts_seen = 0

    def prepare_model(self, model: nn.Module) -> None:
        """What has to happen to the model before its head is fused, such as taking a reference."""

    def make_loop(self, model: nn.Module, callbacks: Sequence[TrainerCallback]) -> Loop:
        return Loop(model, self.tokenizer, self.config, callbacks, self.config.max_skipped_steps)

    # ---- rollout

    def make_sampler(self, *, greedy: bool) -> Any:
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

    def next_prompts(self) -> list[Prompt]:
        """This process's prompts of the next rollout, from a stream of shuffled epochs that is the same on all."""
        count, processes = self.prompts_per_rollout, self.accelerator.num_processes
        while len(self._queue) < count * processes:
            self._queue += torch.randperm(len(self.prompts), generator=self.order).tolist()
        taken, self._queue = self._queue[: count * processes], self._queue[count * processes :]
        self.prompts_seen += len(taken)
        mine = taken[self.accelerator.process_index * count :][:count]
        return [self.prompts[i] for i in mine]

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return round(self.prompts_seen / len(self.prompts), 4)

    # ---- rewards

    def score_rollout(self, rows: Sequence[Prompt], rollout: Rollout) -> Scores:
        """Every reward function on the decoded completions, one row a sequence."""
        ids = rollout.completions()
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chat = [isinstance(p.columns.get("prompt"), list) for p in rows]
        prompts = [p.columns["prompt"] if c else p.text for p, c in zip(rows, chat, strict=True)]
        texts = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)]
        reserved = {"prompt", "prompts", "completion", "completions", "completion_ids", "finish_reasons"}
        names = dict.fromkeys(name for p in rows for name in p.columns if name not in reserved)
        columns = {name: [p.columns.get(name) for p in rows] for name in names}
        return self.rewards(prompts, texts, columns, completion_ids=ids, finish_reasons=list(rollout.finish))

    def rollout_metrics(self, scores: Scores, rewards: Tensor, rollout: Rollout) -> dict[str, float]:
        """Of the rollout; `rewards` over all processes, lengths and single functions of this one."""
        kept, lengths = rewards[rewards.isfinite()], rollout.lengths.float()
        stopped = sum(reason == "stop" for reason in rollout.finish) / len(rollout.finish)
        metrics = {
            "reward": kept.mean() if len(kept) else math.nan,
            "reward_std": kept.std(correction=0) if len(kept) else math.nan,
            "dropped_rows": (~rewards.isfinite()).sum(),
            "completion_length": lengths.mean(),
            "completion_length_min": lengths.min(),
            "completion_length_max": lengths.max(),
            "truncated_completions": 1 - stopped,
        }
        if len(self.rewards.names) > 1:
            for name, column in zip(self.rewards.names, scores.each.unbind(1), strict=True):
                metrics[f"reward_{name}"] = column[column.isfinite()].mean()
        return {name: float(value) for name, value in metrics.items()}

    def over_processes(self, name: str, value: Tensor) -> Tensor:
        """A sum over the processes, or the extreme of a metric whose name says so."""
        if self.accelerator.num_processes == 1:
            return value
        every = self.accelerator.gather(value.reshape(1).to(self.accelerator.device))
        return every.max() if name.endswith("_max") else every.min() if name.endswith("_min") else every.sum()

    # ---- evaluation

    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> dict[str, float]:
        """Mean rewards of one completion for each evaluation prompt, greedy unless `eval_do_sample`."""
        prompts = prompts or self.eval_prompts
        if not prompts:
            raise ValueError("evaluate needs eval_dataset")
        start = time.perf_counter()
        rollout = self.make_sampler(greedy=not self.config.eval_do_sample)([p.ids for p in prompts])
        scores = self.score_rollout(prompts, rollout)
        metrics = {"eval_reward": scores.total, "eval_completion_length": rollout.lengths.float()}
        if len(self.rewards.names) > 1:
            metrics |= {f"eval_reward_{n}": c for n, c in zip(self.rewards.names, scores.each.unbind(1), strict=True)}
        self.loop.seconds["evaluate"] += time.perf_counter() - start
        return {name: float(value[value.isfinite()].mean()) for name, value in metrics.items()}


def as_prompts(rows: Any, tokenizer: Any, config: RLConfig, vocabulary: int) -> list[Prompt]:
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


def add_metrics(total: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Add `new` into `total`; extremes where the name says so."""
    for name, value in new.items():
        pick = torch.maximum if name.endswith("_max") else torch.minimum if name.endswith("_min") else torch.add
        total[name] = pick(total[name], value) if name in total else value


def run_rl(
    config: RLConfig, trainer_class: type[RLTrainer], callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
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
    trainer = trainer_class(model, tokenizer, prompts, rewards, config, eval_dataset=evaluation, callbacks=callbacks)
    return trainer.train()

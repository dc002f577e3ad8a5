"""What PPO and GRPO share around their algorithms: prompts, sampler, rewards, evaluation, the run from a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.ops._fused_run import merge_metrics
from rlhf_fast.trainers.brakes import Brakes
from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.evaluation import Evaluating
from rlhf_fast.trainers.loop import Loop
from rlhf_fast.trainers.memory_advice import OutOfMemory
from rlhf_fast.trainers.models.hf_utils import (
    check_special_tokens,
    check_window,
    ending_ids,
    load_model,
    load_tokenizer,
    ready_tokenizer,
    vocabulary_size,
)
from rlhf_fast.trainers.models.policy import Reference, enable_checkpointing
from rlhf_fast.trainers.preflight import preflight
from rlhf_fast.trainers.restore import seed_from
from rlhf_fast.trainers.reward_calls import RewardError
from rlhf_fast.trainers.reward_ensemble import RewardEnsemble, load_rewards
from rlhf_fast.trainers.rewards import RewardFunction, Rewards, Scores, finite_mean
from rlhf_fast.trainers.rl_config import RLConfig
from rlhf_fast.trainers.rl_data import as_prompts, check_columns, columns_of, load_prompts, make_perplexity
from rlhf_fast.trainers.rollout.http_client import ServerError
from rlhf_fast.trainers.rollout.samplers import Rollout, SamplerSettings, make_sampler
from rlhf_fast.trainers.rollout.turns import MultiTurnSampler, conversations
from rlhf_fast.trainers.sharding import check_whole, load_whole
from rlhf_fast.trainers.stepwise import as_queries


class RLTrainer(Evaluating):
    """A policy, its prompts, its rewards and its sampler. Subclasses bring `run`.

    Args:
        model: a transformers causal LM, plain or a PEFT model; its head is fused here.
        processing_class: the tokenizer.
        train_dataset: rows (dicts with "prompt" or "messages"; other columns go to the reward functions) or `Prompt`s.
            None, as well as no reward, where only the step-wise calls are used.
        reward_funcs: callables or import paths; see `rlhf_fast.trainers.rewards`. Default: the config's.
        config: the stage's options.
        eval_dataset: prompts on which `evaluate` measures the rewards.
        callbacks: `TrainerCallback`s.
        eval_reward_funcs: more functions for `evaluate`. Default: the config's.
        perplexity_dataset: texts whose perplexity `evaluate` gives. Default: the config's.
    """

    reference: Reference | None = None
    data: dict[str, int] | None = None  # what became of the rows, for the summary
    finished = False

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        train_dataset: Sequence[Mapping[str, Any] | Prompt] | None,
        reward_funcs: Any,
        config: RLConfig,
        *,
        eval_dataset: Sequence[Mapping[str, Any] | Prompt] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        eval_reward_funcs: Any = None,
        perplexity_dataset: Sequence[Any] | None = None,
    ):
        self.config = config
        if not config.output_dir:
            raise ValueError("output_dir is required")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a transformers causal LM, got {model!r:.60} ({type(model).__name__})")
        check_whole(model)
        self.tokenizer = ready_tokenizer(processing_class)
        check_special_tokens(model, self.tokenizer)
        if reward_funcs is None:
            reward_funcs = load_rewards(config, self.tokenizer)
        self.rewards = make_rewards(reward_funcs, config.reward_weights, config.reward_timeout)
        measured = config.eval_reward_funcs if eval_reward_funcs is None else eval_reward_funcs
        self.eval_rewards = make_rewards(measured, None, config.reward_timeout)
        known = dict(tokenizer=self.tokenizer, config=config, vocabulary=vocabulary_size(model))
        self.prompts, self.eval_prompts = as_prompts(train_dataset, **known), as_prompts(eval_dataset, **known)
        check_columns(self.prompts, self.rewards.functions if self.rewards is not None else ())
        check_columns(self.eval_prompts, self.reward_functions())
        self.prepare_model(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.brakes = Brakes(config)
        self.loop = self.make_loop(fuse_lm_head(model), [*self.brakes.callbacks(self), *callbacks])
        self.model, self.accelerator = self.loop.model, self.loop.accelerator
        if self.reference is not None and not self.reference.adapters_off:
            self.reference.model = self.reference.called = self.loop.spread.frozen(self.reference.model)
        for part in self.reward_functions():
            if hasattr(part, "to"):
                part.to(self.accelerator.device)
            if isinstance(part, RewardEnsemble):
                part.accelerator = self.accelerator
        self.perplexity = make_perplexity(config, self.tokenizer, known["vocabulary"], perplexity_dataset)
        self.prompts_per_rollout, self.minibatches_per_rollout = config.sizes(self.accelerator.num_processes)
        self.order = torch.Generator().manual_seed(config.seed)  # of the prompts
        self.begin_generators()
        self._queue: list[int] = []
        self.prompts_seen = 0
        self.reward_first: float | None = None
        self.reward_last: float | None = None
        self.loop.snapshot.parts["trainer"] = self
        if self.reference is not None:
            self.loop.snapshot.weights["reference"] = self.reference

    def prepare_model(self, model: nn.Module) -> None:
        """What has to happen to the model before its head is fused, such as taking a reference."""

    def whole_weights(self) -> AbstractContextManager:
        """For forwards without a gradient: inside the block nothing is sharded, and none waits for other processes."""
        reference = () if self.reference is None else (self.reference.model,)
        return self.loop.spread.gathered(*dict.fromkeys((*self.loop.models.values(), *reference)))

    def make_loop(self, model: nn.Module, callbacks: Sequence[TrainerCallback]) -> Loop:
        return Loop(model, self.tokenizer, self.config, callbacks, self.config.max_skipped_steps)

    # ---- rollout

    @property
    def rollouts(self) -> int:
        """Of `num_train_epochs` over the prompts."""
        if not self.prompts:
            raise ValueError("max_steps is required without train_dataset: the schedules run over it")
        together = self.prompts_per_rollout * self.accelerator.num_processes
        return max(1, math.ceil(self.config.num_train_epochs * len(self.prompts) / together))

    def begin_generators(self) -> None:
        """The sampler and the generators that are this process's own, as they are at this step of no earlier run."""
        seed = seed_from(self.config.seed, self.loop.state.global_step, self.accelerator)
        self.sampler = self.make_sampler(greedy=False, seed=seed)
        self.shuffle = torch.Generator().manual_seed(seed + 1)  # of the minibatches

    def make_sampler(self, *, greedy: bool, seed: int | None = None) -> Any:
        config, model = self.config, self.loop.unwrapped
        settings = SamplerSettings(
            max_new_tokens=config.turn_length,
            eos_token_ids=ending_ids(model.generation_config, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=config.temperature,
            top_k=0 if greedy else config.top_k,
            top_p=1.0 if greedy else config.top_p,
            greedy=greedy,
        )
        seed = config.seed + self.accelerator.process_index if seed is None else seed
        options = dict(seed=seed, batch_size=config.rollout_batch_size, **config.sampler_options())
        sampler = make_sampler(config.sampler, model, settings, **options)
        return sampler if config.environment is None else conversations(sampler, config, self.tokenizer)

    def sample(self, prompts: Sequence[Prompt], group_size: int = 1, *, sampler: Any = None) -> Rollout:
        """`group_size` completions of each prompt; an environment sees the prompts' columns."""
        sampler = sampler or self.sampler
        ids = [p.ids for p in prompts]
        columns = {"columns": columns_of(prompts)} if isinstance(sampler, MultiTurnSampler) else {}
        with self.loop.spread.gathered(self.model):
            rollout = sampler(ids, group_size, **columns)
        broken = int(rollout.logprob.isnan().sum())
        if broken:
            raise FloatingPointError(
                f"log-probabilities of sampled tokens are NaN ({broken} of {len(rollout.logprob)}): the model's "
                "weights are NaN, or its logits overflow"
            )
        return rollout

    def generate(self, queries: Sequence[str | Sequence[int]], group_size: int = 1) -> Rollout:
        """Completions of prompts, texts or token ids, with what the sampler recorded: for `step`."""
        return self.sample(as_queries(queries, self.tokenizer), group_size)

    def next_prompts(self, count: int | None = None) -> list[Prompt]:
        """This process's prompts of the next rollout, from a stream of shuffled epochs that is the same on all."""
        if self.prompts is None:
            raise ValueError("train_dataset is required, got None")
        count, processes = count or self.prompts_per_rollout, self.accelerator.num_processes
        while len(self._queue) < count * processes:
            self._queue += torch.randperm(len(self.prompts), generator=self.order).tolist()
        taken, self._queue = self._queue[: count * processes], self._queue[count * processes :]
        self.prompts_seen += len(taken)
        mine = taken[self.accelerator.process_index * count :][:count]
        return [self.prompts[i] for i in mine]

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return round(self.prompts_seen / len(self.prompts), 4) if self.prompts else 0.0

    # ---- rewards

    def reward_functions(self) -> list[RewardFunction]:
        return [f for rewards in (self.rewards, self.eval_rewards) if rewards is not None for f in rewards.functions]

    def score_rollout(self, rows: Sequence[Prompt], rollout: Rollout, rewards: Rewards | None = None) -> Scores:
        """Every reward function on the decoded completions, one row a sequence."""
        rewards = rewards or self.rewards
        if rewards is None:
            raise ValueError("reward_funcs must hold at least one function, got none")
        ids = rollout.completions()
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chat = [isinstance(p.columns.get("prompt"), list) for p in rows]
        prompts = [p.columns["prompt"] if c else p.text for p, c in zip(rows, chat, strict=True)]
        texts = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)]
        given = dict(prompt_ids=[p.ids for p in rows], completion_ids=ids, finish_reasons=list(rollout.finish))
        with self.accelerator.autocast():
            return rewards(prompts, texts, columns_of(rows), **given)

    def rollout_metrics(self, scores: Scores, rollout: Rollout) -> dict[str, float]:
        """Of the rollout of all processes: rewards, single functions and what they say themselves, lengths. Every
        process calls it."""
        stopped = torch.tensor([reason == "stop" for reason in rollout.finish])
        names = self.rewards.names if self.rewards is not None else []
        single = names if 1 < len(names) == scores.each.shape[1] else []  # not the caller's own scores
        columns = [scores.total, rollout.lengths.cpu(), stopped, *scores.each.unbind(1)[: len(single)]]
        table = torch.stack([column.double() for column in columns], 1)
        rewards, lengths, stopped, *each = self.everywhere(table).unbind(1)
        kept = rewards[rewards.isfinite()]
        metrics = {
            "reward": kept.mean() if len(kept) else math.nan,
            "reward_std": kept.std(correction=0) if len(kept) else math.nan,
            "dropped_rows": (~rewards.isfinite()).sum(),
            "completion_length": lengths.mean(),
            "completion_length_min": lengths.min(),
            "completion_length_max": lengths.max(),
            "truncated_completions": 1 - stopped.mean(),
        }
        metrics |= {f"reward_{name}": finite_mean(column) for name, column in zip(single, each, strict=True)}
        said = gather_object([scores.metrics or {}])
        for name in dict.fromkeys(name for part in said for name in part):
            metrics[name] = finite_mean(torch.tensor([part.get(name, math.nan) for part in said]))
        return {name: float(value) for name, value in metrics.items()}

    def everywhere(self, rows: Tensor) -> Tensor:
        """(B, ...) of this process -> those of all processes, on the CPU. Every process has as many."""
        return self.accelerator.gather(rows.to(self.accelerator.device)).cpu()

    def over_processes(self, metrics: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sums over the processes, extremes where the name says so, in one exchange.

        A process on whose rows nothing is trained lacks the metrics of the loss.
        """
        kept = {name: value for name, value in metrics.items() if not name.startswith("rows_")}
        if self.accelerator.num_processes == 1:
            return kept
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in kept.values()]).tolist() if kept else []
        total: dict[str, Tensor] = {}
        for mine in gather_object([dict(zip(kept, values, strict=True))]):
            merge_metrics(total, {name: torch.tensor(value, dtype=torch.float64) for name, value in mine.items()})
        return total

    # ---- the run

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` (or `num_train_epochs`), save the model, return what `summary.json` holds.

        Goes on from the checkpoint of `resume_from_checkpoint`. Ctrl-C and SIGTERM end it after the step, saved; so do
        faults between two steps outside of the model: of a reward function, the rollout server, memory.
        """
        with self.loop.signals:
            try:
                return self.run()
            except (RewardError, ServerError, OutOfMemory):
                self.loop.rescue()
                raise

    def run(self) -> dict[str, Any]:
        raise NotImplementedError

    def note_reward(self, reward: float) -> None:
        """The first and the last rollout's are in the summary."""
        self.reward_first = reward if self.reward_first is None else self.reward_first
        self.reward_last = reward

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this process: generators, place in the data, running statistics."""
        return {
            "order": self.order.get_state(),
            "shuffle": self.shuffle.get_state(),
            "queue": list(self._queue),
            "prompts_seen": self.prompts_seen,
            "sampler": self.sampler.state_dict(),
            "rewards": [f.state_dict() if hasattr(f, "state_dict") else None for f in self.reward_functions()],
            "reward": (self.reward_first, self.reward_last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave to this process."""
        self.load_shared_state(state)
        self.shuffle.set_state(state["shuffle"])
        self.sampler.load_state_dict(state["sampler"])

    def load_state_of_others(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave to a process of another number of them: what all processes have alike."""
        self.load_shared_state(state)
        self.begin_generators()

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        """The part of the state that is the same on all processes, and the reward functions'."""
        self.order.set_state(state["order"])
        self._queue, self.prompts_seen = list(state["queue"]), state["prompts_seen"]
        for function, own in zip(self.reward_functions(), state["rewards"], strict=True):
            if own is not None:
                function.load_state_dict(own)
        self.reward_first, self.reward_last = state["reward"]

    def check_open(self) -> None:
        """Raise ValueError for a step after the run's end: its schedule is over and its files are closed."""
        if self.finished:
            raise ValueError(
                "the run is finished, by train() or finish(), and takes no more steps: make another trainer, with "
                "an output_dir of its own and max_steps for its schedule"
            )

    def finish(self, **values: Any) -> dict[str, Any]:
        """The best model where it was asked for, the files, a last evaluation; returns what `summary.json` holds."""
        if self.reward_first is not None:
            values |= dict(reward_first=self.reward_first, reward_last=self.reward_last)
        values |= self.brakes.finish(self.loop) | ({"data": self.data} if self.data else {})
        summary = self.loop.finish(self.evaluate if self.can_evaluate else None, **values)
        self.finished = True
        return summary


def make_rewards(functions: Any, weights: Sequence[float] | None, timeout: float | None) -> Rewards | None:
    empty = not callable(functions) and len(functions) == 0
    return None if empty else Rewards(functions, weights, timeout)


def run_rl(
    config: RLConfig, trainer_class: type[RLTrainer], callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Train as the configuration says; returns what `summary.json` holds."""
    preflight(config)
    load_whole()
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    prompts, evaluation, stats = load_prompts(config, tokenizer)
    rewards = load_rewards(config, tokenizer)
    model = load_model(config, tokenizer)
    check_window(model, stats.longest + config.max_completion_length, "the longest prompt with its completion")
    trainer = trainer_class(model, tokenizer, prompts, rewards, config, eval_dataset=evaluation, callbacks=callbacks)
    trainer.data = dataclasses.asdict(stats)
    return trainer.train()

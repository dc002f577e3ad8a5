"""The options that PPO and GRPO share: rollout, rewards, updates, evaluation. TRL's names where TRL has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_fast.trainers.config import find_model, require
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.reference_config import ReferenceOptions
from rlhf_fast.trainers.rollout.config import RolloutConfig


@dataclass(kw_only=True)
class RLConfig(ReferenceOptions, RolloutConfig):
    """A rollout is `generation_batch_size` sequences over all processes; one optimiser step is a minibatch of it.

    A minibatch has per_device_train_batch_size x gradient_accumulation_steps x processes sequences, so a rollout
    gives `steps_per_generation / gradient_accumulation_steps` steps for each epoch over it.
    """

    # ---- rollout
    max_prompt_length: int | None = None  # None: cutoff_len - max_completion_length
    generation_batch_size: int | None = None  # sequences a rollout; None: from steps_per_generation
    steps_per_generation: int | None = None  # micro-batches a rollout and process; None: gradient_accumulation_steps
    # ---- reward
    reward_funcs: str | list[str] = field(default_factory=list)  # "package.module:function"
    reward_weights: list[float] | None = None  # one for the reward model (or the ensemble), then one a function
    reward_model: str | list[str] | None = None  # folders of stage rm; several are an ensemble
    reward_model_type: Literal["lora", "full"] | None = None  # what the folder holds; None: look
    reward_aggregation: Literal["mean", "min", "mean_std"] = "mean"  # of an ensemble; mean_std: mean - k std
    reward_std_coef: float = 1.0  # k
    reward_model_weights: list[float] | None = None  # of the members in mean and std
    reward_normalize: bool = False  # each member's scores by their own running mean and std, before they meet
    reward_timeout: float | None = None  # seconds that a reward function may take for a rollout
    # ---- updates
    lr_scheduler_type: str = "linear"
    learning_rate: float = 1e-6
    max_tokens_per_micro_batch: int | None = None  # replaces per_device_train_batch_size as the unit of a forward
    disable_dropout: bool = True  # the policy is updated in eval mode: sampler and trainer are one function
    deepspeed: str | None = None  # a JSON file: ZeRO-1, 2 or 3; `accelerate launch --use_deepspeed` says it as well
    # ---- evaluation
    eval_on_start: bool = False
    eval_do_sample: bool = False  # False: greedy
    eval_reward_funcs: str | list[str] = field(default_factory=list)  # measured besides the reward, never trained on
    perplexity_dataset: str | list[str] | None = None  # texts or conversations whose perplexity is followed
    # ---- brakes
    max_kl: float | None = None  # nats a token against the reference; the run stops beyond it
    metric_for_best_model: str | None = None  # of the evaluation; None: the first of eval_reward_funcs, or eval_reward
    greater_is_better: bool | None = None  # None: unless it is a perplexity, a loss or a length
    load_best_model_at_end: bool = False  # a checkpoint at each best evaluation; the run ends with that model
    health_warnings: bool = True  # a line in words when the metrics show a known illness

    def validate(self) -> None:
        super().validate()
        optional = ("max_prompt_length", "generation_batch_size", "steps_per_generation")
        for name in (*optional, "max_tokens_per_micro_batch"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1 or null")
        for name in ("reward_timeout", "max_kl"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "above 0 or null")
        if self.load_best_model_at_end and not self.eval_steps:
            raise ValueError("load_best_model_at_end goes by evaluations: set eval_steps")
        if self.prompt_length < 1:
            raise ValueError(
                f"cutoff_len={self.cutoff_len} leaves no room for a prompt beside "
                f"max_completion_length={self.max_completion_length}"
            )

    def check_paths(self) -> None:
        super().check_paths()
        if not names(self.reward_model) and not names(self.reward_funcs):
            raise ValueError("reward_model or reward_funcs is required: without either nothing scores the completions")
        for folder in names(self.reward_model):
            find_model("reward_model", folder)
        self.dataset_paths("perplexity_dataset")

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that the best model has most of, and whether more is better."""
        functions = [self.eval_reward_funcs] if isinstance(self.eval_reward_funcs, str) else self.eval_reward_funcs
        name = self.metric_for_best_model or (
            functions[0].replace(":", ".").rpartition(".")[2] if functions else "reward"
        )
        name = name if name.startswith("eval_") else f"eval_{name}"
        less = name.endswith(("perplexity", "loss", "length"))
        return name, not less if self.greater_is_better is None else self.greater_is_better

    @property
    def prompt_length(self) -> int:
        return self.max_prompt_length or self.cutoff_len - self.max_completion_length

    @property
    def micro_batches_per_rollout(self) -> int:
        """Of each process, where generation_batch_size does not say."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    def sizes(self, processes: int = 1) -> tuple[int, int]:
        """Prompts a rollout and process, and minibatches a rollout; ValueError when they do not divide."""
        minibatch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        total = (
            self.generation_batch_size or self.per_device_train_batch_size * self.micro_batches_per_rollout * processes
        )
        units = {"num_generations x processes": self.num_generations * processes, "a minibatch": minibatch * processes}
        for words, unit in units.items():
            if total % unit:
                raise ValueError(f"a rollout of {total} sequences must be a multiple of {words} = {unit}")
        return total // (self.num_generations * processes), total // (minibatch * processes)

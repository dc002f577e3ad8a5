"""The options that PPO and GRPO share: rollout, rewards, updates, evaluation. TRL's names where TRL has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_fast.trainers.config import RunConfig, require


@dataclass(kw_only=True)
class RLConfig(RunConfig):
    """A rollout is `generation_batch_size` sequences over all processes; one optimiser step is a minibatch of it.

    A minibatch has per_device_train_batch_size x gradient_accumulation_steps x processes sequences, so a rollout
    gives `steps_per_generation / gradient_accumulation_steps` steps for each epoch over it.
    """

    # ---- rollout
    num_generations: int = 1  # completions a prompt
    max_completion_length: int = 256
    max_prompt_length: int | None = None  # None: cutoff_len - max_completion_length
    temperature: float = 1.0
    top_k: int = 0  # 0: off. top_k and top_p bias the importance ratios
    top_p: float = 1.0
    sampler: Literal["group", "generate"] = "group"  # own loop with shared prefill, or model.generate
    rollout_batch_size: int | None = None  # sequences decoded at once; None: all
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
    # ---- updates
    lr_scheduler_type: str = "linear"
    learning_rate: float = 1e-6
    max_tokens_per_micro_batch: int | None = None  # replaces per_device_train_batch_size as the unit of a forward
    share_prompts: bool | Literal["auto"] = "auto"  # completions of a prompt go through the model behind one copy of it
    disable_dropout: bool = True  # the policy is updated in eval mode: sampler and trainer are one function
    max_skipped_steps: int = 10  # steps in a row with NaN or infinite gradients before the run is given up
    # ---- evaluation
    eval_on_start: bool = False
    eval_do_sample: bool = False  # False: greedy

    def validate(self) -> None:
        super().validate()
        for name in ("num_generations", "max_completion_length", "max_skipped_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        optional = ("max_prompt_length", "rollout_batch_size", "generation_batch_size", "steps_per_generation")
        for name in (*optional, "max_tokens_per_micro_batch"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1 or null")
        require("temperature", self.temperature, self.temperature > 0, "above 0")
        if self.prompt_length < 1:
            raise ValueError(
                f"cutoff_len={self.cutoff_len} leaves no room for a prompt beside "
                f"max_completion_length={self.max_completion_length}"
            )

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

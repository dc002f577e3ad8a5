"""The options of GRPO: TRL's names where TRL has them, on top of what every stage takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.trainers.config import RunConfig, require


@dataclass(kw_only=True)
class GRPOConfig(RunConfig):
    """One rollout is `generation_batch_size` sequences over all processes; one optimiser step is a minibatch of it.

    A minibatch has per_device_train_batch_size x gradient_accumulation_steps x processes sequences, so a rollout
    gives `steps_per_generation / gradient_accumulation_steps` steps for each of its `num_iterations` epochs.
    """

    stage: str = "grpo"
    # ---- rollout
    num_generations: int = 8  # G, completions a prompt
    max_completion_length: int = 256
    max_prompt_length: int | None = None  # None: cutoff_len - max_completion_length
    temperature: float = 1.0
    top_k: int = 0  # 0: off. top_k and top_p bias the importance ratios
    top_p: float = 1.0
    sampler: Literal["group", "generate"] = "group"  # own loop with shared prefill, or model.generate
    rollout_batch_size: int | None = None  # sequences decoded at once; None: all
    generation_batch_size: int | None = None  # sequences a rollout; None: from steps_per_generation
    steps_per_generation: int | None = None  # micro-batches a rollout and process; None: gradient_accumulation_steps
    num_iterations: int = 1  # epochs over a rollout
    # ---- reward
    reward_funcs: str | list[str] = field(default_factory=list)  # "package.module:function"
    reward_weights: list[float] | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"
    advantage_baseline: Literal["mean", "loo", "batch", "opo", "none"] = "mean"  # loo: leave one out (RLOO)
    mask_truncated_completions: bool = False  # completions cut at max_completion_length are not trained on
    # ---- loss
    loss_type: str = "grpo"  # a registered policy loss
    epsilon: float | None = None  # None: the loss's own
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0  # weight of the KL against the initial policy; 0: no reference model
    kl_estimator: str = "k3"
    kl_gradient: str | None = None
    entropy_coef: float = 0.0
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    # sampler: what the sampler recorded; recompute: one more forward before the updates. The first update of a
    # rollout needs neither: there the old policy is the current one.
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    # ---- updates
    lr_scheduler_type: str = "linear"
    learning_rate: float = 1e-6
    max_tokens_per_micro_batch: int | None = None  # replaces per_device_train_batch_size as the unit of a forward
    disable_dropout: bool = True  # the policy is updated in eval mode: sampler and trainer are one function
    max_skipped_steps: int = 10  # steps in a row with NaN or infinite gradients before the run is given up
    # ---- evaluation
    eval_on_start: bool = False
    eval_do_sample: bool = False  # False: greedy

    def validate(self) -> None:
        super().validate()
        for name in ("num_generations", "max_completion_length", "num_iterations", "max_skipped_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        optional = ("max_prompt_length", "rollout_batch_size", "generation_batch_size", "steps_per_generation")
        for name in (*optional, "max_tokens_per_micro_batch"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1 or null")
        require("temperature", self.temperature, self.temperature > 0, "above 0")
        require("beta", self.beta, self.beta >= 0, "at least 0")
        if self.prompt_length < 1:
            raise ValueError(
                f"cutoff_len={self.cutoff_len} leaves no room for a prompt beside "
                f"max_completion_length={self.max_completion_length}"
            )
        self.policy_loss()  # checks the loss's options

    @property
    def prompt_length(self) -> int:
        return self.max_prompt_length or self.cutoff_len - self.max_completion_length

    def policy_loss(self) -> PolicyLoss:
        """The loss that these options describe."""
        options: dict[str, Any] = dict(
            clip_low=self.epsilon,
            clip_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            entropy_coef=self.entropy_coef,
            importance_level=self.importance_sampling_level,
            max_length=self.max_completion_length,
        )
        return PolicyLoss(self.loss_type, **{name: value for name, value in options.items() if value is not None})

    def sizes(self, processes: int = 1) -> tuple[int, int]:
        """Prompts a rollout and process, and minibatches a rollout; ValueError when they do not divide."""
        minibatch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        total = self.generation_batch_size or self.per_device_train_batch_size * steps * processes
        units = {"num_generations x processes": self.num_generations * processes, "a minibatch": minibatch * processes}
        for words, unit in units.items():
            if total % unit:
                raise ValueError(f"a rollout of {total} sequences must be a multiple of {words} = {unit}")
        return total // (self.num_generations * processes), total // (minibatch * processes)

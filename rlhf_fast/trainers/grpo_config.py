"""The options of GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.trainers.config import require
from rlhf_fast.trainers.rl_config import RLConfig


@dataclass(kw_only=True)
class GRPOConfig(RLConfig):
    """Group Relative Policy Optimization and its relatives; `num_iterations` epochs over each rollout."""

    stage: str = "grpo"
    num_generations: int = 8  # G, completions a prompt
    num_iterations: int = 1  # epochs over a rollout
    # ---- advantages
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

    def validate(self) -> None:
        super().validate()
        require("num_iterations", self.num_iterations, self.num_iterations >= 1, "at least 1")
        require("beta", self.beta, self.beta >= 0, "at least 0")
        self.policy_loss()  # checks the loss's options

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

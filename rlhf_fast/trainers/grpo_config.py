"""The options of GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.losses.registry import variant
from rlhf_fast.ops.advantages import advantage_options, group_advantages
from rlhf_fast.trainers.config import require
from rlhf_fast.trainers.config_types import in_words_of
from rlhf_fast.trainers.rl_config import RLConfig

# The names of options in the functions that they are handed to, and here.
ADVANTAGE_KEYS = {
    "estimator": "advantage_estimator",
    "scale": "scale_rewards",
    "baseline": "advantage_baseline",
    "combine": "multi_objective_aggregation",
    "k": "pass_at_k",
}
LOSS_KEYS = {
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "importance_level": "importance_sampling_level",
    "top_entropy": "top_entropy_quantile",
    "off_policy_threshold": "off_policy_mask_threshold",
    "correction": "importance_correction",
    "correction_min": "importance_correction_min",
    "correction_max": "importance_correction_max",
    "max_length": "max_completion_length",
}


@dataclass(kw_only=True)
class GRPOConfig(RLConfig):
    """Group Relative Policy Optimization and its relatives; `num_iterations` epochs over each rollout."""

    stage: str = "grpo"
    num_generations: int = 8  # G, completions a prompt
    num_iterations: int = 1  # epochs over a rollout
    dynamic_sampling: bool = False  # groups of equal rewards are replaced by groups of other prompts (DAPO)
    dynamic_sampling_attempts: int = 3  # at most; what is still equal then is kept, and has no gradient
    # ---- advantages
    advantage_estimator: str = "grpo"  # see rlhf_fast.ops.advantages.advantage_options; the next two change it
    scale_rewards: Literal["group", "batch", "centered", "mean", "none"] | None = None
    # greedy: the reward of the prompt's greedy completion
    advantage_baseline: Literal["mean", "loo", "batch", "opo", "best_other", "pass_at_k", "greedy", "none"] | None = (
        None
    )
    pass_at_k: int | None = None  # k of advantage_estimator: pass_at_k_training
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    mask_truncated_completions: bool = False  # completions cut at max_completion_length are not trained on
    # ---- loss
    loss_type: str = "grpo"  # a registered policy loss
    loss_params: dict[str, float] = field(default_factory=dict)  # its own numbers, such as sapo's temperature_pos
    epsilon: float | None = None  # None: the loss's own
    epsilon_high: float | None = None  # None: epsilon where that is given (not for cispo's cap), else the loss's own
    delta: float | None = None  # bound of the unclipped ratio
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    top_entropy_quantile: float = 1.0  # only this share of the tokens is trained on, those of highest entropy
    off_policy_mask_threshold: float | None = None  # drops sequences of negative advantage that drifted further
    # ---- reference
    beta: float = 0.0  # weight of the KL against it; 0, and no max_kl: no reference model
    kl_estimator: str = "k3"
    kl_gradient: str | None = None
    kl_correction: bool = False  # the KL times the ratio (DeepSeek-V3.2)
    # ---- sampler and trainer
    # sampler: what the sampler recorded; recompute: one more forward before the updates. The first update of a
    # rollout needs neither: there the old policy is the current one.
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    # Weights pi_old / pi_sampler on the policy term, bounded. Recomputes the old log-probabilities.
    importance_correction: (
        Literal[
            "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
        ]
        | None
    ) = None
    importance_correction_min: float | None = None
    importance_correction_max: float | None = None  # None: 3.0
    share_prompts: bool | Literal["auto"] = "auto"  # completions of a prompt go through the model behind one copy of it

    def validate(self) -> None:
        super().validate()
        for name in ("num_iterations", "dynamic_sampling_attempts"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("beta", self.beta, self.beta >= 0, "at least 0")
        require("top_entropy_quantile", self.top_entropy_quantile, 0 < self.top_entropy_quantile <= 1, "in (0, 1]")
        for name in ("ref_model", "sync_ref_model"):
            if getattr(self, name) and not self.needs_reference:
                raise ValueError(f"{name} is given, but there is no reference: beta is 0, and there is no max_kl")
        if self.packing and self.share_prompts is True:
            raise ValueError("share_prompts and packing are both true; choose one")
        self.policy_loss()  # checks the loss's options
        self._check_advantages()

    @property
    def greedy_baseline(self) -> bool:
        """Whether the baseline is the reward of a greedy completion (ReMax)."""
        return self.advantage_baseline == "greedy" or (
            self.advantage_estimator == "remax" and self.advantage_baseline is None
        )

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.max_kl is not None

    @property
    def needs_old(self) -> bool:
        """Whether the loss reads log-probabilities of before the update even in the first one of a rollout."""
        return self.importance_correction is not None or variant(self.loss_type).prepare is not None

    @property
    def needs_sampler(self) -> bool:
        """Whether the loss reads what the sampler recorded."""
        return self.importance_correction is not None or self.off_policy_mask_threshold is not None

    @property
    def recomputes(self) -> bool:
        """Whether log-probabilities and entropy are computed before the updates, however many follow."""
        return self.importance_correction is not None or self.top_entropy_quantile < 1

    def advantage_options(self) -> dict[str, Any]:
        """Keywords of `group_advantages`."""
        with in_words_of(ADVANTAGE_KEYS):
            options = advantage_options(self.advantage_estimator)
        given = {"scale": self.scale_rewards, "baseline": self.advantage_baseline, "k": self.pass_at_k}
        options |= {name: value for name, value in given.items() if value is not None and value != "greedy"}
        if self.multi_objective_aggregation == "normalize_then_sum":
            options["combine"] = "normalize_then_sum"
        return options

    def _check_advantages(self) -> None:
        """Try the options on two groups of two: what cannot be is an error now, not after the first rollout."""
        if self.pass_at_k is not None and self.pass_at_k > self.num_generations:
            raise ValueError(f"pass_at_k={self.pass_at_k} of num_generations={self.num_generations} completions")
        options, rewards = self.advantage_options(), torch.tensor([0.0, 1.0, 1.0, 0.0])
        if self.greedy_baseline:
            options["baseline"] = torch.zeros(4)
        if options.get("baseline") == "opo":
            options["lengths"] = torch.ones(4)
        if "combine" in options:
            rewards = rewards[:, None].expand(4, 2)
        with in_words_of(ADVANTAGE_KEYS):
            group_advantages(rewards, group_size=2, **options)

    def policy_loss(self) -> PolicyLoss:
        """The loss that these options describe."""
        options: dict[str, Any] = dict(
            clip_low=self.epsilon,
            clip_high=self.epsilon_high,
            delta=self.delta,
            dual_clip=self.dual_clip,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            kl_correction=self.kl_correction,
            entropy_coef=self.entropy_coef,
            importance_level=self.importance_sampling_level,
            top_entropy=self.top_entropy_quantile if self.top_entropy_quantile < 1 else None,
            off_policy_threshold=self.off_policy_mask_threshold,
            correction=self.importance_correction,
            correction_min=self.importance_correction_min,
            correction_max=self.importance_correction_max,
            max_length=self.max_completion_length,
            params=self.loss_params or None,
        )
        with in_words_of(LOSS_KEYS):
            return PolicyLoss(self.loss_type, **{name: value for name, value in options.items() if value is not None})

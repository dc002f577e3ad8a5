"""The options of PPO. LLaMA-Factory's names where it has them, else TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlhf_fast.losses.policy import PolicyLoss
from rlhf_fast.losses.registry import variant
from rlhf_fast.trainers.config import find_model, require
from rlhf_fast.trainers.config_types import in_words_of, names
from rlhf_fast.trainers.controllers import AdaptiveKL, AnnealedKL, anneal
from rlhf_fast.trainers.rl_config import RLConfig

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(kw_only=True)
class PPOConfig(RLConfig):
    """Proximal Policy Optimization: a step is one rollout and `ppo_epochs` passes over its minibatches.

    `max_steps`, `logging_steps`, `save_steps` and `eval_steps` count such steps, as in LLaMA-Factory and TRL. A rollout
    has per_device_train_batch_size x gradient_accumulation_steps x ppo_buffer_size sequences on each process, which are
    `ppo_buffer_size` minibatches.
    """

    stage: str = "ppo"
    ppo_epochs: int = 4  # passes over a rollout
    ppo_buffer_size: int = 1  # minibatches a rollout
    # ---- roles
    critic: Literal["own", "shared"] = "own"  # a model of its own, or a value head on the actor's trunk
    critic_model: str | None = None  # its folder; None: the (first) reward model, else a copy of the policy
    critic_learning_rate: float | None = None  # None: learning_rate
    critic_warmup_steps: int = 0  # first steps in which the critic learns alone
    # ---- reward
    ppo_score_norm: bool = False  # scores by their running mean and std
    score_clip: float | None = None  # bound of |score|, after ppo_score_norm
    missing_eos_penalty: float | None = None  # taken off the scores of completions that did not end
    ppo_whiten_rewards: bool = False  # per-token rewards to variance 1, their mean kept
    # ---- KL against the reference: in the reward or in the loss, with one coefficient
    kl_in: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.05  # 0: no reference
    kl_estimator: str | None = None  # None: k1 in the reward, k3 in the loss
    kl_gradient: str | None = None  # in the loss; None: the estimator's own
    kl_clip: float | None = None  # bound of a token's |KL| in the reward
    ppo_target: float | None = 6.0  # nats a sequence; the coefficient adapts to it. None: it does not
    kl_horizon: float = 10000.0  # sequences over which it adapts
    kl_schedule: Schedule = "constant"  # of the coefficient over the run, with ppo_target: null
    kl_coef_final: float = 0.0
    early_stop_kl: float | None = None  # mean KL(old || new) of a token that ends a rollout's updates
    # ---- advantages
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    # A completion cut at max_completion_length ends there, and its score is what it was worth; True: it would have gone
    # on, and the critic's value of what follows is added to its score. For rewards that are no verdict on the whole.
    bootstrap_truncated: bool = False
    # ---- losses
    loss_type: str = "ppo"  # a registered policy loss
    epsilon: float = 0.2  # the ratio is clipped to [1 - epsilon, 1 + epsilon_high]
    epsilon_high: float | None = None  # None: epsilon
    epsilon_schedule: Schedule = "constant"  # of epsilon (and epsilon_high in proportion) over the run
    epsilon_final: float = 0.0
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    cliprange_value: float | None = 0.2  # values stay this close to the rollout's; None: no clipping
    vf_coef: float = 0.1

    aliases: ClassVar[Mapping[str, str]] = {"cliprange": "epsilon", "init_kl_coef": "kl_coef", "lambda": "lam"}

    def validate(self) -> None:
        super().validate()
        for name in ("ppo_epochs", "ppo_buffer_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("kl_coef", "kl_coef_final", "epsilon_final", "entropy_coef", "critic_warmup_steps"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < float("inf"), "at least 0 and finite")
        for name in ("gamma", "lam"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        positive = ("critic_learning_rate", "score_clip", "kl_clip", "ppo_target", "early_stop_kl", "cliprange_value")
        for name in positive:
            value = getattr(self, name)
            require(name, value, value is None or 0 < value < float("inf"), "above 0 or null")
        for name in ("epsilon", "kl_horizon", "vf_coef"):
            require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "above 0")
        if self.kl_schedule != "constant" and self.ppo_target is not None:
            raise ValueError(
                f"kl_schedule: {self.kl_schedule} and ppo_target: {self.ppo_target} both steer kl_coef; "
                "for a schedule set ppo_target: null"
            )
        for name, schedule in (("kl_coef_final", "kl_schedule"), ("epsilon_final", "epsilon_schedule")):
            if getattr(self, name) and getattr(self, schedule) == "constant":
                raise ValueError(f"{name} is where {schedule} ends, and {schedule} is constant")
        if self.kl_in == "loss" and self.kl_clip is not None:
            raise ValueError("kl_clip bounds the KL in the reward, and kl_in is loss")
        if self.kl_in == "reward" and self.kl_gradient is not None:
            raise ValueError("kl_gradient belongs to the KL in the loss, and kl_in is reward")
        if self.kl_coef == 0 and (self.ref_model or self.ref_model_adapters or self.sync_ref_model):
            raise ValueError("kl_coef is 0: no reference is used; leave out ref_model, its adapters and sync_ref_model")
        if self.kl_coef == 0 and self.max_kl is not None:
            raise ValueError("max_kl stops the run by the KL against the reference, and kl_coef 0 has none")
        if self.critic == "shared" and self.critic_model is not None:
            raise ValueError("critic is shared, a value head on the policy: leave out critic_model")
        if self.ppo_buffer_size > 1 and (self.steps_per_generation or self.generation_batch_size):
            raise ValueError(
                "ppo_buffer_size, steps_per_generation, generation_batch_size: each is the size of a rollout; give one"
            )
        self.policy_loss(0.0, self.kl_coef)  # checks the loss's options

    def check_paths(self) -> None:
        super().check_paths()
        if self.critic_model is not None:
            find_model("critic_model", self.critic_model)

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.steps_per_generation or self.gradient_accumulation_steps * self.ppo_buffer_size

    @property
    def critic_folder(self) -> str | None:
        """Where the critic begins; None: as the policy."""
        return self.critic_model or next(iter(names(self.reward_model)), None)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_old(self) -> bool:
        """Whether the loss reads log-probabilities of before the update even in the first one of a rollout."""
        return variant(self.loss_type).prepare is not None

    @property
    def estimator(self) -> str:
        """Of the KL, in the reward or in the loss."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    def kl_controller(self) -> AdaptiveKL | AnnealedKL:
        """What steers `kl_coef`."""
        if self.ppo_target is None or not self.needs_reference:
            return AnnealedKL(self.kl_coef, self.kl_coef_final, self.kl_schedule)
        return AdaptiveKL(self.kl_coef, self.ppo_target, self.kl_horizon)

    def policy_loss(self, progress: float, kl_coef: float) -> PolicyLoss:
        """The loss at a share `progress` of the run, under the KL coefficient of the moment."""
        low = anneal(self.epsilon, self.epsilon_final, self.epsilon_schedule, progress)
        high = None if self.epsilon_high is None else self.epsilon_high * low / self.epsilon
        options: dict[str, Any] = dict(
            clip_low=low,
            clip_high=high,
            dual_clip=self.dual_clip,
            beta=kl_coef if self.kl_in == "loss" else 0.0,
            kl_estimator=self.estimator,
            kl_gradient=self.kl_gradient,
            entropy_coef=self.entropy_coef,
            max_length=self.max_completion_length,
        )
        with in_words_of({"clip_low": "epsilon", "clip_high": "epsilon_high", "max_length": "max_completion_length"}):
            return PolicyLoss(self.loss_type, **{name: value for name, value in options.items() if value is not None})

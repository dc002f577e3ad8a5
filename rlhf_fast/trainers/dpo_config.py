"""The options of preference optimisation from pairs: TRL's names, LLaMA-Factory's as other names of the same keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlhf_fast.losses.preference import PreferenceLoss
from rlhf_fast.losses.preference_kinds import pair_variant, preference_loss_kinds
from rlhf_fast.trainers.config import require
from rlhf_fast.trainers.reference_config import ReferenceConfig

LOSS_NAMES = ("pref_loss", "dpo_loss_type", "dpo_loss")  # loss_type, as LLaMA-Factory calls and means it


@dataclass(kw_only=True)
class DPOConfig(ReferenceConfig):
    """DPO and its kin. Options that a loss does not know are errors."""

    stage: str = "dpo"
    loss_type: str | list[str] = "sigmoid"  # registered preference losses; a list is a sum
    loss_weights: list[float] | None = None  # of a list; None: 1 each
    beta: float = 0.1  # tie to the reference; IPO's tau, ORPO's lambda
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None  # weight of an SFT term on the chosen answers, a mean over their tokens
    pref_ftx: float = 0.0  # the same, each answer averaged for itself (LLaMA-Factory)
    pref_bco_weight: float = 0.0  # w: (loss + w bco_pair) / (1 + w)
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None  # weight of the tokens beyond the shorter answer's length
    reference_free: bool = False
    use_weighting: bool = False  # WPO
    simpo_gamma: float | None = None  # the losses' own parameters; None: their defaults
    discopop_tau: float | None = None
    cpo_alpha: float | None = None
    length_average: bool | None = None  # ipo: scores per token
    # Of the NLL in sft, cpo, orpo. None: over all tokens, as TRL; with pref_loss or pref_ftx each answer for itself and
    # then over the answers, as LLaMA-Factory.
    sft_average: Literal["token", "sequence"] | None = None

    aliases: ClassVar[Mapping[str, str]] = {
        **{name: "loss_type" for name in LOSS_NAMES},
        **{name: "beta" for name in ("pref_beta", "dpo_beta")},
        "dpo_label_smoothing": "label_smoothing",
        "dpo_ftx": "pref_ftx",
    }

    @classmethod
    def imply(cls, given: dict[str, Any], renamed: Collection[str]) -> None:
        """LLaMA-Factory's loss has LLaMA-Factory's NLL; rpo_alpha is TRL's term, and has TRL's."""
        kinds = given.get("loss_type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        with_nll = any(k in preference_loss_kinds() and "sft_average" in pair_variant(k).params for k in kinds)
        free = given.get("sft_average") is None and given.get("rpo_alpha") is None
        if free and with_nll and any(name in renamed for name in LOSS_NAMES):
            given["sft_average"] = "sequence"

    def validate(self) -> None:
        super().validate()
        for name in ("pref_ftx", "pref_bco_weight"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < float("inf"), "at least 0 and finite")
        if self.rpo_alpha is not None and self.pref_ftx:
            raise ValueError("rpo_alpha and pref_ftx both add an SFT term; choose one")
        loss = self.preference_loss()
        unused = [name for name in ("ref_model", "sync_ref_model", "precompute_ref_log_probs") if getattr(self, name)]
        if unused and not loss.needs_reference:
            raise ValueError(f"{unused[0]} has no use: loss_type {self.loss_type!r} as configured needs no reference")

    def preference_loss(self) -> PreferenceLoss:
        """The loss that these options describe; ValueError naming what does not fit."""
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(kinds) if self.loss_weights is None else list(self.loss_weights)
        if self.pref_bco_weight:
            weights = [weight / (1 + self.pref_bco_weight) for weight in weights]
            kinds, weights = [*kinds, "bco_pair"], [*weights, self.pref_bco_weight / (1 + self.pref_bco_weight)]
        average = self.sft_average
        if self.pref_ftx:
            kinds, weights = [*kinds, "sft"], [*weights, self.pref_ftx]
            average = average or "sequence"
        params: dict[str, Any] = {
            "simpo_gamma": self.simpo_gamma,
            "discopop_tau": self.discopop_tau,
            "nll_weight": self.cpo_alpha,
            "length_average": self.length_average,
            "sft_average": average,
        }
        return PreferenceLoss(
            kinds,
            loss_weights=weights,
            rpo_alpha=self.rpo_alpha,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence=self.f_divergence_type,
            f_alpha=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            reference_free=self.reference_free,
            weighting="wpo" if self.use_weighting else None,
            **{name: value for name, value in params.items() if value is not None},
        )

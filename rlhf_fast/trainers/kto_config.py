"""The options of KTO: TRL's names, LLaMA-Factory's as other names of the same keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_fast.losses.kto import KTO
from rlhf_fast.trainers.reference_config import ReferenceConfig


@dataclass(kw_only=True)
class KTOConfig(ReferenceConfig):
    """Preference optimisation from single answers that are known to be good or bad."""

    stage: str = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    aliases: ClassVar[Mapping[str, str]] = {
        "pref_beta": "beta",
        "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
    }

    def validate(self) -> None:
        super().validate()
        self.kto_loss()

    def kto_loss(self) -> KTO:
        """The loss that these options describe."""
        return KTO(self.loss_type, self.beta, self.desirable_weight, self.undesirable_weight)

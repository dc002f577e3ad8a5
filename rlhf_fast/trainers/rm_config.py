"""The options of reward-model training."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.trainers.config import TrainerConfig, require


@dataclass(kw_only=True)
class RMConfig(TrainerConfig):
    """A Bradley-Terry reward model from pairs; a row may say by how much chosen is better in a number `margin`."""

    stage: str = "rm"
    center_rewards_coefficient: float = 0.0  # keeps scores around 0: + c (chosen + rejected)^2; try 0.01
    label_smoothing: float = 0.0  # probability that a label is flipped, below 0.5
    use_margin: bool = True  # subtract the rows' margin, where they have one
    disable_dropout: bool = True

    def validate(self) -> None:
        super().validate()
        center, smoothing = self.center_rewards_coefficient, self.label_smoothing
        require("center_rewards_coefficient", center, 0 <= center < float("inf"), "at least 0 and finite")
        require("label_smoothing", smoothing, 0 <= smoothing < 0.5, "in [0, 0.5)")

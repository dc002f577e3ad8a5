"""The options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.trainers.config import TrainerConfig


@dataclass(kw_only=True)
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning with `transformers.Trainer`."""

    stage: str = "sft"
    train_on_prompt: bool = False  # score the prompt's tokens as well
    mask_history: bool = False  # score the last assistant turn only

    def validate(self) -> None:
        super().validate()
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history are both true; choose one")

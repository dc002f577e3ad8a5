"""The options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.trainers.config import TrainerConfig


@dataclass(kw_only=True)
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning with `transformers.Trainer`."""

    stage: str = "sft"
    train_on_prompt: bool = False  # score the prompt's tokens as well

"""A reward model from preference pairs.

    L = -1/P sum over pairs of log sigmoid(r(x, y_w) - r(x, y_l) - margin) + c (r(x, y_w) + r(x, y_l))^2

Sources: Bradley and Terry 1952; Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2; centring: Eisenstein
et al. 2023, eq. 2.

Departures from the textbook: none; P counts the pairs of all micro-batches and all ranks. Both answers of a pair go
through one forward, and only the last scored token of each meets the score head. It is the one that ends a completion
of the policy, so that what a template writes behind it ("\n" of ChatML) is never what a score is read from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_fast.losses.reward import reward_loss
from rlhf_fast.trainers.base import FusedTrainer, Totals
from rlhf_fast.trainers.data.collators import PairCollator
from rlhf_fast.trainers.data.sequences import first_sequences, scored_lengths
from rlhf_fast.trainers.models.reward_model import new_reward_model, pool_by_length, score_batch
from rlhf_fast.trainers.rm_config import RMConfig
from rlhf_fast.trainers.stage import run_stage


class RewardTrainer(FusedTrainer):
    """Trains a sequence classifier with one label on pairs.

    Args:
        model: see `reward_model`; it is pooled by length here.
        train_dataset, eval_dataset: `PairDataset`s, or rows with "chosen" and "rejected" token examples and "margin".
        data_collator: default: `PairCollator`, padded.
        center, label_smoothing: of `reward_loss`.
        use_margin: subtract the rows' margin, where they have one.
    Logged: rewards/{chosen, rejected, margins, accuracies, std}, rewards_max, rewards_min.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        data_collator: Any = None,
        center: float = 0.0,
        label_smoothing: float = 0.0,
        use_margin: bool = True,
        disable_dropout: bool = True,
        **kwargs: Any,
    ):
        self.options = {"center": center, "label_smoothing": label_smoothing}
        self.use_margin = use_margin
        super().__init__(
            pool_by_length(model),
            args,
            processing_class=processing_class,
            data_collator=data_collator or PairCollator(processing_class.pad_token_id),
            disable_dropout=disable_dropout,
            **kwargs,
        )

    def counts(self, batch: Mapping[str, Any]) -> Totals:
        return {"pairs": valid_pairs(batch).sum()}

    def first_rows(self, inputs: dict[str, Any], count: int) -> dict[str, Any]:
        return first_sequences(inputs, 2 * count)

    def share(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = score_batch(model, inputs).unflatten(0, (-1, 2)).unbind(1)  # each pair side by side
        margin = inputs.get("margin") if self.use_margin else None
        pairs, valid = totals["pairs"].clamp(min=1).to(chosen.dtype), valid_pairs(inputs)
        loss, metrics = reward_loss(chosen, rejected, margin=margin, mask=valid, normalizer=pairs, **self.options)
        nothing = ~valid.any()  # then no extremes either: other micro-batches' win
        for name, yields in (("rewards_max", -math.inf), ("rewards_min", math.inf)):
            metrics[name] = metrics[name].masked_fill(nothing, yields)
        squares = (chosen.detach().square() + rejected.detach().square()).mul(valid).sum() / (2 * pairs)
        return loss, {**metrics, "rewards/std": squares}

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """The standard deviation of all scores from their mean square. No extremes where no pair counted."""
        if metrics["rewards_max"] < metrics["rewards_min"]:
            metrics = {name: value for name, value in metrics.items() if name not in ("rewards_max", "rewards_min")}
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        return metrics | {"rewards/std": math.sqrt(max(metrics["rewards/std"] - mean**2, 0.0))}


def valid_pairs(batch: Mapping[str, Any]) -> Tensor:
    """(P,) bool: pairs whose answers both have a token."""
    return (scored_lengths(batch) > 0).unflatten(0, (-1, 2)).all(1)


def run_rm(config: RMConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train a reward model as the configuration says; returns what `summary.json` holds.

    The output folder loads with `AutoModelForSequenceClassification` or, after LoRA, with peft, and with
    `reward_model.load_reward_model`.
    """

    def build(model: nn.Module, args: TrainingArguments, *, processing_class: Any, **common: Any) -> RewardTrainer:
        return RewardTrainer(
            model,
            args,
            processing_class=processing_class,
            data_collator=PairCollator(processing_class.pad_token_id, packing=config.packing),
            center=config.center_rewards_coefficient,
            label_smoothing=config.label_smoothing,
            use_margin=config.use_margin,
            disable_dropout=config.disable_dropout,
            **common,
        )

    return run_stage(config, load=new_reward_model, build=build, callbacks=callbacks)

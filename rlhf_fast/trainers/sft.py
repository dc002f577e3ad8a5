"""Supervised fine-tuning: `transformers.Trainer` with the head and the loss fused.

    L = -1/n sum over scored tokens of log p(token | before),   n = scored tokens of the whole step

Departures from the stock trainer:
- the logits never exist: the loss is formed where the model calls its head (`fuse_lm_head`);
- n counts the scored tokens of all micro-batches and all ranks, so 1 x 4 and 4 x 1 are the same step;
- the evaluation loss is a mean over tokens, not a mean of batch means;
- a step with a NaN gradient changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.losses.nll import NLL
from rlhf_fast.trainers.base import FusedTrainer, Totals
from rlhf_fast.trainers.data.collators import Collator
from rlhf_fast.trainers.data.packing import PackedDataset
from rlhf_fast.trainers.data.sequences import model_inputs
from rlhf_fast.trainers.models.hf_utils import load_model
from rlhf_fast.trainers.sft_config import SFTConfig
from rlhf_fast.trainers.stage import run_stage


class SFTTrainer(FusedTrainer):
    """A `FusedTrainer` for causal LMs whose batches hold the model's inputs and `target_ids`.

    Args:
        model: a causal LM, plain or a PEFT model; its head is fused here.
        train_dataset, eval_dataset: `TokenDataset`s, or rows with "input_ids" and "scored".
        data_collator: default: `Collator`, padded.
    Logged: loss and perplexity per scored token.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        collator = data_collator or Collator(processing_class.pad_token_id)
        super().__init__(fuse_lm_head(model), args, processing_class=processing_class, data_collator=collator, **kwargs)

    def counts(self, batch: Mapping[str, Any]) -> Totals:
        return {"tokens": (batch["target_ids"] != -100).sum()}

    def share(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        loss_fn = NLL(normalizer=totals["tokens"])
        return model(**model_inputs(inputs), target_ids=inputs["target_ids"], loss_fn=loss_fn).loss, {}

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {"perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def run_sft(config: SFTConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Fine-tune as the configuration says; returns what `summary.json` holds.

    With `packing`, a row of a training batch is `cutoff_len` tokens of whole examples.
    """

    def build(model: nn.Module, args: TrainingArguments, *, processing_class: Any, **common: Any) -> SFTTrainer:
        if config.packing:
            common["train_dataset"] = PackedDataset(common["train_dataset"], config.cutoff_len, seed=config.seed)
        collator = Collator(processing_class.pad_token_id, packing=config.packing)
        return SFTTrainer(model, args, processing_class=processing_class, data_collator=collator, **common)

    return run_stage(config, load=load_model, build=build, callbacks=callbacks)

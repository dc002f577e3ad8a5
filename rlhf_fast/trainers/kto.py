"""KTO: preference optimisation from single answers that are known to be good or bad.

    r = log pi(y | x) - log pi_ref(y | x),   z = max(0, mean over mismatched (x_i, y_j) of log pi - log pi_ref)
    L = mean_i  lambda_D (1 - sigmoid(beta (r_i - z)))  or  lambda_U (1 - sigmoid(beta (z - r_i)))   (good or bad)

Source: Ethayarajh et al. 2024, eq. 7 and 8; D'Oosterlinck et al. 2024 for apo_zero_unpaired, which has no z.

Departures from the textbook:
- z is one number for the whole step: its mean runs over all micro-batches and all ranks, before any of them is trained
  on. A prompt's mismatched answer is drawn once from the whole dataset, not from its micro-batch, and never from
  another row of the same prompt: a micro-batch may be one row, or all good, or all bad;
- logits never exist, and the policy is updated in eval mode (`disable_dropout`): at the first step r and z are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_fast.losses.kto import KTO
from rlhf_fast.trainers.base import Totals
from rlhf_fast.trainers.data.collators import KTOCollator, first_scored
from rlhf_fast.trainers.data.sequences import (
    first_sequences,
    model_inputs,
    scored_lengths,
    sequence_offsets,
    sequence_sums,
)
from rlhf_fast.trainers.kto_config import KTOConfig
from rlhf_fast.trainers.models.hf_utils import load_model
from rlhf_fast.trainers.reference_trainer import ReferenceTrainer, no_loss, reference_options
from rlhf_fast.trainers.stage import run_stage

KL = "kl_"  # prefix of the mismatched sequences in a batch


class KTOTrainer(ReferenceTrainer):
    """Trains a causal LM on judged answers.

    Args:
        train_dataset, eval_dataset: `KTODataset`s, or rows with "input_ids", "scored" and "label".
        loss: a `KTO`.
        max_length: of the mismatched sequences; None: the longest row of the dataset.
        packing: one row without padding instead of padded batches.
        reference and other options: as in `ReferenceTrainer`.
    Logged: kl, rewards/{chosen, rejected, margins}, logps/{chosen, rejected}, loss/{chosen, rejected}, entropy; chosen
        are the good answers.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        loss: KTO | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        packing: bool = False,
        **kwargs: Any,
    ):
        self.loss = KTO() if loss is None else loss
        if self.loss.kind == "kto":
            wrapped = [d and Mismatched(d, max_length, seed=args.seed) for d in (train_dataset, eval_dataset)]
            train_dataset, eval_dataset = wrapped
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=MismatchedCollator(processing_class.pad_token_id, packing=packing),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )

    def counts(self, batch: Mapping[str, Any]) -> Totals:
        """A sequence counts when it has a scored token; and the sums behind z."""
        lengths = scored_lengths(batch)
        valid = lengths > 0
        good = valid & batch["label"]
        counts = {"sequences": valid.sum(), "desirable": good.sum(), "undesirable": valid.sum() - good.sum()}
        return counts | {"tokens": lengths.sum()} | (self._mismatched_gap(batch) if self.loss.kind == "kto" else {})

    @torch.no_grad()
    def _mismatched_gap(self, batch: Mapping[str, Any]) -> Totals:
        """Sum of log pi - log pi_ref over the mismatched sequences, and their number."""
        batch = self._prepare_inputs(dict(batch))
        other = mismatched(batch)
        offsets, targets = sequence_offsets(other), other["target_ids"]
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            out = self.model_wrapped(**model_inputs(other), target_ids=targets, loss_fn=no_loss, segments=offsets)
        self.model.train(training)
        if "ref" in batch:
            reference = (batch["ref"][:, 1] * (scored_lengths(other) > 0)).sum()
        else:
            reference = self.reference_logprob(other, offsets).sum()
        return {"kl_gap": out.logprob.sum() - reference, "kl_rows": (scored_lengths(other) > 0).sum()}

    def first_rows(self, inputs: dict[str, Any], count: int) -> dict[str, Any]:
        kept = first_sequences(inputs, count)
        if self.loss.kind == "kto":
            kept |= {KL + name: value for name, value in first_sequences(mismatched(inputs), count).items()}
        return kept

    def share(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        offsets = sequence_offsets(inputs)
        counts = {name: totals[name].clamp(min=1) for name in ("sequences", "desirable", "undesirable", "tokens")}
        batch = {
            "desirable": inputs["label"],
            "normalizer": counts["sequences"],
            "num_desirable": counts["desirable"],
            "num_undesirable": counts["undesirable"],
            "kl": totals["kl_gap"] / totals["kl_rows"].clamp(min=1) if self.loss.kind == "kto" else None,
        }
        if "ref" in inputs:
            batch["ref_sequence"] = inputs["ref"][:, 0]
        else:
            batch["ref_logprob"] = self.reference_logprob(inputs, offsets)
        out = model(
            **model_inputs(inputs),
            target_ids=inputs["target_ids"],
            loss_fn=self.loss,
            batch=batch,
            segments=offsets,
            entropy=self.log_entropy,
        )
        return out.loss, self.policy_metrics(out, counts["tokens"])

    def reference_sums(self, batch: dict[str, Any]) -> Tensor:
        """(rows, 1 or 2): the reference's log-probabilities of the answers and, for z, of the mismatched ones."""
        both = [batch, mismatched(batch)] if self.loss.kind == "kto" else [batch]
        offsets = [sequence_offsets(part) for part in both]
        pairs = zip(both, offsets, strict=True)
        return torch.stack([sequence_sums(self.reference_logprob(part, o), o) for part, o in pairs], dim=1)


class Mismatched(torch.utils.data.Dataset):
    """Judged answers whose items carry, as "kl", their prompt with an answer to another prompt, drawn once.

    Raises: ValueError when all rows have the same prompt.
    """

    def __init__(self, dataset: Any, max_length: int | None = None, *, seed: int = 0):
        self.dataset = dataset
        rows = [dataset[i] for i in range(len(dataset))]
        self.prompts = [first_scored(np.asarray(row["scored"])) for row in rows]
        self.max_length = max_length or max(len(row["input_ids"]) for row in rows)
        ids: dict[bytes, int] = {}
        keys = [np.asarray(row["input_ids"][:n]).tobytes() for row, n in zip(rows, self.prompts, strict=True)]
        prompt = np.array([ids.setdefault(key, len(ids)) for key in keys])
        if len(ids) < 2:
            raise ValueError(f"KTO compares answers to different prompts, but all {len(rows)} rows have the same one")
        rng = np.random.default_rng(seed)
        self.partner = rng.permutation(len(rows))
        for i in np.flatnonzero(prompt[self.partner] == prompt):
            self.partner[i] = rng.choice(np.flatnonzero(prompt != prompt[i]))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens of each row."""
        return self.dataset.lengths

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, j = self.dataset[i], int(self.partner[i])
        other = self.dataset[j]
        joined = {
            name: np.concatenate([row[name][: self.prompts[i]], other[name][self.prompts[j] :]])[: self.max_length]
            for name in ("input_ids", "scored")
        }
        return {**row, "kl": joined}


class MismatchedCollator(KTOCollator):
    """`KTOCollator`, and the same keys with the prefix "kl_" for the mismatched sequences."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        if "kl" in examples[0]:
            batch |= {KL + name: value for name, value in self.batch([e["kl"] for e in examples]).items()}
        return batch


def mismatched(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The mismatched sequences of a batch, as a batch."""
    return {name.removeprefix(KL): value for name, value in batch.items() if name.startswith(KL)}


def run_kto(config: KTOConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Optimise the policy as the configuration says; returns what `summary.json` holds."""

    def build(model: nn.Module, args: TrainingArguments, *, processing_class: Any, **common: Any) -> KTOTrainer:
        trainer = KTOTrainer(
            model,
            args,
            processing_class=processing_class,
            loss=config.kto_loss(),
            max_length=config.cutoff_len,
            packing=config.packing,
            **reference_options(config),
            **common,
        )
        if config.precompute_ref_log_probs:
            trainer.precompute_reference(batch_size=config.precompute_ref_batch_size)
        return trainer

    return run_stage(config, load=load_model, build=build, callbacks=callbacks)

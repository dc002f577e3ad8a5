"""Direct preference optimisation, and every other loss of its family.

    L = -1/P sum over pairs of log sigmoid(beta [(log pi - log pi_ref)(y_w | x) - (log pi - log pi_ref)(y_l | x)])

Source: Rafailov et al. 2023, eq. 7; other losses by `loss`, see `losses.preference_kinds`.

Departures from the textbook, each exact:
- both answers of a pair go through one forward, in which the fused head forms loss and gradient: logits never exist;
- P counts the pairs of all micro-batches and all ranks (kinds that sort over a batch sort each micro-batch);
- the reference is the policy with its adapters off where only fresh adapters train, else a frozen copy; its sums can
  be computed once before training;
- the policy is updated in eval mode (`disable_dropout`): at the first step every margin is exactly 0.

BCO's reward shift (in mixes with bco_pair) is the mean reward of all steps before this one; TRL 1.16 has 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_fast.losses.pairs import PairSegments, pair_segments
from rlhf_fast.losses.preference import PreferenceLoss
from rlhf_fast.trainers.base import Totals
from rlhf_fast.trainers.data.collators import PairCollator
from rlhf_fast.trainers.data.sequences import first_sequences, model_inputs, scored_lengths, sequence_offsets
from rlhf_fast.trainers.dpo_config import DPOConfig
from rlhf_fast.trainers.models.hf_utils import load_model
from rlhf_fast.trainers.reference_trainer import ReferenceTrainer, reference_options
from rlhf_fast.trainers.stage import run_stage


class DPOTrainer(ReferenceTrainer):
    """Trains a causal LM on pairs.

    Args:
        train_dataset, eval_dataset: `PairDataset`s, or rows with "chosen" and "rejected" token examples.
        data_collator: default: `PairCollator`, padded.
        loss: a `PreferenceLoss`.
        reference and other options: as in `ReferenceTrainer`.
    Logged: rewards/{chosen, rejected, margins, accuracies}, logps/{chosen, rejected}, loss/<kind> in a mix, entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        loss: PreferenceLoss | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        self.loss = PreferenceLoss() if loss is None else loss
        self._shifted = any(kind == "bco_pair" for kind, _ in self.loss.kinds)
        self._shift = torch.zeros(2, dtype=torch.float64)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator or PairCollator(processing_class.pad_token_id),
            needs_reference=self.loss.needs_reference,
            **kwargs,
        )

    def counts(self, batch: Mapping[str, Any]) -> Totals:
        """A pair counts when both of its answers have scored tokens."""
        lengths = scored_lengths(batch).unflatten(0, (-1, 2))
        valid = (lengths > 0).all(1)
        return {"pairs": valid.sum(), "chosen_tokens": (lengths[:, 0] * valid).sum(), "tokens": lengths.sum()}

    def first_rows(self, inputs: dict[str, Any], count: int) -> dict[str, Any]:
        return first_sequences(inputs, 2 * count)

    def share(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, chosen_tokens, tokens = (totals[name].clamp(min=1) for name in ("pairs", "chosen_tokens", "tokens"))
        layout = self._layout(inputs)
        batch = {"is_chosen": layout.is_chosen, "normalizer": pairs, "chosen_tokens": chosen_tokens}
        if "ref" in inputs:
            batch["ref_chosen"], batch["ref_rejected"] = inputs["ref"].unbind(1)
        elif self.reference is not None:
            batch["ref_logprob"] = self.reference_logprob(inputs, layout.segments)
        if self._shifted:
            batch["bco_delta"] = self._shift[0]
        out = model(
            **model_inputs(inputs),
            target_ids=inputs["target_ids"],
            loss_fn=self.loss,
            batch=batch,
            segments=layout.segments,
            entropy=self.log_entropy,
        )
        return out.loss, self.policy_metrics(out, tokens)

    def reference_sums(self, batch: dict[str, Any]) -> Tensor:
        """(pairs, 2): the reference's log-probabilities of chosen and rejected, desensitised under ld_alpha."""
        layout = self._layout(batch)
        given = {"is_chosen": layout.is_chosen, "ref_logprob": self.reference_logprob(batch, layout.segments).flatten()}
        sums = self.loss.prepare(given, batch["target_ids"].flatten() != -100, layout.segments)
        return torch.stack([sums["ref_chosen"], sums["ref_rejected"]], dim=1)

    def _layout(self, batch: Mapping[str, Any]) -> PairSegments:
        return pair_segments(sequence_offsets(batch), batch["target_ids"].numel())

    # ---- BCO's reward shift: (mean, steps)

    def after_step(self) -> None:
        super().after_step()
        if self._shifted:
            step = self.step_metrics()
            reward = (step["rewards/chosen"] + step["rewards/rejected"]) / 2
            mean, steps = self._shift.to(reward.device)
            self._shift = torch.stack([mean + (reward - mean) / (steps + 1), steps + 1])

    def extra_state(self) -> dict[str, Tensor]:
        return super().extra_state() | ({"bco_shift": self._shift} if self._shifted else {})

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        super().load_extra_state(state)
        self._shift = state.get("bco_shift", self._shift)


def run_dpo(config: DPOConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Optimise the policy as the configuration says; returns what `summary.json` holds."""

    def build(model: nn.Module, args: TrainingArguments, *, processing_class: Any, **common: Any) -> DPOTrainer:
        trainer = DPOTrainer(
            model,
            args,
            processing_class=processing_class,
            loss=config.preference_loss(),
            data_collator=PairCollator(processing_class.pad_token_id, packing=config.packing),
            **reference_options(config),
            **common,
        )
        if config.precompute_ref_log_probs:
            options = f"ld_alpha={config.ld_alpha}"
            trainer.precompute_reference(batch_size=config.precompute_ref_batch_size, options=options)
        return trainer

    return run_stage(config, load=load_model, build=build, callbacks=callbacks)

"""`ReferenceTrainer`: the part of DPO and KTO that deals with the reference's log-probabilities.

They come from the frozen reference, without gradient and without logits, in the forward of each batch; or from disk,
computed once (`precompute_reference`). The reference may follow the policy (TR-DPO, or an EMA).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.base import FusedTrainer
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.data.sequences import model_inputs
from rlhf_fast.trainers.models.hf_utils import choose_attention, load_folder, vocabulary_size, weights_dtype
from rlhf_fast.trainers.models.lora import merge_adapter
from rlhf_fast.trainers.models.policy import Reference
from rlhf_fast.trainers.reference_config import ReferenceConfig
from rlhf_fast.trainers.rollout.samplers import evaluating
from rlhf_fast.trainers.sharding import autocast, load_whole, whole
from rlhf_fast.types import FusedLoss


class ReferenceTrainer(FusedTrainer):
    """A `FusedTrainer` for causal LMs with a reference.

    Args:
        model: a causal LM, plain or a PEFT model; its head is fused here.
        reference: a `Reference`, another model to be one, or None: the policy as it is now. Not made where
            `needs_reference` is False.
        sync_steps: every so many steps `reference <- sync_alpha policy + (1 - sync_alpha) reference`; 0: never.
        log_entropy: log the policy's mean entropy over the scored tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        reference: Reference | nn.Module | None = None,
        needs_reference: bool = True,
        sync_steps: int = 0,
        sync_alpha: float = 0.6,
        log_entropy: bool = False,
        disable_dropout: bool = True,
        **kwargs: Any,
    ):
        if isinstance(reference, nn.Module) and vocabulary_size(reference) < vocabulary_size(model):
            sizes = f"{vocabulary_size(reference)}, the policy's {vocabulary_size(model)}"
            raise ValueError(f"reference: its vocabulary has {sizes} tokens: they cannot be compared")
        if needs_reference and not isinstance(reference, Reference):
            reference = Reference(model, reference, copy=bool(sync_steps))
        self.reference = reference if needs_reference else None
        self.sync_steps, self.sync_alpha, self.log_entropy = sync_steps, sync_alpha, log_entropy
        super().__init__(fuse_lm_head(model), args, disable_dropout=disable_dropout, **kwargs)
        if self.reference is not None:
            self.reference.lay_beside(self.accelerator)

    def reference_sums(self, batch: dict[str, Any]) -> Tensor:
        """(rows, k): what the loss needs of the reference for each row of the dataset."""
        raise NotImplementedError

    @torch.no_grad()
    def reference_logprob(self, batch: Mapping[str, Any], segments: Tensor) -> Tensor:
        """The reference's log-probabilities of `target_ids`, in its shape.

        Computed in the very tiles in which the policy's are, so that equal weights give equal bits.
        """
        inputs = dict(**model_inputs(batch), target_ids=batch["target_ids"], loss_fn=no_loss, segments=segments)
        with ExitStack() as stack:
            model = stack.enter_context(self.reference.active())
            stack.enter_context(autocast(self.accelerator, model))
            if model.training:  # the policy with its adapters off, which may be in training mode with dropout
                stack.enter_context(evaluating(model))
            return model(**inputs).logprob

    def policy_metrics(self, out: FusedLoss, tokens: Tensor) -> dict[str, Tensor]:
        """The loss's metrics without the engine's row counts, and this batch's share of the mean entropy."""
        kept = {name: value for name, value in out.metrics.items() if not name.startswith("rows_")}
        return kept if out.entropy is None else kept | {"entropy": out.entropy.sum() / tokens}

    # ---- a reference that follows the policy

    def after_step(self) -> None:
        if self.sync_steps and self.state.global_step % self.sync_steps == 0:
            self.reference.sync(self.accelerator.unwrap_model(self.model), self.sync_alpha)

    def extra_state(self) -> dict[str, Tensor]:
        state = {} if self.reference is None else self.reference.state_dict()
        return {f"reference.{name}": value.clone() for name, value in state.items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        prefix = "reference."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if self.reference is not None:
            self.reference.load_state_dict(own)

    # ---- once before training

    def precompute_reference(
        self, folder: str | Path | None = None, *, batch_size: int | None = None, options: str = ""
    ) -> None:
        """Compute what the loss needs of the reference for all rows, and drop the reference.

        Kept in `folder` (default: output_dir) under a hash of the rows, the reference's weights and `options`, what
        else it depends on: an equal run reads it back.
        """
        if self.reference is None:
            return
        folder = Path(folder or self.args.output_dir)
        batch_size = batch_size or self.args.per_device_eval_batch_size
        weights = _hash_weights(self.reference)
        options += f" {self.accelerator.mixed_precision}"
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if dataset is None:
                continue
            key = hashlib.blake2b(_hash_rows(dataset) + weights + options.encode(), digest_size=16).hexdigest()
            path = folder / f"ref_logprobs-{key}.npy"
            found = bool(self.accelerator.gather(torch.tensor([path.is_file()], device=self.args.device)).all())
            sums = np.load(path, allow_pickle=False) if found else self._all_sums(dataset, batch_size)
            if not found and self.args.should_save:
                _save_array(path, sums)
            setattr(self, name, WithReference(dataset, sums))
        self.data_collator = ReferenceCollator(self.data_collator)
        self.reference = None

    def _all_sums(self, dataset: Any, batch_size: int) -> np.ndarray:
        """(R, k), each rank a share of the batches."""
        starts = range(0, len(dataset), batch_size)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        sums: Tensor | None = None
        for i in range(0, len(starts), ranks):  # a sharded reference wants as many forwards of every rank
            start = starts[min(i + rank, len(starts) - 1)]
            rows = range(start, min(start + batch_size, len(dataset)))
            part = self.reference_sums(self._prepare_inputs(self.data_collator([dataset[i] for i in rows])))
            if sums is None:
                sums = part.new_zeros(len(dataset), part.shape[1])
            if i + rank < len(starts):
                sums[start : rows.stop] = part
        return self.accelerator.reduce(sums, reduction="sum").cpu().numpy()


def reference_options(config: ReferenceConfig) -> dict[str, Any]:
    """What a configuration says about the reference, as keywords of `ReferenceTrainer`; loads `ref_model`."""
    return {
        "reference": load_reference(config) if config.ref_model else None,
        "sync_steps": config.ref_model_sync_steps if config.sync_ref_model else 0,
        "sync_alpha": config.ref_model_mixup_alpha,
        "log_entropy": config.log_entropy,
        "disable_dropout": config.disable_dropout,
    }


def load_reference(config: ReferenceConfig) -> nn.Module:
    """`ref_model` with its `ref_model_adapters` merged, in the dtype of the policy's frozen weights."""
    load_whole()
    attention = config.attn_implementation or choose_attention(config)
    options = dict(dtype=weights_dtype(config), trust_remote_code=config.trust_remote_code)
    model = load_folder(config.ref_model, **options, attn_implementation=attention)
    for adapter in names(config.ref_model_adapters):
        model = merge_adapter(model, adapter)
    return model


class WithReference(torch.utils.data.Dataset):
    """A dataset whose items carry what was computed once of the reference, (k,), as "ref"."""

    def __init__(self, dataset: Any, sums: np.ndarray):
        if len(sums) != len(dataset):
            raise ValueError(f"the reference's sums are of {len(sums)} rows, the dataset has {len(dataset)}")
        self.dataset, self.sums = dataset, sums

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens of each row."""
        return self.dataset.lengths

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.dataset[i], "ref": self.sums[i]}


class ReferenceCollator:
    """A collator that hands "ref" on as one tensor (rows, k)."""

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.collator(examples) | {"ref": torch.from_numpy(np.stack([e["ref"] for e in examples]))}


def no_loss(logprob: Tensor, entropy: Tensor | None, batch: dict[str, Any]) -> Tensor:
    """For log-probabilities in the tiles in which a loss over whole segments has them."""
    return logprob.new_zeros(())


def _hash_rows(dataset: Any) -> bytes:
    found = hashlib.blake2b(str(len(dataset)).encode())

    def add(item: Any) -> None:
        if isinstance(item, Mapping):
            for key in sorted(item):
                found.update(key.encode())
                add(item[key])
        else:
            array = np.asarray(item) if not isinstance(item, np.ndarray) else item
            found.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())

    for i in range(len(dataset)):
        add({key: value for key, value in dataset[i].items() if key not in ("margin", "label")})
    return found.digest()


def _hash_weights(reference: Reference) -> bytes:
    found = hashlib.blake2b()
    model = reference.model
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not (reference.adapters_off and "lora_" in name):
            weight = whole(weight)
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.digest()


def _save_array(path: Path, array: np.ndarray) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        np.save(f, array, allow_pickle=False)
    part.replace(path)

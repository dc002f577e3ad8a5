"""The sequences in a batch, padded or packed: where they begin, what is scored in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch goes to the model: ids, and the mask of padded or the positions of packed sequences."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def sequence_offsets(batch: Mapping[str, Any]) -> Tensor:
    """(S + 1,) offsets of the sequences into the flattened tokens, padding included."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"]
    rows, width = batch["input_ids"].shape
    return torch.arange(rows + 1, device=batch["input_ids"].device) * width


def sequence_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """(S,) sums of per-token values, which are 0 where not scored."""
    return values.new_zeros(len(offsets) - 1).index_add(0, _owners(offsets, values.numel()), values.flatten())


def _owners(offsets: Tensor, tokens: int) -> Tensor:
    """(tokens,) the sequence that each token belongs to."""
    sequences = torch.arange(len(offsets) - 1, device=offsets.device)
    return sequences.repeat_interleave(offsets.diff().long(), output_size=tokens)


def scored_lengths(batch: Mapping[str, Any]) -> Tensor:
    """(S,) scored tokens of each sequence."""
    return sequence_sums((batch["target_ids"] != -100).long(), sequence_offsets(batch))


def last_scored(batch: Mapping[str, Any]) -> Tensor:
    """(S,) index of each sequence's last scored token into the flattened tokens; 0 where nothing is scored."""
    offsets, scored = sequence_offsets(batch), batch["target_ids"].flatten() != -100
    index = torch.arange(1, len(scored) + 1, device=scored.device) * scored  # of the token that is predicted
    return index.new_zeros(len(offsets) - 1).scatter_reduce(0, _owners(offsets, len(scored)), index, "amax")


def first_sequences(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch with nothing scored beyond its first `count` sequences."""
    ids = batch["target_ids"].clone()
    ids.view(-1)[int(sequence_offsets(batch)[count]) :] = -100
    return {**batch, "target_ids": ids}

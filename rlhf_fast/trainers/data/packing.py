"""Padding-free training: rows filled with short sequences, and the check that a model keeps them apart.

lengths 5 4 3 2 2, budget 8   ->   rows [5 3] [4 2 2]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fill_rows(lengths: Sequence[int] | np.ndarray, budget: int, *, seed: int = 0) -> list[list[int]]:
    """Indices of sequences that share a row of at most `budget` tokens: best fit, longest first.

    At most 11/9 of the smallest possible number of rows (plus one). Every index occurs once. The seed decides among
    sequences of equal length, and the order of the rows, so that neither follows the order of the data.

    Raises: ValueError when a sequence is longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > budget:
        at = int(lengths.argmax())
        raise ValueError(f"budget must be at least the longest sequence, {lengths[at]} tokens (row {at}), got {budget}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # rows by the tokens that they still take
    some = 0  # bit r: there is a row with room for r tokens
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = some >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1  # the lowest bit: the tightest row
            row = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
            rows[row].append(i)
        else:
            row, room = len(rows), budget
            rows.append([i])
        with_room[room - length].append(row)
        some |= 1 << (room - length)
    return [rows[r] for r in rng.permutation(len(rows))]


class PackedDataset(torch.utils.data.Dataset):
    """Rows of about `budget` tokens: item i is a list of examples, which a packing collator puts end to end.

    A batch of b items is then a budget of b * `budget` tokens, whatever the sequences' lengths are.

    Args:
        dataset: a TokenDataset, PairDataset or KTODataset.
        budget: tokens a row, at least the longest example.
    """

    def __init__(self, dataset: Any, budget: int, *, seed: int = 0):
        self.dataset = dataset
        self.budget = budget
        self.rows = fill_rows(dataset.lengths, budget, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[dict[str, Any]]:
        return [self.dataset[k] for k in self.rows[i]]

    @property
    def filled(self) -> float:
        """Share of the budget that holds tokens."""
        return float(self.dataset.lengths.sum() / (len(self.rows) * self.budget))


ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that transformers masks by position ids. Convolutions and recurrences run on over the boundaries."""


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raise ValueError unless `model` keeps packed sequences apart. Three tiny forwards, before FSDP and the like.

    Two sequences are packed as `pack` does it. The second one's hidden states must be what they are alone; what they
    are when the first one is seen is measured too, and the limit lies in the (geometric) middle of that and rounding.

    Args:
        model: a transformers model with any head, plain or a PEFT model around one.
    """
    body = _body(model)
    name = type(body).__name__
    others = sorted(set(getattr(body.config, "layer_types", None) or ()) - ATTENTION)
    if others:
        raise ValueError(f"packing: {name} has {', '.join(others)} layers, which do not stop where a sequence ends")
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise ValueError(f"packing: {name} takes no position_ids, so packed sequences would see each other")
    embedding = body.get_input_embeddings().weight
    first, second = 16, 4
    positions = torch.arange(first + second, device=embedding.device)
    ids = (positions * 7 + 3) % embedding.shape[0]
    training = body.training
    body.eval()
    try:
        alone = _hidden(body, ids[first:], positions[:second])
        together = _hidden(body, ids, torch.cat([positions[:first], positions[:second]]))[first:]
        leaked = _hidden(body, ids, positions)[first:]
    finally:
        body.train(training)
    error, leak = ((x - alone).norm().item() for x in (together, leaked))
    limit = max(4 * (eps := _eps(embedding)) * alone.norm().item(), eps**0.5 * leak)
    if not error <= limit:
        attention = getattr(body.config, "_attn_implementation", None)
        raise ValueError(
            f"packing: {name} with attention {attention!r} does not keep packed sequences apart: the second one is off "
            f"by {error:.1e}, more than {limit:.1e}, where seeing all of the first makes {leak:.1e}"
        )


def _body(model: nn.Module) -> nn.Module:
    """The transformer below the head and below PEFT's wrapper (its layers keep their adapters)."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(model, "base_model", model)


def _hidden(body: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    out = body(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return out[0][0].double()


def _eps(weight: Tensor) -> float:
    tf32 = weight.is_cuda and weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if tf32 else torch.finfo(weight.dtype).eps

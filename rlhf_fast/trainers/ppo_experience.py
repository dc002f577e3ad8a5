"""A PPO rollout as training data: sequences, what the roles said about each trained token, and grids for a forward.

Everything per token is flat, (N,) over the trained tokens in their order. Tokens that the policy did not sample (a
tool's answer), and sequences without a usable score, have no entry: an interior gap closes by itself, as `gae` does it
under mask_mode "carry", and a sequence's last entry is its last trained token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.trainers.rollout.samplers import Rollout

IGNORE = -100


class Sequences(NamedTuple):
    """B prompts with their completions, M tokens in all, N of them trained."""

    ids: Tensor  # (M,) int64
    target: Tensor  # (M,) int64: the trained token that follows a position, else -100
    slot: Tensor  # (M,) int64: that token's place in (N,) where there is one
    cu_seqlens: Tensor  # (B+1,) int64, into ids
    cu_trained: Tensor  # (B+1,) int64, into (N,)
    sampler_logprob: Tensor  # (N,) fp32: what the sampler recorded; NaN: unknown
    terminated: Tensor  # (B,) bool; False: cut at the longest length

    @property
    def lengths(self) -> Tensor:
        """(B,): tokens of each sequence, prompt and all."""
        return self.cu_seqlens.diff()

    @property
    def trained(self) -> Tensor:
        """(B,): trained tokens of each sequence."""
        return self.cu_trained.diff()


class RoleOutputs(NamedTuple):
    """What the roles said, (N,) fp32 each."""

    logprob: Tensor  # of the actor before the updates
    ref_logprob: Tensor | None
    values: Tensor
    bootstrap: Tensor  # (B,): values after the last token
    advantages: Tensor | None = None
    returns: Tensor | None = None


class Grid(NamedTuple):
    """b sequences as one forward takes them: (b, T) padded on the right, or (1, T) side by side without padding."""

    inputs: dict[str, Tensor]  # input_ids; position_ids where packed
    target_ids: Tensor  # the shape of input_ids; -100: not trained
    segments: Tensor  # (b+1,): where sequences begin in the flattened grid
    last: Tensor  # (b,): their last token's place in the flattened grid
    slots: Tensor  # (n,): where the trained tokens, in the grid's order, are in (N,)

    @property
    def positions(self) -> Tensor:
        """(n,): places in the flattened grid that predict a trained token."""
        return (self.target_ids.flatten() != IGNORE).nonzero()[:, 0]

    def idle(self) -> Grid:
        """The same grid with nothing to train on."""
        return self._replace(target_ids=torch.full_like(self.target_ids, IGNORE), slots=self.slots[:0])

    def spread(self, values: Tensor | None) -> Tensor | None:
        """(N,) -> the grid, 0 where nothing is trained."""
        if values is None:
            return None
        flat = values.new_zeros(self.target_ids.numel())
        return flat.index_copy_(0, self.positions, values[self.slots]).view(self.target_ids.shape)


def join(prompts: Sequence[Sequence[int]], rollout: Rollout, counted: Tensor) -> Sequences:
    """Prompts (one a completion) and completions, on the rollout's device. `counted` (B,) bool: sequences to train on.

    Raises: ValueError when their numbers differ, or a prompt is empty.
    """
    completions, lengths, device = rollout.completions(), rollout.lengths, rollout.ids.device
    if len(prompts) != len(completions):
        raise ValueError(f"prompts must hold one prompt for each of {len(completions)} completions, got {len(prompts)}")
    if empty := [row for row, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ValueError(f"prompts must be non-empty lists of token ids, row {empty[0]} is empty")
    flat = chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))
    ids = torch.tensor(list(flat), device=device)
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    cu_seqlens = _offsets(prompt_lengths + lengths)
    sampled = torch.ones_like(rollout.ids, dtype=torch.bool) if rollout.mask is None else rollout.mask
    kept = sampled & counted.to(device).repeat_interleave(lengths)
    # Completion token k stands behind its own prompt and those of the sequences before.
    place = torch.arange(len(rollout.ids), device=device) + prompt_lengths.cumsum(0).repeat_interleave(lengths)
    target = torch.full_like(ids, IGNORE)
    target[place[kept] - 1] = ids[place[kept]]
    slot = (target != IGNORE).cumsum(0) - 1
    trained = _offsets(kept.long())[rollout.cu_seqlens.long()]
    stopped = torch.tensor([reason == "stop" for reason in rollout.finish], device=device)
    return Sequences(ids, target, slot, cu_seqlens, trained, rollout.logprob[kept], stopped)


def lay_out(sequences: Sequences, rows: Tensor, pad_id: int, *, packed: bool = False) -> Grid:
    """The sequences `rows` as one forward takes them."""
    start, lengths = sequences.cu_seqlens[rows], sequences.lengths[rows]
    if packed:
        segments = _offsets(lengths)
        position = torch.arange(int(segments[-1]), device=rows.device) - segments[:-1].repeat_interleave(lengths)
        index = (start.repeat_interleave(lengths) + position)[None]
        ids, target = sequences.ids[index], sequences.target[index]
        inputs, last = {"input_ids": ids, "position_ids": position[None]}, segments[1:] - 1
    else:
        width = int(lengths.max())
        position = torch.arange(width, device=rows.device)
        real = position < lengths[:, None]
        index = torch.where(real, start[:, None] + position, 0)
        inputs = {"input_ids": torch.where(real, sequences.ids[index], pad_id)}
        target = torch.where(real, sequences.target[index], IGNORE)
        segments = torch.arange(len(rows) + 1, device=rows.device) * width
        last = segments[:-1] + lengths - 1
    return Grid(inputs, target, segments, last, sequences.slot[index][target != IGNORE])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def with_mask(rollout: Rollout, masks: Sequence[Any]) -> Rollout:
    """The rollout with a mask for each completion: 0 where a token is not the policy's own.

    Raises: ValueError naming the row whose mask has another length than its completion.
    """
    lengths = rollout.lengths.tolist()
    if len(masks) != len(lengths):
        raise ValueError(f"response_masks must hold {len(lengths)} masks, one a response, got {len(masks)}")
    for row, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
        if len(mask) != length:
            raise ValueError(f"response_masks: row {row} has {len(mask)} entries, its response {length} tokens")
    flat = [bool(m) for mask in masks for m in mask]
    return rollout._replace(mask=torch.tensor(flat, device=rollout.ids.device))

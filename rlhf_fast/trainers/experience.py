"""Rollouts as training data: one flat NamedTuple, and the micro-batches that a model's forward takes.

A sequence is prompt + completion. What enters the model is laid out in rows, in one of three ways:

    plain    [prompt c]            one sequence a row, padded on the right: under a causal mask no real token sees the
                                   padding, so neither mask nor position ids are needed and SDPA takes its causal path
    shared   [prompt c1 c2 .. ck]  completions of one prompt in a row: each sees the prompt and itself. Positions go on
                                   from the prompt's in every one, so nothing but rounding differs from k plain rows
    packed   [prompt c, prompt c]  everything in one row, position ids that restart, no padding

The last token of the prompt predicts the first one of every completion; in a shared row each has its own copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from rlhf_fast.trainers.rollout.samplers import Rollout

IGNORE = -100


class Experience(NamedTuple):
    """B sequences of M tokens in all, N of them in completions."""

    ids: Tensor  # (M,) int64: prompt and completion of each sequence
    cu_seqlens: Tensor  # (B+1,) int64, into ids
    prompt_lengths: Tensor  # (B,) int64
    logprob: Tensor  # (N,) fp32: what the sampler recorded
    cu_completions: Tensor  # (B+1,) int64, into logprob
    advantages: Tensor  # (N,) fp32
    counted: Tensor  # (B,) bool. False: the sequence is in no normaliser, it has no usable reward
    trained: Tensor  # (N,) bool: tokens that enter the loss
    groups: Tensor  # (B,) int64: sequences of the same number, side by side, share their prompt
    extra: Mapping[str, Tensor] = {}  # (N,) each: whatever else a loss wants

    @property
    def completion_lengths(self) -> Tensor:
        """(B,) int64: tokens of each completion, whoever wrote them."""
        return self.cu_completions.diff()

    def per_sequence(self, tokens: Tensor) -> Tensor:
        """(N,) -> (B,): sums over each completion."""
        return torch.nn.functional.pad(tokens.cumsum(0), (1, 0))[self.cu_completions].diff()


class MicroBatch(NamedTuple):
    """r rows of T positions that hold b sequences: position i predicts the token `target_ids[:, i]`."""

    input_ids: Tensor  # (r, T)
    target_ids: Tensor  # (r, T): -100 where nothing is trained on
    cu_seqlens: Tensor  # (b+1,): sequences in the flattened (r T,) grid
    advantages: Tensor  # (r, T) fp32, 0 where nothing is trained on; so are the next ones
    old_logprob: Tensor  # (r, T)
    ref_logprob: Tensor | None = None  # (r, T)
    position_ids: Tensor | None = None  # (r, T); None: from 0 in every row
    attention_mask: Tensor | None = None  # (r, 1, T, T) bool, True: is seen; None: causal
    extra: Mapping[str, Tensor] = {}

    @property
    def sampler_logprob(self) -> Tensor:
        """(r, T): what the sampler recorded, also where `old_logprob` was computed anew."""
        return self.extra.get("rollout_logprob", self.old_logprob)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keywords of the model's forward."""
        given = dict(input_ids=self.input_ids, position_ids=self.position_ids, attention_mask=self.attention_mask)
        return {name: value for name, value in given.items() if value is not None}


class MiniBatch(NamedTuple):
    """One optimiser step. The counts are over every sequence of it, on all processes."""

    micros: list[MicroBatch]
    sequences: float  # including those whose gradient is zero and which are in no micro-batch
    tokens: float  # trained tokens
    live_tokens: float  # those of them in the micro-batches
    entropy_threshold: float | None = None  # tokens of lower entropy are not trained on
    selected_tokens: float | None = None  # the others; None: all


def as_plain(minibatch: MiniBatch) -> dict[str, Any]:
    """The same as dicts, lists, tensors and numbers, for a checkpoint."""
    return minibatch._asdict() | {"micros": [micro._asdict() for micro in minibatch.micros]}


def from_plain(state: Mapping[str, Any], device: torch.device) -> MiniBatch:
    """What `as_plain` was given, on a device."""
    state = send_to_device(dict(state), device)
    return MiniBatch(**state | {"micros": [MicroBatch(**micro) for micro in state["micros"]]})


def build_experience(
    prompts: Sequence[Sequence[int]],  # one a sequence, B in all
    rollout: Rollout,
    advantages: Tensor,  # (B,), or (N,); a sequence with a NaN counts nowhere
    scored: Tensor,  # (B,) bool. False: no token of the sequence is trained on
    group_size: int = 1,
    **extra: Tensor,  # (N,)
) -> Experience:
    """Prompts and completions joined, on the rollout's device."""
    device, lengths = rollout.ids.device, rollout.lengths
    completions = rollout.completions()
    if len(prompts) != len(completions):
        raise ValueError(f"prompts must hold one prompt for each of {len(completions)} completions, got {len(prompts)}")
    for name, values in dict(advantages=advantages, **extra).items():
        per_sequence = name == "advantages" and len(values) == len(lengths)
        if values.dim() != 1 or not (per_sequence or len(values) == len(rollout.ids)):
            raise ValueError(f"{name} must be (N,)=({len(rollout.ids)},), got {tuple(values.shape)}")
    ids = torch.tensor(list(chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))))
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    advantages = advantages.to(device, torch.float32)
    if len(advantages) == len(lengths):
        advantages = advantages.repeat_interleave(lengths)
    cu_completions = rollout.cu_seqlens.long()
    trained = scored.to(device).repeat_interleave(lengths)
    experience = Experience(
        ids=ids.to(device),
        cu_seqlens=torch.nn.functional.pad((prompt_lengths + lengths).cumsum(0), (1, 0)),
        prompt_lengths=prompt_lengths,
        logprob=rollout.logprob,
        cu_completions=cu_completions,
        advantages=advantages.nan_to_num(nan=0.0),
        counted=torch.ones_like(scored, device=device),
        trained=trained if rollout.mask is None else trained & rollout.mask,
        groups=torch.arange(len(lengths), device=device) // group_size,
        extra=extra,
    )
    return experience._replace(counted=experience.per_sequence(advantages.isnan().long()) == 0)


def cut_rows(
    rows: Sequence[Tensor], widths: Sequence[int], count: int, tokens: int | None, *, packed: bool = False
) -> list[list[Tensor]]:
    """Rows (sequence numbers each) in parts of at most `count` sequences, or of at most `tokens` tokens with padding.

    By tokens the widest rows come first. A row that is too large alone is a part of its own.
    """
    order = range(len(rows)) if tokens is None else sorted(range(len(rows)), key=lambda i: -widths[i])
    parts: list[list[Tensor]] = []
    size = width = 0
    for i in order:
        if tokens is None:
            full = size + len(rows[i]) > count
            size = len(rows[i]) if full else size + len(rows[i])
        else:
            width = width or widths[i]
            full = size + (widths[i] if packed else width) > tokens
            width = widths[i] if full else width
            size = (0 if full else size) + (widths[i] if packed else width)
        if full or not parts:
            parts.append([])
        parts[-1].append(rows[i])
    return parts


def collate(experience: Experience, rows: Sequence[Tensor], pad_id: int, *, packed: bool = False) -> MicroBatch:
    """One row for each entry of `rows`, the numbers of the sequences in it; `packed`: all of them in one row."""
    device, sequence = experience.ids.device, torch.cat(list(rows))
    per_row = torch.tensor([len(row) for row in rows], device=device)
    shared = bool((per_row > 1).any())
    # A sequence's piece of the grid: all of it but the last token; after the first of its row, from the end of the
    # prompt on.
    row = torch.arange(len(rows), device=device).repeat_interleave(per_row)
    first = torch.nn.functional.pad(row.diff(), (1, 0), value=1).bool()
    start, prompt = experience.cu_seqlens[sequence], experience.prompt_lengths[sequence]
    skipped = torch.where(first, 0, prompt - 1)
    sizes = experience.cu_seqlens[sequence + 1] - start - 1 - skipped
    ends = sizes.cumsum(0)
    piece = torch.arange(len(sequence), device=device).repeat_interleave(sizes)
    flat = torch.arange(len(piece), device=device)
    position = flat - (ends - sizes)[piece] + skipped[piece]
    source = start[piece] + position

    row_start = (ends - sizes)[first]
    height, width = (1, len(flat)) if packed else (len(rows), int(torch.diff(row_start, append=ends[-1:]).max()))
    shift = torch.zeros_like(row) if packed else row * width - row_start[row]  # from flat to the grid
    index = flat + shift[piece]

    def grid(values: Tensor, fill: float) -> Tensor:
        return values.new_full((height * width,), fill).index_copy(0, index, values).view(height, width)

    # token i of a sequence is completion token i - prompt; the one after position i is predicted there
    token = position + 1 - prompt[piece]
    completion = (experience.cu_completions[sequence][piece] + token).clamp(min=0)
    trained = (token >= 0) & experience.trained[completion]
    segment = torch.where(position < prompt[piece] - 1, 0, piece + 1)  # 0: the prompt
    cu_seqlens = torch.nn.functional.pad((ends - sizes) + shift, (0, 1), value=height * width)
    return MicroBatch(
        input_ids=grid(experience.ids[source], pad_id),
        target_ids=grid(torch.where(trained, experience.ids[source + 1], IGNORE), IGNORE),
        cu_seqlens=cu_seqlens,
        advantages=grid(torch.where(trained, experience.advantages[completion], 0.0), 0.0),
        old_logprob=grid(torch.where(trained, experience.logprob[completion], 0.0), 0.0),
        position_ids=grid(position, 0) if shared or packed else None,
        attention_mask=shared_mask(grid(segment, -1)) if shared else None,
        extra={k: grid(torch.where(trained, v[completion], 0), 0) for k, v in experience.extra.items()},
    )


def shared_mask(segment: Tensor) -> Tensor:
    """(r, T) -> (r, 1, T, T) bool: each position sees what is before it in its own segment and in segment 0."""
    seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    return seen.tril_()[:, None]

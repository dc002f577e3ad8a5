"""Rollouts as training data: one flat NamedTuple, and the padded micro-batches that a model's forward takes.

A sequence is prompt + completion. Micro-batches are padded on the right: under a causal mask no real token sees the
padding, so neither an attention mask nor position ids are needed and SDPA takes its causal path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.trainers.rollout import Rollout

IGNORE = -100


class Experience(NamedTuple):
    """B sequences of M tokens in all, N of them sampled."""

    ids: Tensor  # (M,) int64: prompt and completion of each sequence
    cu_seqlens: Tensor  # (B+1,) int64, into ids
    prompt_lengths: Tensor  # (B,) int64
    logprob: Tensor  # (N,) fp32: what the sampler recorded
    cu_completions: Tensor  # (B+1,) int64, into logprob
    advantages: Tensor  # (B,) fp32
    scored: Tensor  # (B,) bool. False: no token of the sequence counts

    @property
    def completion_lengths(self) -> Tensor:
        return self.cu_completions.diff()


class MicroBatch(NamedTuple):
    """b sequences side by side, T = longest - 1 positions: position i predicts token i + 1."""

    input_ids: Tensor  # (b, T)
    target_ids: Tensor  # (b, T): -100 where position i predicts no sampled token
    cu_seqlens: Tensor  # (b+1,): rows of the flattened (b T,) grid
    advantages: Tensor  # (b,)
    old_logprob: Tensor  # (b, T) fp32, 0 where not scored
    ref_logprob: Tensor | None = None  # (b, T)


class MiniBatch(NamedTuple):
    """One optimiser step. The counts are over every sequence of it, on all processes."""

    micros: list[MicroBatch]
    sequences: float  # including those whose gradient is zero and which are in no micro-batch
    tokens: float  # sampled tokens of scored sequences
    live_tokens: float  # those of them in the micro-batches


def build_experience(
    prompts: Sequence[Sequence[int]],  # one a sequence, B in all
    rollout: Rollout,
    advantages: Tensor,
    scored: Tensor,
) -> Experience:
    """Prompts and completions joined, on the rollout's device."""
    device = rollout.ids.device
    completions = rollout.completions()
    if len(prompts) != len(completions):
        raise ValueError(f"prompts must hold one prompt for each of {len(completions)} completions, got {len(prompts)}")
    ids = torch.tensor(list(chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))))
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    cu_seqlens = torch.nn.functional.pad((prompt_lengths + rollout.lengths).cumsum(0), (1, 0))
    return Experience(
        ids.to(device),
        cu_seqlens,
        prompt_lengths,
        rollout.logprob,
        rollout.cu_seqlens.long(),
        advantages.to(device, torch.float32),
        scored.to(device),
    )


def cut_rows(rows: Tensor, lengths: Tensor, count: int, tokens: int | None) -> list[Tensor]:
    """`rows` in parts of at most `count`, or of at most `tokens` padded tokens, the longest sequences first."""
    if tokens is None:
        return list(rows.split(count))
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    widths, parts, start = lengths[rows].tolist(), [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - start) * widths[start] > tokens:
            parts.append(rows[start:end])
            start = end
    return parts


def collate(experience: Experience, rows: Tensor, pad_id: int) -> MicroBatch:
    """The sequences `rows`, padded on the right."""
    starts, ends = experience.cu_seqlens[rows], experience.cu_seqlens[rows + 1]
    lengths, prompt_lengths = ends - starts, experience.prompt_lengths[rows]
    width = int(lengths.max())
    position = torch.arange(width, device=rows.device)
    index = (starts[:, None] + position).clamp(max=len(experience.ids) - 1)
    ids = torch.where(position < lengths[:, None], experience.ids[index], pad_id)
    sampled = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    sampled &= experience.scored[rows][:, None]
    # token i of the sequence is completion token i - prompt_length
    index = (experience.cu_completions[rows] - prompt_lengths)[:, None] + position
    logprob = torch.where(sampled, experience.logprob[index.clamp(0, len(experience.logprob) - 1)], 0.0)
    return MicroBatch(
        input_ids=ids[:, :-1],
        target_ids=torch.where(sampled, ids, IGNORE)[:, 1:],
        cu_seqlens=torch.arange(len(rows) + 1, device=rows.device) * (width - 1),
        advantages=experience.advantages[rows],
        old_logprob=logprob[:, 1:],
    )

"""Preference data to token ids: pairs (chosen, rejected) with one prompt, and single answers marked good or bad (KTO).

The prompt is tokenised once and stands before both answers, so both see the same prompt tokens whatever is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlhf_fast.trainers.data import forms
from rlhf_fast.trainers.data.encoder import Encoder, check_policy, fit, fit_prompt, overlong
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import BATCH, DataStats, TokenDataset, flatten

Tokens = tuple[np.ndarray, np.ndarray]  # ids and scored, (T,) each


@dataclass
class PairDataset(torch.utils.data.Dataset):
    """Pairs in flat storage; the prompt's tokens are kept with both answers."""

    chosen: TokenDataset
    rejected: TokenDataset
    margin: np.ndarray | None = None  # (R,) float64; rows without one have 0 where others have one
    stats: DataStats = field(default_factory=DataStats)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict[str, Any]:
        margin = None if self.margin is None else float(self.margin[i])
        return {"chosen": self.chosen[i], "rejected": self.rejected[i], "margin": margin}

    @property
    def parts(self) -> tuple[TokenDataset, TokenDataset]:
        """For what looks at all tokens, such as `check_vocabulary`."""
        return self.chosen, self.rejected

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens of both answers with their prompts."""
        return self.chosen.lengths + self.rejected.lengths

    def select(self, indices: Sequence[int]) -> PairDataset:
        """The pairs of `indices`, in that order."""
        sides = self.chosen.select(indices), self.rejected.select(indices)
        margin = None if self.margin is None else self.margin[np.asarray(indices, dtype=np.int64)]
        return PairDataset(*sides, margin, pair_stats(*sides, DataStats(rows=len(indices))))


@dataclass
class KTODataset(TokenDataset):
    """A `TokenDataset` whose rows carry "label": True for a good answer."""

    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # (R,)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "label": bool(self.labels[i])}

    def select(self, indices: Sequence[int]) -> KTODataset:
        return _with_labels(super().select(indices), self.labels[np.asarray(indices, dtype=np.int64)])


def tokenize_pairs(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    overlong_prompt: str = "drop",
    ending_ids: Collection[int] = (),
    progress: Callable[[Iterable], Iterable] = iter,
) -> PairDataset:
    """Turn rows into pairs of examples of at most `max_length` tokens each; both end with EOS, answers are scored.

    Args:
        rows: of the forms in `forms.pair`, with an optional number "margin".
        overlong_prompt: as in `tokenize_sft`; the longer answer decides what room the prompt may take.
        ending_ids: for a reward model: a conversation ends at the first of these tokens in its last turn, as a sampled
            completion does. Default: what the template writes behind it stays, as TRL has it.
    Raises: ValueError naming file and line on rows of an unknown form; when no row is left.
    """
    check_policy(overlong_prompt)
    encode = Encoder(tokenizer)
    stats = DataStats(rows=len(rows))
    sides: tuple[list[Tokens], list[Tokens]] = ([], [])
    origin: list[int] = []
    margins: list[float | None] = []
    for start in progress(range(0, len(rows), BATCH)):
        batch = range(start, min(start + BATCH, len(rows)))
        pairs = [forms.pair(rows[i], rows.where(i), tokenizer) for i in batch]
        prompts = encode.many([p.prompt for p in pairs])
        whole = encode.many([p.prompt + side for p in pairs for side in (p.chosen, p.rejected)], ending_ids=ending_ids)
        for i, pair, prompt, *rows_of in zip(batch, pairs, prompts, whole[::2], whole[1::2], strict=True):
            both = [tuple(part[len(prompt[0]) :] for part in side) for side in rows_of]
            longest = max(len(ids) for ids, _ in both)
            keep = fit_prompt(prompt[0], longest, max_length, overlong_prompt, encode.prefix)
            if keep is None:
                if overlong_prompt == "error":
                    raise overlong(rows, i, len(prompt[0]), max_length)
                stats.dropped_overlong_prompt += 1
                continue
            stats.truncated_prompts += len(keep) < len(prompt[0])
            stats.truncated_completions += sum(len(keep) + len(ids) > max_length for ids, _ in both)
            joined = [
                tuple(np.concatenate([p[keep], a])[:max_length] for p, a in zip(prompt, s, strict=True)) for s in both
            ]
            if not all(scored[1:].any() for _, scored in joined):
                stats.dropped_nothing_scored += 1
                continue
            stats.identical_pairs += np.array_equal(joined[0][0], joined[1][0])
            for side, tokens in zip(sides, joined, strict=True):
                side.append(tokens)
            origin.append(i)
            margins.append(pair.margin)
    if not origin:
        raise ValueError(f"no pair is left to train on: {stats}")
    chosen, rejected = (flatten(side, origin, DataStats()) for side in sides)
    margin = np.array([m or 0.0 for m in margins]) if any(m is not None for m in margins) else None
    return PairDataset(chosen, rejected, margin, pair_stats(chosen, rejected, stats))


def tokenize_kto(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    overlong_prompt: str = "drop",
    progress: Callable[[Iterable], Iterable] = iter,
) -> KTODataset:
    """Turn rows into labelled examples of at most `max_length` tokens; a pair becomes a good and a bad one.

    Args and errors as in `tokenize_pairs`; forms in `forms.judged`.
    """
    check_policy(overlong_prompt)
    encode = Encoder(tokenizer)
    stats = DataStats(rows=len(rows))
    examples: list[Tokens] = []
    origin: list[int] = []
    labels: list[bool] = []
    for start in progress(range(0, len(rows), BATCH)):
        batch = range(start, min(start + BATCH, len(rows)))
        judged = [(i, *answer) for i in batch for answer in forms.judged(rows[i], rows.where(i), tokenizer)]
        encoded = encode.many([segments for _, segments, _ in judged])
        for (i, _, label), (ids, scored) in zip(judged, encoded, strict=True):
            kept = fit(ids, scored, max_length, overlong_prompt, encode.prefix, stats)
            if kept is None:
                if overlong_prompt == "error":
                    raise overlong(rows, i, int(np.argmax(scored)), max_length)
                stats.dropped_overlong_prompt += 1
            elif not kept[1][1:].any():
                stats.dropped_nothing_scored += 1
            else:
                examples.append(kept)
                origin.append(i)
                labels.append(label)
    if not examples:
        raise ValueError(f"no row is left to train on: {stats}")
    return _with_labels(flatten(examples, origin, stats), np.array(labels))


def pair_stats(chosen: TokenDataset, rejected: TokenDataset, stats: DataStats) -> DataStats:
    """Fill in the counts of tokens; "longest" is one answer with its prompt."""
    both = chosen.stats, rejected.stats
    stats.kept = len(chosen)
    stats.tokens = sum(s.tokens for s in both)
    stats.scored_tokens = sum(s.scored_tokens for s in both)
    stats.longest = max(s.longest for s in both)
    return stats


def _with_labels(data: TokenDataset, labels: np.ndarray) -> KTODataset:
    stats = data.stats
    stats.desirable, stats.undesirable = int(labels.sum()), int((~labels).sum())
    return KTODataset(data.ids, data.scored, data.offsets, data.origin, stats, labels)

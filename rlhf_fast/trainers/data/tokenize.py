"""Rows to token ids: supervised examples with a per-token "scored" flag, and prompts for reinforcement learning.

What a row means is told by `forms`, how it is tokenised and cut by `encoder`. Everything downstream goes by lengths,
never by comparing ids with the padding id.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_fast.trainers.data import forms
from rlhf_fast.trainers.data.collators import Collator as Collator
from rlhf_fast.trainers.data.collators import first_scored
from rlhf_fast.trainers.data.encoder import Encoder, check_policy, fit, overlong
from rlhf_fast.trainers.data.readers import Rows

_COUNTS = (
    "truncated_prompts",
    "truncated_completions",
    "last_turn_only",
    "identical_pairs",
    "desirable",
    "undesirable",
)
BATCH = 4096  # texts handed to the tokenizer at once


@dataclass
class DataStats:
    """Counts of what became of the rows; printed and kept in `summary.json`."""

    rows: int = 0
    kept: int = 0
    dropped_overlong_prompt: int = 0
    dropped_nothing_scored: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    last_turn_only: int = 0  # conversations whose template rewrites earlier turns, which are not scored
    identical_pairs: int = 0  # chosen and rejected are the same tokens, perhaps after the cut: nothing to learn
    desirable: int = 0  # KTO
    undesirable: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.rows:,} rows", f"{self.tokens:,} tokens"]
        parts += [f"{self.scored_tokens:,} scored"] if self.scored_tokens else []
        parts += [f"longest {self.longest:,}"]
        for name in ("dropped_overlong_prompt", "dropped_nothing_scored"):
            count = getattr(self, name)
            parts += [f"{count:,} dropped ({name.removeprefix('dropped_').replace('_', ' ')})"] if count else []
        for name in _COUNTS:
            count = getattr(self, name)
            parts += [f"{count:,} {name.replace('_', ' ')}"] if count else []
        return ", ".join(parts)


@dataclass
class TokenDataset(torch.utils.data.Dataset):
    """Examples in flat storage: 5 bytes a token, any number of rows."""

    ids: np.ndarray  # (N,) int32
    scored: np.ndarray  # (N,) bool: the loss counts the prediction of this token
    offsets: np.ndarray  # (R + 1,) int64
    origin: np.ndarray  # (R,) int64: the index of the row that it came from
    stats: DataStats = field(default_factory=DataStats)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = slice(self.offsets[i % len(self)], self.offsets[i % len(self) + 1])
        return {"input_ids": self.ids[row], "scored": self.scored[row]}

    @property
    def parts(self) -> tuple[TokenDataset, ...]:
        """For what looks at all tokens, such as `check_vocabulary`."""
        return (self,)

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens of each row."""
        return np.diff(self.offsets)

    def select(self, indices: Sequence[int]) -> TokenDataset:
        """The rows of `indices`, in that order."""
        rows = [TokenDataset.__getitem__(self, int(i)) for i in indices]
        pairs = [(r["input_ids"], r["scored"]) for r in rows]
        return flatten(pairs, [int(self.origin[int(i)]) for i in indices], DataStats(rows=len(rows)))


class Prompt(NamedTuple):
    """A prompt for sampling, and everything else that its row holds, for the reward functions."""

    ids: list[int]
    text: str
    columns: dict[str, Any]
    where: str  # file and line, for messages


def tokenize_sft(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    overlong_prompt: str = "drop",
    train_on_prompt: bool = False,
    mask_history: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> TokenDataset:
    """Turn rows into examples of at most `max_length` tokens.

    Args:
        overlong_prompt: what happens when the prompt leaves no room for a completion: "drop" the row, "truncate"
            (keep the prompt's end; the completion gets what it needs up to half of the room), or "error".
            A completion that is too long is cut, and then ends without EOS.
        train_on_prompt: score every token.
        mask_history: score the last assistant turn only.
    Raises: ValueError naming file and line on rows of an unknown form; when no row is left.
    """
    check_policy(overlong_prompt)
    encode = Encoder(tokenizer)
    stats = DataStats(rows=len(rows))
    examples: list[tuple[np.ndarray, np.ndarray]] = []
    origin: list[int] = []
    for start in progress(range(0, len(rows), BATCH)):
        batch = range(start, min(start + BATCH, len(rows)))
        read = [forms.supervised(rows[i], rows.where(i), tokenizer, mask_history=mask_history) for i in batch]
        stats.last_turn_only += sum(example.last_only for example in read)
        encoded = encode.many([example.segments for example in read])
        for i, (ids, scored) in zip(batch, encoded, strict=True):
            cut = fit(ids, scored, max_length, overlong_prompt, encode.prefix, stats)
            if cut is None:
                if overlong_prompt == "error":
                    raise overlong(rows, i, first_scored(scored), max_length)
                stats.dropped_overlong_prompt += 1
                continue
            ids, scored = cut
            if train_on_prompt:
                scored = np.ones_like(scored)
            if not scored[1:].any():  # the first token has nothing before it to be predicted from
                stats.dropped_nothing_scored += 1
                continue
            examples.append((ids, scored))
            origin.append(i)
    if not examples:
        raise ValueError(f"no row is left to train on: {stats}")
    if stats.last_turn_only:
        warnings.warn(
            f"{stats.last_turn_only:,} conversations are scored in their last turn only: the chat template rewrites "
            "earlier ones and does not mark assistant text with {% generation %}",
            stacklevel=2,
        )
    return flatten(examples, origin, stats)


def tokenize_prompts(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    overlong_prompt: str = "drop",
) -> tuple[list[Prompt], DataStats]:
    """Prompts for PPO and GRPO: the `prompt`, `messages`, `instruction` or `text` of each row.

    A trailing assistant turn of `messages` is not part of the prompt. Other columns, the answers among them, are
    kept in `Prompt.columns` as they are. "truncate" keeps the end of a prompt longer than `max_length`.
    """
    check_policy(overlong_prompt)
    encode = Encoder(tokenizer)
    stats = DataStats(rows=len(rows))
    prompts: list[Prompt] = []
    for start in range(0, len(rows), BATCH):
        batch = range(start, min(start + BATCH, len(rows)))
        read = [rows[i] for i in batch]
        segments = [forms.prompt(row, rows.where(i), tokenizer) for i, row in zip(batch, read, strict=True)]
        encoded = encode.many([[segment] for segment in segments])
        for i, row, segment, (array_ids, _) in zip(batch, read, segments, encoded, strict=True):
            ids = array_ids.tolist()
            if len(ids) > max_length:
                if overlong_prompt == "error":
                    raise ValueError(f"{rows.where(i)}: the prompt has {len(ids)} tokens, more than {max_length}")
                if overlong_prompt == "drop":
                    stats.dropped_overlong_prompt += 1
                    continue
                stats.truncated_prompts += 1
                prefix = encode.prefix if ids[: len(encode.prefix)] == encode.prefix else []
                ids = prefix + ids[len(ids) - (max_length - len(prefix)) :]
            if not ids:
                raise ValueError(f"{rows.where(i)}: the prompt is empty")
            prompts.append(Prompt(ids, segment.text, row, rows.where(i)))
            stats.tokens += len(ids)
            stats.longest = max(stats.longest, len(ids))
    stats.kept = len(prompts)
    if not prompts:
        raise ValueError(f"no prompt is left: {stats}")
    return prompts, stats


def check_vocabulary(dataset: Any, vocab_size: int, rows: Rows, tokenizer: Any = None) -> None:
    """Raise ValueError naming row, id and token when an id does not fit the model's embedding.

    `dataset`: a TokenDataset, PairDataset or KTODataset.
    """
    for part in dataset.parts:
        bad = np.flatnonzero((part.ids >= vocab_size) | (part.ids < 0))
        if bad.size:
            at = int(bad[0])
            row = int(part.origin[int(np.searchsorted(part.offsets, at, side="right")) - 1])
            raise ValueError(_vocabulary_error(rows, row, int(part.ids[at]), vocab_size, tokenizer))


def check_prompt_vocabulary(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """The same for prompts."""
    for prompt in prompts:
        bad = next((i for i in prompt.ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise ValueError(f"{prompt.where}: token id {bad} is outside the model's vocabulary 0..{vocab_size - 1}")


def flatten(examples: list[tuple[np.ndarray, np.ndarray]], origin: list[int], stats: DataStats) -> TokenDataset:
    """Examples to one `TokenDataset`; fills in the counts of rows and tokens."""
    lengths = np.fromiter((len(ids) for ids, _ in examples), dtype=np.int64, count=len(examples))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([ids for ids, _ in examples])
    scored = np.concatenate([s for _, s in examples])
    first = scored[offsets[:-1]].sum()  # a row's first token is never predicted
    stats.kept, stats.tokens = len(examples), len(ids)
    stats.scored_tokens, stats.longest = int(scored.sum() - first), int(lengths.max())
    return TokenDataset(ids, scored, offsets, np.array(origin, dtype=np.int64), stats)


def _vocabulary_error(rows: Rows, i: int, token_id: int, vocab_size: int, tokenizer: Any) -> str:
    token = f" ({tokenizer.convert_ids_to_tokens(token_id)!r})" if tokenizer is not None else ""
    return (
        f"{rows.where(i)}: token id {token_id}{token} is outside the model's vocabulary 0..{vocab_size - 1}; "
        "do tokenizer and model belong together?"
    )

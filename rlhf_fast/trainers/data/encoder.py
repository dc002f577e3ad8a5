"""Segments to token ids, and ids to a length.

Segments are tokenised apart, so no merge crosses from prompt to completion, and one leading BOS at most is added
where the tokenizer would add it. A completion ends with EOS, which is scored.

A tokenizer that puts a space before every text (SentencePiece's, as Llama 2's) would put one before every segment:
there a row is tokenised whole and cut where its segments meet or, where a token lies across, each behind a line break.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from rlhf_fast.trainers.data.chat import Segment
from rlhf_fast.trainers.data.collators import first_scored
from rlhf_fast.trainers.data.readers import Rows


class Encoder:
    """Tokenises segments apart and joins them: BOS at most once, EOS at the end of what is scored."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise ValueError("the tokenizer has no EOS token: a completion could not learn to end")
        bos = tokenizer.bos_token_id
        self.prefix = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        self.whole = _adds_space(tokenizer)

    def many(
        self, rows: list[list[Segment]], *, bos: bool = True, ending_ids: Collection[int] = ()
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, scored) of each row of segments; a trailing scored segment gets EOS unless it has one.

        Args:
            bos: False for rows that continue another one.
            ending_ids: a trailing scored segment of a template ends at the first of these tokens, if it has one.
        """
        out = []
        texts = [[segment.text for segment in row] for row in rows]
        for row, pieces in zip(rows, self._pieces(texts, continued=not bos), strict=True):
            ids: list[int] = []
            scored: list[bool] = []
            ended = False
            for k, (segment, piece) in enumerate(zip(row, pieces, strict=True)):
                if ending_ids and k == len(row) - 1 and segment.template and segment.scored:
                    end = next((i for i, token in enumerate(piece, 1) if token in ending_ids), None)
                    piece, ended = piece[:end], end is not None
                keep = [segment.scored] * len(piece)
                if segment.template and segment.scored and self.eos in piece:
                    after = piece[::-1].index(self.eos)  # what the template puts after EOS is not the model's
                    keep[len(piece) - after :] = [False] * after
                ids += piece
                scored += keep
            if row[-1].scored and not ended and not _ends_with(ids, scored, self.eos):
                ids.append(self.eos)
                scored.append(True)
            if bos and self.prefix and ids[:1] != self.prefix and not row[0].template:
                ids, scored = self.prefix + ids, [False, *scored]
            out.append((np.array(ids, dtype=np.int32), np.array(scored, dtype=bool)))
        return out

    def _pieces(self, rows: list[list[str]], *, continued: bool) -> list[list[list[int]]]:
        """The ids of each text of each row; `continued`: the rows continue others."""
        if not self.whole:
            texts = list(dict.fromkeys(text for row in rows for text in row))
            ids = dict(zip(texts, self._tokenize(texts)["input_ids"], strict=True))
            return [[ids[text] for text in row] for row in rows]
        if continued:
            return [self._behind_a_line(["", *row])[1:] for row in rows]
        encoded = self._tokenize(["".join(row) for row in rows], return_offsets_mapping=True)
        cut = map(_cut, encoded["input_ids"], encoded["offset_mapping"], rows)
        return [pieces or self._behind_a_line(row) for pieces, row in zip(cut, rows, strict=True)]

    def _behind_a_line(self, row: list[str]) -> list[list[int]]:
        """The ids of each text apart, without a space of the tokenizer's before any but the first."""
        encoded = self._tokenize(["\n" + text for text in row], return_offsets_mapping=True)
        apart = self._tokenize(row)["input_ids"]
        cut = map(_cut, encoded["input_ids"], encoded["offset_mapping"], (["\n", text] for text in row))
        behind = [pieces[1] if pieces else ids for pieces, ids in zip(cut, apart, strict=True)]
        return apart[:1] + behind[1:]

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        options |= dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
        try:
            return self.tokenizer(texts, **options)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                if isinstance(text, str) and not _is_text(text):
                    raise ValueError(f"not Unicode text: half of a surrogate pair in {text!r:.80}") from None
            raise


def _adds_space(tokenizer: Any) -> bool:
    """Whether a fast tokenizer puts a space (as "▁") before a text; of others nothing is known."""
    if not tokenizer.is_fast:
        return False
    core, text = tokenizer.backend_tokenizer, "a"
    if core.normalizer is not None:
        text = core.normalizer.normalize_str(text)
    if core.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text))
    return len(text) > 1


def _cut(ids: list[int], spans: list[tuple[int, int]], texts: list[str]) -> list[list[int]] | None:
    """The ids of each of the texts, of those of all together; None where a token lies across two of them."""
    ends = np.cumsum([len(text) for text in texts]).tolist()
    out: list[list[int]] = [[] for _ in texts]
    k = done = 0
    for token, (start, end) in zip(ids, spans, strict=True):
        while k < len(texts) - 1 and start >= ends[k]:
            if done < ends[k]:  # a space that belongs to the next token, and is in no span
                return None
            k += 1
        if end > ends[k]:
            return None
        out[k].append(token)
        done = end
    return out


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fit(
    ids: np.ndarray, scored: np.ndarray, max_length: int, policy: str, prefix: list[int], stats: Any
) -> tuple[np.ndarray, np.ndarray] | None:
    """The example cut to `max_length`; None when its prompt is too long and may not be cut."""
    if len(ids) <= max_length:
        return ids, scored
    prompt = first_scored(scored)
    keep = fit_prompt(ids[:prompt], len(ids) - prompt, max_length, policy, prefix)
    if keep is None:
        return None
    stats.truncated_prompts += len(keep) < prompt
    keep = np.concatenate([keep, np.arange(prompt, len(ids))])
    stats.truncated_completions += len(keep) > max_length
    return ids[keep[:max_length]], scored[keep[:max_length]]


def fit_prompt(
    prompt: np.ndarray, completion: int, max_length: int, policy: str, prefix: list[int]
) -> np.ndarray | None:
    """Indices of the prompt's tokens that stay beside a completion of so many tokens; None: drop the row.

    A prompt that leaves any room stays whole. One that is cut keeps BOS and its end, in the room that the completion
    leaves, or in half of `max_length` if that is more.
    """
    if len(prompt) < max_length or len(prompt) + completion <= max_length:
        return np.arange(len(prompt))
    if policy != "truncate":
        return None
    room = max(max_length - completion, max_length // 2)
    head = len(prefix) if prompt[: len(prefix)].tolist() == prefix else 0
    return np.concatenate([np.arange(head), np.arange(len(prompt) - (room - head), len(prompt))])


def overlong(rows: Rows, i: int, prompt: int, max_length: int) -> ValueError:
    """The error for a prompt of so many tokens that leaves no room for a completion."""
    return ValueError(
        f"{rows.where(i)}: the prompt of {prompt} tokens leaves no room for a completion in cutoff_len={max_length}"
    )


def check_policy(overlong_prompt: str) -> None:
    if overlong_prompt not in ("drop", "truncate", "error"):
        raise ValueError(f"overlong_prompt must be drop, truncate or error, got {overlong_prompt!r}")


def _ends_with(ids: list[int], scored: list[bool], eos: int) -> bool:
    """Whether the last scored token is EOS."""
    last = next((k for k in range(len(ids) - 1, -1, -1) if scored[k]), None)
    return last is not None and ids[last] == eos

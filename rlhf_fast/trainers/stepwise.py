"""Queries and responses of the step-wise calls (`generate`, `step`) as what the trainers work with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from rlhf_fast.trainers.data.chat import Segment
from rlhf_fast.trainers.data.encoder import Encoder
from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.rollout.samplers import Rollout, SamplerSettings


def as_queries(queries: Sequence[str | Sequence[int]], tokenizer: Any) -> list[Prompt]:
    """`Prompt`s of texts, encoded as a dataset's are (one BOS at most, no EOS), or of token ids."""
    prompts, encoder = [], Encoder(tokenizer)
    for i, query in enumerate(queries):
        text = query if isinstance(query, str) else tokenizer.decode(query)
        ids = _encoded(encoder, query) if isinstance(query, str) else [int(t) for t in query]
        if not ids:
            raise ValueError(f"queries must be texts or token ids, row {i} is empty")
        prompts.append(Prompt(ids, text, {}, f"query {i}"))
    return prompts


def as_rollout(responses: Sequence[str | Sequence[int]], tokenizer: Any, settings: SamplerSettings) -> Rollout:
    """A `Rollout` of completions from elsewhere: texts end with EOS, which is added where one
    has none, and nobody recorded log-probabilities (NaN)."""
    encoder, stops = Encoder(tokenizer), {tokenizer.eos_token_id, *settings.eos_token_ids}
    rows = [_encoded(encoder, r, bos=False) if isinstance(r, str) else [int(t) for t in r] for r in responses]
    rows = [
        [*ids, encoder.eos] if isinstance(r, str) and not stops.intersection(ids[-1:]) else ids
        for r, ids in zip(responses, rows, strict=True)
    ]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"responses must be texts or token ids, row {i} is empty")
    ids = torch.tensor(list(chain.from_iterable(rows)))
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    finish = ["stop" if row[-1] in settings.eos_token_ids else "length" for row in rows]
    return Rollout(ids, torch.full((len(ids),), torch.nan), ends, finish, settings)


def _encoded(encoder: Encoder, text: str, *, bos: bool = True) -> list[int]:
    [(ids, _)] = encoder.many([[Segment(text, False)]], bos=bos)
    return ids.tolist()

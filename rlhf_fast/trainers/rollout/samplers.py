"""Sampling completions: one small protocol, and the samplers that follow it.

A sampler is called with token-id prompts and a group size and returns a `Rollout`: flat ids and log-probabilities
with `cu_seqlens`, prompt-major (the G completions of prompt 0 first). `GroupSampler` prefills each prompt once for
its whole group and runs its own decode loop. The others: `generate` (`model.generate`), `continuous`
(transformers' continuous batching), `server` (a completions server over HTTP); `turns` makes
conversations with tools out of any of them.

Departures from the textbook loop:
- finished rows leave the batch once they are the majority (`compact_below`), so a straggler decodes alone;
- keys and values are written into room reserved once, instead of being concatenated at every token;
- log-probabilities are recorded in fp32 at the sampling temperature, over the whole vocabulary: top-k and top-p
  restrict what is drawn, not what is recorded, which biases importance ratios (a warning says so).
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_fast.trainers.rollout.cache import cache_keyword, expand_cache, holds_keys
from rlhf_fast.trainers.rollout.probe import Abilities, abilities


@dataclass(frozen=True)
class SamplerSettings:
    """How tokens are drawn. `top_k=0` and `top_p=1.0` mean unrestricted; `greedy` takes the likeliest token."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature} (use greedy=True for argmax)")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.restricted and not self.greedy:
            warnings.warn(
                f"top_k={self.top_k}, top_p={self.top_p}: tokens are drawn from a restricted distribution but "
                "log-probabilities are of the full one, so importance ratios are biased",
                stacklevel=3,
            )

    @property
    def restricted(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    @property
    def exact(self) -> bool:
        """True when the recorded log-probabilities are those of the distribution that was drawn from."""
        return not self.restricted and not self.greedy


class Rollout(NamedTuple):
    """What a sampler returns. B = prompts x group size, prompt-major."""

    ids: Tensor  # (N,) int64: completion tokens, EOS included, no padding
    logprob: Tensor  # (N,) fp32, at the sampling temperature
    cu_seqlens: Tensor  # (B+1,) int32
    finish: list[str]  # (B) "stop": ended with EOS; "length": cut
    settings: SamplerSettings
    mask: Tensor | None = None  # (N,) bool, True: sampled by the policy. None: all are; False: a tool's or a user's

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens of each completion, whoever wrote them."""
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()

    @property
    def sampled_lengths(self) -> Tensor:
        """(B,) int64: tokens of each completion that the policy sampled."""
        if self.mask is None:
            return self.lengths
        ends = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
        return ends[self.cu_seqlens[1:].long()] - ends[self.cu_seqlens[:-1].long()]

    def completions(self) -> list[list[int]]:
        """The token ids as Python lists, one per sequence."""
        flat, ends = self.ids.tolist(), self.cu_seqlens.tolist()
        return [flat[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


class Sampler(Protocol):
    settings: SamplerSettings

    def __call__(self, prompts: Sequence[Sequence[int]], group_size: int = 1) -> Rollout: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() for every module inside the block; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def prompts_at_once(batch_size: int | None, prompts: int, group_size: int) -> int:
    """Prompts whose groups fit in a batch; at least one."""
    if prompts == 0:
        raise ValueError("prompts must hold at least one prompt, got none")
    return prompts if batch_size is None else max(1, batch_size // group_size)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and lengths (B,), prompts flush right."""
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts must be non-empty lists of token ids, row {row} is empty")
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], dtype=torch.long)
    return ids.to(device), torch.tensor([len(p) for p in prompts], device=device)


def by_length(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[int]]:
    """`rows` in parts whose prompts have one length."""
    parts: dict[int, list[int]] = {}
    for row in rows:
        parts.setdefault(len(prompts[row]), []).append(row)
    return list(parts.values())


def flat_rollout(ids: Tensor, logprob: Tensor, lengths: Tensor, stopped: Tensor, settings: SamplerSettings) -> Rollout:
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=ids.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    finish = ["stop" if s else "length" for s in stopped.tolist()]
    return Rollout(ids[mask], logprob[mask], cu_seqlens, finish, settings)


class GroupSampler:
    """Prefills each prompt once, expands its cache to the group and decodes token by token.

    Args:
        model: a causal LM of transformers (also under PEFT). Its weights are read, its mode is restored.
        settings: `SamplerSettings`.
        seed: seeds the sampler's own generator, saved by `state_dict`.
        batch_size: sequences decoded at once; None decodes all. Bounds the cache's memory.
        compact_below: finished rows are dropped when the unfinished fraction falls under this. 0 never drops.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SamplerSettings,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        compact_below: float = 0.5,
    ):
        self.model, self.settings = model, settings
        self.batch_size, self.compact_below = batch_size, compact_below
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = inspect.signature(type(base).forward).parameters
        self._takes_positions = "position_ids" in names
        self._prefill_args = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._config, self._cache_keyword, self._able = base.config, cache_keyword(base), None
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._eos = torch.tensor(settings.eos_token_ids, device=self.device)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])

    def __call__(self, prompts: Sequence[Sequence[int]], group_size: int = 1) -> Rollout:
        at_once = prompts_at_once(self.batch_size, len(prompts), group_size)
        with evaluating(self.model), torch.no_grad():
            self._able = self._able or self._look()
            batches = [range(i, min(i + at_once, len(prompts))) for i in range(0, len(prompts), at_once)]
            if not self._able.pads:
                batches = [rows for batch in batches for rows in by_length(prompts, batch)]
            parts = [self._sample([prompts[row] for row in rows], group_size) for rows in batches]
        place = torch.tensor([row for rows in batches for row in rows], device=self.device).argsort()
        place = (place[:, None] * group_size + torch.arange(group_size, device=self.device)).flatten()
        return flat_rollout(*(torch.cat(tensors)[place] for tensors in zip(*parts, strict=True)), self.settings)

    def _look(self) -> Abilities:
        """What the cache is good for; a warning says what the sampler does without."""

        def prefill(prompts: Sequence[Sequence[int]], masked: bool) -> tuple[DynamicCache, tuple]:
            cache, _, mask, lengths = self._prefill(prompts, 1, masked=masked)
            return cache, (mask, lengths)

        def decode(cache: DynamicCache, rest: tuple, rows: Tensor, token: int) -> Tensor:
            mask, position = (None if x is None else x[rows.to(x.device)] for x in rest)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            return self._forward(torch.full_like(position[:, None], token), mask, position[:, None], cache)

        able, name = abilities(prefill, decode, self._config, self.settings.pad_token_id), type(self.model).__name__
        if not able.pads:
            warnings.warn(f"{name} reads padding: only prompts of one length are sampled together", stacklevel=3)
        if not able.moves:
            warnings.warn(
                f"{name}'s cache cannot be repeated for a group: each prompt is prefilled for every completion, and "
                "finished ones stay in the batch",
                stacklevel=3,
            )
        return able

    def _prefill(self, prompts: Sequence[Sequence[int]], group_size: int, *, masked: bool = True):
        """The group's cache, its next-token logits (B, V), the padding mask (or None) and prompt lengths (B,)."""
        ids, lengths = pad_left(prompts, self.settings.pad_token_id, self.device)
        shared = group_size > 1 and self._able.moves
        if not shared:
            ids, lengths = ids.repeat_interleave(group_size, 0), lengths.repeat_interleave(group_size, 0)
        mask = None
        if masked and int(lengths.min()) < ids.shape[1]:
            mask = torch.arange(ids.shape[1], device=self.device) >= ids.shape[1] - lengths[:, None]
        positions = (torch.arange(ids.shape[1], device=self.device) - (ids.shape[1] - lengths[:, None])).clamp_(min=0)
        cache = DynamicCache(config=self._config)
        logits = self._forward(ids, mask, positions, cache, **self._prefill_args)
        repeats, room = (group_size if shared else 1), self.settings.max_new_tokens
        expand_cache(cache, torch.arange(len(ids), device=self.device), repeats, room)
        if shared:
            logits, lengths = logits.repeat_interleave(repeats, 0), lengths.repeat_interleave(repeats, 0)
            mask = None if mask is None else mask.repeat_interleave(repeats, 0)
        mask = mask if holds_keys(cache) else None  # state-space models would mask the new tokens by the old ones
        return cache, logits, mask, lengths

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache, **kwargs) -> Tensor:
        kwargs[self._cache_keyword] = cache
        if self._takes_positions:
            kwargs["position_ids"] = positions
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs)
        return out.logits[:, -1]

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) and their log-probabilities (B,): argmax of log p - log E, E ~ Exp(1), is a draw from p."""
        settings = self.settings
        logprobs = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
        if settings.greedy:
            token = logprobs.argmax(-1)
        else:
            drawn_from = restrict(logprobs, settings.top_k, settings.top_p) if settings.restricted else logprobs
            noise = torch.empty_like(drawn_from).exponential_(generator=self.generator)
            noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()
            token = (drawn_from - noise).argmax(-1)
        return token, logprobs.gather(1, token[:, None])[:, 0]

    def _sample(self, prompts: Sequence[Sequence[int]], group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Padded ids and log-probabilities (B, max_new_tokens), lengths (B,), stopped (B,)."""
        steps, device = self.settings.max_new_tokens, self.device
        cache, logits, mask, position = self._prefill(prompts, group_size)
        total = len(position)
        ids = torch.full((total, steps), self.settings.pad_token_id, device=device)
        logprob = torch.zeros(total, steps, device=device)
        lengths = torch.full((total,), steps, device=device)
        stopped = torch.zeros(total, dtype=torch.bool, device=device)
        rows = torch.arange(total, device=device)  # the sequences still in the batch
        look_every = 1 if device.type == "cpu" else 8  # looking costs the accelerator a sync
        for t in range(steps):
            token, ids_logprob = self._draw(logits)
            ids[rows, t], logprob[rows, t] = token, ids_logprob
            ends = torch.isin(token, self._eos) & ~stopped[rows]
            lengths[rows] = torch.where(ends, t + 1, lengths[rows])
            stopped[rows] |= ends
            if t + 1 == steps:
                break
            if t % look_every == 0:
                going = (~stopped[rows]).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if self._able.moves and len(going) < self.compact_below * len(rows):
                    cache.reorder_cache(going)
                    rows, token, position = rows[going], token[going], position[going]
                    mask = None if mask is None else mask[going]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(token[:, None], mask, position[:, None], cache)
            position = position + 1
        return ids, logprob, lengths, stopped


def restrict(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) with -inf outside the top-k tokens and outside the smallest set of mass >= top_p."""
    if 0 < top_k < logprobs.shape[-1]:
        kth = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logprobs.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before this token already suffices
        logprobs = logprobs.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return logprobs


SAMPLERS = {
    "group": "samplers:GroupSampler",
    "generate": "generate:GenerateSampler",
    "continuous": "continuous:ContinuousSampler",
    "server": "server:ServerSampler",
}


def make_sampler(kind: str, model: nn.Module, settings: SamplerSettings, **kwargs) -> Sampler:
    """The sampler named in a config: "group" (default), "generate", "continuous" or "server"."""
    if kind not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, got {kind!r}")
    module, _, name = SAMPLERS[kind].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)(model, settings, **kwargs)

"""The sampler over `model.generate`: no shared prefill, log-probabilities recorded by a logits processor.

Nothing of the model's own generation_config restricts or shifts what is drawn: it is put aside while sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_fast.trainers.rollout.samplers import (
    Rollout,
    SamplerSettings,
    evaluating,
    flat_rollout,
    pad_left,
    prompts_at_once,
    restrict,
)


class _Recorder(LogitsProcessor):
    """Divides by the temperature and keeps the log-probability of each token once `generate` has chosen it."""

    def __init__(self, settings: SamplerSettings):
        self.settings, self.last, self.columns = settings, None, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids)
        self.last = torch.log_softmax(scores.float() / self.settings.temperature, dim=-1)
        if self.settings.restricted:
            return restrict(self.last, self.settings.top_k, self.settings.top_p)
        return self.last

    def take(self, input_ids: Tensor) -> None:
        if self.last is not None:
            self.columns.append(self.last.gather(1, input_ids[:, -1:]))


@contextmanager
def own_generation(model: nn.Module, settings: SamplerSettings) -> Iterator[GenerationConfig]:
    """The configuration for `settings`, which inside of the block is also the model's.

    `generate` fills what a configuration leaves open from the model's: penalties, minimal lengths, forced tokens.
    """
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=not settings.greedy,
        **({} if settings.greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),  # the recorder's business
        eos_token_id=list(settings.eos_token_ids),
        pad_token_id=settings.pad_token_id,
    )
    holders = [part for part in model.modules() if "generation_config" in vars(part)]
    before = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = config
    try:
        yield config
    finally:
        for part, its_own in zip(holders, before, strict=True):
            part.generation_config = its_own


class GenerateSampler:
    """The same protocol over `model.generate` with left padding: for models whose decoding is their own."""

    def __init__(self, model: nn.Module, settings: SamplerSettings, *, seed: int = 0, batch_size: int | None = None):
        self.model, self.settings, self.batch_size = model, settings, batch_size
        self.device = next(model.parameters()).device
        generator = torch.Generator(self.device).manual_seed(seed)
        self._state = generator.get_state()

    def state_dict(self) -> dict:
        return {"generator": self._state}

    def load_state_dict(self, state: dict) -> None:
        self._state = state["generator"]

    def __call__(self, prompts: Sequence[Sequence[int]], group_size: int = 1) -> Rollout:
        at_once = prompts_at_once(self.batch_size, len(prompts), group_size)
        on_cpu = self.device.type == "cpu"
        rng = torch if on_cpu else torch.get_device_module(self.device)
        devices = {"devices": []} if on_cpu else {"devices": [self.device], "device_type": self.device.type}
        with torch.random.fork_rng(**devices), evaluating(self.model), torch.no_grad():
            rng.set_rng_state(self._state)  # generate draws from the global generator only
            parts = [self._sample(prompts[i : i + at_once], group_size) for i in range(0, len(prompts), at_once)]
            self._state = rng.get_rng_state()
        return flat_rollout(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), self.settings)

    def _sample(self, prompts: Sequence[Sequence[int]], group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        settings, steps = self.settings, self.settings.max_new_tokens
        prompt_ids, prompt_lengths = pad_left(prompts, settings.pad_token_id, self.device)
        prompt_ids, prompt_lengths = (x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_lengths))
        width = prompt_ids.shape[1]
        mask = torch.arange(width, device=self.device) >= width - prompt_lengths[:, None]
        recorder = _Recorder(settings)
        with own_generation(self.model, settings) as config:
            out = self.model.generate(
                input_ids=prompt_ids,
                attention_mask=mask.long(),
                logits_processor=LogitsProcessorList([recorder]),
                generation_config=config,
            )
        recorder.take(out)
        got = out[:, width:]
        is_eos = torch.isin(got, torch.tensor(settings.eos_token_ids, device=self.device))
        stopped = is_eos.any(1)
        lengths = torch.where(stopped, is_eos.int().argmax(1) + 1, got.shape[1])
        ids = torch.full((len(got), steps), settings.pad_token_id, device=self.device)
        logprob = torch.zeros(len(got), steps, device=self.device)
        ids[:, : got.shape[1]], logprob[:, : got.shape[1]] = got, torch.cat(recorder.columns, dim=1)
        return ids, logprob, lengths, stopped

"""The sampler over transformers' continuous batching: sequences join and leave the batch token by token.

Meant for the GPU; on the CPU it works and is slow. Keys and values live in pages that are reserved when a rollout
begins and given back at its end. The attention implementation stays the model's own, so that sampler and trainer are
one function; flash-attention is the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from rlhf_fast.trainers.rollout.samplers import Rollout, SamplerSettings, evaluating, flat_rollout, prompts_at_once

try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
    from transformers.generation.continuous_batching.utils import WorkloadHints
except ImportError:
    ContinuousBatchingConfig = None


class ContinuousSampler:
    """The sampler protocol over `ContinuousBatchingManager`.

    Args:
        model: a causal LM of transformers (also under PEFT). Its mode is restored.
        settings: `SamplerSettings` without top_k and top_p: continuous batching records the log-probabilities of the
            restricted distribution, the other samplers those of the full one.
        seed: seeds the sampler's own generator, saved by `state_dict`. Seeds a whole call; which sequence gets which
            random numbers depends on the order in which pages become free.
        batch_size: sequences decoded at once; None leaves it to transformers.
        memory_share: of the accelerator's free memory, for keys and values; None leaves it to transformers.
    Raises: ValueError for settings or a transformers version it cannot serve; RuntimeError naming the prompts whose
        completions did not come.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SamplerSettings,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        memory_share: float | None = None,
    ):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if ContinuousBatchingConfig is None or not hasattr(base, "init_continuous_batching"):
            raise ValueError(
                "sampler 'continuous' needs transformers >= 5.23 and a model with its continuous batching, got "
                f"{type(base).__name__}"
            )
        if settings.restricted:
            raise ValueError(
                f"sampler 'continuous' records log-probabilities of the restricted distribution and takes no "
                f"top_k={settings.top_k}, top_p={settings.top_p}: use 'group' or 'generate', or leave them off"
            )
        self.model, self.base, self.settings = model, base, settings
        self.batch_size, self.memory_share = batch_size, memory_share
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next(model.parameters()).device

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])

    def __call__(self, prompts: Sequence[Sequence[int]], group_size: int = 1) -> Rollout:
        prompts_at_once(None, len(prompts), group_size)
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompts must be non-empty lists of token ids, row {row} is empty")
        # A prompt is prefilled up to its last token before it is forked: one of a single token cannot be.
        forks = 1 if self.settings.greedy or min(map(len, prompts)) == 1 else group_size
        inputs = [list(p) for p in prompts for _ in range(group_size // forks)]
        on_cpu = self.device.type == "cpu"
        devices = {"devices": []} if on_cpu else {"devices": [self.device], "device_type": self.device.type}
        with torch.random.fork_rng(**devices), evaluating(self.model), torch.no_grad():
            outputs = self._generate(inputs, forks)
        return self._rollout(outputs)

    def _manager(self, inputs: list[list[int]], forks: int) -> Any:
        settings = self.settings
        generation = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=not settings.greedy,
            num_return_sequences=forks,
            **({} if settings.greedy else {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0}),
            eos_token_id=list(settings.eos_token_ids),
            pad_token_id=settings.pad_token_id,
        )
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=int(torch.randint(2**31, (1,), generator=self.generator)),
            max_requests_per_batch=self.batch_size,
            max_memory_percent=self.memory_share,
            auto_switch_to_flash=False,
            **self._room(inputs, forks),
        )
        hints = WorkloadHints(max(map(len, inputs)), settings.max_new_tokens, len(inputs) * forks)
        manager = self.base.init_continuous_batching(generation, batching, hints)
        if settings.greedy and settings.temperature != 1:  # transformers tempers the logits only where it samples
            tempered = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(tempered)
        return manager

    def _room(self, inputs: list[list[int]], forks: int) -> dict[str, int]:
        """Pages for every sequence at its longest, on the CPU: transformers would take most of the free memory."""
        if self.device.type != "cpu":
            return {}
        page = 32
        longest = max(map(len, inputs)) + self.settings.max_new_tokens
        at_once = min(len(inputs) * forks, self.batch_size or len(inputs) * forks)
        return {"page_size": page, "num_blocks": at_once * (longest // page + 2), "max_batch_tokens": 2048}

    def _generate(self, inputs: list[list[int]], forks: int) -> list[Any]:
        """One output a sequence, prompt-major."""
        manager = self._manager(inputs, forks)
        results: dict[str, Any] = {}
        manager.start()
        try:
            requests = manager.add_requests(inputs)
            wanted = [name + f"__child#{i}" * (i >= 0) for name in requests for i in range(-1, forks - 1)]
            while len(results) < len(wanted):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    results[output.request_id] = output
                elif output is None and not manager.is_running():
                    break
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
        fatal = manager.background_thread_status.fatal_error
        for k, name in enumerate(wanted):
            reason = f"{fatal or 'no answer'}" if name not in results else results[name].error
            if reason is not None:
                raise RuntimeError(f"continuous batching failed on prompt {k * len(requests) // len(wanted)}: {reason}")
        return [results[name] for name in wanted]

    def _rollout(self, outputs: list[Any]) -> Rollout:
        settings, steps = self.settings, self.settings.max_new_tokens
        ids = torch.full((len(outputs), steps), settings.pad_token_id)
        logprob = torch.zeros(len(outputs), steps)
        for row, output in enumerate(outputs):
            count = len(output.generated_tokens)
            ids[row, :count] = torch.tensor(output.generated_tokens)
            logprob[row, :count] = torch.tensor(output.logprobs)
        lengths = torch.tensor([len(o.generated_tokens) for o in outputs])
        stopped = torch.tensor([o.generated_tokens[-1] in settings.eos_token_ids for o in outputs])
        return flat_rollout(*(x.to(self.device) for x in (ids, logprob, lengths, stopped)), settings)

"""The sampler over an OpenAI-compatible completions server (vLLM, SGLang, ...) reached over HTTP.

One request a prompt, `n` completions each, many at once. A server is not trusted: what it answers is checked against
what was asked (count, ids within the vocabulary, finite log-probabilities, where completions end), and a server whose
log-probabilities are not those of the sampling temperature is refused, since every importance ratio would be off.

It must answer with token ids: vLLM does when asked (`return_token_ids`, `return_tokens_as_token_ids`). Text would have
to be tokenised again, which does not always give back the tokens that were sampled: such an answer is an error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf_fast.trainers.models.hf_utils import vocabulary_size
from rlhf_fast.trainers.rollout.http_client import BadAnswer, JSONClient, ServerError, ServerOptions
from rlhf_fast.trainers.rollout.samplers import Rollout, SamplerSettings, flat_rollout, prompts_at_once
from rlhf_fast.trainers.rollout.sync import ServedWeights

ROUNDING = 1e-3  # a log-probability may exceed 0 by that much in half precision; it is recorded as 0
# Servers take defaults from the model's generation config unless told otherwise.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Completion(NamedTuple):
    """One verified completion."""

    ids: list[int]
    logprob: list[float]
    stopped: bool


class ServerSampler:
    """The sampler protocol over a completions server.

    Args:
        model: the policy: its vocabulary is what ids are checked against, its weights are what the server should hold.
        settings: `SamplerSettings`.
        options: `ServerOptions`, or the URL alone.
        seed: seeds the sampler's own generator, which seeds the requests; saved by `state_dict`.
        batch_size: sequences asked for at once, besides `options.concurrency`.
        sync: called with the model before a rollout whenever its weights have changed, such as
            `sync.DiskUpdate`. None: the server keeps the weights it has, and a warning counts how old they are.
    Raises: ServerError when the server fails for good, answers what was not asked, gives no token ids, or gives
        log-probabilities at another temperature.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SamplerSettings,
        *,
        options: ServerOptions | str,
        seed: int = 0,
        batch_size: int | None = None,
        sync: Callable[[nn.Module], None] | None = None,
    ):
        self.options = ServerOptions(options) if isinstance(options, str) else options
        self.settings, self.batch_size = settings, batch_size
        self.client, self.weights = JSONClient(self.options), ServedWeights(model, sync)
        self.vocabulary, self.device = vocabulary_size(model), next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self._model_name = self.options.model
        self._tempered = settings.greedy or settings.temperature == 1

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])

    def __call__(self, prompts: Sequence[Sequence[int]], group_size: int = 1) -> Rollout:
        at_once = prompts_at_once(self.batch_size, len(prompts), group_size)
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompts must be non-empty lists of token ids, row {row} is empty")
        self.weights.refresh()
        if self._model_name is None:
            self._model_name = self.client.call("/v1/models", check=_first_model)
        if not self._tempered:
            self._check_temperature(prompts[:4])
            self._tempered = True
        seeds = torch.randint(2**31, (len(prompts),), generator=self.generator).tolist()
        self.client.stop.clear()
        with ThreadPoolExecutor(min(at_once, self.options.concurrency, len(prompts))) as pool:
            work = [pool.submit(self._complete, list(p), group_size, s) for p, s in zip(prompts, seeds, strict=True)]
            try:
                groups = [future.result() for future in work]
            except BaseException:  # the first failure is the call's: nothing else is begun or tried again
                self.client.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._rollout([completion for group in groups for completion in group])

    def _body(self, prompt: Sequence[int], **changes: Any) -> dict[str, Any]:
        settings = self.settings
        top_k = {"top_k": settings.top_k} if settings.top_k else {}
        return {
            "model": self._model_name,
            "prompt": list(prompt),
            "max_tokens": settings.max_new_tokens,
            "temperature": 0.0 if settings.greedy else settings.temperature,
            "top_p": settings.top_p,
            **NEUTRAL,
            **top_k,
            "stop_token_ids": list(settings.eos_token_ids),
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **self.options.extra,
            **changes,
        }

    def _complete(self, prompt: list[int], count: int, seed: int) -> list[Completion]:
        return self.client.call(
            "/v1/completions",
            self._body(prompt, n=count, seed=seed),
            check=lambda answer: self.read(answer, count, len(prompt)),
        )

    def read(self, answer: Any, count: int, prompt_length: int) -> list[Completion]:
        """The completions of an answer, in order, verified. Raises BadAnswer, or ServerError if it has no token ids."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise BadAnswer(f"no list of choices in {str(answer)[:80]}")
        indices = [choice.get("index") for choice in choices]
        if any(type(i) is not int for i in indices) or sorted(indices) != list(range(count)):
            raise BadAnswer(f"{count} choices were asked for, got index {str(indices):.200}")
        usage = answer.get("usage")
        seen = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if seen is not None and seen != prompt_length:
            raise ServerError(
                f"{self.client.base}: the prompt was {prompt_length} tokens, the server saw {seen}: it adds or drops "
                "tokens (a BOS?)"
            )
        return [self._read_choice(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _read_choice(self, choice: dict) -> Completion:
        settings, name = self.settings, f"choice {choice['index']}"
        logprobs = choice.get("logprobs") if isinstance(choice.get("logprobs"), dict) else {}
        ids, values = self._ids(choice, logprobs), logprobs.get("token_logprobs")
        if not isinstance(values, list) or len(values) != len(ids):
            got = len(values) if isinstance(values, list) else values
            raise BadAnswer(f"{name} has {len(ids)} tokens and token_logprobs {got}")
        if not 0 < len(ids) <= settings.max_new_tokens:
            raise BadAnswer(f"{name} must have 1 to {settings.max_new_tokens} tokens, got {len(ids)}")
        for k, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise BadAnswer(f"{name}, token {k} must be an id in [0, {self.vocabulary}), got {repr(token):.40}")
        for k, value in enumerate(values):
            if type(value) not in (int, float) or not -1e30 < value <= ROUNDING:
                raise BadAnswer(
                    f"{name}, token {k}: its log-probability must be finite and at most 0, got {str(value):.40}"
                )
        ends = [k for k, token in enumerate(ids) if token in settings.eos_token_ids]
        if ends and ends[0] != len(ids) - 1:
            raise BadAnswer(f"{name} goes on after its end at token {ends[0]}")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length") or (reason == "stop" and not ends):
            raise BadAnswer(
                f"{name} finished with {repr(reason):.40} and last token {ids[-1]}, not in {settings.eos_token_ids}"
            )
        return Completion(ids, [min(value, 0.0) for value in values], bool(ends))

    def _ids(self, choice: dict, logprobs: dict) -> list[Any]:
        if isinstance(choice.get("token_ids"), list):
            return choice["token_ids"]
        tokens = logprobs.get("tokens")
        if isinstance(tokens, list) and all(isinstance(t, str) and t.startswith("token_id:") for t in tokens):
            return [int(t[9:]) if t[9:].isdecimal() and len(t) < 30 else t[:40] for t in tokens]
        raise ServerError(
            f"{self.client.base} gives no token ids, although return_token_ids and return_tokens_as_token_ids were "
            "asked for. Its text would have to be tokenised again, which need not give the tokens that were sampled"
        )

    def _check_temperature(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ServerError unless log-probabilities follow the temperature: at 2T the gap of the two likeliest tokens
        is half of that at T.

        vLLM gives those of temperature 1 unless it is started with --logprobs-mode processed_logprobs.
        """
        temperature = self.settings.temperature

        def gap(answer: Any) -> float:
            try:
                top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
                first, second = sorted(map(float, top.values()), reverse=True)[:2]
            except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                return math.nan
            return first - second

        for prompt in prompts:
            body = dict(n=1, max_tokens=1, logprobs=2, seed=0, top_p=1.0, top_k=-1)
            cold, warm = (
                self.client.call("/v1/completions", self._body(prompt, **body, temperature=t), check=gap)
                for t in (temperature, 2 * temperature)
            )
            if not (warm > 1e-2 and cold > 1e-2):
                continue  # a tie, or no answer to the question
            if cold / warm < 1.5:
                raise ServerError(
                    f"{self.client.base} gives log-probabilities that do not follow the temperature {temperature:g}: "
                    "ratios would be wrong. Start vLLM with --logprobs-mode processed_logprobs, or use temperature 1"
                )
            return
        warnings.warn(
            f"could not tell whether {self.client.base} gives log-probabilities at the temperature {temperature:g}",
            stacklevel=3,
        )

    def _rollout(self, completions: list[Completion]) -> Rollout:
        settings = self.settings
        ids = torch.full((len(completions), settings.max_new_tokens), settings.pad_token_id)
        logprob = torch.zeros(ids.shape)
        for row, completion in enumerate(completions):
            ids[row, : len(completion.ids)] = torch.tensor(completion.ids)
            logprob[row, : len(completion.ids)] = torch.tensor(completion.logprob)
        lengths = torch.tensor([len(completion.ids) for completion in completions])
        stopped = torch.tensor([completion.stopped for completion in completions])
        return flat_rollout(*(x.to(self.device) for x in (ids, logprob, lengths, stopped)), settings)


def _first_model(answer: Any) -> str:
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise BadAnswer(f"no model in the list {str(answer)[:80]}") from None

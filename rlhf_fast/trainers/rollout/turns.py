"""Conversations with an environment: what the policy samples counts, what a tool or a user says does not.

    prompt  [sampled turn EOS]  [the environment's answer]  [sampled turn EOS]  ...          mask  1 1 1  0 0 0  1 1 1

Each turn is sampled by another sampler on the prompt and everything since. The environment's answers are tokenised
apart and put behind the sampled ids, which stay as they were sampled: nothing is ever decoded and tokenised again, so
the trainer scores exactly the tokens that were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast.trainers.rewards import load_function
from rlhf_fast.trainers.rollout.samplers import Rollout, Sampler, prompts_at_once

# environment(prompts, completions, columns) -> the next message of each conversation, None where it is over.
# completions[i] holds the texts of conversation i in turn: the policy's, the environment's, the policy's, ...
Environment = Callable[[list[str], list[list[str]], dict[str, list[Any]]], Sequence[str | None]]


class _Conversation(NamedTuple):
    row: int  # of the prompt
    ids: list[int]
    logprob: list[float]
    mask: list[bool]
    texts: list[str]


class MultiTurnSampler:
    """A sampler whose completions are conversations.

    Args:
        sampler: samples one turn; its `max_new_tokens` bounds a turn.
        environment: called after every turn with the conversations that ended with EOS:
            `environment(prompts, completions, columns)` gives the next message of each, None where it is over. Texts
            are decoded with special tokens.
        tokenizer: of the policy.
        max_turns: sampled turns of a conversation.
        max_length: tokens of a completion, the environment's included. A conversation that reaches it finishes with
            "length"; an answer that would leave no room for a turn after it is left out.
        render: the text to put behind a sampled turn for a message; `chat_turn(tokenizer)` takes it from the chat
            template. Default: the message alone.
    Returns (when called with prompts, a group size and `columns`, values by name with one a prompt): a `Rollout` whose
        `mask` is False and whose `logprob` is 0 on the environment's tokens.
    """

    def __init__(
        self,
        sampler: Sampler,
        environment: Environment,
        tokenizer: Any,
        *,
        max_turns: int,
        max_length: int,
        render: Callable[[str], str] = lambda message: message,
    ):
        for name, value in (("max_turns", max_turns), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.sampler, self.environment, self.tokenizer = sampler, environment, tokenizer
        self.max_turns, self.max_length, self.render = max_turns, max_length, render

    @property
    def settings(self) -> Any:
        """The turn sampler's."""
        return self.sampler.settings

    def state_dict(self) -> dict:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int = 1,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Rollout:
        prompts_at_once(None, len(prompts), group_size)
        columns = columns or {}
        for name, values in columns.items():
            if len(values) != len(prompts):
                raise ValueError(f"columns[{name!r}] must hold one value for each of {len(prompts)} prompts")
        talks = [_Conversation(row, [], [], [], []) for row in range(len(prompts)) for _ in range(group_size)]
        finish = ["length"] * len(talks)
        going = list(range(len(talks)))
        rollout = self.sampler(prompts, group_size)
        for turn in range(1, self.max_turns + 1):
            self._take(rollout, talks, going, finish)
            going = [k for k in going if finish[k] == "stop"]
            if turn == self.max_turns or not going:
                break
            going = self._answer(prompts, columns, talks, going, finish)
            if not going:
                break
            rollout = self.sampler([[*prompts[talks[k].row], *talks[k].ids] for k in going])
        return self._rollout(talks, finish, rollout)

    def _take(self, rollout: Rollout, talks: list[_Conversation], going: list[int], finish: list[str]) -> None:
        """Put a sampled turn behind each conversation; one longer than what is left is cut."""
        ids, logprob, ends = (x.tolist() for x in (rollout.ids, rollout.logprob, rollout.cu_seqlens))
        for k, start, end, reason in zip(going, ends[:-1], ends[1:], rollout.finish, strict=True):
            talk = talks[k]
            room = self.max_length - len(talk.ids)
            finish[k] = reason if end - start <= room else "length"
            end = min(end, start + room)
            talk.ids.extend(ids[start:end])
            talk.logprob.extend(logprob[start:end])
            talk.mask.extend([True] * (end - start))
            talk.texts.append(self.tokenizer.decode(ids[start:end]))

    def _answer(
        self,
        prompts: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        talks: list[_Conversation],
        going: list[int],
        finish: list[str],
    ) -> list[int]:
        """Put the environment's message behind each conversation; returns those that go on."""
        rows = [talks[k].row for k in going]
        messages = self.environment(
            [self.tokenizer.decode(list(prompts[row])) for row in rows],
            [list(talks[k].texts) for k in going],
            {name: [values[row] for row in rows] for name, values in columns.items()},
        )
        name = getattr(self.environment, "__name__", type(self.environment).__name__)
        if len(messages) != len(going):
            raise ValueError(f"environment {name} got {len(going)} conversations and returned {len(messages)} messages")
        left = []
        for k, message in zip(going, messages, strict=True):
            if message is None:
                continue
            if not isinstance(message, str):
                raise ValueError(f"environment {name} must return strings or None, got {type(message).__name__}")
            text = self.render(message)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            talk = talks[k]
            if len(talk.ids) + len(ids) >= self.max_length:
                finish[k] = "length"
                continue
            talk.ids.extend(ids)
            talk.logprob.extend([0.0] * len(ids))
            talk.mask.extend([False] * len(ids))
            talk.texts.append(message)
            left.append(k)
        return left

    def _rollout(self, talks: list[_Conversation], finish: list[str], like: Rollout) -> Rollout:
        device = like.ids.device
        ends = torch.tensor([0, *(len(talk.ids) for talk in talks)]).cumsum(0)
        return Rollout(
            torch.tensor([t for talk in talks for t in talk.ids], device=device),
            torch.tensor([x for talk in talks for x in talk.logprob], device=device),
            ends.to(device, torch.int32),
            finish,
            self.settings,
            torch.tensor([m for talk in talks for m in talk.mask], device=device),
        )


def load_environment(spec: str | Environment) -> Environment:
    """The callable at an import path, or one as it is."""
    return load_function(spec, "environment")


def conversations(sampler: Sampler, config: Any, tokenizer: Any) -> MultiTurnSampler:
    """The sampler of conversations that a `RolloutConfig` describes."""
    environment = load_environment(config.environment)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    stops = sampler.settings.eos_token_ids
    render = {"render": chat_turn(tokenizer, config.environment_role, stops)} if has_template else {}
    limits = dict(max_turns=config.max_turns, max_length=config.max_completion_length)
    return MultiTurnSampler(sampler, environment, tokenizer, **limits, **render)


def chat_turn(tokenizer: Any, role: str = "user", stops: Sequence[int] = ()) -> Callable[[str], str]:
    """What a chat template puts behind an assistant's turn for a message of `role`: the message and the beginning of
    the assistant's next turn. The turn ends with the first token of `stops`, the ids at which sampling ends (default:
    EOS). ValueError when none is in the template's turn, or it does not grow by appending.
    """
    answer = "an answer"
    opening = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]

    def text(messages: list[dict], more: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)

    before, ends = text(opening, False), tokenizer.convert_ids_to_tokens(list(stops) or [tokenizer.eos_token_id])
    start = before.rfind(answer) + len(answer)
    found = [(at, at + len(end)) for end in ends if end and (at := before.find(end, start)) >= 0]
    if answer not in before or not found:
        raise ValueError(
            f"the chat template does not end an assistant's turn with a token at which sampling stops "
            f"({', '.join(map(repr, ends))}) but with {before[start:]!r}: put the id of its end of turn into "
            "eos_token_id of the model's generation_config.json"
        )
    kept = min(found)[1]  # what has been sampled by then

    def render(message: str) -> str:
        after = text([*opening, {"role": role, "content": message}], True)
        if not after.startswith(before):
            raise ValueError(f"the chat template rewrites earlier turns when a message of role {role!r} follows")
        return after[kept:]

    return render

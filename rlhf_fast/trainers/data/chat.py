"""Conversations to text: messages of every dialect, the tokenizer's chat template, and which text is scored.

The template's text is cut where an assistant turn begins: after the header that `add_generation_prompt` writes. A
template that rewrites earlier turns (Qwen3 takes their thoughts out) has no such cuts but for the last turn: then its
own {% generation %} marks tell what is scored, or else only the last turn is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Turns = list[dict[str, Any]]


class Segment(NamedTuple):
    """Text that is tokenised by itself."""

    text: str
    scored: bool
    template: bool = False  # written by a chat template, which brings its own BOS and end of turn


@dataclass(frozen=True)
class Tags:
    """What a sharegpt file calls its keys and roles; the defaults are sharegpt's own."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    def message(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """The turn as {role, content}; ValueError with the reason. The usual names of the roles are known besides."""
        role, content = turn.get(self.role_tag), turn.get(self.content_tag)
        roles = {self.user_tag: "user", self.assistant_tag: "assistant", self.system_tag: "system"}
        roles |= {self.observation_tag: "tool", self.function_tag: "function_call"}
        role = roles.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: expected one of {', '.join(map(str, roles))}")
        if role == "function_call":
            return {"role": "assistant", "content": "", "tool_calls": tool_calls(content)}
        return {"role": role, "content": content}


ROLES = ("system", "user", "assistant", "tool", "function_call")
SHAREGPT = Tags()


@dataclass(frozen=True)
class Chat:
    """A conversation whose assistant turns from `answers_from` on are scored."""

    turns: Turns
    answers_from: int
    where: str  # file and line, for messages
    tools: list[dict[str, Any]] | None = None

    def render(self, tokenizer: Any, end: int | None = None, *, prompt: bool = False) -> str:
        """The template's text of the turns before `end`; `prompt` adds the header of the assistant's turn."""
        if not has_template(tokenizer):
            raise ValueError(f"{self.where}: chat messages need a chat template, and the tokenizer has none")
        options = {"tools": self.tools} if self.tools else {}
        try:
            return tokenizer.apply_chat_template(
                self.turns[:end], tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:  # jinja's own errors, and what a template raises by itself
            raise ValueError(f"{self.where}: the chat template failed: {error}") from None


def has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def chat_segments(chat: Chat, tokenizer: Any, *, last_only: bool = False) -> tuple[list[Segment], bool]:
    """Context and assistant text in turns, and whether earlier turns went unscored because the template rewrites them.

    `last_only`: score the last assistant turn only.
    """
    scored = [k for k, turn in enumerate(chat.turns) if turn["role"] == "assistant" and k >= chat.answers_from]
    if not scored:
        raise ValueError(f"{chat.where}: no assistant turn to learn from")
    segments = _cut(chat, tokenizer, scored[-1:] if last_only else scored)
    if segments is not None:
        return segments, False
    if chat.answers_from == 0 and not last_only:
        if _marks_generation(tokenizer):
            return _marked_segments(chat, tokenizer), False
        segments = _cut(chat, tokenizer, scored[-1:]) if len(scored) > 1 else None
        if segments is not None:
            return segments, True
    raise ValueError(
        f"{chat.where}: the chat template rewrites what comes before turn {scored[-1] + 1} or drops part of it, which "
        "so cannot be scored apart; mark assistant text with {% generation %} in the template, or give one row for "
        "each assistant turn"
    )


def _cut(chat: Chat, tokenizer: Any, scored: list[int]) -> list[Segment] | None:
    """The text cut around the `scored` turns; None when the template rewrites what was there before."""
    segments: list[Segment] = []
    done = ""
    for k in scored:
        after = chat.render(tokenizer, k + 1)
        before = chat.render(tokenizer, k, prompt=True) if k else _before_opening(chat, after, tokenizer)
        if before is None:
            return None
        if not before.startswith(done) and done.endswith(tokenizer.eos_token):  # EOS only where a conversation ends
            done = done.removesuffix(tokenizer.eos_token)
            segments[-1] = segments[-1]._replace(text=segments[-1].text.removesuffix(tokenizer.eos_token))
        if not after.startswith(before):
            before = _shared_header(chat, k, before, after, tokenizer)
        if before is None or not before.startswith(done):
            return None
        segments += [Segment(before[len(done) :], False, True), Segment(after[len(before) :], True, True)]
        done = after
    return segments


def _before_opening(chat: Chat, after: str, tokenizer: Any) -> str | None:
    """What the template writes before an assistant turn that opens the conversation, as no prompt of it shows.

    The turn's own text is what the template writes of it as an answer, which must be how `after` ends.
    """
    asked = Chat([{"role": "user", "content": "x"}, chat.turns[0]], 1, chat.where, chat.tools)
    segments = _cut(asked, tokenizer, [1])
    answer = segments[-1].text if segments else ""
    return after.removesuffix(answer) if answer and after.endswith(answer) else None


def _shared_header(chat: Chat, k: int, before: str, after: str, tokenizer: Any) -> str | None:
    """What the prompt of turn k and its text have in common, up to a whole token of the header.

    A header may open a thought that the answer does not have. A template that drops part of the answer is refused.
    """
    base = chat.render(tokenizer, k)
    shared = len(os.path.commonprefix([before, after])) - len(base)
    if not tokenizer.is_fast or shared <= 0 or chat.turns[k]["content"].strip() not in after[len(base) :]:
        return None
    tokens = tokenizer(before[len(base) :], add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in tokens["offset_mapping"] if end <= shared]
    return before[: len(base) + max(ends)] if ends else None


def _marks_generation(tokenizer: Any) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _marked_segments(chat: Chat, tokenizer: Any) -> list[Segment]:
    """The text cut at the template's own {% generation %} marks; what follows the last one is left out."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, chat.tools)
    options = dict(chat_template=template, tools=chat.tools, return_assistant_tokens_mask=True)
    try:
        (text,), (spans,) = render_jinja_template([chat.turns], **options, **tokenizer.special_tokens_map)
    except Exception as error:
        raise ValueError(f"{chat.where}: the chat template failed: {error}") from None
    if not spans:
        raise ValueError(f"{chat.where}: the chat template marks no assistant text with {{% generation %}}")
    segments: list[Segment] = []
    done = 0
    for begin, end in spans:
        if text.startswith(tokenizer.eos_token, end):  # the end of the turn is the model's to write
            end += len(tokenizer.eos_token)
        segments += [Segment(text[done:begin], False, True), Segment(text[begin:end], True, True)]
        done = end
    return segments


def as_messages(value: Any, key: str, where: str, tags: Tags = SHAREGPT) -> Turns:
    """Chat messages as {role, content}, from the same or from sharegpt's {from, value}."""
    if not (isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value)):
        raise ValueError(f"{where}: {key} must be a list of {{role, content}} objects, got {value!r:.80}")
    try:
        return [_message(m, tags) for m in value]
    except ValueError as error:
        raise ValueError(f"{where}: {key}: {error}") from None


def _message(turn: Mapping[str, Any], tags: Tags) -> dict[str, Any]:
    if tags.role_tag in turn and (tags != SHAREGPT or "role" not in turn):
        turn = {**{k: v for k, v in turn.items() if k not in (tags.role_tag, tags.content_tag)}, **tags.message(turn)}
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise ValueError(f"must be a list of {{role, content}} objects, got {dict(turn)!r:.80}")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)  # OpenAI's parts
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        what = "a part that is not text" if isinstance(content, list) else f"{content!r:.60}"
        raise ValueError(f"the content of the {role} turn must be a string, got {what}")
    return {**{k: v for k, v in turn.items() if v is not None}, "content": content}  # Arrow fills in absent keys


def tool_calls(text: Any) -> list[dict[str, Any]]:
    """The calls of a function_call turn: JSON of {"name", "arguments"}, or of a list of them."""
    calls = parsed_json(text, "a function_call turn")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(c, dict) and "name" in c and "arguments" in c for c in calls):
        raise ValueError(f'a function_call turn must hold {{"name", "arguments"}}, got {text!r:.60}')
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


def parsed_json(value: Any, what: str) -> Any:
    """A value, or the value of its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON: {error.msg} at column {error.colno}, got {value!r:.60}") from None
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        raise ValueError(f"{what} must be JSON of a usual size, got {value!r:.60}") from None

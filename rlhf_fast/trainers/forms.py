"""The forms that a row may take, and the segments of text that each form means.

    {"prompt", "completion" | "response" | "output"}      strings, or lists of chat messages
    {"messages": [{"role", "content"}, ...]}              the tokenizer's chat template; assistant turns are scored
    {"instruction", "input"?, "output", "system"?, "history"?}
    {"text"}                                              everything is scored

Plain strings are taken as they stand. Alpaca rows go through the chat template when the tokenizer has one; else
the prompt is instruction and input, a line each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .readers import Rows

COMPLETION_KEYS = ("completion", "response", "output")


class Segment(NamedTuple):
    """Text that is tokenised by itself."""

    text: str
    scored: bool
    template: bool = False  # written by a chat template, which brings its own BOS and end of turn


def segments(rows: Rows, i: int, tokenizer: Any) -> list[Segment]:
    """What row `i` means for supervised training."""
    row = rows[i]
    if "messages" in row:
        return _chat_segments(_messages(rows, i, "messages"), 0, rows.where(i), tokenizer)
    if "instruction" in row and "output" in row:
        return _alpaca_segments(rows, i, tokenizer)
    key = next((k for k in COMPLETION_KEYS if k in row), None)
    if "prompt" in row and key is not None:
        if isinstance(row["prompt"], list):
            before = _messages(rows, i, "prompt")
            reply = row[key]
            answer = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else _messages(rows, i, key)
            return _chat_segments(before + answer, len(before), rows.where(i), tokenizer)
        return [Segment(_string(rows, i, "prompt"), False), Segment(_string(rows, i, key), True)]
    if "text" in row:
        return [Segment(_string(rows, i, "text"), True)]
    raise ValueError(
        f"{rows.where(i)}: needs prompt + completion (or response), messages, instruction + output, "
        f"or text; its columns are {_columns(row)}"
    )


def prompt(rows: Rows, i: int, tokenizer: Any) -> Segment:
    """The prompt of row `i`, for sampling; a trailing assistant turn is no part of it."""
    row = rows[i]
    key = next((k for k in ("prompt", "messages") if isinstance(row.get(k), list)), None)
    if key is not None:
        messages = _messages(rows, i, key)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"{rows.where(i)}: {key} has no turn that could be a prompt")
        return Segment(render(tokenizer, messages, rows.where(i), prompt=True), False, template=True)
    if "prompt" in row:
        return Segment(_string(rows, i, "prompt"), False)
    if "instruction" in row:
        if has_template(tokenizer):
            text = render(tokenizer, _alpaca_messages(rows, i), rows.where(i), prompt=True)
            return Segment(text, False, template=True)
        return Segment(_alpaca_query(rows, i), False)
    if "text" in row:
        return Segment(_string(rows, i, "text"), False)
    raise ValueError(f"{rows.where(i)}: needs prompt, messages, instruction or text; its columns are {_columns(row)}")


def _chat_segments(messages: list[dict], scored_from: int, where: str, tokenizer: Any) -> list[Segment]:
    """Alternating context and assistant text; assistant turns from `scored_from` on are scored."""
    segments: list[Segment] = []
    done = ""
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or k < scored_from:
            continue
        before = render(tokenizer, messages[:k], where, prompt=True) if k else ""
        after = render(tokenizer, messages[: k + 1], where, prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"{where}: the chat template rewrites earlier turns, so turn {k + 1} cannot be scored apart; "
                "split the conversation into one row for each assistant turn"
            )
        segments += [Segment(before[len(done) :], False, True), Segment(after[len(before) :], True, True)]
        done = after
    if not segments:
        raise ValueError(f"{where}: no assistant turn to learn from")
    return [s for s in segments if s.text]


def _alpaca_segments(rows: Rows, i: int, tokenizer: Any) -> list[Segment]:
    output = _string(rows, i, "output")
    if has_template(tokenizer):
        messages = [*_alpaca_messages(rows, i), {"role": "assistant", "content": output}]
        return _chat_segments(messages, 0, rows.where(i), tokenizer)
    if rows[i].get("history") or rows[i].get("system"):
        raise ValueError(f"{rows.where(i)}: system and history need a chat template, and the tokenizer has none")
    return [Segment(_alpaca_query(rows, i), False), Segment(output, True)]


def _alpaca_query(rows: Rows, i: int) -> str:
    parts = [_string(rows, i, "instruction")]
    if rows[i].get("input"):
        parts.append(_string(rows, i, "input"))
    return "\n".join(parts)


def _alpaca_messages(rows: Rows, i: int) -> list[dict[str, str]]:
    row = rows[i]
    messages = [{"role": "system", "content": _string(rows, i, "system")}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise ValueError(f"{rows.where(i)}: history must be a list of [user, assistant] pairs, got {turn!r}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": _alpaca_query(rows, i)}]


def _messages(rows: Rows, i: int, key: str) -> list[dict[str, Any]]:
    messages = rows[i][key]
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if not good:
        raise ValueError(f"{rows.where(i)}: {key} must be a list of {{role, content}} objects, got {messages!r:.80}")
    return messages


def _string(rows: Rows, i: int, key: str) -> str:
    value = rows[i][key]
    if not isinstance(value, str):
        raise ValueError(f"{rows.where(i)}: {key} must be a string, got {value!r:.60} ({type(value).__name__})")
    return value


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def render(tokenizer: Any, messages: list[dict[str, Any]], where: str, *, prompt: bool) -> str:
    """The chat template's text; `prompt` adds the header of the assistant's turn."""
    if not has_template(tokenizer):
        raise ValueError(f"{where}: chat messages need a chat template, and the tokenizer has none")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja's own errors, and what a template raises by itself
        raise ValueError(f"{where}: the chat template failed: {error}") from None

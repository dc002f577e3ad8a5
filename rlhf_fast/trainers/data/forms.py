"""The forms that a row may take, and the segments of text that each form means.

    supervised   {"prompt", "completion" | "response" | "output"}      strings, or lists of chat messages
                 {"messages" | "conversations": [...]}                 {role, content} or sharegpt's {from, value}
                 {"instruction", "input"?, "output", "system"?, "history"?}
                 {"text"}                                              everything is scored
    pairs        {"prompt"?, "chosen", "rejected"} with "instruction" or "conversations" as well as "prompt"; without
                 any of them the prompt is what both answers begin with. "margin"?
    judged       a supervised row with "label" or "kto_tag", or a pair
    prompts      any of these; its answers are left out

Plain strings are taken as they stand. Alpaca rows go through the chat template when the tokenizer has one; else the
prompt is instruction and input, a line each. A column that is null is one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_fast.trainers.data.chat import Chat, Segment, Turns, as_messages, chat_segments, has_template, parsed_json

COMPLETION_KEYS = ("completion", "response", "output")
CHAT_KEYS = ("messages", "conversations")
Row = Mapping[str, Any]


class Example(NamedTuple):
    """The segments of a supervised row."""

    segments: list[Segment]
    last_only: bool  # earlier assistant turns are not scored because the template rewrites them


class Pair(NamedTuple):
    """A prompt and its two answers."""

    prompt: list[Segment]
    chosen: list[Segment]
    rejected: list[Segment]
    margin: float | None


def supervised(row: Row, where: str, tokenizer: Any, *, mask_history: bool = False) -> Example:
    """What a row means for supervised training; `mask_history` scores the last assistant turn only."""
    key = _first(row, COMPLETION_KEYS)
    chat = _first(row, CHAT_KEYS)
    if chat is not None:
        context, answer, scored_from = _messages(row, chat, where), [], 0
    elif key is not None and (_has(row, "instruction") or _has(row, "prompt")):
        context = _context(row, where, tokenizer)
        answer = _answer(row, key, where, context)
        scored_from = len(context) if _has(row, "prompt") else 0  # history's turns are learnt from
    elif _has(row, "text"):
        return Example([Segment(_string(row, "text", where), True)], False)
    else:
        raise ValueError(
            f"{where}: needs prompt + completion (or response), messages, instruction + output, or text; "
            f"its columns are {_columns(row)}"
        )
    if isinstance(context, str):
        return Example([Segment(context, False), Segment(answer, True)], False)
    talk = Chat(context + answer, scored_from, where, _tools(row, where))
    segments, last_only = chat_segments(talk, tokenizer, last_only=mask_history)
    return Example([s for s in segments if s.text], last_only)


def prompt(row: Row, where: str, tokenizer: Any) -> Segment:
    """The prompt of a row, for sampling; a trailing assistant turn is no part of it."""
    context = _context(row, where, tokenizer)
    if context is None and _has(row, "chosen") and _has(row, "rejected"):
        context = _common_prefix(*(_answer(row, key, where, None) for key in ("chosen", "rejected")), where)[0]
    if context is None and _has(row, "text"):
        context = _string(row, "text", where)
    if context is None:
        raise ValueError(f"{where}: needs prompt, messages, instruction or text; its columns are {_columns(row)}")
    if isinstance(context, str):
        return Segment(context, False)
    while context and context[-1]["role"] == "assistant":
        context = context[:-1]
    if not context:
        raise ValueError(f"{where}: the conversation has no turn that could be a prompt")
    text = Chat(context, len(context), where, _tools(row, where)).render(tokenizer, prompt=True)
    return Segment(text, False, template=True)


def pair(row: Row, where: str, tokenizer: Any) -> Pair:
    """What a row means as a preference pair."""
    if not (_has(row, "chosen") and _has(row, "rejected")):
        raise ValueError(f"{where}: a pair needs chosen and rejected; its columns are {_columns(row)}")
    context = _context(row, where, tokenizer)
    chosen, rejected = (_answer(row, key, where, context) for key in ("chosen", "rejected"))
    if context is None:
        context, chosen, rejected = _common_prefix(chosen, rejected, where)
    tools = _tools(row, where)
    sides = [_answered(context, a, where, tokenizer, tools) for a in (chosen, rejected)]
    shared = min((side[0] for side in sides), key=lambda segment: len(segment.text))
    for side in sides:  # of a header that only one of the answers continues, the rest goes with that answer
        rest = side[0].text[len(shared.text) :]
        side[:1] = [shared._replace(text=rest)] if rest else []
    return Pair([shared], *sides, _margin(row, where))


def judged(row: Row, where: str, tokenizer: Any) -> list[tuple[list[Segment], bool]]:
    """The answers of a row with their labels: one, or two for a pair. Of a conversation the last turn is judged."""
    key = _first(row, ("kto_tag", "label"))
    if key is None and _has(row, "chosen") and _has(row, "rejected"):
        p = pair(row, where, tokenizer)
        return [(p.prompt + p.chosen, True), (p.prompt + p.rejected, False)]
    if key is None:
        raise ValueError(
            f"{where}: needs label or kto_tag (true or false), or chosen and rejected; its columns are {_columns(row)}"
        )
    label = _truth(row[key], key, where)
    context, name = _context(row, where, tokenizer), _first(row, COMPLETION_KEYS)
    if _first(row, CHAT_KEYS) and context and context[-1]["role"] == "assistant":
        context, answer = context[:-1], context[-1:]
    elif name is not None and context is not None:
        answer = _answer(row, name, where, context)
    else:
        raise ValueError(f"{where}: no prompt with an answer to judge; its columns are {_columns(row)}")
    return [(_answered(context, answer, where, tokenizer, _tools(row, where)), label)]


def _answered(context: str | Turns, answer: Any, where: str, tokenizer: Any, tools: list | None) -> list[Segment]:
    """The prompt's segment, and then the answer's; the answer's assistant turns are scored."""
    if isinstance(context, str):
        return [Segment(context, False), Segment(answer, True)]
    if answer[0]["role"] != "assistant":
        raise ValueError(f"{where}: an answer must begin with an assistant turn, got role {answer[0]['role']!r}")
    return chat_segments(Chat(context + answer, len(context), where, tools), tokenizer)[0]


def _context(row: Row, where: str, tokenizer: Any) -> str | Turns | None:
    """What the answers of a row answer: text or messages; None when only the answers tell."""
    chat = _first(row, CHAT_KEYS)
    if chat is not None:
        return _messages(row, chat, where)
    if _has(row, "prompt"):
        return _messages(row, "prompt", where) if isinstance(row["prompt"], list) else _string(row, "prompt", where)
    if _has(row, "instruction"):
        query = _alpaca_query(row, where)
        if has_template(tokenizer):
            return [*_system(row, where), *_history(row, where), {"role": "user", "content": query}]
        if row.get("history") or row.get("system"):
            raise ValueError(f"{where}: system and history need a chat template, and the tokenizer has none")
        return query
    return None


def _answer(row: Row, key: str, where: str, context: str | Turns | None) -> Any:
    """An answer in the shape of its prompt."""
    value = row[key]
    if isinstance(context, str) or (context is None and isinstance(value, str)):
        return _string(row, key, where)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return as_messages([value] if isinstance(value, Mapping) else value, key, where)


def _common_prefix(chosen: str | Turns, rejected: str | Turns, where: str) -> tuple[Any, Any, Any]:
    """The prompt that both begin with, and what is left of each; text is cut where a word begins."""
    if type(chosen) is not type(rejected):
        raise ValueError(f"{where}: chosen and rejected must be both strings or both lists of messages")
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str):
        while n and not chosen[n - 1].isspace():
            n -= 1
        n -= n > 0 and chosen[n - 1] == " "  # a space belongs to the word behind it
    else:
        n = min(n, len(chosen) - 1, len(rejected) - 1)
        while n and not chosen[n]["role"] == rejected[n]["role"] == "assistant":
            n -= 1
    if not n:
        raise ValueError(f"{where}: no prompt, and chosen and rejected do not begin alike")
    return chosen[:n], chosen[n:], rejected[n:]


def _messages(row: Row, key: str, where: str) -> Turns:
    messages = as_messages(row[key], key, where)
    return messages if messages[0]["role"] == "system" else _system(row, where) + messages


def _system(row: Row, where: str) -> Turns:
    return [{"role": "system", "content": _string(row, "system", where)}] if row.get("system") else []


def _history(row: Row, where: str) -> Turns:
    try:
        history = parsed_json(row.get("history") or [], "history")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    turns: Turns = []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise ValueError(f"{where}: history must be a list of [user, assistant] pairs, got {turn!r:.60}")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns


def _alpaca_query(row: Row, where: str) -> str:
    parts = [_string(row, key, where) for key in ("instruction", "input") if row.get(key) not in (None, "")]
    return "\n".join(parts)


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The functions that the assistant may call: a list of schemas, or its JSON text."""
    if not row.get("tools"):
        return None
    try:
        tools = parsed_json(row["tools"], "tools")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise ValueError(f"{where}: tools must be a list of function schemas, got {tools!r:.60}")
    return tools or None


def _margin(row: Row, where: str) -> float | None:
    value = row.get("margin")
    try:
        margin = None if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = float("nan")
    if margin is not None and (isinstance(value, bool) or not abs(margin) < float("inf")):
        raise ValueError(f"{where}: margin must be a finite number, got {value!r:.60}")
    return margin


def _truth(value: Any, key: str, where: str) -> bool:
    """A truth value, also as 0 or 1 or in words, as a .csv has it."""
    words = {"true": True, "false": False, "1": True, "0": False}
    known = words.get(str(value).strip().lower()) if isinstance(value, (str, bool, int)) else None
    if known is None:
        raise ValueError(f"{where}: {key} must be true or false, got {value!r:.60}")
    return known


def _string(row: Row, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, got {value!r:.60} ({type(value).__name__})")
    return value


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _first(row: Row, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if _has(row, key)), None)


def _columns(row: Row) -> str:
    return ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items()) or "none"

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


class Pair(NamedTuple):
    """A prompt and its two answers."""

    prompt: list[Segment]
    chosen: list[Segment]
    rejected: list[Segment]
    margin: float | None


def pair(rows: Rows, i: int, tokenizer: Any) -> Pair:
    """Row `i` as a preference pair.

    {"prompt", "chosen", "rejected"}: strings, or lists of messages; without "prompt" it is what both begin with.
    {"instruction", "input"?, "chosen", "rejected"} and {"conversations" | "messages", "chosen", "rejected"}.
    """
    row = rows[i]
    if not ("chosen" in row and "rejected" in row):
        raise ValueError(f"{rows.where(i)}: a pair needs chosen and rejected; its columns are {_columns(row)}")
    context = _context(rows, i, tokenizer)
    chosen, rejected = (_answer(rows, i, key, context) for key in ("chosen", "rejected"))
    if context is None:
        context, chosen, rejected = _common_prefix(chosen, rejected, rows.where(i))
    sides = [answer_segments(context, answer, rows.where(i), tokenizer) for answer in (chosen, rejected)]
    (prompt, *chosen), (_, *rejected) = sides
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float)) or margin != margin):
        raise ValueError(f"{rows.where(i)}: margin must be a number, got {margin!r:.60}")
    return Pair([prompt], chosen, rejected, margin)


def judged(rows: Rows, i: int, tokenizer: Any) -> list[tuple[list[Segment], bool]]:
    """The answers of row `i` with their labels: one, or two for a pair.

    {"prompt", "completion" | "response" | "output", "label"}, an alpaca or a chat row with "kto_tag" or "label"
    (the last assistant turn is judged), or a pair.
    """
    row = rows[i]
    key = next((k for k in ("label", "kto_tag") if k in row), None)
    if key is None and "chosen" in row and "rejected" in row:
        p = pair(rows, i, tokenizer)
        return [(p.prompt + p.chosen, True), (p.prompt + p.rejected, False)]
    if key is None:
        raise ValueError(
            f"{rows.where(i)}: needs label or kto_tag (true or false), or chosen and rejected; "
            f"its columns are {_columns(row)}"
        )
    label = row[key]
    if not (isinstance(label, bool) or label in (0, 1)):
        raise ValueError(f"{rows.where(i)}: {key} must be true or false, got {label!r:.60}")
    context = _context(rows, i, tokenizer)
    name = next((k for k in COMPLETION_KEYS if k in row), None)
    if name is not None:
        answer = _answer(rows, i, name, context)
    elif isinstance(context, list) and context and context[-1]["role"] == "assistant":
        context, answer = context[:-1], context[-1:]
    else:
        raise ValueError(f"{rows.where(i)}: no answer to judge; its columns are {_columns(row)}")
    return [(answer_segments(context, answer, rows.where(i), tokenizer), bool(label))]


Turns = list[dict[str, Any]]


def answer_segments(context: str | Turns, answer: str | Turns, where: str, tokenizer: Any) -> list[Segment]:
    """The prompt's segment, and then the answer's; the answer's assistant turns are scored."""
    if isinstance(context, str):
        return [Segment(context, False), Segment(answer, True)]
    if answer[0]["role"] != "assistant":
        raise ValueError(f"{where}: an answer must begin with an assistant turn, got role {answer[0]['role']!r}")
    return _chat_segments(context + answer, len(context), where, tokenizer, keep_empty=True)


def _context(rows: Rows, i: int, tokenizer: Any) -> str | Turns | None:
    """What the answers of row `i` answer: text or messages; None when only the answers tell."""
    row = rows[i]
    if "prompt" in row:
        return _messages(rows, i, "prompt") if isinstance(row["prompt"], list) else _string(rows, i, "prompt")
    for key in ("messages", "conversations"):
        if key in row:
            return _messages(rows, i, key)
    if "instruction" in row:
        if has_template(tokenizer):
            return _alpaca_messages(rows, i)
        return _alpaca_query(rows, i)
    return None


def _answer(rows: Rows, i: int, key: str, context: str | Turns | None) -> str | Turns:
    """An answer in the shape of its prompt."""
    value = rows[i][key]
    if isinstance(value, str):
        return value if context is None or isinstance(context, str) else [{"role": "assistant", "content": value}]
    if isinstance(context, str):
        raise ValueError(f"{rows.where(i)}: {key} must be a string as its prompt is, got {value!r:.60}")
    if isinstance(value, dict):
        value = [value]
    return _as_messages(value, key, rows.where(i))


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
        while n and (n == len(chosen) or n == len(rejected) or not _answers(chosen[n], rejected[n])):
            n -= 1
    if not n:
        raise ValueError(f"{where}: no prompt, and chosen and rejected do not begin alike")
    return chosen[:n], chosen[n:], rejected[n:]


def _answers(*messages: dict[str, Any]) -> bool:
    return all(m["role"] == "assistant" for m in messages)


def _chat_segments(
    messages: Turns, scored_from: int, where: str, tokenizer: Any, *, keep_empty: bool = False
) -> list[Segment]:
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
    return segments if keep_empty else [s for s in segments if s.text]


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


def _messages(rows: Rows, i: int, key: str) -> Turns:
    return _as_messages(rows[i][key], key, rows.where(i))


ROLES = {"human": "user", "gpt": "assistant"}  # sharegpt's names


def _as_messages(value: Any, key: str, where: str) -> Turns:
    """Chat messages; sharegpt's {from, value} become {role, content}."""
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        if all("role" in m for m in value):
            return value
        if all("from" in m and "value" in m for m in value):
            return [{"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in value]
    raise ValueError(f"{where}: {key} must be a list of {{role, content}} objects, got {value!r:.80}")


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

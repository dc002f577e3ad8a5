"""LLaMA-Factory's `template:` names as chat templates (Jinja), for tokenizers that bring none.

A tokenizer's own template wins when it is of the family that the name means; a name of another family replaces it.
None and "empty" leave the tokenizer as it is: its own template, or plain text.

Turns are written with {content}, {bos} and {eos}; `fold` puts the system text into the first user turn.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from dataclasses import dataclass
from typing import Any

from rlhf_fast.trainers.config_types import nearest

PLAIN = ("empty",)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """How a family writes its turns.

    Args:
        marks: any of these in a tokenizer's own template shows that it is of this family; none: it never is.
        user, assistant, header: the turns, and what comes before an assistant's text. Without `user` the family is
            known by its marks only, and the tokenizer must bring the template.
        system: the system turn; or `fold`: {system} and {content} of the first user turn.
        default_system: the system text of a conversation without one.
    """

    marks: tuple[str, ...]
    user: str = ""
    assistant: str = ""
    header: str = ""
    system: str | None = None
    fold: str | None = None
    default_system: str | None = None
    bos: str = ""

    def jinja(self) -> str:
        """The chat template."""
        first = "messages[0].role == 'system'"
        out = "{% if tools %}{{ raise_exception('this template knows no tools') }}{% endif %}"
        out += _write(self.bos)
        if self.default_system is not None:
            text = _write(self.system or "", content=json.dumps(self.default_system))
            out += f"{{% if not (messages and {first}) %}}{text}{{% endif %}}"
        if self.fold is not None:
            out += f"{{% set system = messages[0].content if messages and {first} else none %}}"
            out += "{% if system is not none and messages[1:] and messages[1].role != 'user' %}"
            out += "{{ raise_exception('a user turn must follow the system turn') }}{% endif %}"
            content = _write(self.user, content="content")
            user = "{% set content = m.content %}{% if loop.index0 == 1 and system is not none %}"
            user += "{% set content %}" + _write(self.fold, content="m.content", system="system") + "{% endset %}"
            user += "{% endif %}" + content
            system = (
                "{% if not loop.first %}{{ raise_exception('only the first turn may be a system turn') }}{% endif %}"
            )
        else:
            user = _write(self.user)
            system = _write(self.system or "{{ raise_exception('this template knows no system turn') }}")
        out += "{% for m in messages %}"
        out += f"{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}"
        out += f"{{% elif m.role == 'assistant' and not m.tool_calls %}}{_write(self.assistant)}"
        out += "{% else %}{{ raise_exception('this template knows no ' + m.role + ' turns or tool calls') }}{% endif %}"
        out += "{% endfor %}{% if add_generation_prompt %}" + _write(self.header) + "{% endif %}"
        return out


def _write(pattern: str, content: str = "m.content", system: str = "") -> str:
    """A pattern as Jinja expressions; trailing newlines survive, since they are in strings."""
    names = {"{content}": content, "{system}": system, "{bos}": "bos_token | default('')", "{eos}": "eos_token"}
    parts = [part for part in re.split(r"(\{\w+\})", pattern) if part]
    return "".join(f"{{{{ {names.get(part) or json.dumps(part, ensure_ascii=False)} }}}}" for part in parts)


def _roles(role: str, end: str, roles: dict[str, str] | None = None, **options: Any) -> Format:
    """A family whose turns differ in the role's name only: `role` with {role}, the content, `end`."""
    names = {"system": "system", "user": "user", "assistant": "assistant"} | (roles or {})
    turn = {name: role.replace("{role}", word) for name, word in names.items()}
    options = {"system": turn["system"] + "{content}" + end} | options
    texts = {name: turn[name] + "{content}" + end for name in ("user", "assistant")}
    return Format(header=turn["assistant"], **texts, **options)


def _chatml(default_system: str | None = None) -> Format:
    return _roles("<|im_start|>{role}\n", "<|im_end|>\n", marks=("<|im_start|>",), default_system=default_system)


_HELPFUL = "You are a helpful assistant."
_QWEN = "You are Qwen, created by Alibaba Cloud. " + _HELPFUL
_VICUNA = "A chat between a curious user and an artificial intelligence assistant. "
_VICUNA += "The assistant gives helpful, detailed, and polite answers to the user's questions."
_ALPACA = "Below is an instruction that describes a task. "
_ALPACA += "Write a response that appropriately completes the request."
_ANGLE = dict(system=None, fold="{system}\n\n{content}", bos="{bos}")

FORMATS = {
    "default": Format(
        (),
        user="Human: {content}{eos}\n",
        assistant="Assistant:{content}{eos}\n",
        header="Assistant:",
        system="System: {content}{eos}\n",
    ),
    "chatml": _chatml(),
    "qwen": _chatml(_QWEN),
    "qwen2": _chatml(_HELPFUL),
    "qwen2.5": _chatml(_QWEN),
    "qwen3": _chatml(),
    "qwen3_nothink": _chatml(),
    "yi": _chatml(),
    "llama2": Format(
        ("[INST]",),
        user="{bos}[INST] {content} [/INST]",
        assistant=" {content} {eos}",
        fold="<<SYS>>\n{system}\n<</SYS>>\n\n{content}",
    ),
    "mistral": Format(
        ("[INST]",),
        user="[INST] {content} [/INST]",
        assistant=" {content}{eos}",
        fold="{system}\n\n{content}",
        bos="{bos}",
    ),
    "llama3": _roles(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", marks=("<|start_header_id|>",), bos="{bos}"
    ),
    "llama4": _roles("<|header_start|>{role}<|header_end|>\n\n", "<|eot|>", marks=("<|header_start|>",), bos="{bos}"),
    "gemma": _roles(
        "<start_of_turn>{role}\n", "<end_of_turn>\n", {"assistant": "model"}, marks=("<start_of_turn>",), **_ANGLE
    ),
    "phi": _roles("<|{role}|>\n", "<|end|>\n", marks=("<|end|>",)),
    "phi4": _roles("<|im_start|>{role}<|im_sep|>", "<|im_end|>", marks=("<|im_sep|>",)),
    "zephyr": _roles("<|{role}|>\n", "{eos}\n", marks=("<|user|>",)),
    "granite3": _roles("<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n", marks=("<|start_of_role|>",)),
    "cohere": _roles(
        "<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"},
        marks=("<|START_OF_TURN_TOKEN|>",),
        bos="{bos}",
    ),
    "deepseek": Format(
        ("Assistant:",),
        user="User: {content}\n\n",
        assistant="Assistant: {content}{eos}",
        header="Assistant:",
        system="{content}\n\n",
        bos="{bos}",
    ),
    "deepseek3": Format(
        ("<｜Assistant｜>",),
        user="<｜User｜>{content}",
        assistant="<｜Assistant｜>{content}{eos}",
        header="<｜Assistant｜>",
        system="{content}",
        bos="{bos}",
    ),
    "vicuna": Format(
        ("ASSISTANT:",),
        user="USER: {content} ",
        assistant="ASSISTANT: {content}{eos}",
        header="ASSISTANT:",
        system="{content} ",
        default_system=_VICUNA,
        bos="{bos}",
    ),
    "alpaca": Format(
        ("### Instruction:",),
        user="### Instruction:\n{content}\n\n",
        assistant="### Response:\n{content}{eos}\n\n",
        header="### Response:\n",
        system="{content}\n\n",
        default_system=_ALPACA,
        bos="{bos}",
    ),
    # The tokenizer brings these.
    "deepseekr1": Format(("<｜Assistant｜>",)),
    "glm4": Format(("<|assistant|>",)),
    "gpt_oss": Format(("<|channel|>",)),
    "mistral_small": Format(("[INST]",)),
    "smollm": Format(("<|im_start|>",)),
    "smollm2": Format(("<|im_start|>",)),
}
FORMATS |= {name: FORMATS["gemma"] for name in ("gemma2", "gemma3")} | {"phi3": FORMATS["phi"]}


def check_name(name: str | None) -> None:
    """Raise ValueError naming the nearest known template when `name` is none."""
    if name and name not in PLAIN and name not in FORMATS:
        hint = nearest(name, [*FORMATS, *PLAIN]) or "."
        known = ", ".join([*PLAIN, *FORMATS])
        raise ValueError(
            f"unknown template {name!r}{hint} Known: {known}. "
            "Without `template`, the tokenizer's own chat template is used"
        )


def apply_template(tokenizer: Any, name: str | None) -> Any:
    """Give the tokenizer the chat template that `name` means, unless its own is of that family; returns the tokenizer.

    Raises: ValueError on an unknown name, or on one that needs the tokenizer's own template when it has none.
    """
    check_name(name)
    if not name or name in PLAIN:
        return tokenizer
    template, own = FORMATS[name], getattr(tokenizer, "chat_template", None)
    if own is not None and any(mark in str(own) for mark in template.marks):
        log.info("template %s: the tokenizer's own chat template, which is of that family, is used", name)
        return tokenizer
    if not template.user:
        raise ValueError(f"template {name!r} must come with the tokenizer, and its chat template is {own!r:.60}")
    if own is not None:
        warnings.warn(f"template {name!r} replaces the tokenizer's own chat template, of another family", stacklevel=2)
    missing = [m for m in template.marks if m.startswith("<") and not _is_token(tokenizer, m)]
    if missing:
        warnings.warn(f"template {name!r}: {missing[0]} is no token of this tokenizer but several", stacklevel=2)
    tokenizer.chat_template = template.jinja()
    log.info("template %s: set on a tokenizer without a chat template of that family", name)
    return tokenizer


def _is_token(tokenizer: Any, text: str) -> bool:
    index = tokenizer.convert_tokens_to_ids(text)
    return index is not None and index != tokenizer.unk_token_id

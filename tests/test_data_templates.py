"""`template:` names: the public formats, whose template wins, and how conversations are scored through them."""

from __future__ import annotations

import logging

import pytest
from test_data import CHAT_TEMPLATE, WORDS, word_tokenizer
from test_data_chat import turns

from rlhf_fast.trainers.data.encoder import Encoder
from rlhf_fast.trainers.data.forms import supervised
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.templates import FORMATS, apply_template, check_name
from rlhf_fast.trainers.data.tokenize import tokenize_sft

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:template .* is no token of this tokenizer")

TALK = turns("s S / u U1 / a A1 / u U2")
ROLE = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {  # as the models' cards have them, and as LLaMA-Factory writes "default"
    "default": "System: S</s>\nHuman: U1</s>\nAssistant:A1</s>\nHuman: U2</s>\nAssistant:",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]",
    "llama3": "<s>" + ROLE.format("system") + "S<|eot_id|>" + ROLE.format("user") + "U1<|eot_id|>"
    + ROLE.format("assistant") + "A1<|eot_id|>" + ROLE.format("user") + "U2<|eot_id|>" + ROLE.format("assistant"),
    "mistral": "<s>[INST] S\n\nU1 [/INST] A1</s>[INST] U2 [/INST]",
    "gemma": "<s><start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n<|assistant|>\n",
    "deepseek": "<s>S\n\nUser: U1\n\nAssistant: A1</s>User: U2\n\nAssistant:",
    "deepseek3": "<s>S<｜User｜>U1<｜Assistant｜>A1</s><｜User｜>U2<｜Assistant｜>",
    "vicuna": "<s>S USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "alpaca": "<s>S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n### Response:\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
}  # fmt: skip
WRITTEN = [name for name, template in FORMATS.items() if template.user]


def render(name, messages, prompt=False):
    return apply_template(word_tokenizer(), name).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_public_formats(name):
    assert render(name, TALK, prompt=True) == EXPECTED[name]


def test_default_system_texts():
    start = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert render("qwen", TALK[1:2]) == start + "<|im_start|>user\nU1<|im_end|>\n"
    assert render("qwen3", TALK[1:2]) == "<|im_start|>user\nU1<|im_end|>\n"
    assert render("alpaca", TALK[1:2]).startswith("<s>Below is an instruction that describes a task. Write a response")
    assert "Qwen" not in render("qwen", TALK)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_turn_can_be_scored_apart(name):
    """The text before an answer is the prompt that sampling uses, and only answers are scored."""
    tokenizer = apply_template(word_tokenizer(), name)
    example = supervised({"messages": [*TALK, {"role": "assistant", "content": "A2"}]}, "x", tokenizer)
    assert not example.last_only
    assert [s.scored for s in example.segments] == [False, True] * 2
    assert "".join(s.text for s in example.segments[:-1]) == render(name, TALK, prompt=True)
    answers = [s.text for s in example.segments if s.scored]
    assert all(a.strip().startswith(text) for a, text in zip(answers, ("A1", "A2"), strict=True))
    assert not any("U2" in a for a in answers)
    ids, scored = Encoder(tokenizer).many([example.segments])[0]
    assert ids[scored][-1] == 3
    assert ids.tolist().count(2) == render(name, TALK).count("<s>")  # the template's own BOS, and no other


def test_names():
    for name in (None, "", "empty", *FORMATS):
        check_name(name)
    with pytest.raises(
        ValueError, match=r"unknown template 'qwenn'; did you mean 'qwen'\? Known: empty, default, chatml"
    ):
        check_name("qwenn")
    with pytest.raises(ValueError, match=r"unknown template 'xyzzy'\. Known"):
        apply_template(word_tokenizer(), "xyzzy")


def test_whose_template_wins(caplog):
    caplog.set_level(logging.INFO)
    own = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    for name in (None, "empty", "qwen", "chatml"):
        assert apply_template(word_tokenizer(template=own), name).chat_template == own
    assert "template qwen: the tokenizer's own chat template" in caplog.text
    with pytest.warns(UserWarning, match="template 'default' replaces the tokenizer's own chat template"):
        assert "Human: " in apply_template(word_tokenizer(template=own), "default").chat_template
    with pytest.warns(UserWarning, match="template 'alpaca' replaces the tokenizer's own chat template"):
        replaced = apply_template(word_tokenizer(template=own), "alpaca")
    assert "### Instruction:" in replaced.chat_template
    for name in (None, "empty"):
        assert apply_template(word_tokenizer(), name).chat_template is None
    with pytest.raises(ValueError, match="template 'glm4' must come with the tokenizer, and its chat template is None"):
        apply_template(word_tokenizer(), "glm4")
    assert apply_template(word_tokenizer(template=CHAT_TEMPLATE + "<|assistant|>"), "glm4")


@pytest.mark.filterwarnings("default")
def test_markers_that_are_no_tokens_are_named():
    with pytest.warns(UserWarning, match=r"template 'qwen': <\|im_start\|> is no token of this tokenizer"):
        apply_template(word_tokenizer(), "qwen")


def test_template_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = apply_template(word_tokenizer(), "llama3")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(TALK, tokenize=False) == tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qwen", {"messages": TALK + turns("t b / a A")}, "knows no tool turns"),
        ("qwen", {"messages": TALK + turns("a A"), "tools": [{"name": "f"}]}, "knows no tools"),
        ("mistral", {"messages": turns("s S / a A")}, "a user turn must follow the system turn"),
        ("mistral", {"messages": turns("u U / s S / u U / a A")}, "only the first turn may be a system turn"),
        (
            "qwen",
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
            "assistant turns or tool calls",
        ),
    ],
)
def test_what_a_format_cannot_say_names_the_row(name, row, message):
    tokenizer = apply_template(word_tokenizer(), name)
    with pytest.raises(ValueError, match=f"^rows, row 1: the chat template failed: .*{message}"):
        tokenize_sft(Rows.from_list([row]), tokenizer, max_length=999)


def test_alpaca_rows_go_through_the_named_template():
    tokenizer = apply_template(word_tokenizer(), "zephyr")
    data = tokenize_sft(Rows.from_list([{"instruction": "a", "output": "b"}]), tokenizer, max_length=9)
    ids, scored = data[0]["input_ids"], data[0]["scored"]
    assert [WORDS[i] for i in ids[~scored]] == ["<|user|>", "a", "</s>", "<|assistant|>"]
    assert [WORDS[i] for i in ids[scored]] == ["b", "</s>"]

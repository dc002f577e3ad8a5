"""Conversations: dialects of messages, which turns are scored, templates that rewrite history, tools."""

from __future__ import annotations

import pytest
from test_data import CHAT_TEMPLATE, encode, ids_of, marked, word_tokenizer

from rlhf_fast.trainers.data.pairs import tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import tokenize_prompts, tokenize_sft

pytest.importorskip("transformers")

# Earlier answers lose their first word, as Qwen3's lose their thoughts.
REWRITING = (
    "{% for m in messages %}<|{{ m['role'] }}|> "
    "{% if m['role'] == 'assistant' %}{{ m['content'] if loop.last else m['content'].split(' ')[1:] | join(' ') }} </s>"
    "{% else %}{{ m['content'] }}{% endif %} {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKED = REWRITING.replace("{{ m['content'] if", "{% generation %}{{ m['content'] if").replace(
    "join(' ') }} </s>", "join(' ') }} {% endgeneration %}</s> nl"
)
TOOLS = (
    "{% if tools %}<|system|> {{ tools | length }} {% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }} {{ call.function.arguments.x }}{% endfor %}"
    "{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def turns(text):
    """u a / a b: a user turn "a", then an assistant turn "b"."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    parts = [part.split(" ", 1) for part in text.split(" / ")]
    return [{"role": roles[role], "content": content} for role, content in parts]


def test_a_template_that_rewrites_history_scores_the_last_turn():
    rows = Rows.from_list([{"messages": turns("u a / a b c / u d / a e f")}, {"messages": turns("u a / a b c")}])
    with pytest.warns(UserWarning, match="^1 conversations are scored in their last turn only"):
        data = tokenize_sft(rows, word_tokenizer(template=REWRITING), max_length=100)
    assert marked(data, 0) == "<|user|> a <|assistant|> c </s> <|user|> d <|assistant|> e* f* </s>*"
    assert marked(data, 1) == "<|user|> a <|assistant|> b* c* </s>*"
    assert data.stats.last_turn_only == 1
    assert "1 last turn only" in str(data.stats)


def test_generation_marks_are_believed():
    """Every turn is scored with the end of turn behind it; what follows the last one is left out."""
    data = encode({"messages": turns("u a / a b c / u d / a e f")}, word_tokenizer(template=MARKED))
    text = "<|user|> a <|assistant|> c* </s>* nl <|user|> d <|assistant|> e* f* </s>*"
    assert marked(data) == text
    assert data.stats.last_turn_only == 0


def test_a_template_without_any_cut_is_an_error():
    template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<|user|> {% endif %}"
    )
    with pytest.raises(ValueError, match=r"row 1: the chat template rewrites what comes before turn 2.*generation"):
        encode({"messages": turns("u a / a b")}, word_tokenizer(template=template))


# EOS stands only where a conversation ends, as Phi-3's does.
ENDING = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} nl {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% else %}</s>{% endif %}"
)
# The prompt opens a thought (here with nl), as DeepSeek-R1's does; what comes before a </s> in an answer is dropped.
OPENING = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'].split('</s> ')[-1] }}"
    "{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> nl {% endif %}"
)


def test_eos_only_at_the_end_of_a_conversation():
    data = encode({"messages": turns("u a / a b / u c / a d")}, word_tokenizer(template=ENDING))
    assert marked(data) == "<|user|> a nl <|assistant|> b* nl* <|user|> c nl <|assistant|> d* nl* </s>*"
    assert data.stats.last_turn_only == 0


def test_a_header_that_opens_a_thought():
    tokenizer = word_tokenizer(template=OPENING)
    talk = turns("u a / a b / u c / a nl d")  # the second answer goes on as the prompt began, the first does not
    data = encode({"messages": talk}, tokenizer)
    assert marked(data) == "<|user|> a <|assistant|> b* </s>* <|user|> c <|assistant|> nl d* </s>*"
    near = encode({"messages": turns("u a / a nx")}, tokenizer)  # begins as the word nl does
    assert marked(near) == "<|user|> a <|assistant|> <unk>* </s>*"
    with pytest.raises(
        ValueError, match="row 1: the chat template rewrites what comes before turn 2 or drops part of it"
    ):
        encode({"messages": turns("u a / a b </s> c")}, tokenizer)


def test_a_pair_of_which_one_answer_goes_on_with_the_header():
    row = {"prompt": turns("u a"), "chosen": "nl b", "rejected": "c"}
    for sides in (("chosen", "rejected"), ("rejected", "chosen")):
        swapped = {"prompt": row["prompt"], "chosen": row[sides[0]], "rejected": row[sides[1]]}
        data = tokenize_pairs(Rows.from_list([swapped]), word_tokenizer(template=OPENING), max_length=99)
        got = {sides[0]: marked(data.chosen), sides[1]: marked(data.rejected)}
        assert got == {
            "chosen": "<|user|> a <|assistant|> nl b* </s>*",
            "rejected": "<|user|> a <|assistant|> c* </s>*",
        }


def test_of_an_opening_assistant_turn_only_its_own_text_is_scored():
    """Not the header, nor the system text that the template writes by itself; with tools or without."""
    talk = turns("a b / u a / a d")
    text = "<|assistant|> b* </s>* nl <|user|> a <|assistant|> d* </s>* nl"
    assert marked(encode({"messages": talk}, word_tokenizer(template=CHAT_TEMPLATE))) == text
    alone = encode({"messages": talk[:1]}, word_tokenizer(bos=True, template="<s> e " + CHAT_TEMPLATE))
    assert marked(alone) == "<s> e <|assistant|> b* </s>* nl"
    called = encode({"messages": talk, "tools": [{"name": "b"}]}, word_tokenizer(template=TOOLS))
    assert marked(called) == "<|system|> <unk> <|assistant|> b* </s>* <|user|> a <|assistant|> d* </s>*"
    ending = marked(encode({"messages": talk}, word_tokenizer(template=ENDING)))
    assert ending == "<|assistant|> b* nl* <|user|> a nl <|assistant|> d* nl* </s>*"
    opening = marked(encode({"messages": talk}, word_tokenizer(template=OPENING)))  # its header opens a thought
    assert opening == "<|assistant|> b* </s>* <|user|> a <|assistant|> d* </s>*"


def test_an_opening_turn_that_the_template_writes_otherwise():
    """Its text cannot be told from the header's: a later turn is scored without it, and it alone is an error."""
    template = "{% if messages[0].role == 'assistant' %}e {% endif %}" + CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ ' f' if loop.first and m['role'] == 'assistant' }}"
    )
    with pytest.warns(UserWarning, match="^1 conversations are scored in their last turn only"):
        data = encode({"messages": turns("a b / u a / a d")}, word_tokenizer(template=template))
    assert marked(data) == "e <|assistant|> b f </s> nl <|user|> a <|assistant|> d* </s>* nl"
    with pytest.raises(ValueError, match="rewrites what comes before turn 1"):
        encode({"messages": turns("a b")}, word_tokenizer(template=template))


def test_mask_history():
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE)
    last = "<|user|> a <|assistant|> b </s> nl <|user|> c <|assistant|> d* </s>* nl"
    row = {"messages": turns("u a / a b / u c / a d")}
    assert marked(encode(row, tokenizer, mask_history=True)) == last
    alpaca = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert marked(encode(alpaca, tokenizer, mask_history=True)) == last
    assert marked(encode(alpaca, tokenizer)) == last.replace("b </s>", "b* </s>*")
    assert encode(row, tokenizer, mask_history=True).stats.last_turn_only == 0  # asked for, so no warning


def test_sharegpt_turns_and_its_system_column():
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert marked(encode({"conversations": talk}, tokenizer)) == "<|user|> a <|assistant|> b* </s>* nl"
    with_system = "<|system|> e <|user|> a <|assistant|> b* </s>* nl"
    assert marked(encode({"conversations": talk, "system": "e"}, tokenizer)) == with_system
    turn = {"from": "system", "value": "e"}
    assert marked(encode({"conversations": [turn, *talk], "system": "f"}, tokenizer)) == with_system
    prompts, _ = tokenize_prompts(Rows.from_list([{"conversations": talk}]), tokenizer, max_length=9)
    assert prompts[0].ids == ids_of("<|user|> a <|assistant|>")


def test_tool_turns_are_not_scored_and_calls_are():
    tokenizer = word_tokenizer(template=TOOLS)
    talk = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "b", "arguments": {"x": "c"}}'},
        {"from": "observation", "value": "d"},
        {"from": "gpt", "value": "e"},
    ]
    row = {"conversations": talk, "tools": '[{"name": "b"}]'}
    # of <|system|> 1 the number and of <|tool|> all is unknown to this vocabulary
    text = "<|system|> <unk> <|user|> a <|assistant|> b* c* </s>* <unk> d <|assistant|> e* </s>*"
    assert marked(encode(row, tokenizer)) == text
    calls = [{"type": "function", "function": {"name": "b", "arguments": {"x": "c"}}}]
    same = turns("u a / a b / t d / a e")
    same[1] = {"role": "assistant", "content": None, "tool_calls": calls}
    assert marked(encode({"messages": same, "tools": [{"name": "b"}]}, tokenizer)) == text


def test_arrow_nulls_and_text_parts():
    tokenizer = word_tokenizer(template=TOOLS)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": "c", "name": None},
    ]
    assert marked(encode({"messages": messages, "prompt": None}, tokenizer)) == "<|user|> a b <|assistant|> c* </s>*"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "conversations: unknown role 'alien': expected one of human",
        ),
        ({"conversations": [{"from": "gpt"}]}, "content of the assistant turn must be a string, got None"),
        ({"messages": [{"content": "a"}]}, r"messages: must be a list of \{role, content\}"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of the user turn must be a string, got 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "got a part that is not text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "a function_call turn must be JSON: Expecting"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, r'must hold \{"name", "arguments"\}'),
        ({"messages": turns("u a / a b"), "tools": "{"}, "tools must be JSON"),
        ({"messages": turns("u a / a b"), "tools": "3"}, "tools must be a list of function schemas, got 3"),
        ({"messages": turns("u a"), "system": 3}, "system must be a string, got 3"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history must be JSON"),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            r"history must be a list of \[user, assistant\] pairs",
        ),
        ({"instruction": 1, "output": "b"}, "instruction must be a string, got 1"),
    ],
)
def test_bad_conversations_name_the_row(row, message):
    rows, tokenizer = Rows.from_list([{"text": "a"}, row]), word_tokenizer(template=CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=f"^rows, row 2: .*{message}"):
        tokenize_sft(rows, tokenizer, max_length=9)

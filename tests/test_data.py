"""Readers, the forms of rows, tokenisation at the boundary, truncation, the collator."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from rlhf_fast.trainers.data.readers import Rows, read_rows
from rlhf_fast.trainers.data.tokenize import (
    Collator,
    check_prompt_vocabulary,
    check_vocabulary,
    tokenize_prompts,
    tokenize_sft,
)

pytest.importorskip("transformers")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} </s> nl{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
WORDS = ["<unk>", "<pad>", "<s>", "</s>", "nl", "<|user|>", "<|assistant|>", "<|system|>", *"abcdefghij"]


def word_tokenizer(*, bos=False, pad_is_eos=False, template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text):
    return [WORDS.index(w) for w in text.split()]


def encode(row, tokenizer=None, max_length=100, **kwargs):
    return tokenize_sft(Rows.from_list([row]), tokenizer or word_tokenizer(), max_length=max_length, **kwargs)


def marked(dataset, i=0):
    """The example with a * on every scored token."""
    row = dataset[i]
    return " ".join(WORDS[t] + "*" * int(s) for t, s in zip(row["input_ids"], row["scored"], strict=True))


# ---- readers


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_jsonl_with_bom_blank_lines_crlf_and_line_separators(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"x": 1}\r\n\r\n   \n{"x": "a\u2028b\x85c"}\n\n{"x": 3}')
    rows = read_rows([path])
    assert [r["x"] for r in rows] == [1, "a\u2028b\x85c", 3]
    assert [rows.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (1, 4, 6)]


def test_json_array_lines_in_json_and_folders(tmp_path):
    array = write(tmp_path / "b.json", '\ufeff [{"x": 1},\n {"x": 2}]')
    lines = write(tmp_path / "c.json", '{"x": 3}\n{"x": 4}\n')
    (tmp_path / "sub").mkdir()
    deep = write(tmp_path / "sub" / "d.jsonl", '{"x": 5}')
    write(tmp_path / "readme.txt", "no data")
    write(tmp_path / "dataset_info.json", "{}")
    rows = read_rows([tmp_path])
    assert [r["x"] for r in rows] == [1, 2, 3, 4, 5]
    assert [rows.where(i) for i in (1, 3, 4)] == [f"{array}, row 2", f"{lines}, line 2", f"{deep}, line 1"]
    assert [r["x"] for r in read_rows([lines, array])] == [3, 4, 1, 2]
    assert [r["x"] for r in read_rows([tmp_path], limit=3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n\n{"x": \n', r"a\.jsonl, line 3: not valid JSON: Expecting value"),
        ("a.jsonl", b'{"x": 1}\n[1, 2]\n', r"a\.jsonl, line 2: expected an object \{...\}, got a list"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.json", b'[{"x": 1},\n{"x" 2}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", b'[{"x": 1}, "y"]', r"a\.json, row 2: expected an object \{...\}, got a string"),
        ("a.jsonl", b"\n  \n", r"empty: no row in .*a\.jsonl"),
        ("a.json", b"[]", r"empty: no row in .*a\.json"),
        ("a.txt", b"x\n1\n", r"a\.txt: expected one of \.json, \.jsonl, .*, got \.txt"),
    ],
)
def test_reader_errors_name_file_line_and_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows([tmp_path / name]))


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_rows([tmp_path / "nowhere.jsonl"])
    with pytest.raises(ValueError, match="holds no"):
        read_rows([tmp_path])
    with pytest.raises(ValueError, match="empty"):
        read_rows([])


# ---- forms


@pytest.mark.parametrize("key", ["completion", "response", "output"])
def test_prompt_and_completion(key):
    assert marked(encode({"prompt": "a b", key: "c d"})) == "a b c* d* </s>*"


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_bos_once_and_eos_once(pad_is_eos):
    tokenizer = word_tokenizer(bos=True, pad_is_eos=pad_is_eos)
    assert marked(encode({"prompt": "a", "completion": "b"}, tokenizer)) == "<s> a b* </s>*"
    assert marked(encode({"prompt": "<s> a", "completion": "b </s>"}, tokenizer)) == "<s> a b* </s>*"
    assert marked(encode({"text": "a </s> b"}, tokenizer)) == "<s> a* </s>* b* </s>*"
    assert marked(encode({"prompt": "", "completion": "b"}, tokenizer)) == "<s> b* </s>*"
    assert marked(encode({"prompt": "a", "completion": ""}, tokenizer)) == "<s> a </s>*"


def test_no_merge_over_the_boundary():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    core = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [2]
    row = encode({"prompt": "a", "completion": "ba" + "b"}, tokenizer)[0]
    assert row["input_ids"].tolist() == [0, 1, 2, 3]
    assert row["scored"].tolist() == [False, True, True, True]


def test_messages_score_assistant_turns_up_to_their_eos():
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE, bos=True)  # a template brings its own BOS, here none
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    text = "<|system|> a <|user|> b <|assistant|> c* d* </s>* nl <|user|> e <|assistant|> f* </s>* nl"
    assert marked(encode({"messages": messages}, tokenizer)) == text
    last = text.replace("c* d* </s>* nl", "c d </s> nl")
    for completion in ("f", [messages[-1]]):
        assert marked(encode({"prompt": messages[:-1], "completion": completion}, tokenizer)) == last


def test_messages_whose_template_lacks_eos_get_one():
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE.replace("</s> nl", ""))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert marked(encode({"messages": messages}, tokenizer)) == "<|user|> a <|assistant|> b* </s>*"


def test_alpaca_with_and_without_a_template():
    row = {"instruction": "a b", "input": "c", "output": "d"}
    assert marked(encode(row)) == "a b c d* </s>*"
    assert marked(encode({**row, "input": ""})) == "a b d* </s>*"
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE)
    assert marked(encode(row, tokenizer)) == "<|user|> a b c <|assistant|> d* </s>* nl"
    full = {**row, "system": "e", "history": [["f", "g"]]}
    assert marked(encode(full, tokenizer)) == (
        "<|system|> e <|user|> f <|assistant|> g* </s>* nl <|user|> a b c <|assistant|> d* </s>* nl"
    )
    with pytest.raises(ValueError, match=r"row 1.*chat template"):
        encode(full)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, r"row 1: needs prompt.*its columns are question, answer"),
        ({"prompt": "a"}, r"its columns are prompt"),
        ({}, r"its columns are none"),
        ({"prompt": 3, "completion": "b"}, r"prompt must be a string, got 3 \(int\)"),
        ({"prompt": "a", "completion": None}, r"its columns are prompt, completion \(null\)"),
        ({"messages": "a"}, r"messages must be a list of \{role, content\}"),
        ({"messages": []}, r"messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"chat template|no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"tokenizer has none"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        encode(row)


def test_tokenizer_without_eos_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        encode({"text": "a"}, tokenizer)


def test_train_on_prompt():
    assert marked(encode({"prompt": "a b", "completion": "c"}, train_on_prompt=True)) == "a* b* c* </s>*"


# ---- lengths


def test_overlong_completion_is_cut_without_eos():
    data = encode({"prompt": "a b", "completion": "c d e f"}, max_length=5)
    assert marked(data) == "a b c* d* e*"
    assert data.stats.truncated_completions == 1
    assert marked(encode({"prompt": "a b", "completion": "c d"}, max_length=5)) == "a b c* d* </s>*"


def test_overlong_prompt_policies():
    rows = Rows.from_list([{"prompt": "a b c d", "completion": "e"}, {"prompt": "a", "completion": "b"}])
    tokenizer = word_tokenizer()
    dropped = tokenize_sft(rows, tokenizer, max_length=4, overlong_prompt="drop")
    assert [marked(dropped, i) for i in range(len(dropped))] == ["a b* </s>*"]
    assert (dropped.stats.rows, dropped.stats.kept, dropped.stats.dropped_overlong_prompt) == (2, 1, 1)
    assert "1 dropped (overlong prompt)" in str(dropped.stats)
    assert dropped.origin.tolist() == [1]
    cut = tokenize_sft(rows, tokenizer, max_length=4, overlong_prompt="truncate")
    assert marked(cut) == "c d e* </s>*"
    assert (cut.stats.truncated_prompts, cut.stats.truncated_completions) == (1, 0)
    with pytest.raises(ValueError, match=r"row 1: the prompt of 4 tokens leaves no room.*cutoff_len=4"):
        tokenize_sft(rows, tokenizer, max_length=4, overlong_prompt="error")
    with pytest.raises(ValueError, match="drop, truncate or error"):
        tokenize_sft(rows, tokenizer, max_length=4, overlong_prompt="ignore")
    with pytest.raises(ValueError, match="no row is left"):
        tokenize_sft(Rows.from_list([rows[0]]), tokenizer, max_length=4)


def test_truncation_keeps_bos_and_splits_the_room():
    row = {"prompt": "a b c d e f", "completion": "g h i j g h"}
    data = encode(row, word_tokenizer(bos=True), max_length=6, overlong_prompt="truncate")
    assert marked(data) == "<s> e f g* h* i*"
    assert (data.stats.truncated_prompts, data.stats.truncated_completions) == (1, 1)
    short = encode({**row, "completion": "g"}, word_tokenizer(bos=True), max_length=6, overlong_prompt="truncate")
    assert marked(short) == "<s> d e f g* </s>*"  # more than half, since the completion leaves it


def test_stats_count_predicted_tokens_only():
    data = encode({"text": "a b c"})
    target = Collator(0)([data[0]])["target_ids"]
    assert data.stats.scored_tokens == int((target != -100).sum()) == 3
    assert (data.stats.tokens, data.stats.longest) == (4, 4)


# ---- prompts for RL


def test_prompts_keep_every_column():
    rows = Rows.from_list([{"prompt": "a b", "answer": "c", "n": 3}, {"prompt": "d", "answer": [1]}])
    prompts, stats = tokenize_prompts(rows, word_tokenizer(bos=True), max_length=10)
    assert [p.ids for p in prompts] == [ids_of("<s> a b"), ids_of("<s> d")]
    assert prompts[0].columns == {"prompt": "a b", "answer": "c", "n": 3}
    assert prompts[1].text == "d"
    assert prompts[1].where == "rows, row 2"
    assert (stats.rows, stats.kept, stats.tokens, stats.longest) == (2, 2, 5, 3)


def test_chat_prompts_end_with_the_assistants_header():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE)
    for row in ({"messages": turns}, {"prompt": turns[:1]}, {"instruction": "a", "output": "b"}):
        prompts, _ = tokenize_prompts(Rows.from_list([row]), tokenizer, max_length=10)
        assert prompts[0].ids == ids_of("<|user|> a <|assistant|>")
        assert prompts[0].columns == row


def test_long_and_bad_prompts():
    rows = Rows.from_list([{"prompt": "a b c d"}, {"prompt": "e"}])
    tokenizer = word_tokenizer(bos=True)
    prompts, stats = tokenize_prompts(rows, tokenizer, max_length=3)
    assert ([p.text for p in prompts], stats.dropped_overlong_prompt) == (["e"], 1)
    prompts, stats = tokenize_prompts(rows, tokenizer, max_length=3, overlong_prompt="truncate")
    assert (prompts[0].ids, stats.truncated_prompts) == (ids_of("<s> c d"), 1)
    with pytest.raises(ValueError, match="row 1: the prompt has 5 tokens, more than 3"):
        tokenize_prompts(rows, tokenizer, max_length=3, overlong_prompt="error")
    with pytest.raises(ValueError, match=r"needs prompt.*columns are question"):
        tokenize_prompts(Rows.from_list([{"question": "a"}]), tokenizer, max_length=3)
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokenize_prompts(Rows.from_list([{"prompt": ""}]), word_tokenizer(), max_length=3)
    with pytest.raises(ValueError, match=r"row 2: token id 12 is outside .* 0\.\.11"):
        check_prompt_vocabulary(tokenize_prompts(rows, word_tokenizer(), max_length=9)[0], 12)


def test_out_of_vocabulary_names_row_and_id(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"text": "j j j j j j"}\n\n{"text": "a"}\n{"text": "b c"}\n')
    rows, tokenizer = read_rows([path]), word_tokenizer()
    data = tokenize_sft(rows, tokenizer, max_length=5)
    check_vocabulary(data, len(WORDS), rows, tokenizer)
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: token id 17 \('j'\) .* 0\.\.16"):
        check_vocabulary(data, len(WORDS) - 1, rows, tokenizer)
    late = data.select([1, 2])
    with pytest.raises(ValueError, match=r"d\.jsonl, line 4: token id 10 \('c'\)"):
        check_vocabulary(late, 10, rows, tokenizer)


# ---- collator


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_targets_are_aligned_and_a_real_eos_is_scored(pad_is_eos):
    tokenizer = word_tokenizer(pad_is_eos=pad_is_eos)
    rows = Rows.from_list([{"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c d e"}])
    data = tokenize_sft(rows, tokenizer, max_length=10)
    batch = Collator(tokenizer.pad_token_id, multiple_of=4)([data[0], data[1]])
    a, b, c, d, e, eos = ids_of("a b c d e </s>")
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[a, b, c, eos] + [pad] * 4, [a, b, c, d, e, eos, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 6 + [0] * 2]
    assert batch["target_ids"].tolist() == [[-100, c, eos] + [-100] * 5, [b, c, d, e, eos] + [-100] * 3]
    assert all(t.dtype == torch.int64 for t in batch.values())


def test_dataset_indexing_and_select():
    rows = Rows.from_list([{"text": "a " * n} for n in (1, 2, 3)])
    data = tokenize_sft(rows, word_tokenizer(), max_length=10)
    assert [len(data[i]["input_ids"]) for i in (0, 1, 2, -1)] == [2, 3, 4, 4]
    assert [len(r["input_ids"]) for r in data] == [2, 3, 4]
    part = data.select([2, 0])
    assert [len(r["input_ids"]) for r in part] == [4, 2]
    assert (part.origin.tolist(), part.stats.tokens) == ([2, 0], 6)
    with pytest.raises(IndexError):
        data[3]


def test_a_hundred_thousand_rows(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.choice(list("abcdefghij"), size=(20_000, 12))
    with open(tmp_path / "big.jsonl", "w") as f:
        for line in words.tolist():
            f.write(json.dumps({"prompt": " ".join(line[:6]), "completion": " ".join(line[6:])}) + "\n")
    start = time.process_time()
    rows = read_rows([tmp_path / "big.jsonl"] * 5)
    data = tokenize_sft(rows, word_tokenizer(), max_length=64)
    seconds = time.process_time() - start
    assert len(data) == 100_000
    assert data.stats.scored_tokens == 700_000
    assert data[99_999]["input_ids"].tolist() == [*ids_of(" ".join(words[-1])), 3]
    assert seconds < 20  # 3 to 5 when alone on a core

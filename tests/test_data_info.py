"""The registry `dataset_info.json`: columns, tags, sampling, mixing, and its errors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from test_data import CHAT_TEMPLATE, marked, word_tokenizer

from rlhf_fast.trainers.data.dataset_info import load_rows, mix, resolve
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import tokenize_prompts, tokenize_sft

pytest.importorskip("transformers")


def config(folder, dataset, **kwargs):
    options = dict(dataset_dir=str(folder), eval_dataset=None, max_samples=None, seed=0)
    return SimpleNamespace(dataset=dataset, **(options | kwargs))


def register(folder, entry, rows=None, name="mine"):
    (folder / "rows.json").write_text(json.dumps(rows or [{"text": "a"}]))
    (folder / "dataset_info.json").write_text(json.dumps({name: entry}))
    return config(folder, name)


def load(folder, row, **entry):
    return load_rows(register(folder, {"file_name": "rows.json", **entry}, [row]))


def chat():
    return word_tokenizer(template=CHAT_TEMPLATE)


def test_alpaca_columns(tmp_path):
    row = {"prompt": "not this", "q": "a", "more": "b", "a": "c", "past": [["d", "e"]], "rule": "f", "extra": 7}
    columns = {"prompt": "q", "query": "more", "response": "a", "history": "past", "system": "rule"}
    rows = load(tmp_path, row, columns=columns)
    text = "<|system|> f <|user|> d <|assistant|> e* </s>* nl <|user|> a b <|assistant|> c* </s>* nl"
    assert marked(tokenize_sft(rows, chat(), max_length=50)) == text
    prompts, _ = tokenize_prompts(rows, chat(), max_length=50)
    assert prompts[0].columns["extra"] == 7  # for the reward functions, and the answer under both names
    assert prompts[0].columns["a"] == prompts[0].columns["output"] == "c"
    prompts, _ = tokenize_prompts(
        load(tmp_path, {"q": "a", "output": "c"}, columns={"prompt": "q"}), chat(), max_length=50
    )
    assert prompts[0].columns["output"] == "c"
    without = load(tmp_path, row, columns={"prompt": "q", "response": "a"})
    assert marked(tokenize_sft(without, word_tokenizer(), max_length=50)) == "a c* </s>*"


def test_ranking_and_kto_columns(tmp_path):
    row = {"question": "a", "good": "b", "bad": "c", "label": 3, "ok": True}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    data = tokenize_pairs(load(tmp_path, row, ranking=True, columns=columns), word_tokenizer(), max_length=9)
    assert (marked(data.chosen), marked(data.rejected)) == ("a b* </s>*", "a c* </s>*")
    columns = {"prompt": "question", "response": "bad", "kto_tag": "ok"}
    data = tokenize_kto(load(tmp_path, row, columns=columns), word_tokenizer(), max_length=9)
    assert (marked(data), data[0]["label"]) == ("a c* </s>*", True)


def test_sharegpt_tags_and_columns(tmp_path):
    talk = [
        {"who": "ask", "text": "a"},
        {"who": "say", "text": "b"},
        {"who": "see", "text": "c"},
        {"who": "say", "text": "d"},
    ]
    tags = {
        "role_tag": "who",
        "content_tag": "text",
        "user_tag": "ask",
        "assistant_tag": "say",
        "observation_tag": "see",
    }
    layout = dict(formatting="sharegpt", columns={"messages": "talk", "system": "rule"}, tags=tags)
    rows = load(tmp_path, {"talk": talk, "rule": "e", "conversations": "not this"}, **layout)
    text = "<|system|> e <|user|> a <|assistant|> b* </s>* nl <unk> c <|assistant|> d* </s>* nl"
    assert marked(tokenize_sft(rows, chat(), max_length=50)) == text
    layout["columns"] |= {"chosen": "good", "rejected": "bad"}
    good, bad = {"who": "say", "text": "b"}, {"who": "say", "text": "c"}
    rows = load(tmp_path, {"talk": talk[:1], "good": good, "bad": bad}, ranking=True, **layout)
    data = tokenize_pairs(rows, chat(), max_length=50)
    assert marked(data.rejected) == "<|user|> a <|assistant|> c* </s>* nl"
    layout["columns"] = {"messages": "talk", "kto_tag": "ok"}
    data = tokenize_kto(load(tmp_path, {"talk": talk[:2], "ok": False}, **layout), chat(), max_length=50)
    assert (marked(data), data[0]["label"]) == ("<|user|> a <|assistant|> b* </s>* nl", False)


def test_openai_formatting_and_the_formats_own_names(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = "<|user|> a <|assistant|> b* </s>* nl"
    for entry in ({"formatting": "openai"}, {"formatting": "openai", "columns": {"messages": "messages"}}, {}):
        assert marked(tokenize_sft(load(tmp_path, {"messages": talk}, **entry), chat(), max_length=9)) == text
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for entry in ({"formatting": "sharegpt"}, {"formatting": "sharegpt", "tags": {}}, {}):
        assert marked(tokenize_sft(load(tmp_path, {"conversations": sharegpt}, **entry), chat(), max_length=9)) == text
    assert (
        marked(tokenize_sft(load(tmp_path, {"prompt": "a", "completion": "b"}), chat(), max_length=9)) == "a b* </s>*"
    )


def test_num_samples_and_max_samples(tmp_path):
    rows = [{"text": str(n)} for n in range(10)]

    def texts(max_samples=None, **entry):
        run = register(tmp_path, {"file_name": "rows.json", **entry}, rows)
        run.max_samples = max_samples
        return [int(r["text"]) for r in load_rows(run)]

    assert texts() == list(range(10))
    assert texts(max_samples=3) == [0, 1, 2]
    four = texts(num_samples=4)
    assert (len(set(four)), sorted(four)) == (4, four)
    assert four != [0, 1, 2, 3]
    assert texts(num_samples=4) == four  # the run's seed
    assert texts(num_samples=4, max_samples=2) == four[:2]
    twice = texts(num_samples=25)
    assert {twice.count(n) for n in range(10)} == {2, 3}


def test_max_samples_is_for_each_of_several(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 3}\n{"x": 4}\n')
    run = config(tmp_path, "a.jsonl, b.jsonl", eval_dataset=[str(tmp_path / "b.jsonl")], max_samples=1)
    rows = load_rows(run)
    assert [r["x"] for r in rows] == [1, 3]
    assert rows.where(1) == f"{tmp_path / 'b.jsonl'}, line 1"
    assert [r["x"] for r in load_rows(run, "eval_dataset")] == [3]


def test_mixing():
    a, b = (Rows.from_list([{"x": f"{name}{n}"} for n in range(k)], name) for name, k in (("a", 2), ("b", 5)))

    def mixed(*args, **kwargs):
        return " ".join(r["x"] for r in mix([a, b], *args, **kwargs))

    assert mixed() == "a0 a1 b0 b1 b2 b3 b4"
    assert mixed("interleave_under") == "a0 b0 a1 b1"
    assert mixed("interleave_over") == "a0 b0 a1 b1 a0 b2 a1 b3 a0 b4"
    by_chance = mixed("interleave_under", "0.1, 0.9")
    assert by_chance.split().count("b4") == 1 or by_chance.endswith("a1")
    assert by_chance == mixed("interleave_under", [0.1, 0.9])
    assert by_chance != mixed("interleave_under", [0.9, 0.1])
    assert mix([a, b], "interleave_under").where(1) == "b, row 1"
    with pytest.raises(ValueError, match="mix_strategy must be one of .* got 'interleave'; did you mean"):
        mixed("interleave")
    for bad in ([0.5], [0.5, 0.6], [-1, 2], "x, y"):
        with pytest.raises(ValueError, match="interleave_probs must be"):
            mixed("interleave_over", bad)


@pytest.mark.parametrize("lengths", [(3, 4, 3), (1, 5), (2, 2), (700, 1, 900)])
@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("chance", [False, True])
def test_interleaving_is_that_of_datasets(lengths, strategy, chance):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    parts = [[f"{p}:{i}" for i in range(n)] for p, n in enumerate(lengths)]
    shares = [1 - 0.2 * (len(lengths) - 1)] + [0.2] * (len(lengths) - 1) if chance else None
    theirs = datasets.interleave_datasets(
        [datasets.Dataset.from_dict({"x": part}) for part in parts],
        probabilities=shares,
        seed=3,
        stopping_strategy={"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}[strategy],
    )
    ours = mix([Rows.from_list([{"x": x} for x in part]) for part in parts], strategy, shares, seed=3)
    assert [row["x"] for row in ours] == list(theirs["x"])


def test_names_and_paths(tmp_path):
    run = register(tmp_path, {"file_name": "rows.json"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "b"}')
    assert [s.path for s in resolve(["mine", "other.jsonl", str(other)], tmp_path)] == [
        tmp_path / "rows.json",
        other,
        other,
    ]
    assert [r["text"] for r in load_rows(config(tmp_path, ["mine", "other.jsonl"]))] == ["a", "b"]
    run.dataset = "mint"
    with pytest.raises(
        FileNotFoundError, match=r"^dataset: no file or folder mint or .*mint, and no entry 'mint' .*'mine'\?"
    ):
        load_rows(run)
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^dataset: no file or folder mint or .*mint$"):
        load_rows(run)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "x/y"}, "hf_hub_url is 'x/y', but nothing is downloaded: file_name must name a local file"),
        ({"script_url": "s"}, "script_url is 's', but nothing is downloaded"),
        ({}, "file_name must name a local file or folder"),
        ({"file_nam": "rows.json"}, "unknown key 'file_nam'; did you mean 'file_name'"),
        (
            {"file_name": "rows.json", "formatting": "chat"},
            "formatting must be one of alpaca, sharegpt, openai, got 'chat'",
        ),
        ({"file_name": "rows.json", "columns": {"promt": "a"}}, "unknown key columns.promt; did you mean 'prompt'"),
        ({"file_name": "rows.json", "columns": {"prompt": 3}}, "columns.prompt must be a string, got 3"),
        ({"file_name": "rows.json", "columns": "prompt"}, "columns must be an object, got 'prompt'"),
        ({"file_name": "rows.json", "columns": {"messages": "a"}}, "unknown key columns.messages"),
        (
            {"file_name": "rows.json", "columns": {"prompt": "a", "images": "i"}},
            "columns.images: only text is supported",
        ),
        ({"file_name": "rows.json", "tags": {"user": "a"}}, "unknown key tags.user; did you mean 'user_tag'"),
        ({"file_name": "rows.json", "ranking": True, "columns": {"prompt": "a"}}, "ranking needs columns.chosen and"),
        ({"file_name": "rows.json", "num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        (["rows.json"], "must be an object, got"),
    ],
)
def test_bad_entries(tmp_path, entry, message):
    run = register(tmp_path, entry)
    with pytest.raises(ValueError, match=r"dataset_info\.json, entry 'mine': .*" + message):
        load_rows(run)


def test_missing_files_and_columns_and_a_broken_registry(tmp_path):
    run = register(tmp_path, {"file_name": "gone.json"})
    with pytest.raises(FileNotFoundError, match=r"^dataset: .*entry 'mine': no file or folder .*gone\.json"):
        load_rows(run)
    rows = load(tmp_path, {"a": "b"}, columns={"prompt": "q"})
    with pytest.raises(ValueError, match=r"rows\.json, row 1: no column 'q', which dataset_info.json names; .* are a"):
        rows[0]
    rows = load(tmp_path, {"conversations": [{"from": "dog", "value": "a"}]}, formatting="sharegpt", tags={})
    with pytest.raises(ValueError, match=r"rows\.json, row 1: conversations: unknown role 'dog'"):
        rows[0]
    for text in ("[]", "{"):
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset_info\.json(: must hold an object|, line 1: not valid JSON)"):
            load_rows(run)

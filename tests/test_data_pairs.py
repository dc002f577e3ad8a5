"""Preference pairs and judged answers: their forms, the shared prompt, the cut, labels and margins."""

from __future__ import annotations

import pytest
from test_data import CHAT_TEMPLATE, marked, word_tokenizer
from test_data_chat import REWRITING, turns

from rlhf_fast.trainers.data.forms import pair
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import check_vocabulary

pytest.importorskip("transformers")


def pairs(rows, tokenizer=None, max_length=100, **kwargs):
    return tokenize_pairs(Rows.from_list(rows), tokenizer or word_tokenizer(), max_length=max_length, **kwargs)


def sides(data, i=0):
    return marked(data.chosen, i), marked(data.rejected, i)


def kto(rows, tokenizer=None, max_length=100, **kwargs):
    data = tokenize_kto(Rows.from_list(rows), tokenizer or word_tokenizer(), max_length=max_length, **kwargs)
    return data, [(marked(data, i), data[i]["label"]) for i in range(len(data))]


# ---- pairs


@pytest.mark.parametrize("bos", [False, True])
def test_text_pairs(bos):
    row = {"prompt": "a b", "chosen": "c", "rejected": "d </s>"}
    data = pairs([row], word_tokenizer(bos=bos))
    start = "<s> " * bos
    assert sides(data) == (f"{start}a b c* </s>*", f"{start}a b d* </s>*")
    assert data[0]["margin"] is None
    assert data[0]["chosen"]["input_ids"].tolist() == data.chosen[0]["input_ids"].tolist()


def test_text_without_prompt_is_cut_where_a_word_begins():
    data = pairs([{"chosen": "a b c d", "rejected": "a b e"}])
    assert sides(data) == ("a b c* d* </s>*", "a b e* </s>*")
    p = pair({"chosen": "Q: me\n\nA: seven", "rejected": "Q: me\n\nA: several"}, "x", None)
    assert [s.text for s in (*p.prompt, *p.chosen, *p.rejected)] == ["Q: me\n\nA:", " seven", " several"]
    p = pair({"chosen": "a\nb", "rejected": "a\nc"}, "x", None)
    assert [s.text for s in (*p.prompt, *p.chosen, *p.rejected)] == ["a\n", "b", "c"]


ONE = ("<|user|> a <|assistant|> b* </s>* nl", "<|user|> a <|assistant|> c* </s>* nl")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("u a"), "chosen": turns("a b"), "rejected": turns("a c")},
        {"prompt": turns("u a"), "chosen": "b", "rejected": "c"},
        {"chosen": turns("u a / a b"), "rejected": turns("u a / a c")},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"messages": turns("u a"), "chosen": turns("a b")[0], "rejected": turns("a c")[0]},
    ],
)
def test_chat_pairs(row):
    assert sides(pairs([row], word_tokenizer(template=CHAT_TEMPLATE))) == ONE


def test_answers_of_several_turns():
    """The prompt's assistant turns are not scored, those of the answers are; the prompt ends before the first one."""
    row = {"chosen": turns("u a / a b / u c / a d"), "rejected": turns("u a / a b / u e / a f")}
    chosen, rejected = sides(pairs([row], word_tokenizer(template=CHAT_TEMPLATE)))
    assert chosen == "<|user|> a <|assistant|> b* </s>* nl <|user|> c <|assistant|> d* </s>* nl"
    assert rejected == "<|user|> a <|assistant|> b* </s>* nl <|user|> e <|assistant|> f* </s>* nl"
    row = {"chosen": turns("u a / a b / u c / a d"), "rejected": turns("u a / a b / u c / a e")}
    chosen, _ = sides(pairs([row], word_tokenizer(template=CHAT_TEMPLATE)))
    assert chosen == "<|user|> a <|assistant|> b </s> nl <|user|> c <|assistant|> d* </s>* nl"
    same = {"chosen": turns("u a / a b"), "rejected": turns("u a / a b / u c / a d")}
    chosen, rejected = sides(pairs([same], word_tokenizer(template=CHAT_TEMPLATE)))
    assert (chosen, rejected) == (ONE[0], "<|user|> a <|assistant|> b* </s>* nl <|user|> c <|assistant|> d* </s>* nl")


def test_a_rewriting_template_serves_pairs_of_single_turns():
    row = {"prompt": turns("u a / a b c / u d"), "chosen": turns("a e"), "rejected": turns("a f")}
    chosen, rejected = sides(pairs([row], word_tokenizer(template=REWRITING)))
    assert chosen == "<|user|> a <|assistant|> c </s> <|user|> d <|assistant|> e* </s>*"
    assert rejected == chosen.replace("e*", "f*")
    row["chosen"] = turns("a e / u a / a e")
    with pytest.raises(ValueError, match="row 1: the chat template rewrites"):
        pairs([row], word_tokenizer(template=REWRITING))


def test_both_answers_see_the_same_prompt_after_the_cut():
    row = {"prompt": "a b c d e f", "chosen": "g", "rejected": "h i"}
    data = pairs([row], word_tokenizer(bos=True), max_length=6, overlong_prompt="truncate")
    assert sides(data) == ("<s> e f g* </s>*", "<s> e f h* i* </s>*")
    assert (data.stats.truncated_prompts, data.stats.truncated_completions) == (1, 0)
    data = pairs([{**row, "rejected": "h i j g h"}], max_length=4, overlong_prompt="truncate")
    assert sides(data) == ("e f g* </s>*", "e f h* i*")
    assert data.stats.truncated_completions == 1
    data = pairs([row, {**row, "prompt": "a"}], max_length=6)
    assert (len(data), data.stats.dropped_overlong_prompt, data.chosen.origin.tolist()) == (1, 1, [1])
    with pytest.raises(ValueError, match="row 1: the prompt of 6 tokens leaves no room"):
        pairs([row], max_length=6, overlong_prompt="error")
    with pytest.raises(ValueError, match="drop, truncate or error"):
        pairs([row], overlong_prompt="cut")
    with pytest.raises(ValueError, match="no pair is left"):
        pairs([row], max_length=6)


def test_margins():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = pairs([{**row, "margin": 2}, row, {**row, "margin": "0.5"}])
    assert [data[i]["margin"] for i in range(3)] == [2.0, 0.0, 0.5]
    assert [data.select([2, 0])[i]["margin"] for i in range(2)] == [0.5, 2.0]
    for bad in (True, "x", float("nan"), float("inf"), [1]):
        with pytest.raises(ValueError, match="row 1: margin must be a finite number"):
            pairs([{**row, "margin": bad}])


def test_identical_answers_are_counted():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b c d", "rejected": "b c e"}]
    assert pairs(rows).stats.identical_pairs == 1
    cut = pairs(rows, max_length=3)
    assert cut.stats.identical_pairs == 2
    assert "2 identical pairs" in str(cut.stats)


def test_pair_dataset_select_stats_and_vocabulary():
    rows = Rows.from_list([{"prompt": "a", "chosen": "b " * n, "rejected": "j"} for n in (1, 2, 3)])
    data = tokenize_pairs(rows, word_tokenizer(), max_length=10)
    assert (data.stats.kept, data.stats.tokens, data.stats.scored_tokens, data.stats.longest) == (3, 21, 15, 5)
    assert data.lengths.tolist() == [6, 7, 8]
    part = data.select([2, 0])
    assert [len(part[i]["chosen"]["input_ids"]) for i in range(2)] == [5, 3]
    assert (part.stats.rows, part.stats.tokens) == (2, 14)
    check_vocabulary(data, 18, rows)
    with pytest.raises(ValueError, match=r"row 3: token id 17 \('j'\)"):
        check_vocabulary(part, 17, rows, word_tokenizer())


# ---- judged answers


def test_forms_of_judged_answers():
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "b", "label": "false"},
        {"instruction": "a", "output": "b", "kto_tag": False},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    data, got = kto(rows)
    ab, ac = "a b* </s>*", "a c* </s>*"
    assert got == [(ab, True), (ab, False), (ab, False), (ab, True), (ac, False)]
    assert data.origin.tolist() == [0, 1, 2, 3, 3]
    assert (data.stats.rows, data.stats.kept, data.stats.desirable, data.stats.undesirable) == (4, 5, 2, 3)
    part = data.select([4, 0])
    assert [part[i]["label"] for i in range(2)] == [False, True]
    assert part[0]["label"] is False
    assert (part.stats.desirable, part.stats.undesirable) == (1, 1)
    check_vocabulary(data, 18, Rows.from_list(rows))


def test_the_last_turn_of_a_conversation_is_judged():
    tokenizer = word_tokenizer(template=CHAT_TEMPLATE)
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    last = "<|user|> a <|assistant|> b </s> nl <|user|> c <|assistant|> d* </s>* nl"
    rows = [
        {"conversations": sharegpt, "kto_tag": True},
        {"messages": turns("u a / a b / u c / a d"), "label": 0},
        {"prompt": turns("u a / a b / u c"), "completion": turns("a d"), "label": 1},
        {"messages": turns("u a"), "completion": "b", "label": 1},
    ]
    assert kto(rows, tokenizer)[1] == [(ONE[0], True), (last, False), (last, True), (ONE[0], True)]


def test_judged_answers_are_cut_like_supervised_ones():
    row = {"prompt": "a b c d e f", "completion": "g h", "label": True}
    assert kto([row], max_length=5, overlong_prompt="truncate")[1] == [("e f g* h* </s>*", True)]
    assert kto([row, {**row, "prompt": "a"}], max_length=5)[0].stats.dropped_overlong_prompt == 1
    with pytest.raises(ValueError, match="row 1: the prompt of 6 tokens leaves no room"):
        kto([row], max_length=5, overlong_prompt="error")
    with pytest.raises(ValueError, match="no row is left"):
        kto([row], max_length=5)


@pytest.mark.parametrize(
    ("tokenize", "row", "message"),
    [
        (pairs, {"prompt": "a", "chosen": "b"}, "a pair needs chosen and rejected; its columns are prompt, chosen"),
        (pairs, {"chosen": "b", "rejected": "c"}, "no prompt, and chosen and rejected do not begin alike"),
        (pairs, {"chosen": "a b", "rejected": turns("u a / a b")}, "must be both strings or both lists"),
        (pairs, {"chosen": turns("u a"), "rejected": turns("u b")}, "do not begin alike"),
        (pairs, {"prompt": "a", "chosen": turns("a b"), "rejected": "c"}, "chosen must be a string, got"),
        (pairs, {"prompt": turns("u a"), "chosen": turns("u b"), "rejected": "c"}, "must begin with an assistant turn"),
        (pairs, {"prompt": turns("u a"), "chosen": 3, "rejected": "c"}, "chosen must be a list of"),
        (kto, {"prompt": "a", "completion": "b"}, "needs label or kto_tag .* columns are prompt, completion"),
        (kto, {"prompt": "a", "completion": "b", "label": 2}, "label must be true or false, got 2"),
        (kto, {"prompt": "a", "completion": "b", "label": 0.5}, "label must be true or false, got 0.5"),
        (kto, {"prompt": "a", "label": True}, "no prompt with an answer to judge"),
        (kto, {"messages": turns("u a"), "label": True}, "no prompt with an answer to judge"),
    ],
)
def test_bad_rows_are_named(tokenize, row, message):
    with pytest.raises(ValueError, match=f"^rows, row 1: .*{message}"):
        tokenize([row], word_tokenizer(template=CHAT_TEMPLATE))

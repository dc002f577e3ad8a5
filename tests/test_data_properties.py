"""Properties of tokenisation for any text, any length and any row: hypothesis looks for the exception."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from test_data import CHAT_TEMPLATE

pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from rlhf_fast.trainers.data.collators import Collator, PairCollator, pack  # noqa: E402
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs  # noqa: E402
from rlhf_fast.trainers.data.readers import Rows  # noqa: E402
from rlhf_fast.trainers.data.tokenize import tokenize_prompts, tokenize_sft  # noqa: E402

BOS, EOS = 0, 1
texts = st.text(alphabet="abc \n\u00e9\u4e2d", max_size=12)
lengths = st.integers(1, 30)
policies = st.sampled_from(["drop", "truncate"])
bos_or_not = st.booleans()
few = settings(deadline=None, max_examples=60, derandomize=True)


@functools.cache
def bpe(bos, chat=False):
    """A byte-level BPE that has learnt to merge across every boundary of these texts; EOS pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    letters = np.random.default_rng(0).choice(list("abc \n\u00e9\u4e2d"), (200, 9))
    core.train_from_iterator(["".join(word) for word in letters], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(*items):
    return Rows.from_list(items)


def test_the_tokenizer_would_merge():
    assert len(plain(bpe(False), "a bc")) < len(plain(bpe(False), "a")) + len(plain(bpe(False), " bc"))


@few
@given(texts, texts, bos_or_not)
def test_prompt_and_completion_are_tokenised_apart(prompt, completion, bos):
    tokenizer = bpe(bos)
    start = [BOS] * bos
    assume(start or prompt or completion)
    example = tokenize_sft(rows({"prompt": prompt, "completion": completion}), tokenizer, max_length=999)[0]
    ids, scored = example["input_ids"].tolist(), example["scored"].tolist()
    before, after = start + plain(tokenizer, prompt), [*plain(tokenizer, completion), EOS]
    assert ids == before + after
    assert scored == [False] * len(before) + [True] * len(after)
    assert tokenizer.decode(after[:-1]) == completion
    prompts, _ = tokenize_prompts(rows({"prompt": prompt or "a"}), tokenizer, max_length=999)
    assert prompts[0].ids == start + plain(tokenizer, prompt or "a")  # what is sampled from is what is trained on


@few
@given(texts, texts, lengths, policies, bos_or_not)
def test_the_cut(prompt, completion, max_length, policy, bos):
    tokenizer = bpe(bos)
    row = {"prompt": prompt, "completion": completion}
    assume(bos or prompt)
    before = [BOS] * bos + plain(tokenizer, prompt)
    after = [*plain(tokenizer, completion), EOS]
    try:
        data = tokenize_sft(rows(row), tokenizer, max_length=max_length, overlong_prompt=policy)
    except ValueError as error:
        expected = (policy == "drop" and len(before) >= max_length) or max_length <= 1 + bos
        if not (expected and "no row is left" in str(error)):
            raise
        return
    ids, scored = data[0]["input_ids"].tolist(), data[0]["scored"]
    k = int(np.argmax(scored))
    kept, answer = ids[:k], ids[k:]
    assert len(ids) <= max_length
    assert after[: len(answer)] == answer != []
    assert kept[:1] == before[:1] or not bos
    assert before[len(before) - (k - bos) :] == kept[bos:]  # the prompt's end
    if len(before) < max_length:
        assert kept == before
    if len(before + after) <= max_length:
        assert answer == after
    cut = data.stats
    assert (cut.truncated_prompts, cut.truncated_completions) == (k < len(before), len(answer) < len(after))


@few
@given(texts, texts, texts, lengths, policies, bos_or_not)
def test_pairs_share_their_prompt(prompt, chosen, rejected, max_length, policy, bos):
    tokenizer = bpe(bos)
    assume(bos or prompt)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        data = tokenize_pairs(rows(row), tokenizer, max_length=max_length, overlong_prompt=policy)
    except ValueError as error:
        if "no pair is left" not in str(error):
            raise
        return
    parts = []
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        ids, scored = data[0][side]["input_ids"].tolist(), data[0][side]["scored"]
        k = int(np.argmax(scored))
        parts.append(ids[:k])
        assert len(ids) <= max_length
        assert ids[k:] == [*plain(tokenizer, text), EOS][: len(ids) - k]
        assert scored[k:].all()
    assert parts[0] == parts[1]
    judged = tokenize_kto(rows(row), tokenizer, max_length=999)
    assert [judged[i]["label"] for i in range(2)] == [True, False]


@few
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), bos_or_not)
def test_targets_of_padded_and_packed_batches(items, bos):
    """Each scored token is predicted once, from the token before it; EOS too, although it is the padding."""
    tokenizer = bpe(bos)
    assume(any(bos or p or c for p, c in items))
    data = tokenize_sft(rows(*({"prompt": p, "completion": c} for p, c in items)), tokenizer, max_length=999)
    examples = [data[i] for i in range(len(data))]
    padded, packed = Collator(tokenizer.pad_token_id)(examples), pack(examples)
    expected = [(e["input_ids"][t], e["input_ids"][t - 1]) for e in examples for t in np.flatnonzero(e["scored"]) if t]
    for batch in (padded, packed):
        hit = batch["target_ids"] != -100
        got = zip(batch["target_ids"][hit].tolist(), batch["input_ids"][hit].tolist(), strict=True)
        assert list(got) == expected
    assert len(expected) == data.stats.scored_tokens
    real = padded["attention_mask"].bool()
    assert padded["input_ids"][real].tolist() == packed["input_ids"][0].tolist()
    positions = (padded["attention_mask"].cumsum(1) - 1)[real]
    assert packed["position_ids"][0].tolist() == positions.tolist()
    both = PairCollator(1, packing=True)([{"chosen": e, "rejected": e} for e in examples])
    assert both["cu_seqlens"].diff()[::2].tolist() == packed["cu_seqlens"].diff().tolist()


# ---- rows of any shape

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [
    {"from": "human", "value": "a"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "b"},
    {"from": "gpt", "value": "c"},
]
CALLS = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
GOOD = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": TALK[:1], "completion": TALK[1:], "label": 0, "tools": [{"name": "f"}]},
    {"prompt": TALK[:1], "completion": "b", "kto_tag": "false"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]], "system": "c", "kto_tag": True},
    {"messages": [*TALK[:1], *CALLS, {"role": "tool", "content": [{"type": "text", "text": "a"}]}, *TALK[1:]]},
    {"conversations": SHAREGPT, "system": "a", "tools": '[{"name": "f"}]', "label": 1},
    {"text": "a b"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": "c"},
    {"chosen": TALK, "rejected": [*TALK[:1], {"role": "assistant", "content": "c"}]},
    {"instruction": "a", "chosen": "b", "rejected": "c"},
    {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[3], "rejected": {"from": "gpt", "value": "d"}},
]
junk = st.sampled_from(
    [None, True, 3, -1.5, float("nan"), "", "a", "{", "[]", [], {}, [[]], [{}], ["a"], {"role": "user"}]
)


def places(value, path=()):
    """The path of everything inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoil(row, draw):
    """The row with something in it taken away, or replaced by junk."""
    row = copy.deepcopy(row)
    *path, key = draw(st.sampled_from(list(places(row))))
    holder = functools.reduce(lambda at, step: at[step], path, row)
    if draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(junk)
    return row


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(GOOD), st.data(), st.booleans())
def test_a_spoilt_row_is_tokenised_or_named(row, data, chat):
    """Whatever a row holds: examples, or a ValueError that says where it stands (or that nothing is left of it)."""
    row = spoil(row, data.draw)
    for tokenize in (tokenize_sft, tokenize_prompts, tokenize_pairs, tokenize_kto):
        try:
            tokenize(rows({"text": "a", **GOOD[7]}, row), bpe(True, chat), max_length=50)
        except ValueError as error:
            if not str(error).startswith("rows, row 2: "):
                raise


def test_good_rows_are_good():
    for row in GOOD:
        for tokenize in (tokenize_sft, tokenize_prompts, tokenize_pairs, tokenize_kto):
            fits = {tokenize_pairs: "chosen" in row, tokenize_kto: row.keys() & {"label", "kto_tag", "chosen"}}
            fits[tokenize_sft] = not row.keys() & {"chosen"}
            if fits.get(tokenize, True):
                assert len(tokenize(rows(row), bpe(True, chat=True), max_length=99)) > 0

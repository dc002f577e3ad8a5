"""Tokenizers that put a space before every text: none comes in where segments meet, and the whole text is the judge."""

from __future__ import annotations

import pytest
from test_data_chat import turns

from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.templates import FORMATS
from rlhf_fast.trainers.data.tokenize import tokenize_prompts, tokenize_sft
from rlhf_fast.trainers.rollout.samplers import SamplerSettings
from rlhf_fast.trainers.stepwise import as_queries, as_rollout

pytest.importorskip("transformers")

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LETTERS = "abcdefghijklmnopqrstuvwxyzAUINSTERHmn0123456789[]/:.,?!<>|\n'"
WORDS = ["hello", "cat", "[/INST]", "[INST]", "ASSISTANT", "user", "assistant"]


def llama(legacy=True):
    """As Llama 2's: pieces of SentencePiece, in which a word begins with its space."""
    from transformers import LlamaTokenizer

    words = [space + word for word in WORDS for space in ("▁", "")]
    merges = dict.fromkeys((w[:k], w[k]) for w in words for k in range(1, len(w)))
    vocab = dict.fromkeys([*SPECIAL.values(), "▁", *LETTERS, *(a + b for a, b in merges)])
    numbered = {piece: i for i, piece in enumerate(vocab)}
    return LlamaTokenizer(vocab=numbered, merges=list(merges), legacy=legacy, **SPECIAL)


def byte_level():
    """As RoBERTa's: the space of a word is in its token, but not in its offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [space + word for word in WORDS if word.isalpha() for space in ("Ġ", "")]
    merges = dict.fromkeys((w[:k], w[k]) for w in words for k in range(1, len(w)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = dict.fromkeys([*SPECIAL.values(), *alphabet, *(a + b for a, b in merges)])
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


TOKENIZERS = {"llama": llama, "llama_legacy_off": lambda: llama(legacy=False), "byte_level": byte_level}
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
)
SPACED += "{% if add_generation_prompt %}assistant: {% endif %}"
TALK = "u cat / a hello / u hello cat / a cat: hello"


def make(name, template):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = SPACED if template == "spaced" else template and FORMATS[template].jinja()
    return tokenizer


def whole(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def sft(tokenizer, row):
    """(ids, where runs of scored tokens begin)"""
    example = tokenize_sft(Rows.from_list([row]), tokenizer, max_length=999)[0]
    scored = example["scored"]
    starts = [k for k in range(1, len(scored)) if scored[k] and not scored[k - 1]]
    return example["input_ids"].tolist(), starts


def prompt(tokenizer, row):
    return tokenize_prompts(Rows.from_list([row]), tokenizer, max_length=999)[0][0].ids


def answers(tokenizer, row):
    """(prompt, chosen, rejected) ids; the same of both answers, and of the judged ones."""
    pair = tokenize_pairs(Rows.from_list([row]), tokenizer, max_length=999)[0]
    kto = tokenize_kto(Rows.from_list([row]), tokenizer, max_length=999)
    sides = [pair[side]["input_ids"].tolist() for side in ("chosen", "rejected")]
    starts = {int(pair[side]["scored"].argmax()) for side in ("chosen", "rejected")}
    assert sides == [kto[k]["input_ids"].tolist() for k in range(2)]
    assert len(starts) == 1
    start = starts.pop()
    assert sides[0][:start] == sides[1][:start]
    return sides[0][:start], *(side[start:] for side in sides)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["zephyr", "llama2", "vicuna"])
def test_conversations_prompts_and_pairs_are_the_whole_templates_tokens(name, template):
    tokenizer, talk = make(name, template), turns(TALK)
    ids, starts = sft(tokenizer, {"messages": talk})
    assert ids == whole(tokenizer, talk)
    for start, n in zip(starts, (1, 3), strict=True):
        assert ids[:start] == whole(tokenizer, talk[:n], True) == prompt(tokenizer, {"prompt": talk[:n]})
    before, chosen, rejected = answers(tokenizer, {"prompt": talk[:3], "chosen": talk[3:], "rejected": "hello"})
    assert before == ids[: starts[1]]
    assert before + chosen == ids
    assert before + rejected == whole(tokenizer, [*talk[:3], *turns("a hello")])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_where_a_token_lies_across_prompt_and_answer(name):
    """The prompt ends with the space that the whole text's token would begin with: the answer has no other."""
    tokenizer, talk = make(name, "spaced"), turns(TALK)
    ids, starts = sft(tokenizer, {"messages": talk})
    hello = tokenizer.convert_tokens_to_ids(["hello", "</s>"])
    assert ids[: starts[0]] == whole(tokenizer, talk[:1], True) == prompt(tokenizer, {"prompt": talk[:1]})
    assert ids[starts[0] :][:2] == hello
    assert tokenizer.convert_ids_to_tokens(ids[starts[1] :])[0] == "cat"
    before, chosen, rejected = answers(tokenizer, {"prompt": talk[:1], "chosen": "hello", "rejected": "cat"})
    assert before == ids[: starts[0]]
    assert chosen[:2] == hello
    assert tokenizer.convert_ids_to_tokens(rejected)[0] == "cat"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_text(name):
    """A completion that goes on in a word or behind a space is tokenised as it stands."""
    tokenizer = make(name, None)
    settings = SamplerSettings(max_new_tokens=9, eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=0)
    for text, completion in (("cat:", "hello"), ("cat", " hello"), ("cat ", "hello"), ("cat:", "\nhello")):
        row = {"prompt": text, "completion": completion}
        ids, (start,) = sft(tokenizer, row)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]).strip() == text + completion
        assert ids[:start] == prompt(tokenizer, row)
        before, chosen, _ = answers(tokenizer, {"prompt": text, "chosen": completion, "rejected": "cat"})
        assert (before, chosen) == (ids[:start], ids[start:])
        stepwise = as_queries([text], tokenizer)[0].ids + as_rollout([completion], tokenizer, settings).ids.tolist()
        assert stepwise == ids

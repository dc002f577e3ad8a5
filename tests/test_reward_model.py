"""Reward models: pooled by length, saved and reloaded as transformers' and peft's own classes, against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

from rlhf_fast.trainers.data.collators import pack, pad
from rlhf_fast.trainers.models.reward_model import (
    load_reward_model,
    new_reward_model,
    pool_by_length,
    score_batch,
    score_heads,
    score_sequences,
)
from rlhf_fast.trainers.rm_config import RMConfig

VOCAB, EOS, PAD = 18, 3, 3  # padding and EOS share an id on purpose
LENGTHS = [5, 1, 7, 4]


def tiny_config(**changes):
    values = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return Qwen2Config(**(values | dict(num_key_value_heads=2, num_labels=1, pad_token_id=PAD) | changes))


def classifier(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(tiny_config(**changes)).to(dtype).eval()


def sequences():
    """Ragged; real EOS tokens at the end and inside."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    rows[0][-1] = rows[2][3] = rows[2][-1] = EOS
    return rows


def padded(rows, side="right", fill=PAD):
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(r)) for r in rows]
    return torch.tensor([r + g if side == "right" else g + r for r, g in zip(rows, gaps, strict=True)])


def plain_scores(model, rows):
    """Each sequence alone, its last hidden state times the head."""
    out = []
    for row in rows:
        hidden = model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        out.append(hidden @ model.score.weight[0])
    return torch.stack(out)


def test_scores_and_gradients_equal_each_sequence_alone_in_fp64():
    ours, plain = classifier(), classifier()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    scores = score_sequences(ours, padded(sequences()), torch.tensor(LENGTHS))
    expected = plain_scores(plain, sequences())
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)
    assert scores.std() > 1e-3
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fill", [PAD, 7])
def test_padding_side_padding_id_and_packing_change_nothing(fill):
    model, rows = classifier(), sequences()
    expected = score_sequences(model, padded(rows), torch.tensor(LENGTHS))
    torch.testing.assert_close(score_sequences(model, padded(rows, fill=fill), torch.tensor(LENGTHS)), expected)
    examples = [{"input_ids": r, "scored": [False] * len(r)} for r in rows]
    for batch in (pad(examples, fill), pack(examples)):
        torch.testing.assert_close(score_batch(model, batch), expected, rtol=1e-10, atol=1e-12)
    left = padded(rows, "left", fill)
    mask = padded([[1] * n for n in LENGTHS], "left", 0)
    batch = {"input_ids": left, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    torch.testing.assert_close(score_batch(model, batch), expected, rtol=1e-10, atol=1e-12)


def test_transformers_own_pooling_is_the_bug_that_this_avoids():
    """pad == eos: the stock forward scores the token before the EOS."""
    model, rows = classifier(), sequences()
    stock = model(input_ids=padded(rows), attention_mask=padded([[1] * n for n in LENGTHS], fill=0)).logits[:, 0]
    ours = score_sequences(model, padded(rows), torch.tensor(LENGTHS))
    assert not torch.allclose(stock[0], ours[0])
    torch.testing.assert_close(stock[3], ours[3])  # ends without EOS: both take its last token


def test_scores_are_fp32_in_a_bf16_model():
    model, rows = classifier(torch.bfloat16), sequences()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_sequences(model, padded(rows), torch.tensor(LENGTHS))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())  # more digits than bf16 has


def test_errors_name_what_came():
    model, ids = classifier(), padded(sequences())
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.T=7, got 0\.\.7"):
        score_sequences(model, ids, torch.tensor([5, 0, 7, 4]))
    with pytest.raises(ValueError, match=r"lengths must be .*\(B,\)=\(4,\)"):
        score_sequences(model, ids, torch.tensor([5, 1]))
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\), got \(7,\)"):
        score_sequences(model, ids[0], torch.tensor([5]))
    with pytest.raises(TypeError, match="needs a linear head 'score' with one output"):
        pool_by_length(classifier(num_labels=2))
    assert score_sequences(model, ids[:0], torch.tensor([], dtype=torch.long)).shape == (0,)


# ---- folders


@pytest.fixture
def base_folder(tmp_path):
    from test_data import word_tokenizer
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(3)
    Qwen2ForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def rm_config(folder, **changes):
    values = dict(model_name_or_path=str(folder / "base"), dataset=str(folder / "none"), output_dir=str(folder / "out"))
    return RMConfig(**(values | changes))


def test_a_new_head_starts_small_and_the_body_is_the_language_models(base_folder):
    torch.manual_seed(0)
    model = new_reward_model(rm_config(base_folder))
    (head,) = score_heads(model)
    assert 0 < head.weight.std() < 2 / 17  # std 1 / (D + 1) = 1/17, 16 draws
    ids, lengths = padded(sequences()), torch.tensor(LENGTHS)
    assert score_sequences(model, ids, lengths).abs().max() < 1
    from transformers import AutoModelForCausalLM

    body = AutoModelForCausalLM.from_pretrained(base_folder / "base").model
    for p, q in zip(model.model.parameters(), body.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_saved_reward_model_reloads_and_scores_the_same(base_folder, kind):
    if kind == "lora":
        peft = pytest.importorskip("peft")
    model = new_reward_model(rm_config(base_folder, finetuning_type=kind, lora_rank=2)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():  # as if trained
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
            assert kind == "full" or "lora_" in name or "score" in name
    out = base_folder / "trained"
    model.save_pretrained(out)
    ids, lengths = padded(sequences()), torch.tensor(LENGTHS)
    expected = score_sequences(model, ids, lengths)
    assert expected.abs().max() > 0.1

    again = load_reward_model(out)
    torch.testing.assert_close(score_sequences(again, ids, lengths), expected, rtol=1e-5, atol=1e-6)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    stock = AutoModelForSequenceClassification.from_pretrained(
        out if kind == "full" else base_folder / "base", num_labels=1
    )
    if kind == "lora":
        stock = peft.PeftModel.from_pretrained(stock, out)
    for row, want in zip(sequences()[1:2] + sequences()[3:], expected[[1, 3]], strict=True):  # those without EOS
        got = stock.eval()(input_ids=torch.tensor([row])).logits[0, 0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_trained_head_is_kept_when_training_goes_on(base_folder):
    first = new_reward_model(rm_config(base_folder))
    score_heads(first)[0].weight.data.fill_(0.25)
    first.save_pretrained(base_folder / "rm")
    again = new_reward_model(rm_config(base_folder, model_name_or_path=str(base_folder / "rm")))
    assert torch.equal(score_heads(again)[0].weight, torch.full((1, 16), 0.25))


def test_folders_without_a_reward_model_are_named(base_folder):
    with pytest.raises(ValueError, match="base has no trained score head; train one with stage: rm"):
        load_reward_model(base_folder / "base")
    with pytest.raises(FileNotFoundError, match="reward_model: no folder"):
        load_reward_model(base_folder / "nowhere")


def test_a_family_without_a_sequence_classifier_is_named(tmp_path):
    from test_data import word_tokenizer
    from transformers import CohereConfig, CohereForCausalLM

    shape = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    CohereForCausalLM(CohereConfig(**shape)).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="model_name_or_path: .*[Cc]ohere.*"):
        new_reward_model(rm_config(tmp_path))

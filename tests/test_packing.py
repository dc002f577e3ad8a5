"""Padding-free batches: the same log-probs and gradients as padded rows and single sequences, and who may not pack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from rlhf_fast.integrations.lm_head import fuse_lm_head  # noqa: E402
from rlhf_fast.losses.nll import NLL  # noqa: E402
from rlhf_fast.trainers.data.collators import Collator, KTOCollator, PairCollator  # noqa: E402
from rlhf_fast.trainers.data.packing import PackedDataset, check_packing, fill_rows  # noqa: E402

VOCAB = 97
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "Qwen2": SMALL,
    "Llama": SMALL,
    "Gemma2": SMALL | dict(head_dim=8, sliding_window=5, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "Mistral": SMALL | dict(sliding_window=5),
    "GPT2": dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),  # learned positions
}


def make_model(family, dtype=torch.float32, seed=0, **extra):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES.get(family, {}), **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # attention that matters: at the usual 0.02 a leak would hardly show
        if p.dim() > 1:
            p.data.mul_(5)
    return model.to(dtype)


def make_examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, n).astype(np.int32) for n in lengths]
    return [{"input_ids": ids, "scored": np.arange(len(ids)) >= len(ids) // 2} for ids in rows]


def run(model, batch):
    """Scored log-probs in the order of the sequences, and the loss's gradient."""
    model.zero_grad()
    batch = {k: v for k, v in batch.items() if k != "cu_seqlens"}
    logprob = model(**batch).logprob[batch["target_ids"] != -100]
    model(**batch, loss_fn=NLL(normalizer=1.0)).loss.backward()
    return logprob.detach().double(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


def one_by_one(model, examples):
    parts = [run(model, Collator(0)([e])) for e in examples if e["scored"][1:].any()]
    return torch.cat([p for p, _ in parts]), sum(g for _, g in parts)


LENGTHS = [7, 1, 12, 3, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_single(family):
    """Against the fp64 model, packing errs no more than running the sequences one by one; gradients as well."""
    examples = make_examples(LENGTHS)
    truth = one_by_one(fuse_lm_head(make_model(family, torch.float64)), examples)
    model = fuse_lm_head(make_model(family))
    single = one_by_one(model, examples)
    for collate in (Collator(0, packing=True), Collator(0)):
        for got, ref, exact in zip(run(model, collate(examples)), single, truth, strict=True):
            assert (got - exact).norm() <= 2 * (ref - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "Gemma2"])  # its attention rounds to fp32
def test_packed_is_exact_in_fp64(family):
    model = fuse_lm_head(make_model(family, torch.float64))
    examples = make_examples(LENGTHS)
    for got, exact in zip(run(model, Collator(0, packing=True)(examples)), one_by_one(model, examples), strict=True):
        assert (got - exact).norm() <= 64 * torch.finfo(torch.float64).eps * exact.norm()


# ---- collators


def marked_examples():
    ids = [[5, 6, 7, 8], [9], [10, 11, 12]]
    return [{"input_ids": np.array(i), "scored": np.arange(len(i)) >= 1} for i in ids]


def test_packed_batch():
    batch = Collator(0, packing=True)(marked_examples())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch["target_ids"].tolist() == [[6, 7, 8, -100, -100, 11, 12, -100]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 8]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert set(batch) == {"input_ids", "position_ids", "target_ids", "cu_seqlens"}
    with pytest.raises(ValueError, match="multiple_of must be 1, got 8"):
        Collator(0, packing=True, multiple_of=8)


def test_a_boundary_is_never_predicted():
    """The first token of a sequence is scored here; nothing of the sequence before may predict it."""
    rows = [{"input_ids": np.array([5, 6]), "scored": np.array([True, True])}] * 3
    assert Collator(0, packing=True)(rows)["target_ids"].tolist() == [[6, -100] * 3]


def test_pairs_stand_side_by_side():
    a, b, c = marked_examples()
    pairs = [{"chosen": a, "rejected": b, "margin": None}, {"chosen": c, "rejected": a, "margin": None}]
    padded, packed = PairCollator(0)(pairs), PairCollator(0, packing=True)(pairs)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 0], [5, 6, 7, 8]]
    assert packed["cu_seqlens"].diff().tolist() == padded["attention_mask"].sum(1).tolist() == [4, 1, 3, 4]
    assert packed["input_ids"].tolist() == [padded["input_ids"][padded["attention_mask"].bool()].tolist()]
    assert "margin" not in padded
    pairs[1]["margin"] = 0.5
    margin = PairCollator(0)(pairs)["margin"]
    assert (margin.tolist(), margin.dtype) == ([0.0, 0.5], torch.float32)


@pytest.mark.parametrize("packing", [False, True])
def test_kto_labels(packing):
    rows = [{**e, "label": label} for e, label in zip(marked_examples(), (True, False, np.True_), strict=True)]
    batch = KTOCollator(0, packing=packing)(rows)
    plain = Collator(0, packing=packing)(rows)
    assert (batch["label"].tolist(), batch["label"].dtype) == ([True, False, True], torch.bool)
    assert all(torch.equal(batch[key], plain[key]) for key in plain)


# ---- rows of a token budget


class Lengths:
    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def __getitem__(self, i):
        return {"input_ids": np.full(self.lengths[i], i + 1), "scored": np.ones(self.lengths[i], dtype=bool)}


def test_rows_hold_every_sequence_once_within_the_budget():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(deadline=None, max_examples=50)
    @hypothesis.given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90), st.integers(0, 3))
    def check(lengths, budget, seed):
        rows = fill_rows(lengths, budget, seed=seed)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert not rows or (sums[-1] <= budget and sums[0] > 0)
        assert len(sums) < 2 or sums[0] + sums[1] > budget  # else those two would be one row
        assert rows == fill_rows(lengths, budget, seed=seed)

    check()


def test_rows_are_well_filled():
    assert sorted(sorted(r) for r in fill_rows([7, 6, 4, 3], 10)) == [[0, 3], [1, 2]]
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 20_000).astype(int).clip(1, 2048)
    rows = fill_rows(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99
    assert fill_rows(lengths, 2048, seed=1) != rows
    with pytest.raises(ValueError, match=r"budget .* 9 tokens \(row 1\), got 8"):
        fill_rows([3, 9], 8)


def test_packed_dataset_feeds_the_collators():
    data = PackedDataset(Lengths([5, 4, 3, 2, 2]), 8)
    assert len(data) == 2
    assert data.filled == 1.0
    batch = Collator(0, packing=True)([data[i] for i in range(len(data))])
    assert batch["input_ids"].shape == (1, 16)
    assert sorted(batch["cu_seqlens"].diff().tolist()) == [2, 2, 3, 4, 5]
    assert Collator(0)([data[0]])["input_ids"].shape[0] == len(data[0])


# ---- who may pack


@pytest.mark.parametrize("family", [*FAMILIES, "Qwen3Moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_packing_passes(family, dtype):
    extra = dict(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16) if family == "Qwen3Moe" else {}
    model = make_model(family, dtype, **extra).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("Bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "BloomModel takes no position_ids"),
        ("Lfm2", dict(SMALL, layer_types=["conv", "full_attention"]), "Lfm2Model has conv layers"),
    ],
)
def test_check_packing_refuses(family, options, message):
    with pytest.raises(ValueError, match=message):
        check_packing(make_model(family, **options))


def test_check_packing_sees_a_leak(monkeypatch):
    """Without the block-diagonal mask nothing but the positions tells sequences apart."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="Qwen2Model with attention 'sdpa' does not keep packed sequences apart"):
            check_packing(make_model("Qwen2", dtype))


def test_check_packing_below_any_head_and_adapter():
    peft = pytest.importorskip("peft")
    options = dict(SMALL, num_labels=1, attention_dropout=0.5)
    scorer = transformers.AutoModelForSequenceClassification.from_config(transformers.Qwen2Config(**options))
    check_packing(scorer)
    check_packing(fuse_lm_head(make_model("Qwen2")))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.5)
    check_packing(fuse_lm_head(peft.get_peft_model(make_model("Qwen2"), lora)))


def test_supervised_run_in_full_rows(tmp_path):
    """From the configuration: a batch counts rows of cutoff_len tokens, and each scored token counts once."""
    import json

    from test_data import word_tokenizer

    from rlhf_fast.trainers.config import make_config
    from rlhf_fast.trainers.sft import run_sft

    make_model("Qwen2").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lengths = [5, 4, 3, 2, 2] * 2  # with EOS
    lines = [json.dumps({"text": "a " * (n - 1)}) for n in lengths]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    values = dict(stage="sft", model_name_or_path=str(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"))
    values |= dict(output_dir=str(tmp_path / "out"), cutoff_len=8, packing=True, per_device_train_batch_size=4)
    summary = run_sft(make_config(values | dict(learning_rate=0.0, use_cpu=True, disable_tqdm=True, plot_loss=False)))
    assert summary["steps"] == 1  # 32 tokens in 4 rows
    model = fuse_lm_head(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    sums = []
    for n in lengths:
        row = {"input_ids": np.array([8] * (n - 1) + [3]), "scored": np.ones(n, dtype=bool)}
        sums.append(model(**Collator(0)([row]), loss_fn=NLL(normalizer=1.0)).loss.item())
    assert summary["train_loss"] == pytest.approx(sum(sums) / 22, rel=64 * torch.finfo(torch.float32).eps)

"""The KTO stage against plain torch, on a two-layer model made on the spot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from stage_cases import (
    CHECKPOINTING,
    PAIRS,
    arguments,
    folders,
    judged_data,
    judged_rows,
    one_step,
    run_options,
    sequence_logprob,
    tiny,
)

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.losses.kto import KTO
from rlhf_fast.trainers.config import make_config
from rlhf_fast.trainers.kto import KTOTrainer, Mismatched, MismatchedCollator, run_kto
from rlhf_fast.trainers.kto_config import KTOConfig
from rlhf_fast.trainers.run_log import read_log

ROWS = judged_rows(PAIRS[:6])
LOSS = KTO("kto", beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)


def trainer_for(folder, model=None, rows=ROWS, *, loss=LOSS, packing=False, ref=1, **options):
    data = judged_data(rows)
    return KTOTrainer(
        model or tiny(),
        arguments(folder, **options),
        processing_class=make_tokenizer(),
        loss=loss,
        packing=packing,
        reference=None if ref is None else tiny(ref),
        train_dataset=data,
        eval_dataset=data,
    )


def answer(row):
    return [int(i) for i in row["input_ids"]], int(np.argmax(row["scored"]))


def plain_loss(model, ref, dataset, loss):
    """(loss, z) in the paper's form, each sequence by itself."""
    gaps, good, kl = [], [], []
    for row in (dataset[i] for i in range(len(dataset))):
        with torch.no_grad():
            base = sequence_logprob(ref, *answer(row)).sum()
            if loss.kind == "kto":
                kl.append(
                    (sequence_logprob(model, *answer(row["kl"])) - sequence_logprob(ref, *answer(row["kl"]))).sum()
                )
        gaps.append(sequence_logprob(model, *answer(row)).sum() - base)
        good.append(row["label"])
    z = torch.stack(kl).mean().clamp(min=0) if kl else 0.0
    terms = [
        loss.desirable_weight * (1 - torch.sigmoid(loss.beta * (gap - z)))
        if label
        else loss.undesirable_weight * (1 - torch.sigmoid(loss.beta * (z - gap)))
        for gap, label in zip(gaps, good, strict=True)
    ]
    return torch.stack(terms).mean(), z


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", ["mixed", "good", "bad"])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_every_gradient_equal_plain_torch_in_fp64(tmp_path, kind, labels, packing):
    rows = [r for r in ROWS if labels == "mixed" or r["label"] == (labels == "good")]
    loss = KTO(kind, beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    model, plain = tiny(), tiny()
    trainer = trainer_for(tmp_path, model, rows, loss=loss, packing=packing)
    data = trainer.train_dataset
    expected, z = plain_loss(plain, tiny(1), data, loss)
    expected.backward()
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    ours, metrics = trainer.compute_loss(model, batch, return_outputs=True)
    ours.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-11)
    assert metrics["kl"].item() == pytest.approx(float(z), rel=1e-9, abs=1e-12)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_reference_point_is_above_0_somewhere():
    """So that the test above sees more than its clamp."""
    data = Mismatched(judged_data(ROWS))
    _, one = plain_loss(tiny(), tiny(1), data, LOSS)
    _, other = plain_loss(tiny(1), tiny(), data, LOSS)
    assert max(one, other) > 0.1
    assert min(one, other) == 0


def test_micro_batches_of_one_label_packing_and_checkpointing_change_nothing(tmp_path):
    """Sorted by label: every micro-batch is all good or all bad. The policy of the other test, where z is above 0."""
    rows = sorted(ROWS, key=lambda r: r["label"])
    pick = 0 if plain_loss(tiny(), tiny(1), Mismatched(judged_data(rows)), LOSS)[1] > 0 else 1

    def make(packing=False, **options):
        policy, ref = tiny(pick), 1 - pick
        sampling = dict(train_sampling_strategy="sequential")
        return trainer_for(tmp_path, policy, rows, packing=packing, ref=ref, **sampling, **options)

    whole, logged = one_step(make, per_device_train_batch_size=12)
    assert logged["kl"] > 0.1
    for options in (
        dict(per_device_train_batch_size=3, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=12, packing=True),
        dict(per_device_train_batch_size=12, packing=True, **CHECKPOINTING),
    ):
        parts, other = one_step(make, **options)
        for name in ("loss", "kl", "rewards/chosen", "rewards/margins", "logps/rejected", "loss/chosen"):
            assert other[name] == pytest.approx(logged[name], rel=1e-6), (options, name)  # the Trainer's sum is fp32
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_at_step_0_reward_and_reference_point_are_exactly_0(tmp_path):
    trainer = trainer_for(tmp_path, tiny(dtype=torch.float32, attention_dropout=0.5), ref=None)
    data = trainer.train_dataset
    trainer.model.train()
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    loss, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert all(metrics[name].item() == 0 for name in ("kl", "rewards/chosen", "rewards/rejected"))
    assert loss.item() == pytest.approx((1.3 + 0.7) / 4, rel=1e-6)  # half good, half bad, sigmoid(0)


def test_evaluation_is_the_formula_over_the_whole_set(tmp_path):
    trainer = trainer_for(tmp_path, per_device_eval_batch_size=5)
    expected, z = plain_loss(tiny(), tiny(1), trainer.eval_dataset, LOSS)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["eval_kl"] == pytest.approx(float(z), rel=1e-9, abs=1e-12)


def test_mismatched_answers_come_from_other_prompts():
    data = judged_data(ROWS)
    mismatch = Mismatched(data, max_length=8, seed=3)
    for i in range(len(data)):
        row = mismatch[i]
        ids, prompt = answer(row)
        other, joint = answer(mismatch[i]["kl"])
        assert (joint, other[:joint]) == (prompt, ids[:prompt])
        assert len(other) <= 8
        j = int(mismatch.partner[i])
        assert other[joint:] == answer(data[j])[0][answer(data[j])[1] :][: 8 - joint]
        assert answer(data[j])[0][:4] != ids[:4]
    assert len(set(mismatch.partner.tolist())) > len(data) // 2
    with pytest.raises(ValueError, match="all 2 rows have the same one"):
        Mismatched(judged_data(ROWS[:2]))
    batch = MismatchedCollator(0)([mismatch[i] for i in range(3)])
    assert batch["kl_input_ids"].shape[0] == batch["input_ids"].shape[0] == 3
    assert batch["label"].tolist() == [True, False, True]


def test_precomputed_sums_change_nothing(tmp_path):
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    whole, logged = one_step(lambda **o: trainer_for(tmp_path, **o), **options)

    def make(**changes):
        trainer = trainer_for(tmp_path, **changes)
        trainer.precompute_reference(tmp_path / "cache", batch_size=5)
        return trainer

    parts, other = one_step(make, **options)
    assert other["kl"] == pytest.approx(logged["kl"], rel=1e-9)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- runs


@pytest.fixture
def judged_folders(tmp_path):
    return folders(tmp_path, ROWS)


def test_a_run_learns_and_reports(judged_folders):
    options = dict(max_steps=20, val_size=2, beta=0.5, learning_rate=3e-3)
    summary = run_kto(KTOConfig(**run_options(judged_folders, **options)))
    rows = [r for r in read_log(judged_folders / "out") if "loss" in r]
    assert rows[0]["loss"] == pytest.approx(0.5)
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["rewards/margins"] > 0.5
    assert summary["stage"] == "kto"
    assert summary["data"]["desirable"] + summary["data"]["undesirable"] == 10
    assert math.isfinite(summary["eval_rewards/margins"])


def test_resume_continues_bit_for_bit(judged_folders):
    from safetensors.torch import load_file

    options = dict(max_steps=4, save_steps=2, sync_ref_model=True, ref_model_sync_steps=1)
    for name in ("whole", "parts"):
        run_kto(KTOConfig(**run_options(judged_folders, name, **options)))
    (judged_folders / "parts" / "checkpoint-4" / "trainer_state.json").unlink()  # as after a kill in mid-save
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        run_kto(KTOConfig(**run_options(judged_folders, "parts", **options, resume_from_checkpoint=True)))
    first, second = (read_log(judged_folders / name) for name in ("whole", "parts"))
    assert [(r["step"], r["loss"], r["kl"]) for r in first] == [(r["step"], r["loss"], r["kl"]) for r in second]
    a, b = (load_file(judged_folders / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_llama_factorys_names():
    config = make_config(dict(stage="kto", pref_beta=0.2, kto_chosen_weight=1.5, kto_rejected_weight=0.5))
    assert config.kto_loss() == KTO("kto", 0.2, 1.5, 0.5)
    with pytest.raises(ValueError, match="desirable_weight must be"):
        KTOConfig(desirable_weight=-1.0)

"""The DPO stage against plain torch and TRL, on a two-layer model made on the spot."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from stage_cases import (
    CHECKPOINTING,
    PAIRS,
    arguments,
    each_answer,
    folders,
    one_step,
    pair_batch,
    pair_data,
    run_options,
    sequence_logprob,
    tiny,
)

from rlhf_fast import reference
from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.losses.preference import PreferenceLoss, preference_loss
from rlhf_fast.trainers.config import make_config
from rlhf_fast.trainers.data.collators import PairCollator
from rlhf_fast.trainers.dpo import DPOTrainer, run_dpo
from rlhf_fast.trainers.dpo_config import DPOConfig
from rlhf_fast.trainers.reference_trainer import WithReference
from rlhf_fast.trainers.run_log import read_log


def trainer_for(folder, model=None, data=None, *, loss=None, packing=False, ref=1, **options):
    """Policy of seed 0, reference of seed `ref` (None: the policy itself)."""
    own = {name: options.pop(name) for name in list(options) if name in ("sync_steps", "sync_alpha", "log_entropy")}
    return DPOTrainer(
        model or tiny(),
        arguments(folder, **options),
        processing_class=make_tokenizer(),
        loss=loss,
        reference=None if ref is None else tiny(ref),
        data_collator=PairCollator(0, packing=packing),
        train_dataset=data or pair_data(),
        eval_dataset=data or pair_data(),
        **own,
    )


def plain_pairs(model, data):
    """Per-token log-probabilities of both sides, each sequence by itself."""
    return [[sequence_logprob(model, *answer) for answer in each_answer(data, side)] for side in ("chosen", "rejected")]


def plain_sigmoid(model, ref, data, beta):
    chosen, rejected = ([x.sum() for x in side] for side in plain_pairs(model, data))
    with torch.no_grad():
        ref_chosen, ref_rejected = ([x.sum() for x in side] for side in plain_pairs(ref, data))
    total = 0.0
    for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        total = total + torch.log1p(torch.exp(-beta * ((c - rc) - (r - rr))))
    return total / len(chosen)


def same_gradients(model, plain, tolerance):
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert q[1].grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q[1].grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---- one step


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_every_gradient_equal_plain_torch_in_fp64(tmp_path, packing):
    data, model, plain = pair_data(), tiny(), tiny()
    expected = plain_sigmoid(plain, tiny(1), data, beta=0.7)
    expected.backward()
    trainer = trainer_for(tmp_path, model, loss=PreferenceLoss("sigmoid", beta=0.7))
    loss = trainer.compute_loss(model, pair_batch(data, packing))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    same_gradients(model, plain, 1e-11)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ipo", {}),
        ("simpo", {"simpo_gamma": 1.0, "beta": 2.0}),
        ("orpo", {}),
        ("aot", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("sigmoid", {"weighting": "wpo"}),
        ("sigmoid", {"f_divergence": "js"}),
        ("sigmoid", {"reference_free": True}),
        ({"sigmoid": 0.5, "bco_pair": 0.5, "sft": 0.2}, {}),
    ],
)
def test_every_loss_of_the_family_reaches_the_weights_as_the_formula_says(tmp_path, kind, options):
    """`reference.preference_loss` on plain log-probabilities, padded to one width."""
    data, model, plain, ref = pair_data(), tiny(), tiny(), tiny(1)
    pad = torch.nn.utils.rnn.pad_sequence
    sides, ref_sides = (
        [pad(side, batch_first=True) for side in plain_pairs(m, data)] for m in (plain, ref.requires_grad_(False))
    )
    masks = tuple(pad([torch.ones(len(x)) for x in side], batch_first=True).bool() for side in plain_pairs(ref, data))
    expected, _ = reference.preference_loss(*sides, *ref_sides, kind=kind, mask=masks, **options)
    expected.backward()
    trainer = trainer_for(tmp_path, model, loss=PreferenceLoss(kind, **options))
    assert (trainer.reference is None) == (kind in ("simpo", "orpo") or "reference_free" in options)
    loss = trainer.compute_loss(model, pair_batch(data))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    same_gradients(model, plain, 1e-9)


def test_micro_batches_packing_and_checkpointing_change_nothing(tmp_path):
    """fp64: ragged pairs, a mix whose terms have two different normalisers."""
    loss = PreferenceLoss(["sigmoid", "sft"], loss_weights=[1.0, 0.3], beta=0.5)

    def make(packing=False, **options):
        return trainer_for(tmp_path, loss=loss, packing=packing, **options)

    whole, logged = one_step(make, per_device_train_batch_size=8)
    for options in (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8, packing=True),
        dict(per_device_train_batch_size=8, packing=True),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, **CHECKPOINTING),
    ):
        parts, other = one_step(make, **options)
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "loss/sft"):
            assert other[name] == pytest.approx(logged[name], rel=1e-7), (options, name)  # the Trainer's sum is fp32
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert max((a - b).abs().max() for a, b in zip(whole, tiny().parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_at_step_0_every_margin_is_exactly_0(tmp_path, kind, layout):
    """fp32, dropout in the config and in the adapter, training mode."""
    model = tiny(dtype=torch.float32, attention_dropout=0.5)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
        options = dict(r=2, lora_dropout=0.0 if "lm_head" in targets else 0.5, target_modules=targets)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trainer = trainer_for(tmp_path, model, ref=None, log_entropy=True)
    assert trainer.reference.adapters_off == (kind == "lora")
    batch = pair_batch(pair_data(), packing=layout == "packed")
    if layout == "left":
        batch = left_padded(batch)
    model.train()
    trainer.is_in_train = True
    loss = trainer.compute_loss(model, batch)
    metrics = trainer._step.values
    assert loss.item() == torch.tensor(2.0).log().item()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name].item() == 0.0
    assert metrics["logps/chosen"] < -1
    assert 0 < metrics["entropy"] < math.log(15)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def left_padded(batch):
    """The same rows, padding before them."""
    rows = []
    for ids, mask, target in zip(batch["input_ids"], batch["attention_mask"], batch["target_ids"], strict=True):
        n = int(mask.sum())
        rows.append([torch.cat([x[n:], x[:n]]) for x in (ids, mask, target)])
    return dict(
        zip(("input_ids", "attention_mask", "target_ids"), map(torch.stack, zip(*rows, strict=True)), strict=True)
    )


def test_evaluation_is_the_formula_over_the_whole_set(tmp_path):
    """A mix with two normalisers and ragged batches of 3, 3, 2: a mean of batch means would be another number."""
    data = pair_data()
    loss = PreferenceLoss(["sigmoid", "sft"], beta=0.5)
    whole = trainer_for(tmp_path, data=data, loss=loss)
    expected = whole.compute_loss(whole.model, pair_batch(data)).item()
    for packing in (False, True):
        metrics = trainer_for(tmp_path, data=data, loss=loss, packing=packing, per_device_eval_batch_size=3).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-9)
        accuracy = metrics["eval_rewards/accuracies"]
        assert accuracy * 8 == pytest.approx(round(accuracy * 8))
        assert 0 < accuracy < 1


def test_a_pair_without_a_scored_side_does_not_count(tmp_path):
    data = pair_data()
    trainer = trainer_for(tmp_path, ref=1)
    seven = trainer.compute_loss(trainer.model, pair_batch(data.select(range(7)))).item()
    batch = pair_batch(data)
    batch["target_ids"][-1] = -100
    assert trainer.counts(batch)["pairs"] == 7
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(seven, rel=1e-9)
    batch["target_ids"][:] = -100
    nothing = trainer.compute_loss(trainer.model, batch)
    nothing.backward()
    assert nothing.item() == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in trainer.model.parameters())


# ---- TRL


def test_a_step_is_trls_step(tmp_path):
    """The same model, reference, pairs and SGD step: the same loss, metrics and weights."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    options = dict(per_device_train_batch_size=8, max_steps=1, learning_rate=0.5, optim="sgd", max_grad_norm=0.0)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
    for name, model in (("policy", tiny(dtype=torch.float32)), ("reference", tiny(1, torch.float32))):
        model.save_pretrained(tmp_path / name)
    theirs = trl.DPOTrainer(
        tiny(dtype=torch.float32),
        tiny(1, torch.float32),
        trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.5, gradient_checkpointing=False, **options, **quiet),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    theirs.train()
    ours = trainer_for(tmp_path, tiny(dtype=torch.float32), ref=None, loss=PreferenceLoss(beta=0.5), **options)
    ours.reference.model.load_state_dict(tiny(1, torch.float32).state_dict())
    ours.train()
    first, second = ours.state.log_history[0], theirs.state.log_history[0]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-5), name  # fp32 sums of ten log-probs
    start = tiny(dtype=torch.float32)
    for p, q, s in zip(ours.model.parameters(), theirs.model.parameters(), start.parameters(), strict=True):
        moved = (q - s).abs().max().item()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4 * moved + 1e-7)


# ---- the reference


def test_precomputed_sums_are_the_references_and_are_read_back(tmp_path, monkeypatch):
    loss = PreferenceLoss("sigmoid", beta=0.5, ld_alpha=0.4)
    expected, logged = one_step(lambda **o: trainer_for(tmp_path, loss=loss, **o), per_device_train_batch_size=4)

    def make(**options):
        trainer = trainer_for(tmp_path, loss=loss, **options)
        trainer.precompute_reference(tmp_path / "cache", batch_size=3, options="ld_alpha=0.4")
        assert trainer.reference is None
        assert isinstance(trainer.train_dataset, WithReference)
        return trainer

    weights, again = one_step(make, per_device_train_batch_size=4)
    assert again["loss"] == pytest.approx(logged["loss"], rel=1e-7)
    for a, b in zip(expected, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(list((tmp_path / "cache").glob("ref_logprobs-*.npy"))) == 1  # train and eval set are the same rows

    def never(*args):
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(DPOTrainer, "reference_logprob", never)
    assert make().evaluate()["eval_loss"] > 0
    with pytest.raises(AssertionError, match="asked again"):  # another reference: another hash
        trainer_for(tmp_path, loss=loss, ref=2).precompute_reference(tmp_path / "cache", options="ld_alpha=0.4")


def test_the_reference_follows_the_policy_as_tr_dpo_says(tmp_path):
    options = dict(max_steps=3, learning_rate=0.1, optim="sgd")
    trainer = trainer_for(tmp_path, ref=None, sync_steps=2, sync_alpha=0.25, **options)
    seen, sync = [], trainer.after_step

    def watched():
        sync()
        both = (trainer.reference.model, trainer.model)
        seen.append([[p.detach().clone() for p in model.parameters()] for model in both])

    trainer.after_step = watched
    trainer.train()
    (first, _), (second, policy), (third, _) = seen
    for start, one, two, three, p in zip(tiny().parameters(), first, second, third, policy, strict=True):
        assert torch.equal(one, start)
        torch.testing.assert_close(two, 0.25 * p + 0.75 * start, rtol=1e-12, atol=1e-15)
        assert torch.equal(three, two)
    assert not torch.equal(first[0], second[0])


def test_pairs_can_be_grouped_by_length(tmp_path):
    trainer = trainer_for(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2)
    data = pair_data()
    both = [len(data[i]["chosen"]["input_ids"]) + len(data[i]["rejected"]["input_ids"]) for i in range(8)]
    assert trainer._get_train_sampler().lengths == both
    trainer.precompute_reference(tmp_path, batch_size=8)
    assert trainer._get_train_sampler().lengths == both
    assert len(set(both)) > 4


def test_bcos_shift_is_the_mean_reward_of_the_steps_before(tmp_path):
    loss = PreferenceLoss(["sigmoid", "bco_pair"], beta=0.5)
    options = dict(max_steps=3, learning_rate=0.05, optim="sgd", per_device_train_batch_size=4)
    trainer = trainer_for(tmp_path, ref=None, loss=loss, gradient_accumulation_steps=2, **options)
    trainer.train()
    rows = trainer.state.log_history[:3]
    rewards = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    assert trainer._shift.tolist() == pytest.approx([sum(rewards) / 3, 3])
    assert abs(sum(rewards)) > 1e-3
    other = trainer_for(tmp_path, ref=None, loss=loss)
    other._shift = torch.tensor([50.0, 1.0], dtype=torch.float64)
    _, metrics = other.compute_loss(other.model, pair_batch(pair_data()), return_outputs=True)
    assert metrics["loss/bco_pair"].item() == pytest.approx(50)  # -log sigmoid(0 - 50) - log sigmoid(50 - 0)


# ---- runs


@pytest.fixture
def pair_folders(tmp_path):
    return folders(tmp_path, PAIRS)


def test_a_run_learns_reports_and_reloads(pair_folders):
    from transformers import AutoModelForCausalLM

    options = run_options(pair_folders, max_steps=30, val_size=2, eval_steps=15, beta=0.5, learning_rate=3e-3)
    summary = run_dpo(DPOConfig(**options | {"plot_loss": True}))
    rows = [r for r in read_log(pair_folders / "out") if "loss" in r]
    assert rows[0]["loss"] == pytest.approx(math.log(2))
    assert rows[0]["rewards/margins"] == 0
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["rewards/accuracies"] == 1
    assert rows[-1]["rewards/margins"] == pytest.approx(rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"])
    assert (summary["stage"], summary["steps"], summary["data"]["kept"]) == ("dpo", 30, 6)
    assert summary == json.loads((pair_folders / "out" / "summary.json").read_text())
    assert summary["eval_loss"] > 0
    assert summary["eval_rewards/accuracies"] in (0, 0.5, 1)
    assert (pair_folders / "out" / "training_curves.png").stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(pair_folders / "out")
    data = pair_data()
    again = DPOTrainer(
        model, arguments(pair_folders / "t"), processing_class=make_tokenizer(), loss=PreferenceLoss(beta=0.5),
        reference=AutoModelForCausalLM.from_pretrained(pair_folders / "model"),
    )  # fmt: skip
    held = sorted(torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()[:2])
    loss = again.compute_loss(model.eval(), pair_batch(data.select(held))).item()
    assert loss == pytest.approx(summary["eval_loss"], rel=1e-5)


def test_lora_adapters_reload_and_score_the_same(pair_folders):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    options = run_options(pair_folders, finetuning_type="lora", lora_rank=4, lora_dropout=0.1, val_size=2, max_steps=8)
    summary = run_dpo(DPOConfig(**options))
    base = AutoModelForCausalLM.from_pretrained(pair_folders / "model")
    model = peft.PeftModel.from_pretrained(base, pair_folders / "out")
    held = sorted(torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()[:2])
    reference = AutoModelForCausalLM.from_pretrained(pair_folders / "model")
    expected = plain_sigmoid(model, reference, pair_data().select(held), 0.1).item()
    assert summary["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert summary["eval_loss"] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_under_bf16_autocast_the_margin_starts_at_exactly_0(pair_folders, kind):
    """Packed and checkpointed: policy and reference go through the same tiles and the same casts."""
    if kind == "lora":
        pytest.importorskip("peft")
    changes = dict(bf16=True, packing=True, gradient_checkpointing=True, finetuning_type=kind, max_steps=2)
    run_dpo(DPOConfig(**run_options(pair_folders, **changes)))
    first, second = read_log(pair_folders / "out")
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert second["rewards/margins"] != 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.3, pref_bco_weight=0.5),
        dict(packing=True, precompute_ref_log_probs=True, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    ],
    ids=["ema-bco", "packed-precomputed"],
)
def test_resume_continues_bit_for_bit(pair_folders, changes):
    from safetensors.torch import load_file

    options = dict(max_steps=4, save_steps=2, beta=0.5) | changes
    for name in ("whole", "parts"):
        run_dpo(DPOConfig(**run_options(pair_folders, name, **options)))
    (pair_folders / "parts" / "checkpoint-4" / "trainer_state.json").unlink()  # as after a kill in mid-save
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        run_dpo(DPOConfig(**run_options(pair_folders, "parts", **options, resume_from_checkpoint=True)))
    first, second = (read_log(pair_folders / name) for name in ("whole", "parts"))
    names = ("step", "loss", "rewards/chosen", "grad_norm")
    assert [[r[n] for n in names] for r in first] == [[r[n] for n in names] for r in second]
    a, b = (load_file(pair_folders / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert first[3]["loss"] != first[1]["loss"]


def test_ref_model_is_another_model(pair_folders):
    tiny(5, torch.float32).save_pretrained(pair_folders / "other")
    make_tokenizer().save_pretrained(pair_folders / "other")
    options = run_options(
        pair_folders, ref_model=str(pair_folders / "other"), max_steps=1, per_device_train_batch_size=8
    )
    run_dpo(DPOConfig(**options))
    expected = plain_sigmoid(tiny(dtype=torch.float32), tiny(5, torch.float32), pair_data(), 0.1).item()
    assert read_log(pair_folders / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    tiny(5, torch.float32, vocab_size=11).save_pretrained(pair_folders / "other")
    with pytest.raises(ValueError, match="its vocabulary has 11, the policy's 15 tokens"):
        run_dpo(DPOConfig(**options))


def test_ref_model_adapters_are_merged_into_the_reference(pair_folders):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run_dpo(DPOConfig(**run_options(pair_folders, "adapter", finetuning_type="lora", lora_rank=2, learning_rate=0.1)))
    adapter = str(pair_folders / "adapter")
    options = dict(ref_model=str(pair_folders / "model"), ref_model_adapters=adapter, max_steps=1)
    run_dpo(DPOConfig(**run_options(pair_folders, **options, per_device_train_batch_size=8)))
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair_folders / "model"), adapter)
    expected = plain_sigmoid(tiny(dtype=torch.float32), reference, pair_data(), 0.1).item()
    assert read_log(pair_folders / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(2)) > 1e-3


# ---- options


def test_llama_factorys_and_trls_names_are_the_same_keys():
    base = {"stage": "dpo"}
    one = make_config(base | dict(pref_loss="ipo", pref_beta=0.3, pref_ftx=0.5))
    two = make_config(base | dict(loss_type="ipo", beta=0.3, pref_ftx=0.5))
    assert one.preference_loss() == two.preference_loss()
    assert one.preference_loss().kinds == (("ipo", 1.0), ("sft", 0.5))
    assert one.preference_loss().params["sft_average"] == "sequence"
    mix = make_config(base | dict(pref_loss="sigmoid", pref_bco_weight=1.0, dpo_label_smoothing=0.1)).preference_loss()
    assert mix.kinds == (("sigmoid", 0.5), ("bco_pair", 0.5))
    assert mix.label_smoothing == 0.1
    trl = make_config(
        base | dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    ).preference_loss()
    assert trl.kinds == (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))
    assert make_config(base | dict(pref_loss="simpo", simpo_gamma=0.7)).preference_loss().params["simpo_gamma"] == 0.7


def test_llama_factorys_loss_has_its_nll_and_trls_has_trls():
    """Chosen answers of 6 tokens and of 1: a mean over answers of their means, or over the tokens."""

    def loss_of(**values):
        return make_config({"stage": "dpo", "beta": 0.1} | values)

    sums, lengths = (
        [torch.tensor([-6.0, -0.4]), torch.tensor([-9.0, -2.0])],
        (torch.tensor([6, 1]), torch.tensor([4, 3])),
    )
    odds = preference_loss(*sums, kind="orpo", lengths=lengths, beta=0.1, sft_average="sequence").loss - 0.7
    by_answer, by_token = (1.0 + 0.4) / 2, 6.4 / 7
    for values, nll in (
        (dict(pref_loss="orpo"), by_answer),
        (dict(dpo_loss="orpo"), by_answer),
        (dict(loss_type="orpo"), by_token),
        (dict(pref_loss="orpo", sft_average="token"), by_token),
        (dict(loss_type="orpo", sft_average="sequence"), by_answer),
        (dict(pref_loss="orpo", pref_ftx=0.5), 1.5 * by_answer),
        (dict(loss_type="orpo", pref_ftx=0.5), 1.5 * by_answer),
        (dict(loss_type="orpo", rpo_alpha=0.5), 1.5 * by_token),
        (dict(pref_loss="orpo", rpo_alpha=0.5), 1.5 * by_token),
    ):
        loss = preference_loss(*sums, kind=loss_of(**values).preference_loss(), lengths=lengths).loss
        assert loss.item() == pytest.approx(odds.item() + nll, rel=1e-5), values
    assert make_config({"stage": "dpo", "pref_loss": "orpo"}, ["loss_type=orpo"]).sft_average is None
    for sigmoid in (dict(pref_loss="sigmoid"), dict(pref_loss=["sigmoid", "hinge"])):
        assert loss_of(**sigmoid).sft_average is None  # no NLL in it: nothing to average


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(loss_type="sigmiod"), "did you mean 'sigmoid'"),
        (dict(loss_type="ipo", simpo_gamma=0.5), "simpo_gamma"),
        (dict(beta=0.0), "beta must be"),
        (dict(loss_type="simpo", ref_model="x"), "ref_model has no use"),
        (dict(rpo_alpha=1.0, pref_ftx=1.0), "both add an SFT term"),
        (dict(sync_ref_model=True, precompute_ref_log_probs=True), "choose one"),
        (dict(ref_model_adapters="x"), "goes with ref_model"),
        (dict(ref_model_mixup_alpha=0.0), r"ref_model_mixup_alpha must be in \(0, 1\]"),
        (dict(loss_type="exo_pair"), "label_smoothing must be > 0"),
    ],
)
def test_options_that_do_not_fit_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**values)

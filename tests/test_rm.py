"""The reward-model stage against plain torch, on a two-layer model made on the spot."""

from __future__ import annotations

import json
from types import SimpleNamespace

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
    tiny_config,
)
from test_data import CHAT_TEMPLATE, ids_of, marked, word_tokenizer
from test_data_chat import turns
from transformers import AutoModelForSequenceClassification, Qwen2ForSequenceClassification

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.data.collators import PairCollator
from rlhf_fast.trainers.data.pairs import tokenize_pairs
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import tokenize_prompts
from rlhf_fast.trainers.dpo_config import DPOConfig
from rlhf_fast.trainers.meters import Sums
from rlhf_fast.trainers.models.hf_utils import ending_ids
from rlhf_fast.trainers.models.reward_model import load_reward_model, pool_by_length, score_batch
from rlhf_fast.trainers.reward_ensemble import RewardModel
from rlhf_fast.trainers.rm import RewardTrainer, run_rm
from rlhf_fast.trainers.rm_config import RMConfig
from rlhf_fast.trainers.run_log import read_log
from rlhf_fast.trainers.stage import tokenize

MARGINS = [dict(row, margin=0.1 * i) for i, row in enumerate(PAIRS)]


def classifier(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(tiny_config(num_labels=1, **options)).to(dtype)


def trainer_for(folder, model=None, rows=MARGINS, *, packing=False, center=0.05, **options):
    return RewardTrainer(
        model or classifier(),
        arguments(folder, **options),
        processing_class=make_tokenizer(),
        data_collator=PairCollator(0, packing=packing),
        train_dataset=pair_data(rows),
        eval_dataset=pair_data(rows),
        center=center,
    )


def plain_scores(model, data, side):
    return torch.stack(
        [
            model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0]
            for ids, _ in each_answer(data, side)
        ]
    )


@pytest.mark.parametrize("packing", [False, True])
def test_loss_gradients_and_metrics_equal_plain_torch_in_fp64(tmp_path, packing):
    data, model, plain = pair_data(MARGINS), classifier(), classifier()
    chosen, rejected = (plain_scores(plain, data, side) for side in ("chosen", "rejected"))
    margin = torch.arange(8, dtype=torch.float64) * 0.1
    gap = chosen - rejected - margin.float()  # margins are kept in fp32
    expected = (torch.log1p(torch.exp(-gap)) + 0.05 * (chosen + rejected).square()).mean()
    expected.backward()
    trainer = trainer_for(tmp_path, model, packing=packing, center=0.05)
    loss, metrics = trainer.compute_loss(model, pair_batch(data, packing), return_outputs=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found = trainer.finish_metrics({"loss": 0.0} | {k: v.item() for k, v in metrics.items()})
    every = torch.cat([chosen, rejected]).detach()
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/std": every.std(correction=0),
        "rewards_max": every.max(),
        "rewards_min": every.min(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-9), name
    assert 0 < found["rewards/accuracies"] < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_batch_without_a_pair_has_no_extremes(tmp_path, monkeypatch, sign):
    """A process with nothing to evaluate, or a masked micro-batch, adds nothing, not a score of 0."""
    trainer = trainer_for(tmp_path)
    scores = sign * torch.tensor([5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("rlhf_fast.trainers.rm.score_batch", lambda model, inputs: scores)
    full, totals = pair_batch(pair_data(MARGINS[:2]), False), {"pairs": torch.tensor(2)}
    empty = trainer.first_rows(full, 0)

    def logged(*batches):
        sums = Sums()
        for batch in batches:
            sums.add(trainer.share(trainer.model, batch, totals)[1])
        values = sums.reduced(trainer.accelerator)
        return trainer.finish_metrics({name: value.item() for name, value in values.items()})

    found = logged(empty, full, empty)
    assert (found["rewards_min"], found["rewards_max"]) == (scores.min(), scores.max())
    nothing = logged(empty, empty)
    assert "rewards_max" not in nothing
    assert set(nothing.values()) == {0.0}


def test_micro_batches_packing_and_checkpointing_change_nothing(tmp_path):
    def make(**options):
        return trainer_for(tmp_path, **options)

    whole, logged = one_step(make, per_device_train_batch_size=8)
    for options in (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8, packing=True),
        dict(per_device_train_batch_size=8, packing=True, **CHECKPOINTING),
    ):
        parts, other = one_step(make, **options)
        for name in ("loss", "rewards/margins", "rewards/std", "rewards_max", "rewards_min"):
            assert other[name] == pytest.approx(logged[name], rel=1e-7), (options, name)  # the Trainer's sum is fp32
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert max((a - b).abs().max() for a, b in zip(whole, classifier().parameters(), strict=True)) > 1e-3


def test_dropout_is_off_while_training(tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        model = classifier(attention_dropout=dropout).train()
        losses.append(trainer_for(tmp_path, model).compute_loss(model, pair_batch(pair_data(MARGINS))).item())
    assert losses[0] == losses[1]


def test_a_step_is_trls_step(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    options = dict(per_device_train_batch_size=8, max_steps=1, learning_rate=0.5, optim="sgd", max_grad_norm=0.0)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"),
        center_rewards_coefficient=0.05,
        gradient_checkpointing=False,
        **options,
        **quiet,
    )
    theirs = trl.RewardTrainer(
        classifier(torch.float32), args, train_dataset=Dataset.from_list(PAIRS), processing_class=make_tokenizer()
    )
    theirs.train()
    ours = trainer_for(tmp_path, classifier(torch.float32), rows=PAIRS, **options)
    ours.train()
    first, second = ours.state.log_history[0], theirs.state.log_history[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["rewards/accuracies"] == pytest.approx(second["accuracy"])
    for p, q, s in zip(ours.model.parameters(), theirs.model.parameters(), classifier(torch.float32).parameters(),
                       strict=True):  # fmt: skip
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4 * (q - s).abs().max().item() + 1e-7)


# Both write more behind the token that ends a completion: </s>; and j, here Gemma's <end_of_turn>, with EOS further on.
ENDINGS = {"chatml": ("</s>", CHAT_TEMPLATE), "gemma": ("j", CHAT_TEMPLATE.replace("</s> nl", "j nl"))}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ENDINGS)
def test_trained_where_a_policys_completion_is_scored(name, packing):
    """The scores of the pairs are those that `RewardModel` gives the same texts as PPO and GRPO sample them."""
    end, template = ENDINGS[name]
    tokenizer, model = word_tokenizer(bos=True, template=template), classifier(vocab_size=18).eval()
    rows = [
        {"prompt": turns("u a"), "chosen": "b", "rejected": "c d"},
        {"prompt": turns("u a / a b / u e f"), "chosen": "g b", "rejected": "a"},
    ]
    ending = ending_ids(SimpleNamespace(eos_token_id=ids_of("</s> j")), tokenizer)
    data = tokenize_pairs(Rows.from_list(rows), tokenizer, max_length=99, ending_ids=ending)
    trained = score_batch(pool_by_length(model), pair_batch(data, packing))
    prompts = [p.ids for p in tokenize_prompts(Rows.from_list(rows), tokenizer, max_length=99)[0] for _ in range(2)]
    sampled = [ids_of(f"{row[side]} {end}") for row in rows for side in ("chosen", "rejected")]
    torch.testing.assert_close(trained.tolist(), RewardModel(model)(prompts, sampled), rtol=1e-9, atol=1e-12)
    assert trained.std() > 1e-2


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_with_their_templates_tail_are_scored_at_eos(packing):
    tokenizer, model = word_tokenizer(template=CHAT_TEMPLATE), classifier(vocab_size=18).eval()
    rows = [{"prompt": turns("u a"), "chosen": "b", "rejected": "c d"}]
    whole, cut = (
        tokenize_pairs(Rows.from_list(rows), tokenizer, max_length=99, ending_ids=ending) for ending in ((), (3,))
    )
    assert (whole.lengths - cut.lengths).tolist() == [2]
    scores = [score_batch(pool_by_length(model), pair_batch(data, packing)) for data in (whole, cut)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-12)


def test_only_the_last_turn_ends_and_only_for_a_reward_model(tmp_path):
    """Where completions end is the model folder's to say; DPO has the template's whole text."""
    tokenizer, folder = word_tokenizer(template=ENDINGS["gemma"][1]), folders(tmp_path, [])
    row = {"prompt": turns("u a"), "chosen": turns("a b / u c / a d"), "rejected": turns("a e")}

    def chosen(config):
        return marked(tokenize(config(**run_options(folder)), Rows.from_list([row]), tokenizer).chosen)

    whole = "<|user|> a <|assistant|> b* j* nl* <|user|> c <|assistant|> d* j* nl* </s>*"
    assert chosen(RMConfig) == whole  # the model's completions end with EOS alone
    for file in ("generation_config.json", "config.json"):
        path = folder / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids_of("<|system|> j")}))
        assert chosen(RMConfig) == whole.removesuffix(" nl* </s>*")
        assert chosen(DPOConfig) == whole
        (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    for text in ("{", '{"model_type": "none"}'):
        (folder / "model" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="model_name_or_path: no model could be loaded from .*model: "):
            chosen(RMConfig)
    (folder / "model" / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="model_name_or_path: no model could be loaded from .*model: TypeError"):
        chosen(RMConfig)


# ---- runs


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_learns_and_its_folder_scores_the_same(tmp_path, kind):
    folder = folders(tmp_path, MARGINS)
    options = dict(max_steps=25, val_size=3, learning_rate=1e-2, finetuning_type=kind, use_margin=False)
    if kind == "lora":
        peft = pytest.importorskip("peft")
    summary = run_rm(RMConfig(**run_options(folder, **options)))
    rows = [r for r in read_log(folder / "out") if "loss" in r]
    assert rows[0]["loss"] < 1  # log 2 and a little: a new head's scores are about 1 / sqrt(16)
    assert rows[-1]["loss"] < 0.2
    assert rows[-1]["rewards/accuracies"] == 1
    assert summary["stage"] == "rm"
    assert summary == json.loads((folder / "out" / "summary.json").read_text())

    held = sorted(torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()[:3])
    batch = pair_batch(pair_data(MARGINS).select(held))
    ours = score_batch(load_reward_model(folder / "out"), batch)
    loss = torch.nn.functional.softplus(ours[1::2] - ours[0::2]).mean()
    assert loss.item() == pytest.approx(summary["eval_loss"], rel=1e-5)
    if kind == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
        stock = peft.PeftModel.from_pretrained(base, folder / "out")
    else:
        stock = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    stock.config.pad_token_id = 0
    scores = stock.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    # an adapter is merged into its base, which rounds every weight once: some tens of eps of the largest score
    torch.testing.assert_close(scores, ours, rtol=0, atol=100 * 2**-23 * ours.abs().max().item())
    assert ours.abs().max() > 0.5


def test_resume_continues_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    folder = folders(tmp_path, MARGINS)
    options = dict(max_steps=4, save_steps=2, packing=True)
    for name in ("whole", "parts"):
        run_rm(RMConfig(**run_options(folder, name, **options)))
    (folder / "parts" / "checkpoint-4" / "trainer_state.json").unlink()  # as after a kill in mid-save
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        run_rm(RMConfig(**run_options(folder, "parts", **options, resume_from_checkpoint=True)))
    a, b = (load_file(folder / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0\.5\), got 0\.5"):
        RMConfig(label_smoothing=0.5)
    with pytest.raises(ValueError, match="center_rewards_coefficient must be at least 0"):
        RMConfig(center_rewards_coefficient=-1)

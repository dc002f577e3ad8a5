"""Supervised fine-tuning against plain torch, on a two-layer model made on the spot."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from test_data import word_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from rlhf_fast.losses.nll import NLL
from rlhf_fast.ops.fused import fused_linear_loss
from rlhf_fast.trainers.checkpoint import last_checkpoint
from rlhf_fast.trainers.data.readers import Rows
from rlhf_fast.trainers.data.tokenize import Collator, tokenize_sft
from rlhf_fast.trainers.models.hf_utils import load_model
from rlhf_fast.trainers.run_log import read_log
from rlhf_fast.trainers.sft import SFTTrainer, run_sft
from rlhf_fast.trainers.sft_config import SFTConfig

VOCAB = 18


def tiny_model(seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **shape, **kwargs)
    return Qwen2ForCausalLM(config).to(dtype)


def make_rows(count=16):
    """Copy the prompt backwards; ragged lengths."""
    letters = "abcdefghij"
    rows = []
    for i in range(count):
        word = [letters[(i * 7 + k * 3) % 10] for k in range(1 + i % 4)]
        rows.append({"prompt": " ".join(word), "completion": " ".join(reversed(word))})
    return rows


@pytest.fixture
def folders(tmp_path):
    """A model folder and a data file."""
    model, tokenizer = tiny_model(), word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in make_rows()))
    return tmp_path


def config_for(folder, name="out", **changes):
    values = dict(
        model_name_or_path=str(folder / "model"),
        dataset=str(folder / "train.jsonl"),
        output_dir=str(folder / name),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        plot_loss=False,
    )
    return SFTConfig(**(values | changes))


def trainer_for(tmp_path, model=None, rows=None, **changes):
    tokenizer = word_tokenizer()
    data = tokenize_sft(Rows.from_list(rows or make_rows()), tokenizer, max_length=32)
    values = dict(
        output_dir=str(tmp_path / "t"),
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    args = TrainingArguments(**(values | changes))
    return SFTTrainer(model or tiny_model(), args, processing_class=tokenizer, train_dataset=data, eval_dataset=data)


def plain_loss(model, batch):
    """Mean cross-entropy over scored tokens, from the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten(), ignore_index=-100)


def batch_of(rows):
    data = tokenize_sft(Rows.from_list(rows), word_tokenizer(), max_length=32)
    return Collator(1)([data[i] for i in range(len(data))])


# ---- loss


def test_loss_and_every_gradient_equal_plain_torch_in_fp64(tmp_path):
    batch = batch_of(make_rows(5))
    plain, model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    expected = plain_loss(plain, batch)
    expected.backward()
    loss = trainer_for(tmp_path, model).compute_loss(model, batch)
    loss.backward()
    # An fp64 graph may still pass statistics through fp32; 1e-6 is the floor of that.
    assert abs(loss.item() - expected.item()) <= 1e-6
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max().item()
        assert error <= 1e-6, f"{name}: {error}"
    assert expected.item() > 1


def test_fp32_gradients_are_as_accurate_as_plain_fp32(tmp_path):
    batch = batch_of(make_rows(7))
    truth, plain, model = tiny_model(dtype=torch.float64), tiny_model(), tiny_model()
    plain_loss(truth, batch).backward()
    plain_loss(plain, batch).backward()
    trainer_for(tmp_path, model).compute_loss(model, batch).backward()
    params = zip(model.named_parameters(), plain.parameters(), truth.parameters(), strict=True)
    for (name, ours), naive, exact in params:
        floor = 1e-6 * max(1.0, exact.grad.abs().max().item())
        error, budget = (ours.grad - exact.grad).abs().max(), (naive.grad - exact.grad).abs().max()
        assert error <= budget + floor, f"{name}: {error} over {budget}"


@pytest.mark.parametrize("normalizer", [None, 7, 2.5, torch.tensor(9)])
def test_nll_closed_form_equals_autograd(normalizer):
    torch.manual_seed(0)
    weight, target = torch.randn(11, 8), torch.tensor([1, -100, 3, 10, 0])
    loss_fn, grads = NLL(normalizer), []
    for fn in (loss_fn, lambda lp, h, b: loss_fn(lp, h, b)):  # the second hides prepare and gradient
        hidden = torch.ones(5, 8).mul(torch.arange(5.0)[:, None] / 5).requires_grad_()
        batch = {} if fn is loss_fn else loss_fn.prepare({}, target >= 0, None)
        out = fused_linear_loss(hidden, weight, target, fn, batch=batch)
        (out.loss * 3).backward()
        grads.append(hidden.grad)
    logits = torch.nn.functional.log_softmax((torch.ones(5, 8) * (torch.arange(5.0)[:, None] / 5)) @ weight.T, -1)
    nll = -logits[[0, 2, 3, 4], [1, 3, 10, 0]].sum()
    torch.testing.assert_close(out.metrics["nll"], nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.detach(), nll / float(4 if normalizer is None else normalizer))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)
    assert grads[0].abs().sum() > 0


def test_nothing_scored_gives_zero_loss_and_zero_gradients(tmp_path):
    model, batch = tiny_model(), batch_of(make_rows(3))
    batch["target_ids"].fill_(-100)
    loss = trainer_for(tmp_path, model).compute_loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    empty = NLL().prepare({}, torch.zeros(3, dtype=torch.bool), None)
    assert NLL().gradient(torch.zeros(0), None, empty).loss.item() == 0  # 0 / 1, not 0 / 0
    with pytest.raises(ValueError, match="normalizer"):
        NLL(torch.ones(2)).prepare({}, torch.ones(2, dtype=torch.bool), None)


def one_step(tmp_path, **changes):
    """Weights after one SGD step over all 16 rows."""
    trainer = trainer_for(tmp_path, max_steps=1, learning_rate=0.5, optim="sgd", max_grad_norm=0.0, **changes)
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()], trainer.state.log_history[0]["loss"]


def test_micro_batches_equal_one_batch(tmp_path):
    """Ragged rows: a mean of the micro-batches' means would be another step."""
    whole, loss = one_step(tmp_path, per_device_train_batch_size=16)
    for size, steps in ((4, 4), (1, 16)):
        parts, loss_parts = one_step(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        assert loss_parts == pytest.approx(loss, rel=1e-5)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    moved = max((a - b).abs().max().item() for a, b in zip(whole, tiny_model().parameters(), strict=True))
    assert moved > 1e-3


def test_evaluation_loss_is_a_mean_over_tokens(tmp_path):
    rows = make_rows(7)
    trainer = trainer_for(tmp_path, rows=rows, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    expected = plain_loss(tiny_model(), batch_of(rows)).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


# ---- runs


def test_a_run_learns_and_leaves_its_files(folders):
    torch.manual_seed(1)
    summary = run_sft(config_for(folders, max_steps=60, warmup_steps=5, val_size=4, eval_steps=30, plot_loss=True))
    out = folders / "out"
    rows = read_log(out)
    losses = [r["loss"] for r in rows if "loss" in r]
    assert len(losses) == 60
    assert losses[0] > 2.5  # near log(18) = 2.9
    assert losses[-1] < 0.5 * losses[0]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in rows if "loss" in r)
    assert all(r["tokens_per_second"] > 0 and r["peak_memory_mb"] > 0 for r in rows if "loss" in r)
    assert [r["step"] for r in rows if "eval_loss" in r] == [30, 60, 60]
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["stage"], summary["steps"], summary["skipped_steps"]) == ("sft", 60, 0)
    assert summary["data"]["kept"] == 12
    assert summary["eval_loss"] > 0
    for name in ("training_metrics.csv", "training_curves.png", "run_config.yaml", "model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert not (out / "training_args.bin").exists()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.use_cache
    assert tokenizer.eos_token_id == 3
    assert model.generation_config.eos_token_id in (3, [3])  # transformers 5.17 saves a list
    text = make_rows()[1]
    ids = torch.tensor([tokenizer(text["prompt"])["input_ids"]])
    done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert done.shape[1] <= ids.shape[1] + 8


def test_the_same_seed_gives_the_same_run_and_data_order(folders):
    runs = [
        [r["loss"] for r in (run_sft(config_for(folders, name, seed=seed)), read_log(folders / name))[1]]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_resume_continues_bit_for_bit(folders):
    whole = config_for(folders, "whole", max_steps=8, save_steps=5)
    run_sft(whole)
    run_sft(config_for(folders, "parts", max_steps=8, save_steps=5))
    for name in ("model.safetensors", "summary.json"):  # as after a kill between steps 5 and 8
        (folders / "parts" / name).unlink()
    (folders / "parts" / "checkpoint-8").mkdir(exist_ok=True)
    (folders / "parts" / "checkpoint-8" / "trainer_state.json").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="checkpoint-8 is incomplete"):
        assert last_checkpoint(folders / "parts").name == "checkpoint-5"
    with pytest.warns(UserWarning, match="incomplete"):
        run_sft(config_for(folders, "parts", max_steps=8, save_steps=5, resume_from_checkpoint=True))
    first, second = read_log(folders / "whole"), read_log(folders / "parts")
    assert [r["step"] for r in second] == list(range(1, 9))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    a, b = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_lora_trains_adapters_only_and_reloads(folders):
    peft = pytest.importorskip("peft")
    summary = run_sft(config_for(folders, finetuning_type="lora", lora_rank=4, max_steps=20))
    assert (folders / "out" / "adapter_model.safetensors").is_file()
    losses = [r["loss"] for r in read_log(folders / "out")]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(folders / "model")
    batch = batch_of(make_rows())
    before = plain_loss(base, batch).item()
    model = peft.PeftModel.from_pretrained(base, folders / "out")
    assert plain_loss(model, batch).item() < before
    assert summary["steps"] == 20


def test_gradient_checkpointing_changes_nothing(folders):
    for name, on in (("off", False), ("on", True)):
        run_sft(config_for(folders, name, gradient_checkpointing=on, max_steps=3))
    losses = [[r["loss"] for r in read_log(folders / name)] for name in ("off", "on")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_autocast_runs(folders):
    run_sft(config_for(folders, bf16=True, max_steps=3))
    assert all(math.isfinite(r["loss"]) for r in read_log(folders / "out"))


def test_a_step_with_nan_gradients_changes_nothing(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=2, learning_rate=0.1, logging_steps=1)
    step = trainer.compute_loss

    def poisoned(model, inputs, **kwargs):
        loss = step(model, inputs, **kwargs)
        return loss * math.nan if trainer.state.global_step == 0 else loss

    trainer.compute_loss = poisoned
    before = [p.detach().clone() for p in trainer.model.parameters()]
    after_first = []

    def watch(*args, **kwargs):
        if trainer.state.global_step == 1 and not after_first:
            after_first.extend(p.detach().clone() for p in trainer.model.parameters())

    trainer.callback_handler.on_step_end = (lambda old: lambda *a, **k: (watch(), old(*a, **k))[1])(
        trainer.callback_handler.on_step_end
    )
    with pytest.warns(UserWarning, match="step 1: a gradient is not finite"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, after_first, strict=True))
    assert trainer.broken_steps.skipped == 1
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert any(moved)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_nan_for_ever_ends_the_run(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=20)
    step = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: step(*a, **k) * math.nan
    with pytest.warns(UserWarning, match="step skipped"), pytest.raises(FloatingPointError, match="10 steps in a row"):
        trainer.train()


def test_the_best_checkpoint_is_what_is_saved(folders):
    """A learning rate that spoils the model after a while: the last weights are not the best ones."""
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="steps")
    steps = dict(max_steps=12, eval_steps=2, save_steps=2, val_size=4, learning_rate=0.3, lr_scheduler_type="constant")
    summary = run_sft(config_for(folders, **steps, training_arguments=best))
    losses = {r["step"]: r["eval_loss"] for r in read_log(folders / "out") if "eval_loss" in r and r["step"] < 12}
    assert summary["best_step"] == min(losses, key=losses.get)
    assert summary["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(folders / "out")
    kept = AutoModelForCausalLM.from_pretrained(folders / "out" / f"checkpoint-{summary['best_step']}")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), kept.parameters(), strict=True))


def test_do_train_false_only_evaluates(folders):
    summary = run_sft(config_for(folders, do_train=False, val_size=4))
    assert "steps" not in summary
    assert 2 < summary["eval_loss"] < 4
    assert not (folders / "out" / "model.safetensors").exists()


def test_lora_plus_gives_b_its_own_rate(folders):
    pytest.importorskip("peft")
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            seen.update(
                {names[id(p)]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
            )

    lora = dict(finetuning_type="lora", lora_rank=2, loraplus_lr_ratio=16.0, learning_rate=1e-3, max_steps=1)
    run_sft(config_for(folders, **lora), callbacks=[Look()])
    assert {rate for name, rate in seen.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in seen.items() if "lora_B" in name} == {1.6e-2}
    assert (folders / "out" / "generation_config.json").is_file()


def test_packing_rows_of_a_token_budget_hold_every_example(folders):
    """The loss at the start is that of the padded run, whatever the rows hold."""
    run_sft(config_for(folders, "packed", packing=True, cutoff_len=24, max_steps=1, per_device_train_batch_size=16))
    run_sft(config_for(folders, "padded", cutoff_len=24, max_steps=1, per_device_train_batch_size=16))
    first, second = (read_log(folders / name)[0]["loss"] for name in ("packed", "padded"))
    assert first == pytest.approx(second, rel=1e-5)


# ---- errors before anything is spent


def test_errors_come_before_the_model_is_loaded(folders, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rlhf_fast.trainers.sft.load_model", never)
    (folders / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        run_sft(config_for(folders, dataset=str(folders / "empty.jsonl")))
    (folders / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: needs .* columns are prompt, answer"):
        run_sft(config_for(folders, dataset=str(folders / "bad.jsonl")))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run_sft(config_for(folders, resume_from_checkpoint=True))
    with pytest.raises(ValueError, match="val_size=16"):
        run_sft(config_for(folders, val_size=16))


def test_a_tokenizer_larger_than_the_model_is_named(folders):
    small = Qwen2Config(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    small.num_attention_heads = small.num_key_value_heads = 2
    Qwen2ForCausalLM(small).save_pretrained(folders / "model")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: token id \d+ \('\w'\) is outside .* 0\.\.8"):
        run_sft(config_for(folders))


def test_a_broken_model_folder_is_named(folders):
    (folders / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_name_or_path: no model could be loaded from"):
        load_model(config_for(folders))

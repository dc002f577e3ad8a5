"""fp16's gradient scaler, on the CPU: what it skips, while it finds its scale and later, is counted and limited."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

import accelerate
import grpo_cases
import torch
from stage_cases import tiny
from test_sft import make_rows
from test_sft import trainer_for as sft_trainer
from transformers import TrainerCallback

from rlhf_fast.trainers.run_log import read_log


@pytest.fixture
def scaler_on_the_cpu(monkeypatch):
    """What accelerate does on a GPU: it makes a scaler, scales losses and unscales gradients."""
    plain = accelerate.Accelerator.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**40), True

    monkeypatch.setattr(accelerate.Accelerator, "__init__", init)


class Break(TrainerCallback):
    """A parameter is NaN from one step to another."""

    def __init__(self, parameter, steps):
        self.parameter, self.steps = parameter, steps

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 in self.steps:
            self.kept = self.parameter.detach().clone()
            self.parameter.data.fill_(math.nan)

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.steps:
            self.parameter.data.copy_(self.kept)


def sft(folder, steps, limit, broken=()):
    trainer = sft_trainer(folder, tiny(dtype=torch.float32, vocab_size=18), make_rows(16), fp16=True, max_steps=steps)
    trainer.broken_steps.limit = limit
    trainer.add_callback(Break(trainer.model.model.norm.weight, broken))
    return trainer, lambda: [row for row in trainer.state.log_history if "loss" in row]


def grpo(folder, steps, limit, broken=()):
    options = dict(fp16=True, max_steps=steps, max_skipped_steps=limit, steps_per_generation=1)
    model = grpo_cases.tiny()
    callbacks = [Break(model.model.norm.weight, broken)]
    return grpo_cases.trainer(folder, model, callbacks=callbacks, **options), lambda: read_log(folder)


def moments(trainer):
    optimizer = trainer.loop.optimizer if hasattr(trainer, "loop") else trainer.optimizer
    return [int(state["step"]) for state in optimizer.state.values()]


@pytest.mark.filterwarnings("ignore:step .* a gradient is not finite")
@pytest.mark.parametrize("make", [sft, grpo])
def test_the_search_for_a_scale_is_counted_apart_from_broken_steps(tmp_path, scaler_on_the_cpu, make):
    trainer, rows = make(tmp_path, 40, 30, broken=(36, 37))
    trainer.train()
    rows, scale, made, searched, skipped = rows(), 2.0**40, 0, 0, 0
    for row in rows:
        if row["grad_norm"] is not None and math.isfinite(row["grad_norm"]):
            made += 1
        else:
            scale, searched, skipped = scale / 2, searched + (not made), skipped + (made > 0)
        found = [row[name] for name in ("loss_scale", "loss_scale_search_steps", "skipped_steps")]
        assert found == [scale, searched, skipped], row
    assert 10 < searched < 35
    assert skipped >= 2  # the broken ones, and perhaps one that scale and batch make too large
    assert made + searched + skipped == 40
    assert set(moments(trainer)) == {made}


@pytest.mark.filterwarnings("ignore:step .* a gradient is not finite")
@pytest.mark.parametrize("make", [sft, grpo])
def test_a_search_that_does_not_end_is_given_up(tmp_path, scaler_on_the_cpu, make):
    trainer, _ = make(tmp_path, 40, 4)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="4 steps in a row .* up to step 4 at a loss scale of 1.37"):
        trainer.train()
    assert all(map(torch.equal, before, (p.detach() for p in trainer.model.parameters())))


@pytest.mark.filterwarnings("ignore:step .* a gradient is not finite")
@pytest.mark.parametrize("make", [sft, grpo])
def test_without_a_scaler_fp16_is_warned_of_and_steps_are_still_judged(tmp_path, make):
    with pytest.warns(UserWarning, match="fp16 is not computed on the CPU"):
        trainer, rows = make(tmp_path, 3, 3, broken=(2,))
    trainer.train()
    assert getattr(trainer, "loop", trainer).broken_steps.skipped == 1
    assert set(moments(trainer)) == {2}

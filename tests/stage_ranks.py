"""SFT, reward model, DPO and KTO on any number of processes: `python stage_ranks.py OUT STEPS [fsdp2]` in torchrun's
environment."""

from __future__ import annotations

import os
from pathlib import Path

from ranks import save_results
from stage_cases import PAIRS, judged_rows, tiny
from test_dpo import trainer_for as dpo_trainer
from test_kto_trainer import trainer_for as kto_trainer
from test_rm import trainer_for as rm_trainer
from test_sft import make_rows
from test_sft import trainer_for as sft_trainer

from rlhf_fast.losses.preference import PreferenceLoss
from rlhf_fast.trainers.sharding import full_state


def trainers(folder: Path, ranks: int, steps: int):
    """(name, trainer): a step is all rows, in micro-batches of 2, whatever the number of ranks."""

    def options(rows):
        sizes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=rows // 2 // ranks)
        sizes |= dict(per_device_eval_batch_size=5)  # does not divide the rows: some are repeated on several ranks
        return sizes | dict(max_steps=steps, learning_rate=0.1, optim="sgd", train_sampling_strategy="sequential")

    yield "sft", sft_trainer(folder / "sft", tiny(vocab_size=18), make_rows(16), **options(16))
    yield "rm", rm_trainer(folder / "rm", **options(8))
    mix = PreferenceLoss(["sigmoid", "bco_pair", "sft"], beta=0.5)
    yield "dpo", dpo_trainer(folder / "dpo", ref=None, loss=mix, sync_steps=1, **options(8))
    rows = sorted(judged_rows(PAIRS), key=lambda row: row["label"])
    yield "kto", kto_trainer(folder / "kto", rows=rows, **options(16))


def results(folder: Path, steps: int) -> dict[str, dict]:
    """Weights after the steps, what was logged, and the evaluation, by stage."""
    out = {}
    timings = ("second", "runtime", "time", "mb")
    for name, trainer in trainers(folder, int(os.environ["WORLD_SIZE"]), steps):
        trainer.train()
        metrics = trainer.evaluate()
        logged = [row for row in trainer.state.log_history if "grad_norm" in row]
        model = trainer.model_wrapped
        whole = full_state(trainer.accelerator, model)
        whole = trainer.accelerator.unwrap_model(model).state_dict() if whole is None else whole
        out[name] = {
            "weights": {k: v.clone() for k, v in whole.items()},
            "logged": {k: [row[k] for row in logged] for k in logged[0] if not k.endswith(timings)},
            "evaluation": {k: v for k, v in metrics.items() if not k.endswith(timings)},
        }
    return out


if __name__ == "__main__":
    save_results(results)

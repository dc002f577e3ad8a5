"""KTO on 8,000 single samples of the fine-tuned model, each judged right or wrong; no pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import samples, task

PROMPTS, ANSWERS = 10_000, 8_000

KTO: dict[str, Any] = dict(
    stage="kto",
    pref_beta=1.0,
    per_device_train_batch_size=256,
    num_train_epochs=2,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    warmup_steps=10,
    adam_beta2=0.95,
    logging_steps=1,
)


def demo(
    output: str | Path = "runs/demo-kto",
    seed: int = 0,
    *,
    prompts: int = PROMPTS,
    answers: int = ANSWERS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, samples, KTO; accuracy_before and accuracy_after are in the summary.

    Args:
        output: gets the data, the configs, the SFT model under sft/, and the files of the KTO run.
        prompts, answers: how many prompts are sampled, and how many judged answers are kept at most.
        overrides: options of the KTO stage.
    """
    from rlhf_fast.trainers.config import load_config, run

    output = Path(output)
    start = task.start(output, seed, prompts, title="kto", quiet=quiet)
    data = output / "data" / "judged.jsonl"
    count = samples.write_judged(data, samples.sample(start.sft, start.prompts, seed), answers, seed)
    config = start.config("kto", KTO | dict(overrides or {}), model=start.sft, data=data, out=output)
    start.console.print(
        f"\n[bold]KTO[/] on {count:,} samples of the SFT model, judged by the verifier: rlhf-fast train {config}"
    )
    return start.finish("KTO", output, run(load_config(config)), answers=count)

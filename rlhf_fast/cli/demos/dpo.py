"""DPO on 8,000 pairs of the fine-tuned model's own samples: one right, one wrong answer to each prompt, no SFT term."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import samples, task

PROMPTS, PAIRS = 20_000, 8_000

DPO: dict[str, Any] = dict(
    stage="dpo",
    pref_loss="sigmoid",
    pref_beta=1.0,
    per_device_train_batch_size=128,
    num_train_epochs=2,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    warmup_steps=10,
    adam_beta2=0.95,
    logging_steps=1,
)


def demo(
    output: str | Path = "runs/demo-dpo",
    seed: int = 0,
    *,
    prompts: int = PROMPTS,
    pairs: int = PAIRS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, samples, pairs, DPO; accuracy_before and accuracy_after are in the summary.

    Args:
        output: gets the data, the configs, the SFT model under sft/, and the files of the DPO run.
        prompts, pairs: how many prompts may be sampled until there are so many pairs.
        overrides: options of the DPO stage.
    """
    from rlhf_fast.trainers.config import load_config, run

    output = Path(output)
    start = task.start(output, seed, prompts, title="dpo", quiet=quiet)
    data = output / "data" / "pairs.jsonl"
    count = samples.write_pairs(data, samples.sample(start.sft, start.prompts, seed, mixed=pairs), pairs)
    config = start.config("dpo", DPO | dict(overrides or {}), model=start.sft, data=data, out=output)
    start.console.print(
        f"\n[bold]DPO[/] on {count:,} pairs, sampled from the SFT model {samples.PER_PROMPT} times a prompt and judged "
        f"by the verifier: rlhf-fast train {config}"
    )
    return start.finish("DPO", output, run(load_config(config)), pairs=count)

"""A reward model from 10,000 pairs of the fine-tuned model's samples: how often it ranks held-out pairs right, and
what picking the best of 8 samples by its score is worth."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import samples, task

PROMPTS, PAIRS, HELD_OUT_PAIRS = 25_000, 10_000, 1_000

RM: dict[str, Any] = dict(
    stage="rm",
    per_device_train_batch_size=128,
    per_device_eval_batch_size=500,
    max_steps=600,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    adam_beta2=0.95,
    logging_steps=10,
    eval_steps=100,
)


def demo(
    output: str | Path = "runs/demo-rm",
    seed: int = 0,
    *,
    prompts: int = PROMPTS,
    pairs: int = PAIRS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """SFT, samples, pairs, reward model; pair_accuracy is in the summary.

    accuracy_before is that of the SFT model's greedy answers, accuracy_after that of the best of 8 samples by the
    reward model; sampled_accuracy and any_of_8 are what chance and a perfect judge make of the same samples.

    Args:
        output: gets the data, the configs, the SFT model under sft/, and the reward model with its run's files.
        prompts, pairs: how many prompts may be sampled until there are so many pairs.
        overrides: options of the rm stage.
    """
    output = Path(output)
    start = task.start(output, seed, prompts, title="rm", quiet=quiet)
    summary = train_reward_model(start, output, pairs=pairs, overrides=overrides)
    chosen = best_of(output, samples.sample(start.sft, start.test, seed + 1))
    scores = {"accuracy_before": task.accuracy(start.before), **chosen}
    scores["pair_accuracy"] = summary["eval_rewards/accuracies"]
    seconds = round(time.perf_counter() - start.began, 2)
    summary |= dict(demo="rm", seed=seed, **scores, demo_seconds=seconds)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    start.console.print(
        f"held-out pairs ranked right: [bold]{scores['pair_accuracy']:.3f}[/]\n"
        f"accuracy on {task.HELD_OUT} held-out prompts: greedy {scores['accuracy_before']:.3f}, a sample "
        f"{scores['sampled_accuracy']:.3f}, best of {samples.PER_PROMPT} by the reward model "
        f"[bold]{scores['accuracy_after']:.3f}[/] (a perfect judge: {scores['any_of_8']:.3f}) in {seconds:.0f} s\n"
        f"curves   {output / 'training_curves.png'}\nmodel    {output}"
    )
    return summary


def train_reward_model(
    start: task.Start, out: Path, *, pairs: int = PAIRS, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Sample the start's prompts, make pairs, train a reward model into `out`; its summary.

    A tenth as many pairs are held out, of prompts that no other pair has.
    """
    from rlhf_fast.trainers.config import load_config, run

    held = min(HELD_OUT_PAIRS, pairs // 10)
    found = samples.sample(start.sft, start.prompts, start.seed, mixed=pairs + held)
    mixed = samples.both(found)
    if len(mixed) <= held:
        raise ValueError(
            f"only {len(mixed)} of {len(found)} prompts have a right and a wrong sample: give more prompts"
        )
    data = [start.output / "data" / f"{name}.jsonl" for name in ("pairs", "held_out_pairs")]
    samples.write_pairs(data[1], mixed[:held], held)
    count = samples.write_pairs(data[0], mixed[held:], pairs)
    options = RM | dict(eval_dataset=str(data[1])) | dict(overrides or {})
    config = start.config("rm", options, model=start.sft, data=data[0], out=out)
    start.console.print(
        f"\n[bold]Reward model[/] on {count:,} pairs, sampled from the SFT model {samples.PER_PROMPT} times a prompt "
        f"and judged by the verifier: rlhf-fast train {config}"
    )
    return run(load_config(config)) | dict(pairs=count)


def best_of(folder: Path, judged: list[samples.Judged]) -> dict[str, float]:
    """Accuracy of the sample that the reward model in `folder` likes best, of any sample, and of the perfect judge."""
    import torch
    from transformers import AutoTokenizer

    from rlhf_fast.trainers.models.reward_model import load_reward_model, score_sequences

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_reward_model(folder)
    texts = [
        (j.prompt + text, good) for j in judged for good, side in ((True, j.right), (False, j.wrong)) for text in side
    ]
    ids = [torch.tensor([*row, tokenizer.eos_token_id]) for row in tokenizer([text for text, _ in texts])["input_ids"]]
    with torch.no_grad():
        lengths = torch.tensor([len(row) for row in ids])
        scores = score_sequences(model, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), lengths).tolist()
    scored, picked = iter(zip(scores, (good for _, good in texts), strict=True)), []
    for j in judged:
        mine = [next(scored) for _ in (*j.right, *j.wrong)]
        picked.append(max(mine)[1] if mine else False)
    return {
        "sampled_accuracy": sum(len(j.right) for j in judged) / (samples.PER_PROMPT * len(judged)),
        "accuracy_after": sum(picked) / len(judged),
        f"any_of_{samples.PER_PROMPT}": sum(bool(j.right) for j in judged) / len(judged),
    }

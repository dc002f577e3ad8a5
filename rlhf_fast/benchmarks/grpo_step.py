"""A GRPO step beside TRL's: the demo's model and prompts, the same sizes and settings, in turn in one process.

A cycle is one rollout of 64 prompts x 8 completions of 7 tokens and its two optimiser steps; a step is half of it.
Cycles are timed from the end of an optimiser step to the end of the step two later, so everything a trainer does in
between is in. The reward is dense (the share of right digits): almost no group has zero advantage, so almost nothing
can be skipped. Without noise in it, both libraries see the same task and learn at the same learning rate.

TRL generates with transformers (no vLLM on a CPU), in fp32, without gradient checkpointing, reference model, logging
or saving. What remains different is the library: TRL scores the completions once more for the old log-probabilities
(its generation does not keep them), and forms logits.
"""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from rlhf_fast.benchmarks import memory
from rlhf_fast.benchmarks.measure import median

PROMPTS, GROUP, LENGTH, MINIBATCHES = 64, 8, 7, 2
ROWS = PROMPTS * GROUP // MINIBATCHES
CYCLES = 4
LEARNING_RATE = 5e-4
Notify = Callable[[str], None]


class Cycles(NamedTuple):
    """Of one short run, a value per cycle: seconds, those of generation, mean reward, tokens per completion; memory."""

    seconds: list[float]
    generation: list[float]
    reward: list[float]
    tokens: list[float]
    peak_bytes: int | None  # beyond what model and data take


def digits_right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The share of the six digits that stand where they should."""
    return [sum(a == b for a, b in zip(text, want, strict=False)) / 6 for text, want in zip(completions, answer)]  # noqa: B905


def run(rounds: int = 3, cycles: int = CYCLES, notify: Notify = lambda text: None, seed: int = 0) -> dict[str, Any]:
    """Seconds per optimiser step of both trainers, medians over all rounds' cycles; the first cycle is warm-up.

    Returns: {"rlhf_fast": {...}, "trl": {... or {"skipped": reason}}, "ratio": ours / TRL's}.
    """
    contenders = {"rlhf_fast": ours, "trl": trl}
    found: dict[str, list[Cycles]] = {name: [] for name in contenders}
    skipped = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notify("grpo_step: model, data, a little SFT")
        rows = prepare(Path(folder), cycles, seed)
        for i in range(rounds):
            names = list(contenders)[:: 1 if i % 2 == 0 else -1]
            for name in names:
                if name in skipped:
                    continue
                notify(f"grpo_step: round {i + 1} of {rounds}, {name}")
                try:
                    found[name].append(contenders[name](Path(folder), rows, cycles, seed))
                except ImportError as error:
                    skipped[name] = str(error)
                gc.collect()
    result: dict[str, Any] = {name: _summary(runs) for name, runs in found.items() if runs}
    result |= {name: {"skipped": reason} for name, reason in skipped.items()}
    if not skipped:
        result["ratio"] = result["rlhf_fast"]["step_seconds"] / result["trl"]["step_seconds"]
    result["setting"] = dict(
        prompts=PROMPTS, group=GROUP, completion_length=LENGTH, rows_per_step=ROWS, rounds=rounds, cycles=cycles
    )
    return result


def prepare(folder: Path, cycles: int, seed: int, prompts: int = PROMPTS) -> list[dict[str, str]]:
    """The demo's model after its SFT, under `folder`/sft; prompts and answers for the cycles."""
    from rlhf_fast.cli.demos import task

    task.start(folder, seed, cycles, title="grpo", quiet=True)
    pairs = task.make_rows(prompts * (cycles + 1), seed + 1)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


def ours(folder: Path, rows: list[dict[str, str]], cycles: int, seed: int) -> Cycles:
    """This library's GRPOTrainer, with the demo's options."""
    from rlhf_fast.trainers.grpo import GRPOTrainer
    from rlhf_fast.trainers.grpo_config import GRPOConfig

    model, tokenizer = load(folder)
    config = GRPOConfig(
        output_dir=str(folder / "ours"),
        num_generations=GROUP,
        max_completion_length=LENGTH,
        cutoff_len=16,
        per_device_train_batch_size=ROWS,
        steps_per_generation=MINIBATCHES,
        max_steps=MINIBATCHES * (cycles + 1),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        loss_type="grpo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10**6,
        plot_loss=False,
        report_to="none",
        seed=seed,
    )
    rewards, generation = Reward(), []
    clock = _clock()
    trainer = GRPOTrainer(model, tokenizer, rows, rewards, config, callbacks=[clock])
    trainer.sampler = _timed(trainer.sampler, generation)
    before = memory.watch("cpu")
    trainer.train()
    return _cycles(clock.ends, generation, rewards, memory.peak_above(before, "cpu"))


def trl(folder: Path, rows: list[dict[str, str]], cycles: int, seed: int) -> Cycles:
    """TRL's GRPOTrainer, the same options under its names. ImportError when TRL is not there."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(folder)
    tokenizer.padding_side = "left"
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        num_generations=GROUP,
        max_completion_length=LENGTH,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        steps_per_generation=MINIBATCHES,
        max_steps=MINIBATCHES * (cycles + 1),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        loss_type="grpo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        scale_rewards="group",
        temperature=1.0,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    rewards, generation = Reward(), []
    clock = _clock()
    trainer = GRPOTrainer(model, rewards, args, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer._generate = _timed(trainer._generate, generation)
    before = memory.watch("cpu")
    trainer.train()
    return _cycles(clock.ends, generation, rewards, memory.peak_above(before, "cpu"))


class Reward:
    """`digits_right`, remembering what it saw."""

    __name__ = "digits_right"

    def __init__(self) -> None:
        self.means: list[float] = []
        self.tokens: list[float] = []

    def __call__(
        self, completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        values = digits_right(completions, answer)
        self.means.append(sum(values) / len(values))
        self.tokens.append(sum(map(len, completion_ids)) / len(completion_ids))
        return values


def load(folder: Path) -> tuple[Any, Any]:
    """The demo's model and tokenizer, from `prepare`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder / "sft"), AutoTokenizer.from_pretrained(folder / "sft")


def _clock() -> Any:
    """A callback that notes when optimiser steps end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    return Clock()


def _timed(fn: Callable, seconds: list[float]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return fn(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def _cycles(ends: list[float], generation: list[float], rewards: Reward, peak: int | None) -> Cycles:
    marks = ends[MINIBATCHES - 1 :: MINIBATCHES]
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    if not len(generation) == len(rewards.means) == len(seconds) + 1:
        raise RuntimeError(f"{len(seconds) + 1} cycles, but {len(generation)} rollouts, {len(rewards.means)} scored")
    return Cycles(seconds, generation[1:], rewards.means, rewards.tokens, peak)


def _summary(runs: list[Cycles]) -> dict[str, Any]:
    cycle = median([s for run in runs for s in run.seconds])
    generation = median([s for run in runs for s in run.generation])
    peaks = [run.peak_bytes / 1e6 for run in runs if run.peak_bytes is not None]
    return {
        "step_seconds": cycle / MINIBATCHES,
        "cycle_seconds": cycle,
        "generation_seconds": generation,
        "update_seconds": median([s - g for run in runs for s, g in zip(run.seconds, run.generation, strict=True)]),
        "extra_mb": median(peaks) if peaks else None,
        "tokens_per_completion": [sum(column) / len(runs) for column in zip(*(r.tokens for r in runs), strict=True)],
        "reward": [sum(column) / len(runs) for column in zip(*(r.reward for r in runs), strict=True)],
        "cycles": [run.seconds for run in runs],
    }


def table(result: dict[str, Any]) -> Table:
    """Seconds by part, and the ratio."""
    out = Table(title="GRPO step, the demo's model: 64 prompts x 8, 7 tokens, 2 optimiser steps", title_justify="left")
    for name in ("trainer", "s / step", "generation s", "rest s", "peak MB", "tokens", "reward, first to last"):
        out.add_column(name, justify="left" if name == "trainer" else "right")
    for name in ("rlhf_fast", "trl"):
        row = result[name]
        if "skipped" in row:
            out.add_row(name, "", "", "", "", "", f"skipped: {row['skipped']}", style="dim")
            continue
        numbers = (f"{row[key]:.4f}" for key in ("step_seconds", "generation_seconds", "update_seconds"))
        extra = "" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        tokens = sum(row["tokens_per_completion"]) / len(row["tokens_per_completion"])
        out.add_row(name, *numbers, extra, f"{tokens:.2f}", f"{row['reward'][0]:.3f} to {row['reward'][-1]:.3f}")
    if "ratio" in result:
        out.caption = f"ours / TRL's: {result['ratio']:.2f}"
    return out

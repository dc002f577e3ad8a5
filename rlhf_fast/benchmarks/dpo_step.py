"""A DPO step beside TRL's: the same model, reference, pairs, batch and optimiser, in turn in one process.

The model is small (4 layers, width 256) and its vocabulary is not (32,000), so that the head weighs as much as in a
model of some billions. Steps are timed from the end of an optimiser step to the end of the next one, so everything a
trainer does in between is in. Both train in full against a frozen copy, in fp32 on a CPU and in bf16 on a GPU, without
gradient checkpointing, logging or saving, and both form the entropy. TRL 1.16 forms no whole logits tensor either: its
head works in chunks, and adds mean logits and top-1 hits for its metrics. What remains different is the library.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from rlhf_fast.benchmarks import memory
from rlhf_fast.benchmarks.measure import median, synchronize

VOCAB, WIDTH, LAYERS = 32_000, 256, 4
PAIRS, PROMPT, ANSWER = 4, (16, 48), (16, 64)
MAX_LENGTH = 256
STEPS = 4
LEARNING_RATE, BETA = 1e-4, 0.1
Notify = Callable[[str], None]
TRAINING: dict[str, Any] = dict(
    gradient_accumulation_steps=1,
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    train_sampling_strategy="sequential",
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


class Steps(NamedTuple):
    """Of one short run: seconds a step, peak memory beyond what model, reference and data take, mean loss."""

    seconds: list[float]
    peak_bytes: int | None
    loss: float


def run(
    rounds: int = 3,
    steps: int = STEPS,
    notify: Notify = lambda text: None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Seconds per optimiser step of both trainers, medians over all rounds' steps; the first step is warm-up.

    Returns: {"rlhf_fast": {...}, "trl": {... or {"skipped": reason}}, "ratio": ours / TRL's, "memory_ratio": the same}.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    contenders = {"rlhf_fast": ours, "trl": trl}
    found: dict[str, list[Steps]] = {name: [] for name in contenders}
    skipped = {}
    rows = make_rows(PAIRS * (steps + 1), seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(rounds):
            for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
                if name in skipped:
                    continue
                notify(f"dpo_step: round {i + 1} of {rounds}, {name}")
                try:
                    found[name].append(contenders[name](Path(folder), rows, steps, seed, device))
                except Exception as error:
                    if name == "rlhf_fast":
                        raise
                    skipped[name] = f"{type(error).__name__}: {error}"  # another release of TRL, say
                gc.collect()
    result: dict[str, Any] = {name: _summary(runs) for name, runs in found.items() if runs}
    result |= {name: {"skipped": reason} for name, reason in skipped.items()}
    if not skipped:
        first, second = result["rlhf_fast"], result["trl"]
        result["ratio"] = first["step_seconds"] / second["step_seconds"]
        if first["extra_mb"] and second["extra_mb"]:
            result["memory_ratio"] = first["extra_mb"] / second["extra_mb"]
    sizes = dict(vocabulary=VOCAB, width=WIDTH, layers=LAYERS, pairs=PAIRS, prompt=PROMPT, answer=ANSWER)
    result["setting"] = sizes | dict(rounds=rounds, steps=steps, device=device)
    return result


def ours(
    folder: Path,
    rows: list[dict[str, str]],
    steps: int,
    seed: int,
    device: str,
    pairs: int = PAIRS,
    length: int = MAX_LENGTH,
) -> Steps:
    """This library's DPOTrainer."""
    from transformers import TrainingArguments

    from rlhf_fast.losses.preference import PreferenceLoss
    from rlhf_fast.trainers.data.pairs import tokenize_pairs
    from rlhf_fast.trainers.data.readers import Rows
    from rlhf_fast.trainers.dpo import DPOTrainer

    tokenizer = make_tokenizer()
    trainer = DPOTrainer(
        make_model(seed, length),
        TrainingArguments(**_arguments(folder / "ours", steps, seed, device, pairs)),
        processing_class=tokenizer,
        loss=PreferenceLoss("sigmoid", beta=BETA),
        log_entropy=True,
        train_dataset=tokenize_pairs(Rows.from_list([dict(row) for row in rows]), tokenizer, max_length=length),
    )
    return _timed(trainer, device)


def trl(
    folder: Path,
    rows: list[dict[str, str]],
    steps: int,
    seed: int,
    device: str,
    pairs: int = PAIRS,
    length: int = MAX_LENGTH,
) -> Steps:
    """TRL's DPOTrainer, the same options under its names. ImportError when TRL is not there."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    options = _arguments(folder / "trl", steps, seed, device, pairs)
    trainer = DPOTrainer(
        make_model(seed, length),
        make_model(seed, length),
        DPOConfig(loss_type=["sigmoid"], beta=BETA, max_length=length, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    return _timed(trainer, device)


def make_tokenizer() -> Any:
    """Words w0, w1, ...; the first two ids are padding and EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_model(seed: int, length: int = MAX_LENGTH) -> Any:
    """An untrained Qwen2 for sequences of that length."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def make_rows(count: int, seed: int, pair: int | None = None) -> list[dict[str, str]]:
    """Ragged pairs of random words; with `pair`, all of so many tokens, PROMPT[0] of them the prompt's."""
    prompt, answer = (PROMPT, ANSWER) if pair is None else ((PROMPT[0],) * 2, (pair - PROMPT[0],) * 2)
    rng = random.Random(seed)

    def words(span: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(rng.randint(*span)))

    return [
        {"prompt": words(prompt), "chosen": " " + words(answer), "rejected": " " + words(answer)} for _ in range(count)
    ]


def table(result: dict[str, Any]) -> Table:
    """Seconds, memory, and the ratios."""
    title = f"DPO step: {PAIRS} pairs, {LAYERS} layers of {WIDTH}, vocabulary {VOCAB:,}, {result['setting']['device']}"
    out = Table(title=title, title_justify="left")
    for name in ("trainer", "s / step", "peak MB beyond the models", "loss"):
        out.add_column(name, justify="left" if name == "trainer" else "right")
    for name in ("rlhf_fast", "trl"):
        row = result[name]
        if "skipped" in row:
            out.add_row(name, "", "", f"skipped: {row['skipped']}", style="dim")
            continue
        extra = "" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        out.add_row(name, f"{row['step_seconds']:.4f}", extra, f"{row['loss']:.6f}")
    if "ratio" in result:
        memory_ratio = f", {result['memory_ratio']:.2f} of the memory" if "memory_ratio" in result else ""
        out.caption = f"ours / TRL's: {result['ratio']:.2f} of the time{memory_ratio}"
    return out


def _arguments(folder: Path, steps: int, seed: int, device: str, pairs: int) -> dict[str, Any]:
    precision = dict(use_cpu=device == "cpu", bf16=device == "cuda")
    run = dict(output_dir=str(folder), max_steps=steps + 1, seed=seed, per_device_train_batch_size=pairs)
    return TRAINING | precision | run


def _timed(trainer: Any, device: str) -> Steps:
    from transformers import PrinterCallback, TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    before = memory.watch(device)
    loss = trainer.train().training_loss
    peak = memory.peak_above(before, device)
    return Steps([b - a for a, b in zip(ends, ends[1:], strict=False)], peak, loss)


def _summary(runs: list[Steps]) -> dict[str, Any]:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "step_seconds": median([s for run in runs for s in run.seconds]),
        "extra_mb": median([peak / 1e6 for peak in peaks]) if peaks else None,
        "loss": runs[0].loss,
        "rounds": [run.seconds for run in runs],
    }

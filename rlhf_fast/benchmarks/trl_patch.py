"""TRL's GRPO and DPO trainers as they are, with the patch, and with the single-pass loss: time, memory, error.

    python -m rlhf_fast.benchmarks.trl_patch --output benchmarks/results

Two layers of width 256 and a vocabulary of 32,000: most of a step is the head, as it is at the batch sizes of RL with
a small model. Trainers run in turn in one process, each for a few whole steps of `train()`, optimiser included;
GRPO's completions are given, since a sampler belongs to neither side. Memory: the high-water mark of a step over what
is resident at its beginning, in a fresh process. Error: of the loss's gradients by hidden states and head against
fp64, on the same numbers.

On the CPU TRL scores prompts and padding too, on a GPU it does not: `trl, scored rows` leaves them out, so that what
remains between it and the patch is the computation.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf_fast.benchmarks.measure import median

MODULE = "rlhf_fast.benchmarks.trl_patch"  # also when it is run as __main__
VOCAB, WIDTH, LAYERS = 32_000, 256, 2
PROMPT, SHORT, LONG = 32, 128, 256  # tokens: of a prompt, of the shortest and the longest completion
SEQUENCES = 4  # of a step: 4 completions of one prompt, or 2 pairs
STEPS = 3  # of a run; the first warms up
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = {"grpo": ("trl", "trl, scored rows", "patch", "single pass"), "dpo": ("trl", "trl, scored rows", "patch")}
Notify = Callable[[str], None]


def run(
    hosts: tuple[str, ...] = ("grpo", "dpo"), dtypes: tuple[str, ...] = ("fp32", "bf16"), rounds: int = 3,
    memory: bool = True, notify: Notify = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """{host: {dtype: {mode: {"step_seconds", "cpu_seconds", "seconds", "loss", "extra_mb"}}}}, "error", "setting"."""
    result: dict[str, Any] = {host: {} for host in hosts}
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        prepare(folder)
        for host in hosts:
            for dtype in dtypes:
                result[host][dtype] = _race(folder, host, dtype, rounds, notify)
                for mode, row in result[host][dtype].items() if memory else ():
                    notify(f"trl_patch: memory of {host}, {dtype}, {mode}")
                    row["extra_mb"] = _memory(folder, host, dtype, mode)
        notify("trl_patch: errors against fp64")
        result["error"] = {dtype: errors(dtype) for dtype in dtypes}
    result["setting"] = dict(
        vocab=VOCAB, width=WIDTH, layers=LAYERS, prompt=PROMPT, completion=[SHORT, LONG], sequences=SEQUENCES,
        steps=STEPS, rounds=rounds,
    )  # fmt: skip
    return result


def _race(folder: Path, host: str, dtype: str, rounds: int, notify: Notify) -> dict[str, Any]:
    """Seconds per step of every mode, and those of all threads together, which a busy machine changes less: medians
    over all rounds' steps after the first."""
    rows: dict[str, Any] = {mode: {"seconds": [], "cpu": []} for mode in MODES[host]}
    for i in range(rounds):
        names = list(rows)
        for mode in names[i % len(names) :] + names[: i % len(names)]:
            notify(f"trl_patch: {host}, {dtype}, round {i + 1} of {rounds}, {mode}")
            with served(mode):
                clock, losses = train(folder, host, dtype, mode)
            for kind, ends in (("seconds", clock.ends), ("cpu", clock.cpu)):
                rows[mode][kind] += [b - a for a, b in zip(ends, ends[1:], strict=False)]
            rows[mode]["loss"] = losses
            gc.collect()
    for row in rows.values():
        row |= {"step_seconds": median(row["seconds"]), "cpu_seconds": median(row.pop("cpu"))}
    return rows


@contextlib.contextmanager
def served(mode: str) -> Iterator[None]:
    """TRL as the mode wants it."""
    from rlhf_fast.integrations import trl, trl_head

    if mode in ("patch", "single pass"):
        with trl.patch():
            yield
    elif mode == "trl, scored rows":
        import trl.trainer.utils as utils

        own = utils._use_triton
        utils._use_triton = trl_head.scored_rows_only(own)
        try:
            yield
        finally:
            utils._use_triton = own
    else:
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the hosts' warnings and progress bars."""
    from datasets.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- one run ---------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Model and tokenizer under `folder`/model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlhf_fast.cli.demos.task import make_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")


def train(
    folder: Path, host: str, dtype: str, mode: str, clock: Any = None, steps: int = STEPS
) -> tuple[Any, list[float]]:
    """A short `train()` of the host's trainer: the clock that watched it, and the losses of its steps."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from rlhf_fast.integrations.trl import FastGRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left" if host == "grpo" else "right")
    clock = clock or _clock()
    common = dict(
        output_dir=str(folder / "out"), max_steps=steps, learning_rate=1e-4, lr_scheduler_type="constant",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
        save_strategy="no", logging_steps=1, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=DTYPES[dtype])
    if host == "grpo":
        args = trl.GRPOConfig(
            **common, per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, steps_per_generation=1,
            max_completion_length=LONG, beta=0.0,
        )  # fmt: skip
        cls = FastGRPOTrainer if mode == "single pass" else trl.GRPOTrainer
        trainer = cls(model, _reward, args, _prompts(), processing_class=tokenizer, rollout_func=Completions())
    else:
        args = trl.DPOConfig(**common, per_device_train_batch_size=SEQUENCES // 2, max_length=PROMPT + LONG)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=_pairs(), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock, [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Completions:
    """A sampler that costs nothing: random tokens, the same in every run."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [[self.random.randrange(4, VOCAB) for _ in range(self.random.randint(SHORT, LONG))] for _ in prompts]
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}


def _reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) / len(ids) for ids in completion_ids]


def _digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("0123456789", k=length))


def _prompts() -> Any:
    from datasets import Dataset

    rng = random.Random(0)
    return Dataset.from_list([{"prompt": _digits(rng, PROMPT)} for _ in range(SEQUENCES)])


def _pairs() -> Any:
    from datasets import Dataset

    rng = random.Random(0)
    rows = [
        {"prompt": _digits(rng, PROMPT)}
        | {key: _digits(rng, rng.randint(SHORT, LONG)) for key in ("chosen", "rejected")}
        for _ in range(SEQUENCES // 2 * STEPS)
    ]
    return Dataset.from_list(rows)


def _clock(on_begin: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None) -> Any:
    """A callback that notes when optimiser steps end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.cpu: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            on_begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())
            self.cpu.append(time.process_time())
            on_end()

    return Clock()


# ---- memory ----------------------------------------------------------------------------------------------------


def _memory(folder: Path, host: str, dtype: str, mode: str) -> float:
    """MB of a step's peak over what is resident at its beginning: the second step's."""
    command = [sys.executable, "-m", MODULE, "memory-of", str(folder), host, dtype, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) / 1e6


def _measure_memory(folder: str, host: str, dtype: str, mode: str) -> None:
    from rlhf_fast.benchmarks import memory

    peaks: list[int] = []
    resident = 0

    def begin() -> None:
        nonlocal resident
        resident = memory.reset_peak()

    with quiet(), served(mode):
        watch = _clock(begin, lambda: peaks.append(memory.peak_bytes() - resident))
        train(Path(folder), host, dtype, mode, watch, steps=2)
    print(json.dumps(peaks[1]))


# ---- error -----------------------------------------------------------------------------------------------------


def errors(dtype: str, rows: int = 512) -> dict[str, dict[str, float]]:
    """{"trl" and "patch": {"logprob", "hidden", "weight"}}: ||out - truth|| / ||truth|| against fp64 on the same
    numbers, for a policy that knows something: half of the targets have the largest logit of their row."""
    import trl.trainer.utils as utils

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=g).to(DTYPES[dtype])
    weight = (torch.randn(VOCAB, WIDTH, generator=g) / WIDTH**0.5 * 4).to(DTYPES[dtype])
    target = torch.randint(0, VOCAB, (rows,), generator=g)
    upstream = torch.randn(rows, generator=g) / rows
    double = [x.double().requires_grad_() for x in (hidden, weight)]
    with torch.no_grad():
        target[::2] = (double[0] @ double[1].t())[::2].argmax(-1)
    logprob = (double[0] @ double[1].t()).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    truth = (logprob.detach(), *torch.autograd.grad((logprob * upstream).sum(), double))
    out = {}
    for mode in ("trl", "patch"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with served(mode):
            logprob = utils._ChunkedLogProbFunction.apply(*leaves, None, target, 1.0, 32768, None, 1.0, ("log_probs",))[
                0
            ]
            got = (logprob.detach(), *torch.autograd.grad((logprob * upstream).sum(), leaves))
        out[mode] = {
            name: ((a.double() - b).norm() / b.norm()).item()
            for name, a, b in zip(("logprob", "hidden", "weight"), got, truth, strict=True)
        }
    return out


# ---- the table -------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One for each host and dtype, and the errors."""
    for host in MODES:
        for dtype, rows in result.get(host, {}).items():
            table = Table(title=f"TRL {host.upper()}, {dtype}", title_justify="left")
            for name in ("", "s / step", "x trl", "CPU s", "x trl", "extra MB", "x trl", "last loss"):
                table.add_column(name, justify="left" if not name else "right")
            first = rows["trl"]
            for mode, row in rows.items():
                cells = []
                for key, digits in (("step_seconds", 3), ("cpu_seconds", 3), ("extra_mb", 0)):
                    known = key in row
                    cells += [f"{row[key]:.{digits}f}", f"{row[key] / first[key]:.2f}"] if known else ["", ""]
                table.add_row(mode, *cells, f"{row['loss'][-1]:.6f}")
            yield table
    table = Table(title="relative error against fp64", title_justify="left")
    for name in ("", "log-probs", "d hidden", "d weight"):
        table.add_column(name, justify="left" if not name else "right")
    for dtype, modes in result["error"].items():
        for mode, row in modes.items():
            table.add_row(f"{dtype}, {mode}", *(f"{value:.1e}" for value in row.values()))
    yield table


def main(arguments: list[str]) -> None:
    """Run, print, and save where --output says."""
    import argparse

    if arguments[:1] == ["memory-of"]:
        return _measure_memory(*arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a JSON file a host and dtype")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--host", choices=MODES, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from rlhf_fast.benchmarks import report

    console, info = Console(), report.environment("cpu")
    console.print(report.hardware_line(info))
    notify = lambda text: print(text, file=sys.stderr)  # noqa: E731
    hosts, dtypes = tuple(options.host or MODES), tuple(options.dtype or DTYPES)
    for dtype in dtypes:
        for host in hosts:
            result = run((host,), (dtype,), options.rounds, options.memory, notify)
            for table in tables(result):
                console.print(table)
            if options.output is not None:
                for path in report.save(options.output, f"trl-{host}-{dtype}", info, [], {"trl_patch": result}):
                    console.print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

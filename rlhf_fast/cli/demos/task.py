"""The demos' task and their common beginning: sort six digits, "251648>" -> "124568".

A character-level tokenizer of 15 tokens and a Qwen2 of 132,736 parameters are made on the spot; 100 labelled examples
teach the format by SFT. What comes after that is the demo's own.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", ">"]
LABELLED, HELD_OUT = 100, 512
COMPLETION = 7  # six digits and EOS
VERIFIER = "rlhf_fast.trainers.rewards:exact_match"

SFT: dict[str, Any] = dict(
    stage="sft",
    per_device_train_batch_size=128,
    max_steps=100,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    logging_steps=5,
)

Answers = list[tuple[str, str, str]]
"""(prompt, right answer, completion) of each held-out prompt."""


class Start(NamedTuple):
    """Where a demo begins."""

    output: Path
    seed: int
    sft: Path  # the fine-tuned model
    prompts: Path  # rows of {"prompt", "answer"} that the SFT has not seen
    test: Path  # the held-out ones
    before: Answers
    console: Console
    quiet: bool
    began: float  # time.perf_counter()

    def config(self, stage: str, options: Mapping[str, Any], *, model: Path, data: Path, out: Path) -> Path:
        """Write `<stage>.yaml` for a run from `model` on `data` into `out`; its path."""
        return write_config(self.output / f"{stage}.yaml", options, self.seed, model, data, out, self.quiet)

    def finish(self, title: str, folder: Path, summary: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Score the model in `folder` on the held-out prompts, report, and write `summary.json` in the output."""
        after = answers(folder, self.test)
        scores = dict(accuracy_before=accuracy(self.before), accuracy_after=accuracy(after), **values)
        seconds = round(time.perf_counter() - self.began, 2)
        summary = summary | dict(demo=title.lower(), seed=self.seed, **scores, demo_seconds=seconds)
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        report(self.console, title, self.before, after, summary, folder)
        return summary


def start(output: Path, seed: int, prompts: int, *, title: str, quiet: bool = False) -> Start:
    """Make tokenizer, model and data under `output`, fine-tune on the labelled examples, score the result.

    Args:
        prompts: how many rows `data/prompts.jsonl` gets, all different, none of them labelled or held out.
    """
    from transformers.utils import logging

    from rlhf_fast.trainers.config import load_config, run

    logging.disable_progress_bar()  # of loading and saving: the training bar is the one to watch
    began, console = time.perf_counter(), Console(quiet=quiet)
    console.print(f"[bold]rlhf-fast demo {title}[/]: sort six digits with a transformer of 132,736 parameters")
    prepare(output, seed, prompts)
    sft, data = output / "sft", output / "data"
    config = write_config(output / "sft.yaml", SFT, seed, output / "base", data / "sft.jsonl", sft, quiet)
    console.print(f"\n[bold]SFT[/] on {LABELLED} labelled examples: rlhf-fast train {config}")
    run(load_config(config))
    before = answers(sft, data / "test.jsonl")
    console.print(f"held-out accuracy [bold]{accuracy(before):.3f}[/]")
    return Start(output, seed, sft, data / "prompts.jsonl", data / "test.jsonl", before, console, quiet, began)


def prepare(output: Path, seed: int, prompts: int) -> None:
    """Write the tokenizer and the untrained model to base/, the rows to data/."""
    for folder in ("base", "data"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(output / "base")
    make_model(seed, tokenizer).save_pretrained(output / "base")
    rows = make_rows(LABELLED + HELD_OUT + prompts, seed)
    write_rows(output / "data" / "sft.jsonl", ("prompt", "completion"), rows[:LABELLED])
    write_rows(output / "data" / "test.jsonl", ("prompt", "answer"), rows[LABELLED : LABELLED + HELD_OUT])
    write_rows(output / "data" / "prompts.jsonl", ("prompt", "answer"), rows[LABELLED + HELD_OUT :])


def write_rows(path: Path, keys: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """JSONL with one object a row."""
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_config(
    path: Path, options: Mapping[str, Any], seed: int, model: Path, data: Path, out: Path, quiet: bool
) -> Path:
    """A YAML file that `rlhf-fast train` runs."""
    import yaml

    paths = dict(model_name_or_path=str(model), dataset=str(data), output_dir=str(out))
    common = dict(seed=seed, cutoff_len=16, use_cpu=True, **({"disable_tqdm": True} if quiet else {}))
    path.write_text(yaml.safe_dump({**common, **options, **paths}, sort_keys=False), encoding="utf-8")
    return path


def make_tokenizer() -> Any:
    """One token a character; the decoder joins them without spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int, tokenizer: Any) -> Any:
    """An untrained Qwen2 of 2 layers, width 64."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def make_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) for `count` different numbers of six digits."""
    numbers = random.Random(seed).sample(range(10**6), count)
    return [(f"{n:06d}>", "".join(sorted(f"{n:06d}"))) for n in numbers]


def answers(folder: Path, data: Path) -> Answers:
    """(prompt, right answer, greedy completion) of every row for the model in `folder`, loaded afresh."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fast.trainers.rollout.samplers import GroupSampler, SamplerSettings

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    limits = dict(max_new_tokens=COMPLETION, greedy=True)
    ends = dict(eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id)
    sampler = GroupSampler(model, SamplerSettings(**limits, **ends))
    completions = sampler(tokenizer([row["prompt"] for row in rows])["input_ids"]).completions()
    eos = tokenizer.eos_token
    texts = [
        text.removesuffix(eos) if text.endswith(eos) else text + "..." for text in tokenizer.batch_decode(completions)
    ]
    return [(row["prompt"], row["answer"], text) for row, text in zip(rows, texts, strict=True)]


def accuracy(rows: Answers) -> float:
    """Share of completions that are right and ended with EOS."""
    return sum(text == answer for _, answer, text in rows) / len(rows)


def report(
    console: Console, title: str, before: Answers, after: Answers, summary: Mapping[str, Any], folder: Path
) -> None:
    """A table of ten held-out prompts, the accuracies, and where the files are."""
    table = Table(title="held-out prompts, greedy")
    for column in ("prompt", "answer", "after SFT", f"after {title}"):
        table.add_column(column)
    for (prompt, answer, first), (_, _, second) in list(zip(before, after, strict=True))[:10]:
        marked = [f"[{'green' if text == answer else 'red'}]{text}[/]" for text in (first, second)]
        table.add_row(prompt, answer, *marked)
    console.print(table)
    console.print(
        f"accuracy on {HELD_OUT} held-out prompts: {summary['accuracy_before']:.3f} -> "
        f"[bold]{summary['accuracy_after']:.3f}[/] in {summary['demo_seconds']:.0f} s"
    )
    console.print(f"curves   {folder / 'training_curves.png'}\nmodel    {folder}")

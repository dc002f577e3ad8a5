"""`rlhf-fast demo`: the real trainers, configs and data readers on a task that needs no download.

grpo: sort six digits, "251648>" -> "124568". A character-level tokenizer of 15 tokens and a Qwen2 of 132,736
parameters are made on the spot; 100 labelled examples teach the format (SFT), the verifiable reward does the rest.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", ">"]
LABELLED, HELD_OUT = 100, 512
PROMPTS_PER_ROLLOUT, GROUP, ROLLOUTS, MINIBATCHES = 64, 8, 240, 2

SFT: dict[str, Any] = dict(
    stage="sft",
    per_device_train_batch_size=128,
    max_steps=100,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    logging_steps=5,
)
GRPO: dict[str, Any] = dict(
    stage="grpo",
    num_generations=GROUP,
    max_completion_length=7,  # six digits and EOS
    temperature=1.0,
    per_device_train_batch_size=PROMPTS_PER_ROLLOUT * GROUP // MINIBATCHES,
    steps_per_generation=MINIBATCHES,
    reward_funcs="rlhf_fast.trainers.rewards:exact_match",
    scale_rewards="group",
    loss_type="grpo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=0.0,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    warmup_steps=10,
    adam_beta1=0.9,
    adam_beta2=0.95,
    max_grad_norm=1.0,
    eval_on_start=True,
    eval_steps=48,
)


def demo(
    name: str = "grpo",
    output: str | Path = "runs/demo-grpo",
    seed: int = 0,
    *,
    rollouts: int = ROLLOUTS,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a demo; returns what `summary.json` in `output` holds, accuracy_before and accuracy_after among it.

    Args:
        name: "grpo".
        output: gets the data, the configs, the SFT model under sft/, and the files of the GRPO run.
        rollouts: of GRPO; fewer make a shorter run with a schedule of its own.
        overrides: options of the GRPO stage.
    """
    if name != "grpo":
        raise ValueError(f"demo must be one of grpo, got {name!r}")
    from transformers.utils import logging

    from rlhf_fast.trainers.config import load_config, run

    logging.disable_progress_bar()  # of loading and saving: the training bar is the one to watch
    start, output = time.perf_counter(), Path(output)
    console = Console(quiet=quiet)
    console.print("[bold]rlhf-fast demo grpo[/]: sort six digits with a transformer of 132,736 parameters, on this CPU")
    sft_yaml, grpo_yaml = prepare(
        output, seed, rollouts, {**(overrides or {}), **({"disable_tqdm": True} if quiet else {})}
    )

    console.print(f"\n[bold]1/2 SFT[/] on {LABELLED} labelled examples: rlhf-fast train {sft_yaml}")
    run(load_config(sft_yaml))
    before = answers(output / "sft", output / "data" / "test.jsonl")
    console.print(f"held-out accuracy [bold]{accuracy(before):.3f}[/]")

    console.print(
        f"\n[bold]2/2 GRPO[/], {rollouts} x {PROMPTS_PER_ROLLOUT} prompts x {GROUP}: rlhf-fast train {grpo_yaml}"
    )
    summary = run(load_config(grpo_yaml))
    after = answers(output, output / "data" / "test.jsonl")

    scores = dict(accuracy_before=accuracy(before), accuracy_after=accuracy(after))
    summary |= dict(demo=name, seed=seed, **scores, demo_seconds=round(time.perf_counter() - start, 2))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(console, before, after, summary, output)
    return summary


def prepare(output: Path, seed: int, rollouts: int, overrides: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write tokenizer, untrained model, data and the two configs; the configs' paths."""
    import yaml

    for folder in ("base", "data"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(output / "base")
    make_model(seed, tokenizer).save_pretrained(output / "base")

    rows = make_rows(LABELLED + HELD_OUT + rollouts * PROMPTS_PER_ROLLOUT, seed)
    parts = {
        "sft": rows[:LABELLED],
        "test": rows[LABELLED : LABELLED + HELD_OUT],
        "prompts": rows[LABELLED + HELD_OUT :],
    }
    for name, part in parts.items():
        key = "completion" if name == "sft" else "answer"
        lines = [json.dumps({"prompt": prompt, key: answer}) for prompt, answer in part]
        (output / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    common = dict(seed=seed, cutoff_len=16, use_cpu=True)
    quiet = {key: value for key, value in overrides.items() if key == "disable_tqdm"}
    sft = SFT | common | quiet
    sft |= _paths(output, model="base", data="sft", out=output / "sft")
    grpo = GRPO | common | dict(max_steps=rollouts * MINIBATCHES, eval_dataset=str(output / "data" / "test.jsonl"))
    grpo |= _paths(output, model="sft", data="prompts", out=output) | dict(overrides)
    for name, config in (("sft", sft), ("grpo", grpo)):
        (output / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return output / "sft.yaml", output / "grpo.yaml"


def _paths(output: Path, *, model: str, data: str, out: Path) -> dict[str, str]:
    return dict(
        model_name_or_path=str(output / model),
        dataset=str(output / "data" / f"{data}.jsonl"),
        output_dir=str(out),
    )


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


def answers(folder: Path, data: Path) -> list[tuple[str, str, str]]:
    """(prompt, right answer, greedy completion) of every row for the model in `folder`, loaded afresh."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fast.trainers.rollout import GroupSampler, SamplerSettings

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    limits = dict(max_new_tokens=GRPO["max_completion_length"], greedy=True)
    ends = dict(eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id)
    sampler = GroupSampler(model, SamplerSettings(**limits, **ends))
    completions = sampler(tokenizer([row["prompt"] for row in rows])["input_ids"]).completions()
    eos = tokenizer.eos_token
    texts = [
        text.removesuffix(eos) if text.endswith(eos) else text + "..." for text in tokenizer.batch_decode(completions)
    ]
    return [(row["prompt"], row["answer"], text) for row, text in zip(rows, texts, strict=True)]


def accuracy(rows: list[tuple[str, str, str]]) -> float:
    """Share of completions that are right and ended with EOS."""
    return sum(text == answer for _, answer, text in rows) / len(rows)


def _report(console: Console, before: list, after: list, summary: Mapping[str, Any], output: Path) -> None:
    table = Table(title="held-out prompts, greedy")
    for column in ("prompt", "answer", "after SFT", "after GRPO"):
        table.add_column(column)
    for (prompt, answer, first), (_, _, second) in list(zip(before, after, strict=True))[:10]:
        marked = [f"[{'green' if text == answer else 'red'}]{text}[/]" for text in (first, second)]
        table.add_row(prompt, answer, *marked)
    console.print(table)
    console.print(
        f"accuracy on {HELD_OUT} held-out prompts: {summary['accuracy_before']:.3f} -> "
        f"[bold]{summary['accuracy_after']:.3f}[/] in {summary['demo_seconds']:.0f} s"
    )
    console.print(f"curves   {output / 'training_curves.png'}\nsummary  {output / 'summary.json'}\nmodel    {output}")

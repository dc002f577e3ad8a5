"""What the preference demos train on: the fine-tuned model's own samples, judged by the verifier."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from . import task

PER_PROMPT = 8  # samples of each prompt
BATCH = 512  # prompts sampled at once
CHARACTERS = {token for token in task.TOKENS if len(token) == 1}


class Judged(NamedTuple):
    """The finished samples of one prompt: right ones and wrong ones, in the order in which they were drawn."""

    prompt: str
    right: list[str]
    wrong: list[str]


def sample(folder: Path, data: Path, seed: int, *, count: int | None = None, mixed: int | None = None) -> list[Judged]:
    """Sample the model in `folder` on the first `count` rows of `data`, or until `mixed` prompts have a right and a
    wrong sample; None: on all.

    A completion cut at the limit is left out: as an answer it would be read as one that ended there. So is one with a
    special token inside, which is no text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fast.trainers.rewards import exact_match
    from rlhf_fast.trainers.rollout.samplers import GroupSampler, SamplerSettings

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = dict(eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id)
    settings = SamplerSettings(max_new_tokens=task.COMPLETION, **ends)
    sampler = GroupSampler(AutoModelForCausalLM.from_pretrained(folder), settings, seed=seed)
    lines = data.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    found: list[Judged] = []
    for i in range(0, len(rows), BATCH):
        if mixed is not None and len(both(found)) >= mixed:
            break
        part = rows[i : i + BATCH]
        rollout = sampler(tokenizer([row["prompt"] for row in part])["input_ids"], PER_PROMPT)
        texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
        wanted = [row["answer"] for row in part for _ in range(PER_PROMPT)]
        good = exact_match(texts, wanted, rollout.finish)
        for k, row in enumerate(part):
            group = range(k * PER_PROMPT, (k + 1) * PER_PROMPT)
            done = [j for j in group if rollout.finish[j] == "stop" and set(texts[j]) <= CHARACTERS]
            right, wrong = ([texts[j] for j in done if bool(good[j]) == side] for side in (True, False))
            found.append(Judged(row["prompt"], right, wrong))
    return found


def both(judged: list[Judged]) -> list[Judged]:
    """Those with a right and a wrong sample."""
    return [j for j in judged if j.right and j.wrong]


def write_pairs(path: Path, judged: list[Judged], count: int) -> int:
    """One pair of each prompt that has a right and a wrong sample, `count` at most; how many there were."""
    rows = [(j.prompt, j.right[0], j.wrong[0]) for j in both(judged)][:count]
    task.write_rows(path, ("prompt", "chosen", "rejected"), rows)
    return len(rows)


def write_judged(path: Path, judged: list[Judged], count: int, seed: int) -> int:
    """Single answers with their label, as many right as wrong ones, `count` at most, in random order."""
    right = [(j.prompt, text, True) for j in judged for text in dict.fromkeys(j.right)]
    wrong = [(j.prompt, text, False) for j in judged for text in dict.fromkeys(j.wrong)]
    order = random.Random(seed)
    order.shuffle(right)
    order.shuffle(wrong)
    each = min(count // 2, len(right), len(wrong))
    rows = right[:each] + wrong[:each]
    order.shuffle(rows)
    task.write_rows(path, ("prompt", "completion", "label"), rows)
    return len(rows)

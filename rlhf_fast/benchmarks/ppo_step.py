"""A PPO step beside a plain loop in torch and transformers: TRL 1.16 has no PPO to stand beside.

The demo's model and prompts; a step is one rollout of 256 completions of 7 tokens, the roles' answers about it and two
epochs over its four minibatches. The plain loop does what a reader of the papers writes: `generate`, logits and their
log-softmax, a token classifier as critic, GAE as a loop over columns, whitening, clipped losses, fused AdamW. Both
have an actor, a critic, a frozen reference and the dense reward of `grpo_step`, in fp32.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from rlhf_fast.benchmarks import grpo_step, memory
from rlhf_fast.benchmarks.measure import median

PROMPTS, MINIBATCHES, EPOCHS, LENGTH = 256, 4, 2, 7
CYCLES = 3
RATE, CRITIC_RATE = 3e-4, 1e-3
CLIP, KL_COEF, VF_COEF, GAMMA, LAM = 0.2, 0.05, 0.1, 1.0, 0.95
PARTS = ("rollout", "scoring", "forward", "update")
PLAIN = "plain loop"
Notify = Callable[[str], None]


class Steps(NamedTuple):
    """Of one short run: for each step its seconds by part and mean reward; peak memory beyond what was there before."""

    parts: list[dict[str, float]]
    reward: list[float]
    peak_bytes: int | None


def run(rounds: int = 3, cycles: int = CYCLES, notify: Notify = lambda text: None, seed: int = 0) -> dict[str, Any]:
    """Seconds a step of both, medians over all rounds' steps; the first step is warm-up.

    Returns: {"rlhf_fast": {...}, "plain loop": {...}, "ratio": ours / plain, "memory_ratio": the same}.
    """
    contenders = {"rlhf_fast": ours, PLAIN: plain}
    found: dict[str, list[Steps]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notify("ppo_step: model, data, a little SFT")
        rows = grpo_step.prepare(Path(folder), cycles, seed, prompts=PROMPTS)
        for i in range(rounds):
            for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
                notify(f"ppo_step: round {i + 1} of {rounds}, {name}")
                found[name].append(contenders[name](Path(folder), rows, cycles, seed))
                gc.collect()
    result: dict[str, Any] = {name: _summary(runs) for name, runs in found.items()}
    first, second = result["rlhf_fast"], result[PLAIN]
    result["ratio"] = first["step_seconds"] / second["step_seconds"]
    if first["extra_mb"] and second["extra_mb"]:
        result["memory_ratio"] = first["extra_mb"] / second["extra_mb"]
    sizes = dict(prompts=PROMPTS, completion_length=LENGTH, minibatches=MINIBATCHES, epochs=EPOCHS)
    result["setting"] = sizes | dict(rounds=rounds, cycles=cycles)
    return result


def ours(folder: Path, rows: list[dict[str, str]], cycles: int, seed: int) -> Steps:
    """This library's PPOTrainer."""
    from transformers import TrainerCallback

    from rlhf_fast.trainers.ppo import PPOTrainer
    from rlhf_fast.trainers.ppo_config import PPOConfig

    model, tokenizer = grpo_step.load(folder)
    config = PPOConfig(
        output_dir=str(folder / "ours"),
        max_completion_length=LENGTH,
        cutoff_len=16,
        per_device_train_batch_size=PROMPTS // MINIBATCHES,
        per_device_eval_batch_size=PROMPTS,  # the roles answer about a whole rollout at once, as in the plain loop
        ppo_buffer_size=MINIBATCHES,
        ppo_epochs=EPOCHS,
        max_steps=cycles + 1,
        learning_rate=RATE,
        critic_learning_rate=CRITIC_RATE,
        lr_scheduler_type="constant",
        kl_coef=KL_COEF,
        ppo_target=None,
        gamma=GAMMA,
        lam=LAM,
        vf_coef=VF_COEF,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10**6,
        plot_loss=False,
        report_to="none",
        seed=seed,
    )
    marks: list[dict[str, float]] = [{}]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(dict(trainer.loop.seconds))

    rewards = grpo_step.Reward()
    trainer = PPOTrainer(model, tokenizer, rows, rewards, config, callbacks=[Clock()])
    before = memory.watch("cpu")
    trainer.train()
    parts = [{k: b.get(k, 0.0) - a.get(k, 0.0) for k in PARTS} for a, b in zip(marks, marks[1:], strict=False)]
    return Steps(parts, rewards.means, memory.peak_above(before, "cpu"))


def plain(folder: Path, rows: list[dict[str, str]], cycles: int, seed: int) -> Steps:
    """The loop as one writes it in torch and transformers."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(seed)
    model, tokenizer = grpo_step.load(folder)
    tokenizer.padding_side = "left"
    reference = copy.deepcopy(model).requires_grad_(False)
    critic = AutoModelForTokenClassification.from_pretrained(folder / "sft", num_labels=1)
    groups = [dict(params=model.parameters(), lr=RATE), dict(params=critic.parameters(), lr=CRITIC_RATE)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for role in (model, reference, critic):
        role.eval()
    before, found, means = memory.watch("cpu"), [], []
    for cycle in range(cycles + 1):
        seconds: dict[str, float] = defaultdict(float)
        batch = rows[cycle * PROMPTS : (cycle + 1) * PROMPTS]
        with _timed(seconds, "rollout"):
            prompts = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
            ids = model.generate(**prompts, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=LENGTH)
        start = prompts["input_ids"].shape[1]
        ended = (ids[:, start:] == tokenizer.eos_token_id).long().cumsum(1)
        mask = (ended - (ids[:, start:] == tokenizer.eos_token_id).long()) == 0
        with _timed(seconds, "scoring"):
            texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            scores = torch.tensor(grpo_step.digits_right(texts, [row["answer"] for row in batch]))
        means.append(float(scores.mean()))
        attention = torch.cat([prompts["attention_mask"], mask.long()], dim=1)
        with _timed(seconds, "forward"), torch.no_grad():
            old = _logprobs(model, ids, attention, start)
            values = _values(critic, ids, attention, start) * mask
            rewards = -KL_COEF * (old - _logprobs(reference, ids, attention, start)) * mask
            rewards[torch.arange(PROMPTS), mask.sum(1) - 1] += scores
            advantages, returns = _advantages(rewards, values, mask)
        with _timed(seconds, "update"):
            for _ in range(EPOCHS):
                for part in torch.randperm(PROMPTS).split(PROMPTS // MINIBATCHES):
                    inputs = (ids[part], attention[part], start)
                    m, tokens = mask[part], mask[part].sum()
                    ratio, a = (_logprobs(model, *inputs) - old[part]).exp(), advantages[part]
                    policy = -torch.min(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
                    v, r = _values(critic, *inputs), returns[part]
                    near = values[part] + (v - values[part]).clamp(-CLIP, CLIP)
                    value = torch.max((v - r).square(), (near - r).square()) / 2
                    loss = ((policy + VF_COEF * value) * m).sum() / tokens
                    optimizer.zero_grad()
                    loss.backward()
                    for role in (model, critic):
                        torch.nn.utils.clip_grad_norm_(role.parameters(), 1.0)
                    optimizer.step()
        found.append(dict(seconds))
    return Steps(found, means, memory.peak_above(before, "cpu"))


def _logprobs(model: Any, ids: Tensor, attention: Tensor, start: int) -> Tensor:
    logits = model(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, ids[:, start:, None]).squeeze(-1)


def _values(critic: Any, ids: Tensor, attention: Tensor, start: int) -> Tensor:
    return critic(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1, 0]


def _advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    running, collected = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        running = (rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running) * mask[:, t]
        collected.append(running)
    advantages = torch.stack(collected[::-1], dim=1)
    chosen = advantages[mask]
    return (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt() * mask, advantages + values


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def _summary(runs: list[Steps]) -> dict[str, Any]:
    steps = [parts for run in runs for parts in run.parts[1:]]
    peaks = [run.peak_bytes / 1e6 for run in runs if run.peak_bytes is not None]
    return {
        "step_seconds": median([sum(parts.values()) for parts in steps]),
        "seconds": {name: median([parts[name] for parts in steps]) for name in PARTS},
        "extra_mb": median(peaks) if peaks else None,
        "reward": [sum(column) / len(runs) for column in zip(*(run.reward for run in runs), strict=True)],
        "rounds": [[sum(parts.values()) for parts in run.parts[1:]] for run in runs],
    }


def table(result: dict[str, Any]) -> Table:
    """Seconds by part, memory, and the ratios."""
    title = (
        f"PPO step, the demo's model: {PROMPTS} prompts, {EPOCHS} epochs of {MINIBATCHES} minibatches (TRL has none)"
    )
    out = Table(title=title, title_justify="left")
    for name in ("trainer", "s / step", *PARTS, "peak MB", "reward, first to last"):
        out.add_column(name, justify="left" if name == "trainer" else "right")
    for name in ("rlhf_fast", PLAIN):
        row = result[name]
        parts = (f"{row['seconds'][part]:.3f}" for part in PARTS)
        extra = "" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        curve = f"{row['reward'][0]:.3f} to {row['reward'][-1]:.3f}"
        out.add_row(name, f"{row['step_seconds']:.3f}", *parts, extra, curve)
    memory_ratio = f", {result['memory_ratio']:.2f} of the memory" if "memory_ratio" in result else ""
    out.caption = f"ours / plain: {result['ratio']:.2f} of the time{memory_ratio}"
    return out

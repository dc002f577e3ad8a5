"""Gauges of a run: perplexity on texts that it does not train on, and known illnesses told by the metrics."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_fast.ops.kl import kl_estimate
from rlhf_fast.trainers.data.collators import Collator
from rlhf_fast.trainers.data.tokenize import TokenDataset
from rlhf_fast.trainers.rollout.samplers import evaluating


class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens: what alignment costs in language (its "tax").

    Args:
        dataset: of `tokenize_sft`: plain texts, or conversations whose answers are scored.
        pad_token_id: any id.
        batch_size: rows a forward, of similar lengths.
    """

    def __init__(self, dataset: TokenDataset, pad_token_id: int, *, batch_size: int = 8):
        order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
        collator = Collator(pad_token_id)
        self.batches = [
            collator([dataset[i] for i in order[at : at + batch_size]]) for at in range(0, len(order), batch_size)
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """Of a model whose head is fused."""
        device = model.get_input_embeddings().weight.device
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self.batches:
                total -= float(model(**{name: tensor.to(device) for name, tensor in batch.items()}).logprob.sum())
                count += int((batch["target_ids"] != -100).sum())
        return math.exp(min(total / max(count, 1), 700.0))


def kl_by_estimator(logprob: Tensor, ref_logprob: Tensor, tokens: float) -> dict[str, Tensor]:
    """kl_k1, kl_k2, kl_k3: estimates of KL(policy || reference) over (n,) tokens, as shares of a mean over `tokens`."""
    estimates = {name: kl_estimate(logprob.detach(), ref_logprob, estimator=name) for name in ("k1", "k2", "k3")}
    return {f"kl_{name}": values.sum() / tokens for name, values in estimates.items()}


class History:
    """The series of each metric, logged value by logged value."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self.series[name].append((step, float(value)))

    def first(self, name: str) -> float:
        """Mean of the first values; NaN while there are too few to tell a beginning from now."""
        values = [value for _, value in self.series[name]]
        return fmean(values[:WINDOW]) if len(values) >= 2 * WINDOW else math.nan

    def now(self, name: str) -> float:
        """Mean of the last values, NaN while there are too few."""
        values = [value for _, value in self.series[name]]
        return fmean(values[-WINDOW:]) if len(values) >= WINDOW else math.nan

    def between(self, name: str, start: int, end: int) -> float:
        values = [value for step, value in self.series[name] if start < step <= end]
        return fmean(values) if values else math.nan


WINDOW = 5  # logged rows that are averaged before anything is said
RECOVERED = 0.7  # the severity under which an illness may be warned of again


class Illness(NamedTuple):
    """`severity`: 1 and above is ill, NaN unknown. `words`: the numbers, and what to try."""

    name: str
    severity: Callable[[History], float]
    words: Callable[[History], str]


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan


def _entropy(h: History) -> float:
    return _ratio(0.1 * h.first("entropy"), h.now("entropy"))


def _lengths(h: History) -> float:
    longer = _ratio(h.now("completion_length"), 1.5 * h.first("completion_length"))
    cut = (h.now("truncated_completions") - h.first("truncated_completions")) / 0.2
    return min(longer, cut) if longer == longer and cut == cut else math.nan


def _kl(h: History) -> float:
    known = [s for s in (h.now("kl") / 1.0, h.now("approx_kl") / 0.2) if s == s]
    return max(known, default=math.nan)


def _say(text: str, advice: str, **metrics: str) -> Callable[[History], str]:
    """`text` with {name} = the mean of the last values of a metric and {name0} that of the first; then what to try."""

    def words(h: History) -> str:
        values = {key: h.now(name) for key, name in metrics.items()}
        values |= {f"{key}0": h.first(name) for key, name in metrics.items()}
        return f"{text.format(**values)}. Try {advice}"

    return words


ILLNESSES = [
    Illness(
        "entropy collapse",
        _entropy,
        _say(
            "entropy fell from {h0:.3g} to {h:.3g} nats a token: the policy has stopped exploring (no harm where the "
            "task is solved)",
            "a higher temperature, epsilon_high (0.28), entropy_coef, a KL term (beta), or a lower learning_rate",
            h="entropy",
        ),
    ),
    Illness(
        "KL explosion",
        _kl,
        lambda h: (
            f"the policy runs away: {_distances(h)}. Try a lower learning_rate, fewer updates a rollout, a larger KL "
            "coefficient, max_kl, or a smaller epsilon"
        ),
    ),
    Illness(
        "no spread",
        lambda h: h.now("zero_std_groups") / 0.8 if math.isfinite(h.now("reward")) else 0.0,
        _say(
            "{share:.0%} of the groups have equal rewards (mean {reward:.3g}) and teach nothing",
            "prompts that are neither solved nor hopeless, dynamic_sampling, more num_generations, or a finer reward",
            share="zero_std_groups",
            reward="reward",
        ),
    ),
    Illness(
        "lengths running away",
        _lengths,
        _say(
            "completions grew from {n0:.4g} to {n:.4g} tokens and {cut:.0%} of them are cut",
            "a length term in the reward, mask_truncated_completions, loss_type dr_grpo, missing_eos_penalty (PPO), or "
            "a larger max_completion_length",
            n="completion_length",
            cut="truncated_completions",
        ),
    ),
    Illness(
        "sampler and trainer disagree",
        lambda h: h.now("sampler_logprob_gap") / 0.05,
        _say(
            "the sampler's log-probabilities are {gap:.3g} nats a token off the trainer's: the ratios are biased",
            "top_p 1 and top_k 0, equal dtypes, fresh weights on the server, old_logprobs recompute, or "
            "importance_correction",
            gap="sampler_logprob_gap",
        ),
    ),
    Illness(
        "blind critic",
        lambda h: -h.now("explained_variance") / 0.2,
        _say(
            "the critic explains less than nothing of the returns (explained variance {ev:.3g})",
            "a higher critic_learning_rate, critic_warmup_steps, or smaller rewards (ppo_score_norm)",
            ev="explained_variance",
        ),
    ),
    Illness(
        "alignment tax",
        lambda h: _perplexity(h) / 1.5,
        lambda h: (
            f"perplexity on the held-out texts is {_perplexity(h):.3g} times what it was: the policy forgets language. "
            "Try a larger KL coefficient, max_kl, LoRA, or a lower learning_rate"
        ),
    ),
]


def _distances(h: History) -> str:
    known = {"the reference": h.now("kl"), "the policy that sampled": h.now("approx_kl")}
    return ", ".join(f"KL {kl:.3g} nats a token from {where}" for where, kl in known.items() if kl == kl)


def _perplexity(h: History) -> float:
    values = h.series["eval_perplexity"]
    return values[-1][1] / values[0][1] if len(values) > 1 else math.nan


def overoptimised(metric: str, greater_is_better: bool) -> Illness:
    """The reward goes on rising while the held-out metric falls from its best, twice in a row."""
    sign = 1.0 if greater_is_better else -1.0

    def state(h: History) -> tuple[float, float, float, float, float]:
        """Severity; metric and reward at the best evaluation, and now."""
        scores = h.series[metric]
        if len(scores) < 3:
            return math.nan, *(math.nan,) * 4
        best = max(range(len(scores)), key=lambda i: sign * scores[i][1])
        (at, top), later = scores[best], scores[best + 1 :]
        if len(later) < 2:
            return 0.0, *(math.nan,) * 4
        last = [value for _, value in later[-2:]]
        fallen = min(sign * (top - value) for value in last) / max(abs(top), 1e-8)
        before = scores[best - 1][0] if best else at - (later[0][0] - at)
        then, now = h.between("reward", before, at), h.between("reward", scores[-2][0], scores[-1][0])
        rising = now > then or not math.isfinite(then)
        return fallen / 0.1 if rising else 0.0, top, last[-1], then, now

    def words(h: History) -> str:
        _, top, last, then, now = state(h)
        return (
            f"the reward rose from {then:.3g} to {now:.3g} while {metric} went from {top:.3g} to {last:.3g}: the "
            "policy exploits the reward. Try a larger KL coefficient, max_kl, several reward models "
            "(reward_aggregation min or mean_std), load_best_model_at_end, or a lower learning_rate"
        )

    return Illness("reward hacking", lambda h: state(h)[0], words)


class HealthWarnings(TrainerCallback):
    """Says so in words when the metrics show a known illness: once, and again only after it had got better.

    The words go to `warnings`, into the logged row as "warning", and into `messages`, which end up in summary.json.

    Args:
        metric, greater_is_better: the evaluation's, to hold against the reward.
    """

    def __init__(self, metric: str = "eval_reward", greater_is_better: bool = True):
        self.illnesses = [overoptimised(metric, greater_is_better), *ILLNESSES]
        self.history = History()
        self.ill: set[str] = set()
        self.messages: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs:
            return
        self.history.add(state.global_step, logs)
        new = []
        for illness in self.illnesses:
            severity = illness.severity(self.history)
            if severity >= 1 and illness.name not in self.ill:
                self.ill.add(illness.name)
                new.append(f"{illness.name}: {illness.words(self.history)}")
            elif severity < RECOVERED:
                self.ill.discard(illness.name)
        if not new:
            return
        logs["warning"] = "; ".join(new)
        for text in new:
            self.messages.append(f"step {state.global_step}: {text}")
            if state.is_world_process_zero:
                warnings.warn(self.messages[-1], stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"series": dict(self.history.series), "ill": sorted(self.ill), "messages": list(self.messages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.series.update(state["series"])
        self.ill, self.messages = set(state["ill"]), state["messages"]

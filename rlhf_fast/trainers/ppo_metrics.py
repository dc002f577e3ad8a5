"""What a PPO rollout says of itself: sums that add up over processes, and the metrics that follow from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_fast.ops.kl import kl_estimate
from rlhf_fast.trainers.ppo_experience import RoleOutputs, Sequences

ESTIMATORS = ("k1", "k2", "k3")


def rollout_sums(
    sequences: Sequences, outputs: RoleOutputs, scores: Tensor, rewards: Tensor, estimator: str
) -> dict[str, Tensor]:
    """Sums over this process's trained tokens and sequences, fp64 where they are squared.

    Args:
        scores: (B,): what was put on the last tokens. rewards: (N,): per token, with the KL where it is in them.
        estimator: of the KL that is trained on.
    """
    values, returns = outputs.values.double(), outputs.returns.double()
    gap = (outputs.logprob - sequences.sampler_logprob).abs()
    live, known = sequences.trained > 0, gap.isfinite()
    sums = {
        "tokens": torch.ones_like(values).sum(),
        "sequences": live.sum(),
        "shaped_score": scores[live].sum(),
        "shaped_reward": rewards.sum(),
        "value": values.sum(),
        "return": returns.sum(),
        "squared_return": returns.square().sum(),
        "error": (returns - values).sum(),
        "squared_error": (returns - values).square().sum(),
        "known": known.sum(),
        "gap": gap[known].sum(),
    }
    if outputs.ref_logprob is not None:
        pair = outputs.logprob, outputs.ref_logprob
        sums |= {f"kl_{name}": kl_estimate(*pair, estimator=name).sum() for name in ESTIMATORS}
        sums["kl"] = kl_estimate(*pair, estimator=estimator).sum()
    return sums


def rollout_metrics(total: Mapping[str, float]) -> dict[str, float]:
    """Means per token (kl*, values, returns) and per sequence (scores, rewards, kl_sequence); explained variance.

        explained = 1 - Var(R - V) / Var(R),   0 where R is constant

    `sampler_logprob_gap` is there where the sampler's log-probabilities are known.
    """
    tokens, sequences = max(total["tokens"], 1), max(total["sequences"], 1)
    metrics = {name: total[name] / sequences for name in ("shaped_score", "shaped_reward")}
    metrics |= {f"{name}_mean": total[name] / tokens for name in ("value", "return")}
    metrics |= {name: total[name] / tokens for name in total if name.startswith("kl")}
    if "kl_k1" in total:
        metrics["kl_sequence"] = total["kl_k1"] / sequences
    if total["known"]:
        metrics["sampler_logprob_gap"] = total["gap"] / total["known"]
    variance = total["squared_return"] / tokens - metrics["return_mean"] ** 2
    unexplained = total["squared_error"] / tokens - (total["error"] / tokens) ** 2
    constant = variance <= 1e-12 * total["squared_return"] / tokens
    return metrics | {"explained_variance": 0.0 if constant else 1 - unexplained / variance}

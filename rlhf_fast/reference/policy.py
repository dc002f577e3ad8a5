"""Policy losses and KL estimates, straight from the papers: the oracle.

Plain torch, any dtype, gradient by autograd. A batch is a list of sequences, each holding only its counted tokens, so
that no formula here knows of masks, padding or packing. Slow on purpose: one Python step per sequence.

Notation, per sequence i of length |y|: lr_t = log pi(t) - log pi_old(t), r_t = exp(lr_t), A_t the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: str = "k3",
    gradient: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(pi || ref) per token from samples of pi (Schulman 2020); value of one estimator, gradient of another."""
    if mask is not None:
        logprob, ref_logprob = (torch.where(mask, t, torch.zeros_like(t)) for t in (logprob, ref_logprob))
    log_r = ref_logprob - logprob
    bounded = log_r.clamp(max=20.0)
    values = {
        "k1": -log_r,
        "abs": log_r.abs(),
        "k2": log_r**2 / 2,
        "k3": torch.expm1(bounded) - bounded,
    }
    value, slope = values[estimator], values[gradient or estimator]
    return value.detach() + (slope - slope.detach())


# ---- the loss of each token of one sequence ----------------------------------------------------------------


def _ratio(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """Importance ratio of each token: its own, or the geometric mean over the sequence (GSPO eq. 7 and 14)."""
    log_ratio = s.log_ratio
    if o.importance_level == "sequence":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    elif o.importance_level == "sequence_token":
        log_ratio = log_ratio.mean().detach() + s.logprob - s.logprob.detach()
    return log_ratio.clamp(-20, 20).exp()


def _clip(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """PPO eq. 7; INTELLECT-2's delta; dual clip, Ye et al. 2019 eq. 5."""
    r, a = s.ratio, s.advantages
    first = r if o.delta is None else torch.minimum(r, torch.full_like(r, o.delta))
    objective = torch.minimum(first * a, r.clamp(1 - o.clip_low, 1 + o.clip_high) * a)
    if o.dual_clip is not None:
        objective = torch.where(a < 0, torch.maximum(objective, o.dual_clip * a), objective)
    return -objective


def _vanilla(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    return -s.advantages * s.logprob


def _cispo(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """MiniMax-M1 eq. 4, upper bound only unless there is a ratio_min."""
    return -s.ratio.detach().clamp(o.params["ratio_min"], o.clip_high) * s.advantages * s.logprob


def _beyond(s: SimpleNamespace, o: SimpleNamespace, kind: str) -> Tensor:
    """Tokens that left DPPO's trust region and would go on (arXiv 2602.04879, the binary divergences)."""
    p, q = s.logprob.detach().exp(), s.old.exp()
    distance = (p - q).abs()
    if kind == "dppo_kl":
        distance = q * (s.old - s.logprob.detach()) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    up, down = (distance > o.clip_high) & (p > q), (distance > o.clip_low) & (p < q)
    return torch.where(s.advantages > 0, up, down)


def _dppo(kind: str) -> Callable[[SimpleNamespace, SimpleNamespace], Tensor]:
    def loss(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
        weight = s.ratio.detach().clamp(max=o.params["ratio_max"]) * ~_beyond(s, o, kind)
        return -weight * s.advantages * s.logprob

    return loss


def _dro(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """Richemond et al. 2024, the policy's part of the objective."""
    return -(s.advantages * s.logprob - o.params["dro_beta"] / 2 * s.log_ratio**2)


def _sapo(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    positive = s.advantages > 0
    pos, neg = o.params["temperature_pos"], o.params["temperature_neg"]
    gate_pos = 4 / pos / (1 + torch.exp(-pos * (s.ratio - 1)))
    gate_neg = 4 / neg / (1 + torch.exp(-neg * (s.ratio - 1)))
    return -torch.where(positive, gate_pos, gate_neg) * s.advantages


def _vespo(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """phi(w) = w^k exp(lambda (1 - w)) of the whole sequence's ratio w (with the rollout correction in it)."""
    log_w = s.log_ratio.detach().clamp(-20, 20).sum() + s.log_correction
    w = torch.exp(log_w.clamp(math.log(1e-8), 20))
    p = o.params
    phi_pos = w ** p["k_pos"] * torch.exp(p["lambda_pos"] * (1 - w))
    phi_neg = w ** p["k_neg"] * torch.exp(p["lambda_neg"] * (1 - w))
    return -torch.where(s.advantages >= 0, phi_pos, phi_neg) * s.advantages * s.logprob


def _geo_mean(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """GMPO eq. 4: clip each token's log-ratio on the side where its advantage could run away, then average."""
    up = s.log_ratio.clamp(max=o.clip_high)
    down = s.log_ratio.clamp(min=-o.clip_low)
    kept = torch.where(s.advantages > 0, up, torch.where(s.advantages < 0, down, torch.zeros_like(up)))
    ratio = kept.mean().clamp(-20, 20).exp()
    return (-ratio * s.advantages.mean()).expand_as(s.logprob)


def _kl_cov(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    return -s.ratio * s.advantages + o.params["coef"] * s.selected * s.log_ratio.abs()


def _clip_cov(s: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    return _clip(s, o) * (1 - s.selected)


_CLIP = {"clip_low": 0.2}
_SEQUENCE = {"importance_level": "sequence"}
_COV = {"fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0}
_GAMMA = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}

# name: function of one sequence, aggregation, defaults, parameters
KINDS: dict[str, tuple[Callable, str, dict, dict]] = {
    "ppo": (_clip, "token_mean", _CLIP, {}),
    "grpo": (_clip, "seq_mean_token_mean", _CLIP, {}),
    "dapo": (_clip, "token_mean", {"clip_low": 0.2, "clip_high": 0.28}, {}),
    "dr_grpo": (_clip, "fixed_length", _CLIP, {}),
    "bnpo": (_clip, "token_mean", _CLIP, {}),
    "gspo": (_clip, "seq_mean_token_mean", {**_SEQUENCE, "clip_low": 3e-4, "clip_high": 4e-4}, {}),
    "luspo": (_clip, "seq_mean_token_sum", {**_SEQUENCE, "clip_low": 2e-3, "clip_high": 2.5e-3}, {}),
    "reinforce": (_vanilla, "seq_mean_token_sum", {}, {}),
    "gpg": (_vanilla, "token_mean", {}, {}),
    "cispo": (_cispo, "token_mean", {"clip_high": 5.0}, {"ratio_min": 0.0}),
    "sapo": (_sapo, "seq_mean_token_mean", {}, {"temperature_pos": 1.0, "temperature_neg": 1.05}),
    "vespo": (_vespo, "token_mean", {}, _GAMMA),
    "geo_mean": (_geo_mean, "seq_mean_token_mean", {"clip_low": 0.4, "clip_high": 0.4}, {}),
    "clip_cov": (_clip_cov, "token_mean", _CLIP, _COV),
    "kl_cov": (_kl_cov, "token_mean", {}, {"fraction": 2e-4, "coef": 1.0}),
    "dppo_tv": (_dppo("dppo_tv"), "token_mean", _CLIP, {"ratio_max": 20.0}),
    "dppo_kl": (_dppo("dppo_kl"), "token_mean", _CLIP, {"ratio_max": 20.0}),
    "dro": (_dro, "token_mean", {}, {"dro_beta": 0.1}),
}

_OPTIONS = {
    "clip_low": 0.2, "clip_high": None, "delta": None, "dual_clip": None, "beta": 0.0, "kl_estimator": "k3",
    "kl_gradient": None, "kl_correction": False, "entropy_coef": 0.0, "importance_level": "token", "max_length": None,
    "normalizer": None, "entropy_normalizer": None, "top_entropy": None, "off_policy_threshold": None,
    "correction": None, "correction_min": 0.0, "correction_max": 3.0,
}  # fmt: skip


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    kind: str = "ppo",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    importance_weight: Tensor | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () and metrics of `rlhf_fast.policy_loss`, whose docstring defines the arguments; any dtype, any kind.

    clip_low given alone is symmetric, as in TRL: clip_high is then the same, whatever the kind's own is.
    `noise`: the random keys of clip_cov's draw, shaped like logprob.
    """
    function, aggregation, defaults, params = KINDS[kind]
    params = {name: options.pop(name, value) for name, value in params.items()}
    options = {name: value for name, value in options.items() if value is not None}
    if "clip_low" in options and "clip_low" in defaults:  # given alone it is symmetric
        defaults = {**defaults, "clip_high": None}
    o = SimpleNamespace(**{**_OPTIONS, "aggregation": aggregation, **defaults, **options}, params=params)
    o.clip_high = o.clip_low if o.clip_high is None else o.clip_high
    tokens = {"logprob": logprob, "old": old_logprob, "ref": ref_logprob, "entropy": entropy}
    tokens.update(rollout=rollout_logprob, noise=noise)
    sequences = _sequences(tokens, advantages, importance_weight, mask, cu_seqlens)
    for s in sequences:
        s.old = s.logprob.detach() if s.old is None else s.old
        s.log_ratio = s.logprob - s.old
        s.ratio = _ratio(s, o)
        s.factor, s.log_correction = _correction(s, o) if importance_weight is None else _given_weight(s)
        s.in_top = torch.ones_like(s.logprob)
    _select_by_covariance(sequences, kind, o)
    _select_by_entropy(sequences, o)
    _drop_off_policy(sequences, o)

    policy, extra = [], []
    for s in sequences:
        factor = s.in_top * s.kept if kind == "vespo" else s.in_top * s.kept * s.factor
        policy.append(function(s, o) * factor)
        kl = torch.zeros_like(s.logprob)
        if o.beta != 0:
            kl = kl_estimate(s.logprob, s.ref, estimator=o.kl_estimator, gradient=o.kl_gradient)
        s.kl = kl.detach()
        extra.append(o.beta * kl * (s.ratio if o.kl_correction else 1.0))
    policy_term = aggregate(policy, o.aggregation, o.normalizer, o.max_length)
    loss = policy_term + aggregate(extra, o.aggregation, o.normalizer, o.max_length)
    if o.entropy_coef != 0:
        total = sum((s.entropy * s.in_top).sum() for s in sequences)
        count = sum(int(s.in_top.sum()) for s in sequences)
        loss = loss - o.entropy_coef * total / (max(count, 1) if o.entropy_normalizer is None else o.entropy_normalizer)
    return loss + logprob.new_zeros(()), _metrics(sequences, policy_term, kind, o)


def aggregate(losses: list[Tensor], how: str, normalizer: float | None, max_length: int | None) -> Tensor:
    """One number from the per-token losses of each sequence; `normalizer` replaces the batch's own count."""
    zero = losses[0].new_zeros(()) if losses else torch.zeros(())
    if how == "token_mean":
        count = sum(x.numel() for x in losses) if normalizer is None else normalizer
        return sum((x.sum() for x in losses), zero) / max(count, 1e-30 if normalizer is not None else 1)
    count = max(len(losses), 1) if normalizer is None else normalizer
    if how == "seq_mean_token_mean":
        return sum((x.sum() / max(x.numel(), 1) for x in losses), zero) / count
    if how == "seq_mean_token_sum":
        return sum((x.sum() for x in losses), zero) / count
    return sum((x.sum() for x in losses), zero) / (count * max_length)


def _sequences(
    tokens: dict[str, Tensor | None], advantages: Tensor, importance_weight: Tensor | None, mask, cu_seqlens
) -> list[SimpleNamespace]:
    """The batch as a list of sequences of counted tokens."""
    logprob = tokens["logprob"]
    if logprob.dim() == 2:
        rows = [(i,) for i in range(logprob.shape[0])]
    elif cu_seqlens is None:
        rows = [(slice(0, logprob.shape[0]),)]
    else:
        ends = cu_seqlens.tolist()
        rows = [(slice(a, b),) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    out = []

    def of_row(tensor: Tensor, i: int, row, index: Tensor) -> Tensor:
        """The counted tokens' own values, or the sequence's one value, ()."""
        return tensor[row][index] if tensor.shape == logprob.shape else tensor.reshape(-1)[i]

    for i, row in enumerate(rows):
        index = torch.arange(logprob[row].shape[0], device=logprob.device)
        if mask is not None:
            index = index[mask[row]]
        s = SimpleNamespace(**{k: None if t is None else t[row][index] for k, t in tokens.items()})
        s.advantages = of_row(advantages, i, row, index).expand(index.shape)
        s.importance = None if importance_weight is None else of_row(importance_weight, i, row, index)
        out.append(s)
    return out


def _given_weight(s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Weights that the caller made, and the log of the sequence's whole weight."""
    return s.importance.expand_as(s.logprob), s.importance.log().clamp(math.log(1e-8), 20).sum()


def _correction(s: SimpleNamespace, o: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Bounded weights pi_old / pi_rollout of each token, and the log of the sequence's whole weight."""
    ones, nothing = torch.ones_like(s.logprob), s.logprob.new_zeros(())
    s.gap = nothing
    if o.correction is None or s.logprob.numel() == 0:
        return ones.detach(), nothing
    level, how = o.correction.split("_")
    gap = torch.nan_to_num(s.old - s.rollout, nan=0.0).detach()
    pooled = {"token": gap, "sequence": gap.sum().expand_as(gap), "geometric": gap.mean().expand_as(gap)}[level]
    w = pooled.clamp(-20, 20).exp()
    outside = (w < o.correction_min) | (w > o.correction_max)
    bounded = w.clamp(o.correction_min, o.correction_max) if how == "truncate" else w * ~outside
    s.outside = outside
    log_w = bounded.clamp(min=1e-8).log()
    return bounded, log_w.sum() if level == "token" else log_w[0]


def _select_by_covariance(sequences: list[SimpleNamespace], kind: str, o: SimpleNamespace) -> None:
    """Cui et al. 2025: tokens by their term of cov(A, log pi) over the batch."""
    for s in sequences:
        s.selected = torch.zeros_like(s.logprob).detach()
    if kind not in ("clip_cov", "kl_cov"):
        return
    adv = torch.cat([s.advantages for s in sequences])
    logprob = torch.cat([s.logprob.detach() for s in sequences])
    cov = (adv - adv.mean()) * (logprob - logprob.mean())
    count = max(1, int(o.params["fraction"] * len(cov)))
    if kind == "kl_cov":
        chosen = sorted(range(len(cov)), key=lambda t: (-float(cov[t]), t))[:count]
    else:
        ratio = torch.cat([s.log_ratio.detach().clamp(-20, 20).exp() for s in sequences])
        clipped = ((adv > 0) & (ratio > 1 + o.clip_high)) | ((adv < 0) & (ratio < 1 - o.clip_low))
        inside = (cov > o.params["cov_low"]) & (cov < o.params["cov_high"]) & ~clipped
        noise = torch.cat([s.noise for s in sequences])
        eligible = [t for t in range(len(cov)) if bool(inside[t])]
        chosen = sorted(eligible, key=lambda t: -float(noise[t]))[:count]
    flat = torch.cat([s.selected for s in sequences])
    flat[chosen] = 1
    for s, part in zip(sequences, flat.split([len(s.logprob) for s in sequences]), strict=True):
        s.selected = part


def _select_by_entropy(sequences: list[SimpleNamespace], o: SimpleNamespace) -> None:
    """Wang et al. 2025: the policy term of the top fraction of tokens by entropy alone."""
    entropies = [] if o.top_entropy is None else [s.entropy.detach() for s in sequences]
    if sum(len(e) for e in entropies) == 0:
        return
    threshold = torch.quantile(torch.cat(entropies), 1 - o.top_entropy)
    for s in sequences:
        s.in_top = (s.entropy.detach() >= threshold).to(s.logprob.dtype)


def _drop_off_policy(sequences: list[SimpleNamespace], o: SimpleNamespace) -> None:
    """DeepSeek-V3.2 eq. 9: a sequence that drifted too far teaches nothing by a negative advantage."""
    for s in sequences:
        s.kept = torch.ones_like(s.logprob).detach()
        if o.off_policy_threshold is not None and s.logprob.numel():
            behavior = s.old if s.rollout is None else s.rollout
            drift = torch.nan_to_num(behavior - s.logprob.detach(), nan=0.0).mean()
            s.kept = ((s.advantages >= 0) | (drift <= o.off_policy_threshold)).to(s.logprob.dtype)


def _metrics(sequences: list[SimpleNamespace], policy_term: Tensor, kind: str, o: SimpleNamespace) -> dict[str, Tensor]:
    def mean(name: Callable[[SimpleNamespace], Tensor]) -> Tensor:
        values = torch.cat([name(s).detach().to(s.logprob.dtype) for s in sequences])
        given = o.normalizer if o.aggregation == "token_mean" else None  # then it counts all tokens there are
        return values.sum() / (max(values.numel(), 1) if given is None else given)

    def of(s: SimpleNamespace) -> Tensor:
        return s.log_ratio if kind == "geo_mean" else s.ratio

    low, high = 1 - o.clip_low, 1 + o.clip_high
    if kind == "geo_mean":
        low, high = -o.clip_low, o.clip_high
    elif kind == "cispo":
        low, high = o.params["ratio_min"], o.clip_high

    def outside(s: SimpleNamespace, side: int) -> Tensor:
        if kind.startswith("dppo"):
            beyond = _beyond(s, o, kind)
        else:
            beyond = of(s) < low if side < 0 else of(s) > high
        return beyond & (side * s.advantages > 0)

    metrics = {
        "policy_loss": policy_term.detach(),
        "ratio_mean": mean(lambda s: s.ratio),
        "approx_kl": mean(lambda s: torch.expm1(s.log_ratio.clamp(-20, 20)) - s.log_ratio.clamp(-20, 20)),
        "clip_fraction_low": mean(lambda s: outside(s, -1)),
        "clip_fraction_high": mean(lambda s: outside(s, 1)),
        "off_policy_dropped": mean(lambda s: 1 - s.kept),
        "cov_fraction": mean(lambda s: s.selected),
    }
    metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    if o.beta != 0:
        metrics["kl"] = mean(lambda s: s.kl)
    if sequences and sequences[0].entropy is not None:
        metrics["entropy"] = mean(lambda s: s.entropy)
    ratios = torch.cat([s.ratio.detach() for s in sequences]) if sequences else torch.ones(1)
    metrics["ratio_max"] = ratios.max() if len(ratios) else torch.ones(())
    metrics["ratio_min"] = ratios.min() if len(ratios) else torch.ones(())
    return metrics

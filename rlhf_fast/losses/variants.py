"""The policy losses: each one the loss of a token, before masks, corrections, KL, entropy and aggregation.

Notation: r = importance ratio (of the token, or of its sequence), A = advantage, sg = stop gradient.
Each docstring gives the source, and where TRL 1.16 ("TRL") or verl do otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_fast.losses.registry import PolicyTerms, register_policy_loss
from rlhf_fast.losses.weights import MIN_LOG_WEIGHT, covariance, largest
from rlhf_fast.ops.kl import MAX_LOG_RATIO
from rlhf_fast.ops.policy import Form

if TYPE_CHECKING:
    from rlhf_fast.losses.policy import PolicyLoss

Indicators = dict[str, Tensor]


# ---- the clip family ---------------------------------------------------------------------------------------


def clipped(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A), and at most dual_clip |A| where A < 0."""
    low, high = 1 - o.clip_low, 1 + o.clip_high
    free = x.ratio if o.delta is None else x.ratio.clamp(max=o.delta)
    loss = -torch.minimum(free * x.advantages, x.ratio.clamp(low, high) * x.advantages)
    far = free != x.ratio
    if o.dual_clip is not None:
        cap = -o.dual_clip * x.advantages
        far = far | (loss > cap)
        loss = torch.where(x.advantages < 0, torch.minimum(loss, cap), loss)
    indicators = clip_indicators(x, low, high)
    if o.delta is not None or o.dual_clip is not None:
        indicators["dual_clip_fraction"] = far & (x.advantages < 0)
    return loss, indicators


def clip_indicators(x: PolicyTerms, low: float, high: float) -> Indicators:
    below = (x.ratio < low) & (x.advantages < 0)
    above = (x.ratio > high) & (x.advantages > 0)
    return {"clip_fraction": below | above, "clip_fraction_low": below, "clip_fraction_high": above}


@register_policy_loss("ppo", fused=True, aggregation="token_mean", clip_low=0.2)
def ppo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """PPO (Schulman et al. 2017, eq. 7), a mean over tokens; dual clip after Ye et al. 2019, eq. 5.

    verl's default has dual_clip=3.0; here it is off until asked for.
    """
    return clipped(x, o)


@register_policy_loss("grpo", fused=True, aggregation="seq_mean_token_mean", clip_low=0.2)
def grpo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """GRPO (Shao et al. 2024, eq. 3): each sequence's token mean, then the mean over sequences."""
    return clipped(x, o)


@register_policy_loss("dapo", fused=True, aggregation="token_mean", clip_low=0.2, clip_high=0.28)
def dapo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """DAPO (Yu et al. 2025, eq. 8): token mean and a higher upper clip, 0.28 (TRL: 0.2 unless it is set)."""
    return clipped(x, o)


@register_policy_loss("dr_grpo", fused=True, aggregation="fixed_length", clip_low=0.2)
def dr_grpo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """Dr. GRPO (Liu et al. 2025): token sums over sequences x max_length (verl: over the padded length alone)."""
    return clipped(x, o)


@register_policy_loss("bnpo", fused=True, aggregation="token_mean", clip_low=0.2)
def bnpo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """Mean over the tokens of the local batch, TRL's "bnpo": the formula of "ppo" without an outer normalizer."""
    return clipped(x, o)


@register_policy_loss(
    "gspo",
    fused=True,
    aggregation="seq_mean_token_mean",
    importance_level="sequence",
    clip_low=3e-4,
    clip_high=4e-4,
)
def gspo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """GSPO (Zheng et al. 2025, eq. 5 and 7): one ratio per sequence, the geometric mean of its tokens'.

    The gradient runs through the mean, as in TRL; importance_level="sequence_token" is GSPO-token (eq. 13), verl's
    form, which is the same for advantages that are constant along a sequence.
    """
    return clipped(x, o)


@register_policy_loss(
    "luspo",
    fused=True,
    aggregation="seq_mean_token_sum",
    importance_level="sequence",
    clip_low=2e-3,
    clip_high=2.5e-3,
)
def luspo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """LUSPO (2026, arXiv 2602.05261): GSPO with each sequence's loss times its length. Clips of its section 5.1.

    The KL is summed over counted tokens, as in TRL; Liger 0.8.5 averages it over the padded width, masked tokens too.
    """
    return clipped(x, o)


def _vanilla(o: PolicyLoss) -> Form:
    return Form("vanilla")


def _either(condition: Tensor, yes: float, no: float, x: PolicyTerms) -> Tensor:
    """One of two numbers per token, in the tokens' dtype."""
    return torch.full_like(x.ratio, no).masked_fill(condition, yes)


# ---- other weightings of the token's gradient --------------------------------------------------------------


@register_policy_loss("reinforce", form=_vanilla, aggregation="seq_mean_token_sum")
def reinforce(x: PolicyTerms, o: PolicyLoss) -> Tensor:
    """REINFORCE (Williams 1992): -A logprob, summed over a sequence, mean over sequences. No ratio."""
    return -x.advantages * x.logprob


@register_policy_loss("gpg", form=_vanilla, aggregation="token_mean")
def gpg(x: PolicyTerms, o: PolicyLoss) -> Tensor:
    """GPG (Chu et al. 2025, eq. 5), as in verl: -A logprob, mean over tokens. No ratio, no clip."""
    return -x.advantages * x.logprob


@register_policy_loss(
    "cispo",
    form=lambda o: Form("cispo", low=o.params["ratio_min"], high=o.clip_high),
    aggregation="token_mean",
    clip_high=5.0,
    params={"ratio_min": 0.0},
)
def cispo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """CISPO (MiniMax-M1 2025, eq. 4): -sg(clip(r, ratio_min, clip_high)) A logprob. Every token keeps a gradient.

    `clip_high` is the cap itself, not an offset from 1 (as in TRL; 5.0 after ScaleRL). No lower bound, as the paper and
    TRL; verl's is ratio_min = 1 - clip_low.
    """
    weight = x.ratio.detach().clamp(o.params["ratio_min"], o.clip_high)
    indicators = clip_indicators(x, o.params["ratio_min"], o.clip_high)
    return -weight * x.advantages * x.logprob, indicators


@register_policy_loss(
    "sapo",
    form=lambda o: Form("sapo", first=o.params["temperature_pos"], second=o.params["temperature_neg"]),
    aggregation="seq_mean_token_mean",
    params={"temperature_pos": 1.0, "temperature_neg": 1.05},
)
def sapo(x: PolicyTerms, o: PolicyLoss) -> Tensor:
    """SAPO (2025, arXiv 2511.20347): -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (0 counts as negative)."""
    tau = _either(x.advantages > 0, o.params["temperature_pos"], o.params["temperature_neg"], x)
    return -(4 / tau) * torch.sigmoid(tau * (x.ratio - 1)) * x.advantages


@register_policy_loss(
    "vespo",
    aggregation="token_mean",
    segments=True,
    absorbs_correction=True,
    params={"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
)
def vespo(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """VESPO (2026, arXiv 2602.10693): -sg(phi(w)) A logprob, phi(w) = w^k exp(lambda (1 - w)), w the sequence's ratio.

    w is the product of the token ratios, log w clamped to [log 1e-8, 20]. A rollout correction multiplies w. As TRL.
    """
    log_ratio = x.token_log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if "log_correction" in x.batch:
        log_ratio = log_ratio + x.batch["log_correction"]
    log_w = x.segments.spread(x.segments.sum(log_ratio)).clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    positive = x.advantages >= 0
    k = _either(positive, o.params["k_pos"], o.params["k_neg"], x)
    lam = _either(positive, o.params["lambda_pos"], o.params["lambda_neg"], x).clamp(min=1e-4)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi * x.advantages * x.logprob, {"vespo_weight": phi}


@register_policy_loss(
    "geo_mean",
    form=lambda o: Form("geo_mean", low=-o.clip_low, high=o.clip_high),
    aggregation="seq_mean_token_mean",
    segments=True,
    clip_low=0.4,
    clip_high=0.4,
)
def geo_mean(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """GMPO (Zhao et al. 2025, eq. 4): the ratio of a sequence is the geometric mean of clipped token ratios.

    Clips are offsets of the log-ratio, exp(-0.4) to exp(0.4) as the paper recommends; A is the sequence's mean.
    """
    log_ratio = x.token_log_ratio
    inside = log_ratio.clamp(-o.clip_low, o.clip_high)
    sign = x.advantages.sign()
    kept = sign * torch.minimum(sign * log_ratio, sign * inside)
    ratio = x.segments.mean(kept).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -x.segments.mean(x.advantages) * ratio
    above, below = (log_ratio > inside) & (x.advantages > 0), (log_ratio < inside) & (x.advantages < 0)
    indicators = {"clip_fraction": above | below, "clip_fraction_low": below, "clip_fraction_high": above}
    return x.segments.spread(loss), indicators


# ---- selections by covariance ------------------------------------------------------------------------------


def _clip_cov_weights(
    o: PolicyLoss,
    batch: Mapping[str, Any],
    advantages: Tensor,
    logprob: Tensor,
    old_logprob: Tensor | None,
    valid: Tensor,
) -> dict[str, Tensor]:
    """Tokens to cut: `fraction` of all, drawn among unclipped ones whose covariance lies within the bounds."""
    ratio = torch.ones_like(logprob)
    if old_logprob is not None:
        ratio = (logprob - old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free, inside = -ratio * advantages, -ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantages
    cov = covariance(advantages, logprob, valid)
    eligible = (cov > o.params["cov_low"]) & (cov < o.params["cov_high"]) & (valid != 0) & (inside <= free)
    noise = batch["noise"] if "noise" in batch else torch.rand_like(logprob)
    count = (valid.double().sum() * o.params["fraction"]).floor().clamp(min=1)
    cut = largest(noise, eligible, count)
    return {"policy_weight": (~cut).to(logprob.dtype), "metric/cov_fraction": _fraction(cut, valid)}


def _kl_cov_weights(
    o: PolicyLoss,
    batch: Mapping[str, Any],
    advantages: Tensor,
    logprob: Tensor,
    old_logprob: Tensor | None,
    valid: Tensor,
) -> dict[str, Tensor]:
    """Tokens to hold: the `fraction` of the largest covariance."""
    count = (valid.double().sum() * o.params["fraction"]).floor().clamp(min=1)
    held = largest(covariance(advantages, logprob, valid), valid != 0, count)
    return {"held": held.to(logprob.dtype), "metric/cov_fraction": _fraction(held, valid)}


def _fraction(selected: Tensor, valid: Tensor) -> Tensor:
    return (selected * valid).sum() / valid.sum().clamp(min=1)


@register_policy_loss(
    "clip_cov",
    fused=True,
    prepare=_clip_cov_weights,
    aggregation="token_mean",
    clip_low=0.2,
    params={"fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
)
def clip_cov(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """Clip-Cov (Cui et al. 2025, eq. 10-11): PPO whose gradient is cut at random tokens of high covariance.

    Numbers as in verl. The draw is over the batch given to `prepare`, in the trainers a micro-batch, as in verl: the
    layout changes the result. `batch["noise"]` (N,) replaces torch's generator.
    """
    return clipped(x, o)


@register_policy_loss(
    "kl_cov",
    form=lambda o: Form("kl_cov", first=o.params["coef"]),
    prepare=_kl_cov_weights,
    aggregation="token_mean",
    params={"fraction": 2e-4, "coef": 1.0},
)
def kl_cov(x: PolicyTerms, o: PolicyLoss) -> Tensor:
    """KL-Cov (Cui et al. 2025, eq. 12-13): -r A, plus coef |log r| at the tokens of highest covariance. As verl.

    They are chosen within the batch given to `prepare`, in the trainers a micro-batch: the layout changes the result.
    """
    return -x.ratio * x.advantages + o.params["coef"] * x.batch["held"] * x.token_log_ratio.abs()


# ---- a trust region of probabilities -----------------------------------------------------------------------


def _trust_region(x: PolicyTerms, o: PolicyLoss, distance: Tensor) -> tuple[Tensor, Indicators]:
    """-sg(min(r, ratio_max)) A logprob, without the tokens whose step away from the old policy is longer than allowed.

    `distance` (n,): of the two policies at the token; more than clip_high upwards, or clip_low downwards, is too far.
    """
    moved = x.token_log_ratio.detach()
    above = (distance > o.clip_high) & (moved > 0) & (x.advantages > 0)
    below = (distance > o.clip_low) & (moved < 0) & (x.advantages <= 0)
    weight = x.ratio.detach().clamp(max=o.params["ratio_max"]).masked_fill(above | below, 0.0)
    below = below & (x.advantages < 0)
    indicators = {"clip_fraction": above | below, "clip_fraction_low": below, "clip_fraction_high": above}
    return -weight * x.advantages * x.logprob, indicators


def _two_policies(x: PolicyTerms) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) of now and then, constant."""
    now = x.logprob.detach()
    return now, now - x.token_log_ratio.detach()


@register_policy_loss(
    "dppo_tv",
    form=lambda o: Form("dppo_tv", low=o.clip_low, high=o.clip_high, first=o.params["ratio_max"]),
    aggregation="token_mean",
    clip_low=0.2,
    params={"ratio_max": 20.0},
)
def dppo_tv(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """DPPO (2026, arXiv 2602.04879) by total variation of the sampled token against the rest, |p - p_old|. As verl.

    The clips bound a divergence and not a ratio: rare tokens move freely, likely ones do not.
    """
    now, old = _two_policies(x)
    return _trust_region(x, o, (now.exp() - old.exp()).abs())


@register_policy_loss("dppo_kl", aggregation="token_mean", clip_low=0.2, params={"ratio_max": 20.0})
def dppo_kl(x: PolicyTerms, o: PolicyLoss) -> tuple[Tensor, Indicators]:
    """DPPO by KL(old || new) of the sampled token against the rest, the rest's shares + 1e-8. As verl."""
    now, old = _two_policies(x)
    rest, old_rest = -torch.expm1(now), -torch.expm1(old)
    distance = old.exp() * (old - now) + old_rest * torch.log((old_rest + 1e-8) / (rest + 1e-8))
    return _trust_region(x, o, distance)


@register_policy_loss(
    "dro",
    form=lambda o: Form("dro", first=o.params["dro_beta"]),
    aggregation="token_mean",
    params={"dro_beta": 0.1},
)
def dro(x: PolicyTerms, o: PolicyLoss) -> Tensor:
    """DRO (Richemond et al. 2024, arXiv 2405.19107): -(A logprob - dro_beta / 2 (log r)^2). No ratio, no clip. As verl,
    where dro_beta has no default."""
    return -x.advantages * x.logprob + 0.5 * o.params["dro_beta"] * x.token_log_ratio.square()

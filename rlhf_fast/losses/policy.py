"""`PolicyLoss`, the ready-made policy loss for `fused_linear_loss`.

A loss is composed once, from a registered function of the token (`losses.variants`) and terms that all kinds share:

    L = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef mean_t H_t

w: aggregation with global counts; v: rollout correction, selections and masks. `prepare` forms both from the whole
batch; `__call__` and `gradient` then take chunks of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses import variants as _variants  # noqa: F401  (registers the kinds)
from rlhf_fast.losses.options import DEFAULTS, check_options, own_high
from rlhf_fast.losses.prepare import by_token, prepare_batch
from rlhf_fast.losses.registry import PolicyTerms, unknown, variant
from rlhf_fast.losses.segments import Segments
from rlhf_fast.ops.fused import ReadyMade
from rlhf_fast.ops.kl import MAX_LOG_RATIO, keep, kl_terms
from rlhf_fast.ops.policy import SUMS, ClipTerms, Form, clip_loss, ratio_range, takes_forms
from rlhf_fast.types import LossGrad, Metrics

CLIPPING = ("clip", "cispo", "geo_mean", "dppo_tv")  # forms that count clipped tokens


@dataclass(frozen=True, init=False)
class PolicyLoss(ReadyMade):
    """A policy loss with its options: callable on chunks of log-probabilities after `prepare`.

    Options left out take the kind's defaults (see `losses.variants`).

    Args:
        kind: a registered name: ppo, grpo, dapo, dr_grpo, bnpo, gspo, luspo, cispo, sapo, vespo, gpg, geo_mean,
            clip_cov, kl_cov, dppo_tv, dppo_kl, dro, reinforce, or your own.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. clip_low given alone is symmetric:
            clip_high is then the same, whatever the kind's own is (as TRL's epsilon). For cispo clip_high is the cap
            itself, and clip_low does not touch it.
        delta: upper bound of the unclipped ratio (INTELLECT-2). dual_clip: bound of the loss, dual_clip |A|, where
            A < 0 (Ye et al. 2019), > 1.
        beta, kl_estimator, kl_gradient: the KL term against `ref_logprob`; see `kl_estimate`.
        kl_correction: multiply the KL by the ratio (DeepSeek-V3.2). TRL 1.16 does so by default.
        entropy_coef: bonus on the mean entropy of the tokens (TRL; verl aggregates it like the loss).
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (needs max_length).
        importance_level: token; sequence (GSPO); sequence_token (GSPO-token: its value, the token's gradient).
        normalizer: global count behind the aggregation: tokens for token_mean, sequences otherwise. None: the batch's.
            Sequences without a scored token count, as in TRL.
        entropy_normalizer: the same for the entropy bonus: tokens (selected ones under top_entropy).
        top_entropy: keep the policy term of this fraction of tokens, those of highest entropy (Wang et al. 2025).
        off_policy_threshold: drop sequences of negative advantage whose mean log(pi_behaviour / pi) exceeds it
            (DeepSeek-V3.2, eq. 9).
        correction, correction_min, correction_max: weights pi_old / pi_rollout, {token,sequence,geometric}_{truncate,
            mask}, bounded to [min, max] (max 3.0 unless given, as TRL; inf: no bound).
        params: the kind's own numbers, also accepted as keywords (temperature_pos=..., coef=...).
    """

    kind: str
    clip_low: float
    clip_high: float
    delta: float | None
    dual_clip: float | None
    beta: float
    kl_estimator: str
    kl_gradient: str | None
    kl_correction: bool
    entropy_coef: float
    aggregation: str
    importance_level: str
    max_length: int | None
    normalizer: Tensor | float | None
    entropy_normalizer: Tensor | float | None
    top_entropy: float | None
    off_policy_threshold: float | None
    correction: str | None
    correction_min: float | None
    correction_max: float | None
    params: Mapping[str, float]

    def __init__(self, kind: str = "grpo", **options: Any) -> None:
        found = variant(kind)
        params = {**found.params, **(options.pop("params", None) or {})}
        values: dict[str, Any] = {**DEFAULTS, **found.defaults}
        for name, value in options.items():
            if name in found.params:
                params[name] = value
            elif name not in DEFAULTS:
                raise ValueError(unknown(f"option of policy loss {kind!r}:", name, [*DEFAULTS, *found.params]))
            elif value is not None or DEFAULTS[name] is None:
                values[name] = value if value is not None else values[name]
        for name in params:
            if name not in found.params:
                raise ValueError(unknown(f"parameter of policy loss {kind!r}:", name, found.params))
        if values["clip_high"] is None or (options.get("clip_low") is not None and not own_high(found, options)):
            values["clip_high"] = values["clip_low"]
        values.update(kind=kind, params=params)
        for field in fields(self):
            object.__setattr__(self, field.name, values[field.name])
        check_options(self)
        self._register()

    # ---- the loss_fn protocol ----

    @property
    def needs_entropy(self) -> bool:
        """Whether chunks must come with their entropy."""
        return self.entropy_coef != 0 or self.top_entropy is not None

    @property
    def needs_segments(self) -> bool:
        """Whether chunks must hold whole sequences."""
        return self._per_sequence or self.off_policy_threshold is not None

    def prepare(self, batch: Mapping[str, Any], mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Check the batch, spread per-sequence values, form the per-token weights; once, before any chunk.

        batch keys, per token (N,) unless noted: advantages, also (S,); old_logprob (absent or None: on-policy);
        ref_logprob (beta != 0); rollout_logprob (correction); importance_weight, also (S,), in the place of a
        correction; old_entropy or a number entropy_threshold (top_entropy);
        logprob, the current one where the caller knows it (clip_cov and kl_cov use old_logprob otherwise); numbers
        normalizer, entropy_normalizer (over the options'), num_tokens (the count behind the metrics).
        """
        return prepare_batch(self, batch, mask, cu_seqlens)

    def __call__(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        """Loss () of a chunk, summed with its weights, and its metrics. Differentiable by logprob and entropy."""
        batch = self._chunk(logprob, batch)
        if self._in_one_pass(logprob, entropy):
            result = self._clip(logprob, entropy, batch)
            return result.loss, self._clip_metrics(result.sums.detach(), entropy is not None, batch)
        return self._composed(logprob, entropy, batch)

    def gradient(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]) -> LossGrad:
        """Loss, dloss/dlogprob, dloss/dentropy and metrics of a chunk; nothing of it is differentiable."""
        if self._in_one_pass(logprob, entropy):
            batch = self._chunk(logprob, batch)
            with torch.no_grad():
                result = self._clip(logprob, entropy, batch)
                metrics = self._clip_metrics(result.sums, entropy is not None, batch)
            return LossGrad(result.loss, result.dlogprob, result.dentropy, metrics)
        with torch.enable_grad():
            leaf = logprob.detach().requires_grad_()
            bonus = entropy is not None and self.entropy_coef != 0
            entropy_leaf = entropy.detach().requires_grad_() if bonus else entropy
            loss, metrics = self(leaf, entropy_leaf, batch)
            grads = torch.autograd.grad(loss, [leaf, entropy_leaf] if bonus else [leaf])
        return LossGrad(loss.detach(), grads[0], grads[1] if bonus else None, metrics)

    # ---- how ----

    @property
    def _per_sequence(self) -> bool:
        return self.importance_level != "token" or variant(self.kind).segments

    @property
    def takes_whole(self) -> bool:
        """Whether a batch may come with one weight per sequence: nothing here needs them token by token."""
        selects = self.top_entropy is not None or self.off_policy_threshold is not None or self.correction is not None
        return (self._fused or self._form is not None) and not selects and variant(self.kind).prepare is None

    @property
    def _fused(self) -> bool:
        return variant(self.kind).fused and self.importance_level == "token"

    @property
    def _form(self) -> Form | None:
        """What the eager CPU pass does for this loss beyond the fused op's clip at token level; None: nothing."""
        found = variant(self.kind)
        if self.importance_level == "token":
            return None if found.form is None else found.form(self)
        if not found.fused:
            return None
        return Form("clip", self.importance_level, low=1 - self.clip_low, high=1 + self.clip_high)

    def _in_one_pass(self, logprob: Tensor, entropy: Tensor | None) -> bool:
        """Whether a kernel forms loss, gradient and metrics."""
        return self._fused or (self._form is not None and takes_forms(logprob, entropy))

    def _chunk(self, logprob: Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The chunk's batch with the masks that depend on the current policy multiplied into policy_weight."""
        if "weight" not in batch:
            raise ValueError("batch must come from prepare(batch, mask, cu_seqlens); it has no 'weight'")
        dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
        batch = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        if self.off_policy_threshold is not None:
            valid = batch["weight"] != 0
            drift = 0.0
            if batch.get("behavior_logprob") is not None:
                drift = keep(batch["behavior_logprob"] - logprob.detach(), valid).nan_to_num(nan=0.0)
            segments = _segments(batch)
            drift = segments.spread(segments.mean(drift + torch.zeros_like(batch["weight"])))
            kept = (batch["advantages"] >= 0) | (drift <= self.off_policy_threshold)
            batch["dropped"] = ~kept & valid
            batch["policy_weight"] = kept * batch.get("policy_weight", 1.0)
        return batch

    def _clip(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]):
        policy_weight, entropy_weight = self._entropy_masked(entropy, batch)
        terms = ClipTerms(
            self.clip_low, self.clip_high, self.delta, self.dual_clip, self.beta, self.kl_estimator,
            self.kl_gradient or self.kl_estimator, self.kl_correction, self.entropy_coef,
        )  # fmt: skip
        form = None if self._fused else self._form
        if form is not None and self.needs_segments and "offsets" not in batch:
            batch["offsets"], batch["length"] = _segments(batch).bounds()
        return clip_loss(
            logprob, batch.get("old_logprob"), batch["advantages"], batch["weight"], terms,
            policy_weight=policy_weight, ref_logprob=batch.get("ref_logprob"),
            entropy=entropy, entropy_weight=entropy_weight,
            mask=batch.get("mask"), offsets=batch.get("offsets"), length=batch.get("length", 0),
            form=form, held=batch.get("held"),
        )  # fmt: skip

    def _entropy_masked(self, entropy: Tensor | None, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """policy_weight and entropy_weight, with top_entropy's mask where it goes by the current entropy."""
        policy_weight, entropy_weight = batch.get("policy_weight"), batch.get("entropy_weight")
        if self.needs_entropy and entropy is None:
            raise ValueError("entropy must be given for entropy_coef or top_entropy, got None")
        if "entropy_threshold" in batch:
            high = (entropy.detach() >= batch["entropy_threshold"]).to(batch["weight"].dtype)
            policy_weight = high if policy_weight is None else high * policy_weight
            entropy_weight = None if entropy_weight is None else high * entropy_weight
        return policy_weight, entropy_weight

    def _composed(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        """The general path: plain torch, gradient by autograd."""
        batch = by_token(batch, logprob.numel())
        weight, advantages = batch["weight"], batch["advantages"]
        valid = weight != 0
        policy_weight, entropy_weight = self._entropy_masked(entropy, batch)
        terms = self._terms(keep(logprob.to(weight.dtype), valid), batch, valid)
        out = variant(self.kind).function(terms, self)
        loss, indicators = out if isinstance(out, tuple) else (out, {})
        _checks.check_shape(f"the loss of kind {self.kind!r}", loss, advantages.shape, "(n,)")
        indicators = dict(indicators)
        loss = keep(loss, valid)
        policy = torch.dot(weight, loss if policy_weight is None else loss * policy_weight.to(loss.dtype))
        total = policy
        if self.beta != 0:
            delta = terms.logprob - keep(batch["ref_logprob"], valid)
            kl = kl_terms(delta, self.kl_estimator, self.kl_gradient)
            indicators["kl"] = kl.detach()
            total = total + self.beta * torch.dot(weight, kl * terms.ratio if self.kl_correction else kl)
        if entropy is not None:
            entropy = keep(entropy.to(weight.dtype), valid)
            indicators["entropy"] = entropy.detach()
            if self.entropy_coef != 0:
                total = total - self.entropy_coef * torch.dot(entropy_weight, entropy)
        drift = terms.token_log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        indicators.update(ratio_mean=terms.ratio.detach(), approx_kl=torch.expm1(drift) - drift)
        return total, self._metrics(policy.detach(), indicators, terms.ratio.detach(), valid, batch)

    def _terms(self, logprob: Tensor, batch: Mapping[str, Any], valid: Tensor) -> PolicyTerms:
        old = batch.get("old_logprob")
        token = logprob - (logprob.detach() if old is None else keep(old, valid))
        segments = _segments(batch) if self.needs_segments else None
        log_ratio = token
        if self.importance_level != "token":
            log_ratio = segments.spread(segments.mean(token))
            if self.importance_level == "sequence_token":
                log_ratio = log_ratio.detach() + (logprob - logprob.detach())
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return PolicyTerms(logprob, log_ratio, log_ratio.exp(), batch["advantages"], token, segments, batch)

    # ---- metrics: sums over the chunk, already divided by the batch's count of tokens ----

    def _clip_metrics(self, sums: Tensor, with_entropy: bool, batch: Mapping[str, Any]) -> Metrics:
        means = sums.clone()
        means[SUMS.index("clip_low") : SUMS.index("ratio_max")] *= batch["inv_tokens"]
        mean = dict(zip(SUMS, means.unbind(), strict=True))
        metrics = {"policy_loss": mean["policy_loss"]}
        if self._fused or self._form.name in CLIPPING:
            metrics["clip_fraction"] = mean["clip_low"] + mean["clip_high"]
            metrics.update(clip_fraction_low=mean["clip_low"], clip_fraction_high=mean["clip_high"])
        if variant(self.kind).fused and (self.delta is not None or self.dual_clip is not None):
            metrics["dual_clip_fraction"] = mean["clip_far"]
        metrics.update(ratio_mean=mean["ratio"], approx_kl=mean["approx_kl"])
        if self.beta != 0:
            metrics["kl"] = mean["kl"]
        if with_entropy:
            metrics["entropy"] = mean["entropy"]
        metrics.update(ratio_max=mean["ratio_max"], ratio_min=mean["ratio_min"])
        return self._with_constants(metrics, mean["count"], batch)

    def _metrics(
        self, policy: Tensor, indicators: Mapping[str, Tensor], ratio: Tensor, valid: Tensor, batch: Mapping[str, Any]
    ) -> Metrics:
        share = valid.to(ratio.dtype) * batch["inv_tokens"]
        metrics = {"policy_loss": policy}
        for name, value in indicators.items():
            metrics[name] = torch.dot(share, keep(value.detach().to(share.dtype), valid))
        metrics["ratio_max"], metrics["ratio_min"] = ratio_range(ratio, valid)
        return self._with_constants(metrics, share.sum(), batch)

    def _with_constants(self, metrics: Metrics, share: Tensor, batch: Mapping[str, Any]) -> Metrics:
        """Add the whole batch's metrics: each chunk carries its share of tokens of them."""
        if "dropped" in batch:
            metrics["off_policy_dropped"] = batch["dropped"].sum() * batch["inv_tokens"]
        for name, value in batch.items():
            if name.startswith("metric/"):
                metrics[name.removeprefix("metric/")] = value * share
        return metrics


def _segments(batch: Mapping[str, Any]) -> Segments:
    if "segments" in batch:
        return batch["segments"]
    if "segment_ids" not in batch:
        raise ValueError("this policy loss needs whole sequences: give segments (cu_seqlens) with the batch")
    return Segments(batch["segment_ids"], batch["num_segments"], (batch["weight"] != 0).to(batch["weight"].dtype))

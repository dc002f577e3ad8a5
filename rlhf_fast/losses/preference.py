"""`PreferenceLoss`, the DPO family for `fused_linear_loss`, and `preference_loss`, the same as one call.

    L = sum_i w_i sum_k c_k l_k(pair i),   w_i = pair_weight_i / normalizer

l_k: registered functions of a pair (`losses.preference_kinds`), c_k: weights of a mix. `prepare` forms from the whole
batch what single chunks cannot know: lengths, the reference's sums, which pairs count, and how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses.pairs import check_pair_weight, check_two, flatten_pairs, pair_segments, prepare_pairs, token_sums
from rlhf_fast.losses.preference_kinds import (
    F_ALIASES,
    PairTerms,
    PairVariant,
    divergence_score,
    pair_variant,
)
from rlhf_fast.losses.preference_options import check_options, mix
from rlhf_fast.losses.registry import made_once, unknown
from rlhf_fast.ops.fused import ReadyMade
from rlhf_fast.ops.kl import MAX_LOG_RATIO, keep
from rlhf_fast.types import LossMetrics, Metrics

__all__ = ["DPO", "PreferenceLoss", "pair_segments", "preference_loss"]

_DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence": "reverse_kl",
    "f_alpha": 0.5,
    "ld_alpha": None,
    "average_logprob": False,
    "reference_free": False,
    "weighting": None,
}


@dataclass(frozen=True, init=False)
class PreferenceLoss(ReadyMade):
    """A preference loss with its options: callable on chunks of whole pairs after `prepare`.

    Args:
        kind: a registered name (sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
            aot, aot_unpaired, apo_zero, apo_down, discopop, sft, cpo, simpo, orpo, or your own), a list of names, or
            a dict of names and weights.
        loss_weights: weights of a list of names; None: 1 each.
        rpo_alpha: adds an `sft` term of this weight (Pang et al. 2024, RPO).
        beta: strength of the tie to the reference; IPO's tau, ORPO's lambda, SPPO's 1 / eta.
        label_smoothing: probability of a flipped label, for the kinds that know it; an error for the others.
        f_divergence, f_alpha: reverse_kl, forward_kl, js or alpha (with its coefficient; 1 is reverse_kl), for kinds
            of the score difference (Wang et al. 2023). Exponents are clamped at 20.
        ld_alpha: LD-DPO (Liu et al. 2024, eq. 9): tokens beyond the shorter response's length weigh ld_alpha, in
            policy and reference alike; lengths, NLL terms and WPO weights stay whole.
        average_logprob: a sequence's log-probability is the mean over its tokens, of policy and reference alike, in
            every kind (sigmoid_norm, ipo, simpo and orpo average on their own: no change). NLL terms are untouched.
        reference_free: the reference counts as uniform: its log-probabilities are taken as 0.
        weighting: None or "wpo": each pair weighs the product of both responses' exp(mean log w_t), constant (Zhou et
            al. 2024, eq. 2), with w_t = pi(y_t), or pi(y_t) / sum_v pi(v)^2 where `log_sum_sq` is given (TRL).
        params: the kinds' own parameters, also accepted as keywords: length_average (ipo), discopop_tau, simpo_gamma,
            nll_weight (cpo), sft_average "token" or "sequence" (sft, cpo, orpo).
    """

    kinds: tuple[tuple[str, float], ...]
    beta: float
    label_smoothing: float
    f_divergence: str
    f_alpha: float
    ld_alpha: float | None
    average_logprob: bool
    reference_free: bool
    weighting: str | None
    params: Mapping[str, Any]

    def __init__(
        self,
        kind: str | Sequence[str] | Mapping[str, float] = "sigmoid",
        *,
        loss_weights: Sequence[float] | None = None,
        rpo_alpha: float | None = None,
        **options: Any,
    ) -> None:
        kinds = mix(kind, loss_weights, rpo_alpha)
        known = {k: v for name, _ in kinds for k, v in pair_variant(name).params.items()}
        params = {**known, **(options.pop("params", None) or {})}
        values = dict(_DEFAULTS)
        for name, value in options.items():
            if name in known:
                params[name] = value
            elif name not in _DEFAULTS:
                raise ValueError(unknown(f"option of preference loss {kind!r}:", name, [*_DEFAULTS, *known]))
            else:
                values[name] = value
        for name in params:
            if name not in known:
                raise ValueError(unknown(f"parameter of preference loss {kind!r}:", name, known))
        values["f_divergence"] = F_ALIASES.get(values["f_divergence"], values["f_divergence"])
        values.update(kinds=kinds, params=params)
        for field in fields(self):
            object.__setattr__(self, field.name, values[field.name])
        check_options(self)
        self._register()

    # ---- the loss_fn protocol ----

    needs_entropy = False
    needs_segments = True
    segment_keys = ("ref_chosen", "ref_rejected", "chosen_length", "rejected_length", "valid_pair", "pair_weight")

    @property
    def needs_batch(self) -> bool:
        """Whether a chunk must be the whole batch: kinds that sort over it (aot, aot_unpaired)."""
        return any(v.whole_batch for v in self.variants)

    def prepare(self, batch: Mapping[str, Any], mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Check the batch and form what chunks need from the whole of it; once, before any chunk.

        `cu_seqlens` (P+1,) bounds PAIRS: each segment holds both sequences of a pair, told apart by `is_chosen`; for
        sequences in the order chosen, rejected, chosen, ... `pair_segments` gives both. A pair with a side without
        scored tokens does not count.

        batch keys: is_chosen (N,) bool; the reference as ref_logprob (N,), or as sums ref_chosen and ref_rejected
        (P,) (under ld_alpha: desensitised); pair_weight (P,), 0: the pair does not count; log_sum_sq (N,), log of
        sum_v pi(v)^2, for weighting "wpo"; numbers normalizer (global count of pairs), chosen_tokens (global count of
        chosen tokens, behind the NLL's token mean), bco_delta (running mean of rewards).
        """
        return prepare_pairs(self, batch, mask, cu_seqlens)

    def __call__(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        """Loss () of a chunk of whole pairs, summed with its weights, and its metrics. Differentiable by logprob."""
        if "valid_pair" not in batch:
            raise ValueError("batch must come from prepare(batch, mask, cu_seqlens); it has no 'valid_pair'")
        chosen, rejected, raw, raw_rejected = token_sums(self, logprob, batch)
        lengths = [batch[name].to(chosen.dtype) for name in ("chosen_length", "rejected_length")]
        pair_weight = batch.get("pair_weight")
        if self.weighting is not None:
            shift = (0.0, 0.0)
            if "log_sum_sq" in batch:
                shift = token_sums(self, batch["log_sum_sq"].to(chosen.dtype), batch)[2:]
            means = [(x.detach() - s) / n for x, s, n in zip((raw, raw_rejected), shift, lengths, strict=True)]
            wpo = (means[0] + means[1]).clamp(max=MAX_LOG_RATIO).exp()
            pair_weight = wpo if pair_weight is None else wpo * pair_weight
        refs = (batch.get("ref_chosen"), batch.get("ref_rejected"))
        return self._loss(chosen, rejected, raw, refs, lengths, pair_weight, batch)

    # ---- how ----

    @property
    def variants(self) -> list[PairVariant]:
        """The registered losses of the mix."""
        return [pair_variant(name) for name, _ in self.kinds]

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities must be given."""
        return not self.reference_free and any(v.reference for v in self.variants)

    def _loss(
        self,
        chosen: Tensor,  # (P,)
        rejected: Tensor,
        raw: Tensor,  # chosen, without ld_alpha
        refs: Sequence[Tensor | None],
        lengths: Sequence[Tensor | None],
        pair_weight: Tensor | None,
        batch: Mapping[str, Any],  # valid_pair (P,) bool, normalizer, chosen_tokens, bco_delta; all_valid: all True
    ) -> tuple[Tensor, Metrics]:
        valid, normalizer = batch["valid_pair"], batch["normalizer"]
        share = valid.to(chosen.dtype) / normalizer
        weight = share if pair_weight is None else share * keep(pair_weight.to(share.dtype), valid)
        terms = self._terms(chosen, rejected, raw, refs, lengths, batch)
        whole = batch.get("all_valid", False)
        total, metrics = chosen.new_zeros(()), {}
        for (name, factor), v in zip(self.kinds, self.variants, strict=True):
            losses = v.function(terms, self)
            _checks.check_shape(f"the loss of kind {name!r}", losses, chosen.shape, "(P,)")
            if v.whole_batch:  # its valid entries come first
                part = torch.dot(weight.sort(descending=True).values, losses)
            else:
                part = torch.dot(weight, losses if whole else keep(losses, valid))
            total = total + factor * part
            if len(self.kinds) > 1:
                metrics[f"loss/{name}"] = part.detach()
        return total, {**metrics, **self._metrics(terms, share)}

    def _terms(self, chosen, rejected, raw, refs, lengths, batch) -> PairTerms:
        valid = batch["valid_pair"]
        kept = (lambda x: x) if batch.get("all_valid", False) else (lambda x: keep(x, valid))
        chosen, rejected, raw = (kept(x) for x in (chosen, rejected, raw))
        refs = [None if r is None else kept(r.detach().to(chosen.dtype)) for r in refs]
        nll = None
        if lengths[0] is not None:
            if self.params.get("sft_average", "token") == "token":
                nll = -raw * batch["normalizer"] / batch["chosen_tokens"]
            else:
                nll = -raw / lengths[0]
        if self.average_logprob:
            chosen, rejected = chosen / lengths[0], rejected / lengths[1]
            refs = [None if r is None else r / n for r, n in zip(refs, lengths, strict=True)]
            lengths = [torch.ones_like(chosen)] * 2
        logratios = [chosen, rejected]
        if not self.reference_free and refs[0] is not None:
            logratios = [chosen - refs[0], rejected - refs[1]]
        scores = [divergence_score(x, self.f_divergence, self.f_alpha) for x in logratios]
        return PairTerms(chosen, rejected, *logratios, *scores, *lengths, nll, valid, batch.get("bco_delta", 0.0))

    def _metrics(self, t: PairTerms, share: Tensor) -> Metrics:
        """Means over the pairs that count; rewards are beta times the log-ratios, whatever the f-divergence."""
        v = self.variants[0]
        with torch.no_grad():
            rewards = [t.chosen_logratio, t.rejected_logratio] if v.reference else [t.chosen, t.rejected]
            if v.averaged:
                rewards = [rewards[0] / t.chosen_length, rewards[1] / t.rejected_length]
            win, lose = (self.beta * r for r in rewards)
            values = {
                "rewards/chosen": win,
                "rewards/rejected": lose,
                "rewards/margins": win - lose,
                "rewards/accuracies": (win > lose).to(share.dtype),
                "logps/chosen": t.chosen,
                "logps/rejected": t.rejected,
            }
            return {name: torch.dot(share, value) for name, value in values.items()}


DPO = PreferenceLoss


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str | Sequence[str] | Mapping[str, float] | PreferenceLoss = "sigmoid",
    mask: tuple[Tensor, Tensor] | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    log_sum_sq: tuple[Tensor, Tensor] | None = None,
    pair_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chosen_tokens: Tensor | float | None = None,
    bco_delta: Tensor | float | None = None,
    **options: Any,
) -> LossMetrics:
    """Preference loss of a batch of pairs, averaged over the pairs, and its metrics.

        a = chosen - ref_chosen,  b = rejected - ref_rejected
        sigmoid: L = -mean log sigmoid(beta (a - b))

    Equivalent to `reference.preference_loss`.

    Args:
        chosen, rejected: (B,) sequence log-probabilities, or (B, T) and (B, T') per token. Differentiable.
        ref_chosen, ref_rejected: the reference's, constant; (B,), or shaped like chosen and rejected. Not needed by
            sft, cpo, simpo, orpo, nor with reference_free (then ignored).
        kind: a name, a list of names, a dict of names and weights, or a `PreferenceLoss` (then without options).
        mask: two bool tensors, shaped like per-token chosen and rejected. True = counts.
        lengths: two (B,) tensors of token counts, for (B,) input to kinds that average over length (ipo, simpo, ...),
            average_logprob and weighting "wpo".
        log_sum_sq: two tensors shaped like per-token chosen and rejected, for weighting "wpo".
        pair_weight: (B,). Constant; 0: the pair does not count, whatever it holds. Not for aot and aot_unpaired.
        normalizer: global count of pairs; None: this batch's that count.
        chosen_tokens: global count of chosen tokens, behind the token mean of the sft, cpo and orpo terms.
        bco_delta: reward shift of bco_pair, () or a number.
        options: those of `PreferenceLoss`: beta, label_smoothing, f_divergence, ld_alpha (per-token input only),
            average_logprob, reference_free, weighting, loss_weights, rpo_alpha, and the kinds' own parameters.
    Returns: LossMetrics(loss (), metrics), fp32 (fp64 for fp64 input). Metrics are 0-d constants, means over pairs:
        rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}, and loss/<kind> in a mix.
    Raises: ValueError naming the tensor or option, what was expected and what came.
    Source: see `losses.preference_kinds` for each kind's paper and where TRL 1.16 differs.
    Notes: finite for log-ratios of any size that a dtype can square. Per-token input: a pair with a side that is
        masked whole does not count (TRL counts it). No pair that counts: loss 0, zero gradients, finite metrics.
    Example:
        >>> chosen = torch.tensor([-4.0, -3.0], requires_grad=True)
        >>> rejected, lengths = torch.tensor([-5.0, -2.0]), (torch.tensor([4, 4]), torch.tensor([5, 2]))
        >>> loss, metrics = preference_loss(chosen, rejected, kind="simpo", lengths=lengths)
        >>> loss.backward()
    """
    if isinstance(kind, PreferenceLoss) and options:
        raise ValueError(f"options must be in the PreferenceLoss given as kind, got {', '.join(options)} beside it")
    loss_fn = kind if isinstance(kind, PreferenceLoss) else made_once(PreferenceLoss, kind, options, pair_variant)
    _checks.check_float("chosen", chosen)
    _checks.check_float("rejected", rejected)
    if chosen.dim() not in (1, 2):
        raise ValueError(f"chosen must be (B,) or (B, T), got {_checks.shape_str(chosen.shape)}")
    if rejected.dim() != chosen.dim() or rejected.shape[0] != chosen.shape[0]:
        expected = f"(B,)=({chosen.shape[0]},)" if chosen.dim() == 1 else f"(B, T') with B={chosen.shape[0]}"
        raise ValueError(f"rejected must be {expected}, got {_checks.shape_str(rejected.shape)}")
    _checks.check_same_device(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen and ref_rejected must be given together, got one of them")
    numbers = {"normalizer": normalizer, "chosen_tokens": chosen_tokens, "bco_delta": bco_delta}
    if chosen.dim() == 2:
        if lengths is not None:
            raise ValueError("lengths goes with (B,) input; for (B, T) give a mask")
        flat = flatten_pairs(chosen, rejected, ref_chosen, ref_rejected, mask, log_sum_sq)
        batch = {**flat.batch, **numbers, "pair_weight": pair_weight}
        batch = loss_fn.prepare(batch, flat.mask, flat.segments)
        return LossMetrics(*loss_fn(flat.logprob, None, batch))
    for name, value in (("mask", mask), ("log_sum_sq", log_sum_sq)):
        if value is not None:
            raise ValueError(f"{name} goes with per-token chosen (B, T), got chosen {_checks.shape_str(chosen.shape)}")
    return _sequence_level(loss_fn, (chosen, rejected), (ref_chosen, ref_rejected), lengths, pair_weight, numbers)


def _sequence_level(
    o: PreferenceLoss,
    logprobs: tuple[Tensor, Tensor],
    refs: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor, Tensor] | None,
    pair_weight: Tensor | None,
    numbers: dict[str, Any],
) -> LossMetrics:
    """The loss of (B,) log-probabilities."""
    size = logprobs[0].shape
    if o.ld_alpha is not None:
        raise ValueError(f"ld_alpha needs per-token chosen (B, T), got chosen {_checks.shape_str(size)}")
    given = {"ref_chosen": refs[0], "ref_rejected": refs[1], "pair_weight": pair_weight}
    for name, tensor in given.items():
        if tensor is not None:
            _checks.check_float(name, tensor)
            _checks.check_shape(name, tensor, size, "(B,)")
    _checks.check_same_device(chosen=logprobs[0], **given)
    check_pair_weight(o, pair_weight)
    if lengths is not None:
        check_two("lengths", lengths)
        for name, tensor in zip(("lengths of chosen", "lengths of rejected"), lengths, strict=True):
            _checks.check_shape(name, tensor, size, "(B,)")
            _checks.check_same_device(chosen=logprobs[0], **{name: tensor})
            if tensor.dtype not in _checks.SCALAR_DTYPES:
                raise ValueError(f"{name} must be integers or a usual float dtype, got {tensor.dtype}")
    if refs[0] is None and o.needs_reference:
        raise ValueError(f"ref_chosen must be (B,)={_checks.shape_str(size)} for kind {o.kinds[0][0]!r}, got None")
    needed = {"weighting 'wpo'": o.weighting is not None, "average_logprob": o.average_logprob}
    needed[f"kind {o.kinds[0][0]!r}"] = any(v.lengths and not _sums_only(v, o) for v in o.variants)
    if lengths is None and any(needed.values()):
        what = next(name for name, needs in needed.items() if needs)
        raise ValueError(f"lengths must be two (B,)={_checks.shape_str(size)} tensors for {what}, got None")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in logprobs) else torch.float32
    chosen, rejected = (x.to(dtype) for x in logprobs)
    valid = torch.ones_like(chosen, dtype=torch.bool) if pair_weight is None else pair_weight != 0
    if lengths is not None:  # a side without tokens: the pair does not count
        valid = valid & (lengths[0] > 0) & (lengths[1] > 0)
    clamped = [None, None] if lengths is None else [x.to(dtype).clamp(min=1) for x in lengths]
    for name, value in numbers.items():
        if value is not None:
            _checks.check_scalar(name, value, positive=name != "bco_delta", measured=name == "bco_delta")
    batch: dict[str, Any] = {k: v for k, v in numbers.items() if v is not None}
    batch.update(valid_pair=valid, all_valid=pair_weight is None and lengths is None)
    count = max(valid.numel(), 1) if batch["all_valid"] else valid.sum().clamp(min=1)
    batch.setdefault("normalizer", count)
    if lengths is not None:
        batch.setdefault("chosen_tokens", keep(clamped[0], valid).sum().clamp(min=1))
    if o.weighting is not None:
        wpo = sum(x.detach() / n for x, n in zip((chosen, rejected), clamped, strict=True)).exp()
        pair_weight = wpo if pair_weight is None else wpo * pair_weight
    return LossMetrics(*o._loss(chosen, rejected, chosen, refs, clamped, pair_weight, batch))


def _sums_only(v: PairVariant, o: PreferenceLoss) -> bool:
    """IPO on sums needs no lengths."""
    return v.name == "ipo" and not o.params["length_average"]

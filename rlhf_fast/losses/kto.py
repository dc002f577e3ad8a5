"""`KTO`, the unpaired preference losses for `fused_linear_loss`, and `kto_loss`, the same as one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.losses.pairs import number
from rlhf_fast.losses.registry import unknown
from rlhf_fast.losses.segments import Segments
from rlhf_fast.ops.fused import ReadyMade
from rlhf_fast.ops.kl import keep
from rlhf_fast.types import LossMetrics, Metrics

KINDS = ("kto", "apo_zero_unpaired")
KEYS = ("desirable", "ref_logprob", "ref_sequence", "kl", "normalizer", "num_desirable", "num_undesirable")


def kto_kl(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """KTO's reference point z: the mean log-ratio of mismatched pairs (x_i, y_j), at least 0. Constant, ().

        z = max(0, mean_i (log pi(y_j | x_i) - log pi_ref(y_j | x_i))),   j != i

    Clamped after the mean, not before: single estimates are negative half of the time. Over several ranks or
    micro-batches, average first and hand the mean itself to `kto_loss`, which clamps it too.

    Args:
        logprob, ref_logprob: (B,) sequence log-probabilities of the mismatched responses. B = 0 gives 0.
    Source: Ethayarajh et al. 2024, section 4.1.
    """
    for name, tensor in (("logprob", logprob), ("ref_logprob", ref_logprob)):
        _checks.check_float(name, tensor)
        _checks.check_shape(name, tensor, (logprob.numel(),), "(B,)")
    gap = (_wide(logprob.detach()) - _wide(ref_logprob.detach())).sum() / max(logprob.numel(), 1)
    return gap.clamp(min=0)


@dataclass(frozen=True)
class KTO(ReadyMade):
    """An unpaired preference loss with its options: callable on chunks of whole sequences after `prepare`.

    Args:
        kind: kto, or apo_zero_unpaired (APO-zero, term by term; no KL).
        beta: strength of the tie to the reference.
        desirable_weight, undesirable_weight: lambda_D and lambda_U; the paper keeps the ratio of their totals,
            lambda_D n_D / (lambda_U n_U), in [1, 4/3] (later 1.5).
        average_logprob: a sequence's log-probability is the mean over its tokens, of policy and reference alike (and
            then z's should be too). Not for `kto_loss`, which takes sequence log-probabilities as they are.
    """

    kind: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    average_logprob: bool = False

    needs_entropy = False
    needs_segments = True
    segment_keys = ("desirable", "ref_sequence", "valid_sequence", "length")

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(unknown("KTO kind", self.kind, KINDS))
        _checks.check_positive("beta", self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            _checks.check_number(name, getattr(self, name), least=0)
        _checks.check_flag("average_logprob", self.average_logprob)
        self._register()

    def prepare(self, batch: Mapping[str, Any], mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Check the batch, sum the reference, count; once, before any chunk.

        `cu_seqlens` (S+1,) bounds sequences; one without scored tokens does not count.

        batch keys: desirable (S,) bool; the reference as ref_logprob (N,) or its sums ref_sequence (S,); kl, () or a
        number, for kind "kto": it comes from other pairs of prompt and response, see `kto_kl`; numbers normalizer
        (global count of sequences), num_desirable, num_undesirable (global counts behind the metrics).
        """
        given = {name: value for name, value in batch.items() if value is not None}
        for name in given:
            if name not in KEYS:
                raise ValueError(unknown("batch key", name, KEYS))
        if cu_seqlens is None:
            raise ValueError("segments must be given, the (S+1,) offsets of the sequences, got None")
        if "desirable" not in given or not ("ref_logprob" in given or "ref_sequence" in given):
            raise ValueError("batch must hold 'desirable' (S,) bool, and 'ref_logprob' (N,) or 'ref_sequence' (S,)")
        desirable, size = given["desirable"], cu_seqlens.shape[0] - 1
        _check_desirable(desirable, (size,), "(S,)")
        if mask is None:
            n = given["ref_logprob"].numel() if "ref_logprob" in given else int(cu_seqlens[-1])
            mask = torch.ones(n, dtype=torch.bool, device=desirable.device)
        if not torch.compiler.is_compiling():
            _checks.check_cu_seqlens("segments", cu_seqlens, mask.numel())
        segments = Segments.from_cu_seqlens(cu_seqlens.to(desirable.device), mask)
        out: dict[str, Any] = {"segment_ids": segments.ids, "num_segments": size, "valid": mask, "desirable": desirable}
        if "ref_logprob" in given:
            _checks.check_shape("ref_logprob", given["ref_logprob"], mask.shape, "(N,)")
            out["ref_sequence"] = _sums(_wide(given["ref_logprob"].detach()), out)
        else:
            _checks.check_shape("ref_sequence", given["ref_sequence"], (size,), "(S,)")
            out["ref_sequence"] = given["ref_sequence"].detach()
        length = _sums(mask.long(), out)
        out["valid_sequence"] = length > 0
        if self.average_logprob:
            out["length"] = length.clamp(min=1)
            out["ref_sequence"] = out["ref_sequence"] / out["length"]
        return out | self._numbers(given, desirable, out["valid_sequence"])

    def __call__(self, logprob: Tensor, entropy: Tensor | None, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        """Loss () of a chunk of whole sequences and its metrics. Differentiable by logprob."""
        if "valid_sequence" not in batch:
            raise ValueError("batch must come from prepare(batch, mask, cu_seqlens); it has no 'valid_sequence'")
        sequence = _sums(logprob, batch)
        return self._loss(sequence / batch["length"] if self.average_logprob else sequence, batch)

    def _numbers(self, given: Mapping[str, Any], desirable: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """0-d tensors: kl and the counts, this batch's where no global one is given."""
        if self.kind == "kto" and given.get("kl") is None:
            raise ValueError("kl must be given for kind 'kto', a number or a 0-d tensor (see kto_kl), got None")
        counts = {"normalizer": valid, "num_desirable": valid & desirable, "num_undesirable": valid & ~desirable}
        out = {name: given.get(name) for name in ("kl", *counts)}
        for name, value in out.items():
            if value is None:
                value = counts[name].sum().clamp(min=1) if name in counts else 0.0
            out[name] = number(name, value, desirable.device)
        out["kl"] = out["kl"].clamp(min=0)
        return out

    def _loss(self, sequence: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        """Loss and metrics from the sequences' log-probabilities (S,)."""
        desirable, valid = batch["desirable"], batch["valid_sequence"]
        sequence = keep(sequence, valid)
        logratio = sequence - keep(batch["ref_sequence"].to(sequence.dtype), valid)
        kl = batch["kl"].to(sequence.dtype)
        centred = logratio - kl if self.kind == "kto" else logratio
        # 1 - sigmoid(x) = sigmoid(-x): no cancellation
        losses = torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-self.beta * centred),
            self.undesirable_weight * torch.sigmoid(self.beta * centred),
        )
        weight = valid.to(sequence.dtype) / batch["normalizer"]
        loss = torch.dot(weight, losses)
        return loss, self._metrics(sequence.detach(), logratio.detach(), losses.detach(), weight, batch)

    def _metrics(
        self, sequence: Tensor, logratio: Tensor, losses: Tensor, weight: Tensor, batch: Mapping[str, Any]
    ) -> Metrics:
        desirable, valid = batch["desirable"], batch["valid_sequence"]
        sides = {"chosen": (desirable, "num_desirable"), "rejected": (~desirable, "num_undesirable")}
        metrics = {"kl": weight.sum() * batch["kl"].to(weight.dtype)}
        for side, (which, count) in sides.items():
            share = (which & valid).to(sequence.dtype) / batch[count]
            metrics[f"rewards/{side}"] = torch.dot(share, self.beta * logratio)
            metrics[f"logps/{side}"] = torch.dot(share, sequence)
            metrics[f"loss/{side}"] = torch.dot(share, losses)
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


def kto_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float | None = None,
    kind: str | KTO = "kto",
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    **options: Any,
) -> LossMetrics:
    """Loss of responses that are known to be good or bad, without pairs, and its metrics.

        r = log pi - log pi_ref,   kto: L = mean_i w_i (1 - sigmoid(+-beta (r_i - z))),  + desirable, - undesirable

    Equivalent to `reference.kto_loss`.

    Args:
        logprob: (B,) sequence log-probabilities. Differentiable.
        ref_logprob: (B,). Constant.
        desirable: (B,) bool. A batch may be all desirable or all undesirable.
        kl: z, () or a number, constant; clamped at 0 here. See `kto_kl`. Not used by apo_zero_unpaired.
        kind: kto, apo_zero_unpaired, or a `KTO` (then without options).
        mask: (B,) bool. True = counts.
        normalizer: global count of sequences; None: those of this batch that count.
        options: those of `KTO`: beta, desirable_weight, undesirable_weight.
    Returns: LossMetrics(loss (), metrics), fp32 (fp64 for fp64 input). metrics: kl, rewards/{chosen,rejected,margins},
        logps/*, loss/*; 0 for a side without sequences.
    Raises: ValueError naming the tensor, expected and got.
    Source: Ethayarajh et al. 2024, eq. 7 and 8 (the loss is lambda_y - v, here without the constant: w_i (1 - sigmoid),
        as TRL 1.16 has it); D'Oosterlinck et al. 2024 for apo_zero_unpaired.
    Notes: computed in fp32 (fp64); memory of a few (B,). All masked: loss and gradients 0, metrics finite.
    Example:
        >>> logprob = torch.tensor([-3.0, -4.0], requires_grad=True)
        >>> loss, _ = kto_loss(logprob, torch.tensor([-3.5, -3.5]), torch.tensor([True, False]), kl=0.1)
        >>> loss.backward()
    """
    if isinstance(kind, KTO) and options:
        raise ValueError(f"options must be in the KTO given as kind, got {', '.join(options)} beside it")
    loss_fn = kind if isinstance(kind, KTO) else KTO(kind, **options)
    if loss_fn.average_logprob:
        raise ValueError("average_logprob needs tokens: give kto_loss means as logprob and ref_logprob instead")
    _checks.check_float("logprob", logprob)
    if logprob.dim() != 1:
        raise ValueError(f"logprob must be (B,), got {_checks.shape_str(logprob.shape)}")
    _checks.check_float("ref_logprob", ref_logprob)
    _checks.check_shape("ref_logprob", ref_logprob, logprob.shape, "(B,)")
    _check_desirable(desirable, logprob.shape, "(B,)")
    _checks.check_same_device(logprob=logprob, ref_logprob=ref_logprob, desirable=desirable, mask=mask)
    if mask is not None:
        _checks.check_mask("mask", mask, logprob.shape, "(B,)")
    valid = torch.ones_like(desirable) if mask is None else mask.bool()
    batch = {"desirable": desirable, "ref_sequence": ref_logprob.detach(), "valid_sequence": valid}
    batch |= loss_fn._numbers({"kl": kl, "normalizer": normalizer}, desirable, valid)
    return LossMetrics(*loss_fn._loss(_wide(logprob), batch))


def _check_desirable(desirable: object, shape: tuple[int, ...], dims: str) -> None:
    _checks.check_shape("desirable", desirable, shape, dims)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sums(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """(n,) -> (S,): sum over the valid tokens of each sequence."""
    zeros = values.new_zeros(batch["num_segments"])
    return zeros.index_add(0, batch["segment_ids"], keep(values, batch["valid"]))

"""Preference losses, straight from the papers: the oracle.

Plain torch, any dtype, gradient by autograd. One Python step per pair, sequences as they are written in the papers:
no masks, no packing, no formula rearranged for speed. Only log(1 + exp(x)) is a softplus, and exponents of log-ratios
are clamped at 20, as everywhere in this library.

Notation, per pair: w, l the responses' log-probabilities, a and b their log-ratios to the reference, d = f'(a) - f'(b).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def sequence_logprob(
    logprob: Tensor, *, mask: Tensor | None = None, other: int = 0, ld_alpha: float | None = None
) -> Tensor:
    """Log-probability () of one response from its tokens (T,).

    With ld_alpha (LD-DPO, Liu et al. 2024, eq. 9): tokens past the length of the `other` response of the pair weigh
    ld_alpha.
    """
    tokens = logprob if mask is None else logprob[mask]
    if ld_alpha is None:
        return tokens.sum()
    shared = min(len(tokens), other)
    return tokens[:shared].sum() + ld_alpha * tokens[shared:].sum()


def _f_score(x: Tensor, o: SimpleNamespace) -> Tensor:
    """f'(e^x), Wang et al. 2023, table 1."""
    if o.f_divergence in ("forward_kl", "forward"):
        return 1 - torch.exp((-x).clamp(max=20))
    if o.f_divergence in ("js", "js_divergence"):
        return math.log(2) + logsigmoid(x)
    if o.f_divergence in ("alpha", "alpha_divergence") and o.f_alpha != 1:
        return (torch.exp(((o.f_alpha - 1) * x).clamp(max=20)) - 1) / (o.f_alpha - 1)
    return x


def _exo(p: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """Ji et al. 2024, eq. 16: KL of the policy's distribution over the pair to (1 - e, e)."""
    q = torch.log_softmax(o.beta * torch.stack([p.fa, p.fb]), 0)
    target = torch.tensor([1 - o.label_smoothing, o.label_smoothing], dtype=q.dtype).log()
    return (q.exp() * (q - target)).sum()


def _robust(p: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    e = o.label_smoothing
    return (-(1 - e) * logsigmoid(o.beta * p.d) + e * logsigmoid(-o.beta * p.d)) / (1 - 2 * e)


def _ipo(p: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    d = p.fa / p.w_len - p.fb / p.l_len if o.length_average else p.d
    return (d - 1 / (2 * o.beta)) ** 2


def _discopop(p: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """Lu et al. 2024, eq. 5."""
    x = o.beta * p.d
    gate = torch.sigmoid(x / o.discopop_tau)
    return -(1 - gate) * logsigmoid(x) + gate * torch.exp(-x)


def _smoothed(x: Tensor, o: SimpleNamespace) -> Tensor:
    return -(1 - o.label_smoothing) * logsigmoid(x) - o.label_smoothing * logsigmoid(-x)


def _orpo(p: SimpleNamespace, o: SimpleNamespace) -> Tensor:
    """Hong et al. 2024, eq. 3 to 7: odds(p) = p / (1 - p), p the geometric mean over tokens."""
    win, lose = p.w / p.w_len, p.l / p.l_len
    log_odds = [x - torch.log(1 - torch.exp(x)) for x in (win, lose)]
    return p.nll - o.beta * logsigmoid(log_odds[0] - log_odds[1])


KINDS: dict[str, Callable[[SimpleNamespace, SimpleNamespace], Tensor]] = {
    "sigmoid": lambda p, o: _smoothed(o.beta * p.d, o),  # Rafailov et al. 2023, eq. 7; Mitchell 2023
    "sigmoid_norm": lambda p, o: _smoothed(o.beta * (p.fa / p.w_len - p.fb / p.l_len), o),
    "hinge": lambda p, o: relu(1 - o.beta * p.d),  # Zhao et al. 2023
    "ipo": _ipo,  # Azar et al. 2023, eq. 17
    "robust": _robust,  # Chowdhury et al. 2024, eq. 12
    "exo_pair": _exo,
    "nca_pair": lambda p, o: (
        -logsigmoid(o.beta * p.a) - 0.5 * logsigmoid(-o.beta * p.a) - 0.5 * logsigmoid(-o.beta * p.b)
    ),  # Chen et al. 2024
    "bco_pair": lambda p, o: (
        -logsigmoid(o.beta * p.a - o.bco_delta) - logsigmoid(-(o.beta * p.b - o.bco_delta))
    ),  # Jung et al. 2024, eq. 10
    "sppo_hard": lambda p, o: (p.a - 1 / (2 * o.beta)) ** 2 + (p.b + 1 / (2 * o.beta)) ** 2,  # Wu et al. 2024
    "apo_zero": lambda p, o: 1 - torch.sigmoid(o.beta * p.a) + torch.sigmoid(o.beta * p.b),  # APO, eq. 7
    "apo_down": lambda p, o: torch.sigmoid(o.beta * p.a) + 1 - torch.sigmoid(o.beta * (p.a - p.b)),  # APO, eq. 8
    "discopop": _discopop,
    "sft": lambda p, o: p.nll,
    "cpo": lambda p, o: _smoothed(o.beta * (p.w - p.l), o) + o.nll_weight * p.nll,  # Xu et al. 2024, eq. 3
    "simpo": lambda p, o: _smoothed(o.beta * (p.w / p.w_len - p.l / p.l_len) - o.simpo_gamma, o),  # Meng et al. 2024
    "orpo": _orpo,
}


def _aot(pairs: list[SimpleNamespace], o: SimpleNamespace) -> list[Tensor]:
    """Melnyk et al. 2024: quantile against quantile, of the policy's margins and the reference's."""
    policy = torch.stack([p.w - p.l for p in pairs]).sort().values
    ref = torch.stack([p.ref_w - p.ref_l for p in pairs]).sort().values
    return list(_smoothed(o.beta * (policy - ref), o))


def _aot_unpaired(pairs: list[SimpleNamespace], o: SimpleNamespace) -> list[Tensor]:
    win = torch.stack([p.a for p in pairs]).sort().values
    lose = torch.stack([p.b for p in pairs]).sort().values
    return list(_smoothed(o.beta * (win - lose), o))


BATCH_KINDS = {"aot": _aot, "aot_unpaired": _aot_unpaired}

_OPTIONS = {
    "beta": 0.1, "label_smoothing": 0.0, "f_divergence": "reverse_kl", "f_alpha": 0.5, "ld_alpha": None,
    "average_logprob": False, "reference_free": False, "weighting": None, "length_average": True,
    "discopop_tau": 0.05, "simpo_gamma": 0.5, "nll_weight": 1.0, "sft_average": "token", "bco_delta": 0.0,
}  # fmt: skip


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str | list[str] | dict[str, float] = "sigmoid",
    loss_weights: list[float] | None = None,
    rpo_alpha: float | None = None,
    mask: tuple[Tensor, Tensor] | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    log_sum_sq: tuple[Tensor, Tensor] | None = None,
    pair_weight: Tensor | None = None,
    normalizer: float | None = None,
    chosen_tokens: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () and metrics of `rlhf_fast.preference_loss`, whose docstring defines the arguments; any dtype."""
    if not isinstance(kind, dict):
        kind = [kind] if isinstance(kind, str) else kind
        kind = dict(zip(kind, loss_weights or [1.0] * len(kind), strict=True))
    if rpo_alpha is not None:
        kind = {**kind, "sft": rpo_alpha}
    o = SimpleNamespace(**{**_OPTIONS, **options})
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, mask, lengths, log_sum_sq, pair_weight, o)
    count = max(len(pairs), 1) if normalizer is None else normalizer
    tokens = max(sum(float(p.w_len) for p in pairs), 1.0) if chosen_tokens is None else chosen_tokens
    for p in pairs:
        p.nll = -p.w_whole * count / tokens if o.sft_average == "token" else -p.w_whole / p.w_len
        if o.average_logprob:
            p.w_len, p.l_len = 1, 1  # the rest is averaged already
    loss, metrics = chosen.new_zeros(()), {}
    for name, factor in kind.items() if pairs else ():
        losses = BATCH_KINDS[name](pairs, o) if name in BATCH_KINDS else [KINDS[name](p, o) for p in pairs]
        part = sum(p.weight * x for p, x in zip(pairs, losses, strict=True)) / count
        metrics[f"loss/{name}"] = part.detach()
        loss = loss + factor * part
    return loss, {**metrics, **_metrics(pairs, next(iter(kind)), count, chosen, o)}


def _pairs(chosen, rejected, ref_chosen, ref_rejected, mask, lengths, log_sum_sq, pair_weight, o):
    """The pairs that count."""
    out = []
    for i in range(chosen.shape[0]):
        p = SimpleNamespace(weight=1.0 if pair_weight is None else pair_weight[i])
        if chosen.dim() == 2:
            kept = [torch.ones_like(x[i], dtype=torch.bool) for x in (chosen, rejected)]
            kept = kept if mask is None else [m[i] for m in mask]
            sizes = [int(m.sum()) for m in kept]

            def total(x, side, kept=kept, sizes=sizes, i=i):  # (B, T) tokens, or (B,) sums
                if x.dim() == 1:
                    return x[i]
                return sequence_logprob(x[i], mask=kept[side], other=sizes[1 - side], ld_alpha=o.ld_alpha)

            p.w, p.l, p.w_whole = total(chosen, 0), total(rejected, 1), chosen[i][kept[0]].sum()
            whole = [p.w_whole, rejected[i][kept[1]].sum()]
            drift = [0.0, 0.0] if log_sum_sq is None else [x[i][m].sum() for x, m in zip(log_sum_sq, kept, strict=True)]
        else:
            sizes = [1, 1] if lengths is None else [x[i] for x in lengths]
            p.w, p.l, p.w_whole, whole, drift = chosen[i], rejected[i], chosen[i], [chosen[i], rejected[i]], [0.0, 0.0]

            def total(x, side, i=i):
                return x[i]

        if min(sizes) <= 0 or (pair_weight is not None and p.weight == 0):
            continue
        p.w_len, p.l_len = sizes
        no_reference = o.reference_free or ref_chosen is None
        p.ref_w, p.ref_l = (p.w * 0, p.l * 0) if no_reference else (total(ref_chosen, 0), total(ref_rejected, 1))
        if o.average_logprob:
            p.w, p.ref_w, p.l, p.ref_l = p.w / sizes[0], p.ref_w / sizes[0], p.l / sizes[1], p.ref_l / sizes[1]
        p.a, p.b = p.w - p.ref_w, p.l - p.ref_l
        p.fa, p.fb = _f_score(p.a, o), _f_score(p.b, o)
        p.d = p.fa - p.fb
        if o.weighting == "wpo":  # Zhou et al. 2024, eq. 2
            p.weight = p.weight * math.exp(
                sum(float((x.detach() - s) / n) for x, s, n in zip(whole, drift, sizes, strict=True))
            )
        out.append(p)
    return out


def _metrics(pairs: list[SimpleNamespace], kind: str, count: float, like: Tensor, o: SimpleNamespace):
    """Means over pairs."""

    def reward(p: SimpleNamespace, ours: Tensor, ratio: Tensor, length: float) -> Tensor:
        value = ours if kind in ("sft", "cpo", "simpo", "orpo") else ratio
        return o.beta * (value / length if kind in ("simpo", "orpo") else value)

    def mean(values: list[Tensor]) -> Tensor:
        return sum(values, like.detach().new_zeros(())) / count

    with torch.no_grad():
        win = [reward(p, p.w, p.a, p.w_len) for p in pairs]
        lose = [reward(p, p.l, p.b, p.l_len) for p in pairs]
        margins = [x - y for x, y in zip(win, lose, strict=True)]
        return {
            "rewards/chosen": mean(win),
            "rewards/rejected": mean(lose),
            "rewards/margins": mean(margins),
            "rewards/accuracies": mean([(m > 0).to(like.dtype) for m in margins]),
            "logps/chosen": mean([p.w for p in pairs]),
            "logps/rejected": mean([p.l for p in pairs]),
        }


def kto_kl(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """max(0, mean log-ratio), Ethayarajh et al. 2024, section 4.1; constant."""
    if logprob.numel() == 0:
        return logprob.new_zeros(())
    return (logprob - ref_logprob).detach().mean().clamp(min=0)


def kto_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float = 0.0,
    kind: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () and metrics of `rlhf_fast.kto_loss`: Ethayarajh et al. 2024, eq. 7 and 8, without their constant."""
    z = max(float(kl), 0.0) if kind == "kto" else 0.0
    sides: dict[bool, list] = {True: [], False: []}
    for i in range(logprob.shape[0]):
        if mask is None or mask[i]:
            sign, weight = (1, desirable_weight) if desirable[i] else (-1, undesirable_weight)
            r = logprob[i] - ref_logprob[i]
            value = torch.sigmoid(sign * beta * (r - z))
            sides[bool(desirable[i])].append((weight * (1 - value), beta * r.detach(), logprob[i].detach()))
    every = [loss for side in sides.values() for loss, *_ in side]
    count = max(len(every), 1) if normalizer is None else normalizer
    metrics = {"kl": logprob.new_tensor(max(float(kl), 0.0)) * len(every) / count}
    for name, side in (("chosen", sides[True]), ("rejected", sides[False])):
        for column, what in enumerate(("loss", "rewards", "logps")):
            total = sum((row[column].detach() for row in side), logprob.new_zeros(()))
            metrics[f"{what}/{name}"] = total / max(len(side), 1)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return sum(every, logprob.new_zeros(())) / count, metrics


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center: float = 0.0,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () and metrics of `rlhf_fast.reward_loss`: Ouyang et al. 2022, eq. 1; Touvron et al. 2023, eq. 2."""
    rows = [i for i in range(chosen.shape[0]) if mask is None or mask[i]]
    count = max(len(rows), 1) if normalizer is None else normalizer
    loss = chosen.new_zeros(())
    for i in rows:
        d = chosen[i] - rejected[i]
        if margin is not None:
            d = d - (margin[i] if isinstance(margin, Tensor) else margin)
        loss = loss - (1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)
        loss = loss + center * (chosen[i] + rejected[i]) ** 2
    win, lose = chosen.detach()[rows], rejected.detach()[rows]
    metrics = {
        "rewards/chosen": win.sum() / count,
        "rewards/rejected": lose.sum() / count,
        "rewards/margins": (win - lose).sum() / count,
        "rewards/accuracies": (win > lose).to(win.dtype).sum() / count,
    }
    return loss / count, metrics

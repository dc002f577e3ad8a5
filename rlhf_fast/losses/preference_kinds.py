"""The preference losses by name: one small function of a batch of pairs each.

Notation, per pair: log-ratios a = log pi(y_w) - log pi_ref(y_w), b = the same of y_l, d = f'(a) - f'(b) their
difference in the chosen f-divergence (a - b for reverse KL), s(x) = log sigmoid(x), e = label_smoothing.
log(1 + exp(x)) is written -s(-x) throughout, which neither overflows nor cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.losses.registry import unknown
from rlhf_fast.ops.kl import MAX_LOG_RATIO

if TYPE_CHECKING:
    from rlhf_fast.losses.preference import PreferenceLoss


class PairTerms(NamedTuple):
    """What a preference function sees: P pairs, each tensor (P,). Pairs that do not count hold zeros, lengths 1.

    `chosen`, `rejected`: sequence log-probabilities (with ld_alpha: desensitised). `chosen_logratio`: those minus the
    reference's, or as they are without one. `chosen_score`: f' of the ratio. Lengths in tokens, None when unknown; 1
    under average_logprob, where all of these are means already.
    `chosen_nll`: the pair's share of the NLL of the chosen responses, so that its mean over pairs is the SFT loss;
    None when lengths are unknown.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_length: Tensor | None
    rejected_length: Tensor | None
    chosen_nll: Tensor | None
    valid: Tensor
    bco_delta: Tensor | float


PreferenceFunction = Callable[[PairTerms, "PreferenceLoss"], Tensor]


class PairVariant(NamedTuple):
    """A registered preference loss; the flags are those of `register_preference_loss`."""

    name: str
    function: PreferenceFunction
    params: dict[str, Any]
    reference: bool
    lengths: bool
    difference: bool
    smoothing: bool
    whole_batch: bool
    averaged: bool


_VARIANTS: dict[str, PairVariant] = {}


def register_preference_loss(
    name: str,
    *,
    params: Mapping[str, Any] | None = None,
    reference: bool = True,
    lengths: bool = False,
    difference: bool = False,
    smoothing: bool = False,
    whole_batch: bool = False,
    averaged: bool = False,
) -> Callable[[PreferenceFunction], PreferenceFunction]:
    """Decorator: make a function of (terms, options) a preference loss called `name`.

    The function takes `PairTerms` and the `PreferenceLoss` and returns the loss of each pair (P,). Weights, masks, the
    mean, metrics and mixes are composed around it; its gradient comes from autograd over these small vectors.

    Args:
        name: for `PreferenceLoss(name)` and `preference_loss(kind=name)`. Taken names are an error.
        params: the function's own parameters and their defaults, read as `options.params["..."]`.
        reference: it uses the reference model; without one (and without reference_free) the call is an error.
        lengths: it uses the lengths or `chosen_nll`.
        difference: it depends on the scores through their difference alone, so that any f-divergence is sound.
        smoothing: it uses `options.label_smoothing`.
        whole_batch: its losses belong to the batch and not to single pairs (it sorts, say): the whole batch goes in
            one chunk, and weights of single pairs are an error.
        averaged: its implicit reward is per token; only the reward metrics use this.
    Example:
        >>> @register_preference_loss("squared_hinge", difference=True)
        ... def squared_hinge(terms, options):
        ...     return (1 - options.beta * (terms.chosen_score - terms.rejected_score)).relu().square()
    """

    def register(function: PreferenceFunction) -> PreferenceFunction:
        if name in _VARIANTS:
            raise ValueError(f"preference loss {name!r} is already registered")
        own = dict(params or {})
        flags = (reference, lengths, difference, smoothing, whole_batch, averaged)
        _VARIANTS[name] = PairVariant(name, function, own, *flags)
        return function

    return register


def preference_loss_kinds() -> list[str]:
    """The registered names."""
    return sorted(_VARIANTS)


def pair_variant(name: str) -> PairVariant:
    """The preference loss called `name`; ValueError naming the nearest one."""
    if not isinstance(name, str) or name not in _VARIANTS:
        raise ValueError(unknown("preference loss", name, _VARIANTS))
    return _VARIANTS[name]


# ---- f-divergences (Wang et al. 2023, "Beyond Reverse KL", table 1): the score f'(pi / pi_ref) ----

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
F_ALIASES = {"reverse": "reverse_kl", "forward": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def divergence_score(logratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(logratio)); exponents are clamped at 20."""
    if divergence == "forward_kl":  # f(t) = -log t, f'(t) = -1 / t
        return -torch.expm1((-logratio).clamp(max=MAX_LOG_RATIO))
    if divergence == "js":  # f'(t) = log(2 t / (t + 1))
        return math.log(2) + logsigmoid(logratio)
    if divergence == "alpha" and abs(alpha - 1) >= 1e-6:  # f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)
        return torch.expm1(((alpha - 1) * logratio).clamp(max=MAX_LOG_RATIO)) / (alpha - 1)
    return logratio


# ---- the losses ----


def logistic(x: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) s(x) - e s(-x)."""
    loss = -logsigmoid(x)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * logsigmoid(-x)


def scaled_difference(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """beta d."""
    return o.beta * (t.chosen_score - t.rejected_score)


def mean_difference(t: PairTerms) -> Tensor:
    """Difference of the scores per token."""
    return t.chosen_score / t.chosen_length - t.rejected_score / t.rejected_length


@register_preference_loss("sigmoid", difference=True, smoothing=True)
def _sigmoid(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """DPO, Rafailov et al. 2023, eq. 7; label_smoothing: conservative DPO (Mitchell 2023). TRL 1.16 ignores it."""
    return logistic(scaled_difference(t, o), o.label_smoothing)


@register_preference_loss("sigmoid_norm", difference=True, smoothing=True, lengths=True)
def _sigmoid_norm(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """DPO on per-token scores (Tulu 3, eq. 6)."""
    return logistic(o.beta * mean_difference(t), o.label_smoothing)


@register_preference_loss("hinge", difference=True)
def _hinge(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """SLiC's calibration loss on the DPO reward (Zhao et al. 2023; Liu et al. 2023, RSO)."""
    return (1 - scaled_difference(t, o)).relu()


@register_preference_loss("ipo", difference=True, lengths=True, params={"length_average": True})
def _ipo(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """IPO, Azar et al. 2023, eq. 17. The paper is silent on lengths: averaged as in TRL (and the authors' runs);
    length_average=False takes the sums as eq. 17 is written."""
    d = mean_difference(t) if o.params["length_average"] else t.chosen_score - t.rejected_score
    return (d - 1 / (2 * o.beta)).square()


@register_preference_loss("robust", difference=True, smoothing=True)
def _robust(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024, eq. 12: unbiased when labels are flipped with probability e < 0.5."""
    x, e = scaled_difference(t, o), o.label_smoothing
    return (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e)


@register_preference_loss("exo_pair", difference=True, smoothing=True)
def _exo_pair(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """EXO, Ji et al. 2024, eq. 16: KL(policy over the pair || (1 - e, e)), e > 0."""
    x, e = scaled_difference(t, o), torch.tensor(o.label_smoothing, dtype=torch.float64)
    log_win, log_lose = logsigmoid(x), logsigmoid(-x)
    return log_win.exp() * (log_win - float(torch.log1p(-e))) + log_lose.exp() * (log_lose - float(e.log()))


@register_preference_loss("nca_pair")
def _nca_pair(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """NCA, Chen et al. 2024, for two responses of rewards 1 and 0."""
    win, lose = o.beta * t.chosen_logratio, o.beta * t.rejected_logratio
    return -logsigmoid(win) - (logsigmoid(-win) + logsigmoid(-lose)) / 2


@register_preference_loss("bco_pair")
def _bco_pair(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """BCO, Jung et al. 2024, eq. 10. Its reward shift delta, a running mean of rewards, comes from outside as
    `bco_delta`; 0 as in TRL 1.16 when absent."""
    return -logsigmoid(o.beta * t.chosen_logratio - t.bco_delta) - logsigmoid(
        t.bco_delta - o.beta * t.rejected_logratio
    )


@register_preference_loss("sppo_hard")
def _sppo_hard(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """SPPO, Wu et al. 2024, eq. 4.7 with win probabilities 1 and 0; its eta is 1 / beta."""
    return (t.chosen_logratio - 0.5 / o.beta).square() + (t.rejected_logratio + 0.5 / o.beta).square()


@register_preference_loss("apo_zero")
def _apo_zero(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """APO, D'Oosterlinck et al. 2024, eq. 7: the chosen response up, the rejected one down."""
    return torch.sigmoid(-o.beta * t.chosen_logratio) + torch.sigmoid(o.beta * t.rejected_logratio)


@register_preference_loss("apo_down")
def _apo_down(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """APO, eq. 8: both down, the rejected one further."""
    return torch.sigmoid(o.beta * t.chosen_logratio) + torch.sigmoid(
        -o.beta * (t.chosen_logratio - t.rejected_logratio)
    )


@register_preference_loss("discopop", difference=True, params={"discopop_tau": 0.05})
def _discopop(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """DiscoPOP, Lu et al. 2024, eq. 5: logistic loss, blended into the exponential one where the pair is right.

    exp(-x) sigmoid(x / tau) is formed in the log, where it cannot become inf * 0.
    """
    x, tau = scaled_difference(t, o), o.params["discopop_tau"]
    exponential = (logsigmoid(x / tau) - x).clamp(max=MAX_LOG_RATIO).exp()
    return -logsigmoid(x) * torch.sigmoid(-x / tau) + exponential


_SFT = {"sft_average": "token"}


@register_preference_loss("sft", difference=True, reference=False, lengths=True, params=_SFT)
def _sft(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """NLL of the chosen responses: mean over all their tokens (TRL), or per sequence (sft_average="sequence", as in
    Pang et al. 2024, RPO)."""
    return t.chosen_nll


@register_preference_loss("cpo", reference=False, smoothing=True, lengths=True, params={**_SFT, "nll_weight": 1.0})
def _cpo(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """CPO, Xu et al. 2024, eq. 3 plus its NLL term. The paper sums the NLL over tokens; averaged as TRL (and the
    authors' code) do."""
    return logistic(o.beta * (t.chosen - t.rejected), o.label_smoothing) + o.params["nll_weight"] * t.chosen_nll


@register_preference_loss(
    "simpo", reference=False, smoothing=True, lengths=True, averaged=True, params={"simpo_gamma": 0.5}
)
def _simpo(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """SimPO, Meng et al. 2024, eq. 6: per-token rewards, target margin simpo_gamma (the paper: beta 2, gamma 1)."""
    margin = o.beta * (t.chosen / t.chosen_length - t.rejected / t.rejected_length)
    return logistic(margin - o.params["simpo_gamma"], o.label_smoothing)


@register_preference_loss("orpo", reference=False, lengths=True, averaged=True, params=_SFT)
def _orpo(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """ORPO, Hong et al. 2024, eq. 6 and 7: NLL + beta times the log odds ratio's loss (its lambda is beta).

    P is the per-token geometric mean. The NLL counts response tokens; TRL 1.16 adds the prompt's to it.
    """
    win, lose = log_odds(t.chosen / t.chosen_length), log_odds(t.rejected / t.rejected_length)
    return t.chosen_nll - o.beta * logsigmoid(win - lose)


def log_odds(logprob: Tensor) -> Tensor:
    """log p / (1 - p); p is kept below 1 by the dtype's epsilon."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))


@register_preference_loss("aot", smoothing=True, whole_batch=True)
def _aot(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """AOT paired, Melnyk et al. 2024, eq. 8: the policy's margins, sorted, against the reference's, sorted."""
    margins = sorted_valid(t.chosen - t.rejected, t.valid)
    ref_margins = (t.chosen - t.chosen_logratio) - (t.rejected - t.rejected_logratio)
    return logistic(o.beta * (margins - sorted_valid(ref_margins.detach(), t.valid)), o.label_smoothing)


@register_preference_loss("aot_unpaired", smoothing=True, whole_batch=True)
def _aot_unpaired(t: PairTerms, o: PreferenceLoss) -> Tensor:
    """AOT unpaired, eq. 9: sorted log-ratios of the chosen against those of the rejected."""
    win, lose = sorted_valid(t.chosen_logratio, t.valid), sorted_valid(t.rejected_logratio, t.valid)
    return logistic(o.beta * (win - lose), o.label_smoothing)


def sorted_valid(values: Tensor, valid: Tensor) -> Tensor:
    """The valid values in rising order, then the others: two stable sorts, so that a valid NaN stays among them."""
    order = values.argsort(stable=True)
    order = order[(~valid[order]).to(torch.uint8).argsort(stable=True)]
    return values.index_select(0, order)

"""From scores, values and log-probabilities to whitened advantages and returns in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _checks
from rlhf_fast.ops import _scans
from rlhf_fast.ops._memory import huge
from rlhf_fast.ops._sequences import Layout, check_on_host, flat, work_dtype
from rlhf_fast.ops.kl import check_estimator
from rlhf_fast.ops.value import check_scores, check_unit, gae, masked_whiten, place_of, shape_rewards, start_values
from rlhf_fast.types import PpoAdvantages

EPS = 1e-8  # of masked_whiten


def ppo_advantages(
    scores: Tensor,
    values: Tensor,
    logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
) -> PpoAdvantages:
    """Advantages and returns of a PPO batch, from one score per sequence or per token.

        rewards, kl = shape_rewards(scores, logprob, ref_logprob)
        advantages, returns = gae(rewards, values);   advantages = masked_whiten(advantages)

    Equivalent to these three calls (and to `reference.ppo_advantages`), without going through memory for each.

    Args:
        scores: (B,) float: one per sequence; or rewards of every token, in the shape of values. Constant, as everything
            here.
        values: (N,) with cu_seqlens, or (B, T), float.
        logprob, ref_logprob: the shape of values. Without both there is no KL term.
        kl_coef, kl_estimator, kl_clip, score_clip: as in `shape_rewards`.
        gamma, lam, cu_seqlens, mask, mask_mode, terminated, bootstrap: as in `gae`.
        whiten: give the advantages mean 0 and variance 1 over the tokens that count, as `masked_whiten` does by
            default. Over several ranks: False, and `masked_whiten` with its process_group.
    Returns: PpoAdvantages(advantages, returns, rewards, kl or None) of the shape of values, fp32 (fp64 where scores or
        values are).
    Raises: ValueError naming the tensor, what was expected and what came.
    Source: see `shape_rewards`, `gae` and `masked_whiten`.
    Notes: more parameters than one likes: it is three functions. On the CPU a sequence is shaped, scanned and its
        moments taken while in cache. On the GPU one kernel shapes, scans and takes the moments, and one whitens: no
        advantage can be written before the last is known. With rewards of every token the three functions run one
        after the other.
    Example:
        >>> values, logprob = torch.zeros(1, 3), torch.tensor([[-1.0, -2.0, -0.5]])
        >>> ppo_advantages(torch.tensor([1.0]), values, logprob, logprob - 1, lam=1.0, whiten=False).returns
        tensor([[0.8500, 0.9000, 0.9500]])
    """
    _checks.check_float("scores", scores)
    place = place_of("values", values, cu_seqlens, mask, mask_mode)
    if (logprob is None) != (ref_logprob is None):
        raise ValueError("logprob and ref_logprob must be given together or not at all")
    for name, tensor in {"logprob": logprob, "ref_logprob": ref_logprob}.items():
        if tensor is not None:
            _checks.check_float(name, tensor)
            _checks.check_shape(name, tensor, values.shape, "values' shape ")
    check_scores(scores, place, values)
    _checks.check_same_device(values=values, scores=scores, logprob=logprob, ref_logprob=ref_logprob)
    check_estimator("kl_estimator", kl_estimator)
    for name, bound in {"kl_clip": kl_clip, "score_clip": score_clip}.items():
        if bound is not None:
            _checks.check_positive(name, bound)
    kl_coef = _checks.check_number("kl_coef", kl_coef)
    _checks.check_flag("whiten", whiten)
    check_unit("gamma", gamma)
    check_unit("lam", lam)
    dtype = torch.promote_types(work_dtype(values), work_dtype(scores))
    advantages, returns, rewards, kl = _ppo_advantages(
        flat(values, dtype), flat(scores, dtype),
        *(None if t is None else flat(t, dtype) for t in (logprob, ref_logprob)),
        place.offsets, place.batch, place.length, place.mask, start_values(place, values, terminated, bootstrap, dtype),
        float(gamma), float(lam), mask_mode == "carry", kl_coef, kl_estimator, kl_clip, score_clip, whiten,
    )  # fmt: skip
    outputs = [t.reshape(values.shape) for t in (advantages, returns, rewards)]
    return PpoAdvantages(*outputs, None if logprob is None else kl.reshape(values.shape))


@torch.library.custom_op("rlhf_fast::ppo_advantages", mutates_args=())
def _ppo_advantages(
    values: Tensor,  # (N,) f32 or f64, as every float tensor here
    scores: Tensor,  # (B,) or (N,)
    logprob: Tensor | None,  # (N,)
    ref_logprob: Tensor | None,  # (N,)
    offsets: Tensor | None,  # (B+1,) int64; None: sequences of `length`
    batch: int,
    length: int,
    mask: Tensor | None,  # (N,) bool
    bootstrap: Tensor | None,  # (B,), 0 where terminated
    gamma: float,
    lam: float,
    carry: bool,
    kl_coef: float,
    kl_estimator: str,
    kl_clip: float | None,
    score_clip: float | None,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantages, returns, rewards, kl), each (N,); kl is (0,) without log-probabilities."""
    shaping = dict(kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clip=kl_clip, score_clip=score_clip)
    if offsets is not None:
        check_on_host(offsets, values.numel())
    if scores.numel() == batch and _scans.native(values, "ppo_advantages") and values.numel():
        rewards, advantages, returns = (huge(torch.empty_like(values)) for _ in range(3))
        kl = None if logprob is None else huge(torch.empty_like(values))
        place = Layout(offsets, batch, length, values.numel(), mask)
        _scans.ppo_advantages(
            values, scores, logprob, ref_logprob, place, bootstrap,
            gamma=gamma, lam=lam, carry=carry, **shaping, whiten=whiten, eps=EPS,
            rewards=rewards, kl=kl, advantages=advantages, returns=returns,
        )  # fmt: skip
        return advantages, returns, rewards, values.new_empty(0) if kl is None else kl
    return _composed(
        values, scores, logprob, ref_logprob, offsets, (batch, length), mask, bootstrap, gamma, lam, carry, shaping,
        whiten,
    )  # fmt: skip


@_ppo_advantages.register_fake
def _(values, scores, logprob, *_):
    kl = values.new_empty(0) if logprob is None else torch.empty_like(values)
    return torch.empty_like(values), torch.empty_like(values), torch.empty_like(values), kl


def _composed(
    values, scores, logprob, ref_logprob, offsets, shape, mask, bootstrap, gamma, lam, carry, shaping, whiten
):  # fmt: skip
    """The public functions one after the other."""

    def view(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or offsets is not None else tensor.reshape(shape)

    where = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rewards, kl = shape_rewards(
        scores if scores.numel() == shape[0] else view(scores), view(logprob), view(ref_logprob),
        cu_seqlens=offsets, mask=view(where), **shaping,
    )  # fmt: skip
    advantages, returns = gae(
        rewards, view(values), gamma=gamma, lam=lam, cu_seqlens=offsets, mask=view(mask),
        mask_mode="carry" if carry else "zero", bootstrap=bootstrap,
    )  # fmt: skip
    if whiten:
        advantages = masked_whiten(advantages, view(mask), eps=EPS)
    kl = values.new_empty(0) if logprob is None else kl.reshape(-1)
    return advantages.reshape(-1), returns.reshape(-1), rewards.reshape(-1), kl

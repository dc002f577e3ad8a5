"""Row passes over two tiles of logits: the divergence of each row, and its gradient in place.

p and q are the softmaxes of the policy's and the reference's tile, u = log p - log q. Every KL is summed as

    KL(a || b) = sum_j a_j h(log b_j - log a_j),   h(d) = exp(d) - 1 - d >= 0

which is sum_j a_j (log a_j - log b_j) + sum_j (b_j - a_j), and the last sum is 0. No term is negative, none cancels
against another, and the rounding of a log-sum, common to a whole row, drops out to first order: near p = q the plain
sum is wrong by the rounding of log p, 1e-6, whatever the size of the divergence. The mixture of JSD enters through

    log M - log p = log(1 + a (exp(-u) - 1)) where u > 0, and that of (log M - log q) - u elsewhere (and so in reverse)

which neither overflows nor departs from 0 where p = q. Formulas of the gradients: `reference.divergence`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _backend
from rlhf_fast.ops._rows import Transform, _shaped

KINDS = ("forward", "reverse", "jsd")


class Side(NamedTuple):
    """One head's tile of raw logits and what is known of its rows."""

    logits: Tensor  # (n, V)
    bias: Tensor | None  # (V,)
    tf: Transform
    row_max: Tensor  # (n,)
    log_sum: Tensor  # (n,)


class RowKl(NamedTuple):
    """The sums that value and gradient are made of: own = KL(p || q or M), ref = KL(q || p or M), each (n,) or None.

    forward has ref alone, reverse own alone, jsd both.
    """

    own: Tensor | None
    ref: Tensor | None

    def value(self, kind: str, ref_share: float) -> Tensor:
        """The divergence (n,)."""
        if kind == "jsd":
            return ref_share * self.ref + (1 - ref_share) * self.own
        return self.ref if kind == "forward" else self.own


def _launcher(own: Side, ref: Side):
    """The module that carries the row passes of these tiles; None: torch, here."""
    name = _backend.backend(own.logits.device, "divergence")
    if name == "torch" or torch.float64 in (own.logits.dtype, ref.logits.dtype):
        return None
    if name == "triton":
        from rlhf_fast.kernels import divergence

        return divergence
    from rlhf_fast import _backend_divergence

    return _backend_divergence


def _arguments(own: Side, ref: Side) -> dict:
    return dict(
        form=tuple(own.tf),
        ref_form=tuple(ref.tf),
        row_max=own.row_max.contiguous(),
        log_sum=own.log_sum.contiguous(),
        ref_max=ref.row_max.contiguous(),
        ref_sum=ref.log_sum.contiguous(),
    )


def row_divergence(own: Side, ref: Side, *, kind: str, ref_share: float) -> RowKl:
    """The divergence sums of each row; both tiles are read once."""
    n = own.logits.shape[0]
    dtype = torch.promote_types(own.row_max.dtype, ref.row_max.dtype)
    new = lambda on: torch.empty(n, dtype=dtype, device=own.logits.device) if on else None  # noqa: E731
    out = RowKl(new(kind != "forward"), new(kind != "reverse"))
    if n == 0:
        return out
    launcher = _launcher(own, ref)
    if launcher is None:
        _torch_divergence(own, ref, kind, ref_share, out)
    else:
        args = _arguments(own, ref) | dict(kind=KINDS.index(kind), ref_share=ref_share)
        with _backend.on_device(own.logits):
            launcher.row_divergence(own.logits, ref.logits, own.bias, ref.bias, **args, own_kl=out.own, ref_kl=out.ref)
    return out


def divergence_dlogits(
    own: Side,
    ref: Side,
    kl: RowKl,
    grad: Tensor,  # (n,)
    out: Tensor | None,  # (n, V); may share the storage of the policy's tile, row for row
    ref_out: Tensor | None,  # (n, V); likewise the reference's
    *,
    kind: str,
    ref_share: float,
) -> None:
    """Write grad times the gradient of each row's divergence with respect to the raw logits."""
    if own.logits.shape[0] == 0 or (out is None and ref_out is None):
        return
    launcher = _launcher(own, ref)
    if launcher is None:
        _torch_dlogits(own, ref, kl, grad, out, ref_out, kind, ref_share)
    else:
        args = _arguments(own, ref) | dict(kind=KINDS.index(kind), ref_share=ref_share)
        sums = {k: None if x is None else x.contiguous() for k, x in (("own_kl", kl.own), ("ref_kl", kl.ref))}
        with _backend.on_device(own.logits):
            launcher.divergence_dlogits(
                own.logits, ref.logits, own.bias, ref.bias, **args, **sums, grad=grad.contiguous(), out=out,
                ref_out=ref_out,
            )  # fmt: skip


def _log_p(side: Side) -> tuple[Tensor, Tensor | None]:
    """log-probabilities (n, V), and tanh where there is a softcap."""
    s, t = _shaped(side.logits, side.bias, side.tf)
    return (s - side.row_max.unsqueeze(-1)) - side.log_sum.unsqueeze(-1), t


def _kl(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """sum_j a_j h(d_j), d = log b - log a; a_j = 0 leaves b_j."""
    term = torch.where(d < 1, a * (torch.expm1(d) - d), (b - a) - a * d)
    return torch.where(a == 0, b, term).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, ref_share: float) -> tuple[Tensor, Tensor]:
    """log M - log p and log M - log q."""
    u = log_p - log_q
    smaller = torch.where(u > 0, u.new_full((), ref_share), u.new_full((), 1 - ref_share))  # of M, the smaller's share
    from_larger = torch.log1p(smaller * torch.expm1(-u.abs()))
    from_smaller = from_larger + u.abs()
    return torch.where(u > 0, from_larger, from_smaller), torch.where(u > 0, from_smaller, from_larger)


def _torch_divergence(own: Side, ref: Side, kind: str, ref_share: float, out: RowKl) -> None:
    (log_p, _), (log_q, _) = _log_p(own), _log_p(ref)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        out.ref.copy_(_kl(q, p, log_p - log_q))
    elif kind == "reverse":
        out.own.copy_(_kl(p, q, log_q - log_p))
    else:
        mixed = ref_share * q + (1 - ref_share) * p
        from_p, from_q = _mixture(log_p, log_q, ref_share)
        out.own.copy_(_kl(p, mixed, from_p))
        out.ref.copy_(_kl(q, mixed, from_q))


def _torch_dlogits(own, ref, kl: RowKl, grad, out, ref_out, kind: str, ref_share: float) -> None:
    (log_p, t), (log_q, ref_t) = _log_p(own), _log_p(ref)
    p, q = log_p.exp(), log_q.exp()

    def centred(a: Tensor, from_a: Tensor, mean: Tensor) -> Tensor:  # a (log a - log b - KL(a || b))
        return torch.where(a == 0, a, a * (-from_a - mean.unsqueeze(-1)))

    def write(dst: Tensor, side: Side, g: Tensor, tanh: Tensor | None) -> None:
        jac = side.tf.scale * side.tf.inv_temperature
        g = g * (grad * jac).unsqueeze(-1)
        dst.copy_(g if tanh is None else g * (1 - tanh * tanh))

    from_p = from_q = None
    if kind == "jsd":
        from_p, from_q = _mixture(log_p, log_q, ref_share)
    if kind == "forward":
        g, ref_g = p - q, None if ref_out is None else centred(q, log_p - log_q, kl.ref)
    elif kind == "reverse":
        g, ref_g = centred(p, log_q - log_p, kl.own), q - p
    else:
        g, ref_g = (1 - ref_share) * centred(p, from_p, kl.own), ref_share * centred(q, from_q, kl.ref)
    if out is not None:
        write(out, own, g, t)
    if ref_out is not None:
        write(ref_out, ref, ref_g, ref_t)

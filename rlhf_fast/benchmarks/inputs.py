"""Inputs and fp64 answers of the ops with a head or with logits, in blocks of rows; those on tokens: `token_inputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.benchmarks import token_inputs
from rlhf_fast.benchmarks.cases import BETA, CLIP, DTYPES, ENTROPY_COEF, LENGTH, OPS, Case, on_tokens
from rlhf_fast.benchmarks.token_inputs import TokenInputs

BLOCK_BYTES = 256 << 20
WITH_REFERENCE = ("dpo", "forward_kl", "jsd")
IGNORE = -100


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D) or logits (N, V), leaves that require grad; the rest is constant.

    Sequences of a DPO case stand in the order chosen, rejected, chosen, ...
    """

    hidden: Tensor | None
    weight: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    logits: Tensor | None
    target: Tensor
    dlogprob: Tensor
    old_logprob: Tensor
    advantages: Tensor  # (N / LENGTH,), one per sequence; (N,) for ppo
    share: Tensor  # (N,) the weight of a token in a mean over those that count

    @property
    def token_advantages(self) -> Tensor:
        """(N,)"""
        return self.advantages.repeat_interleave(self.target.shape[0] // self.advantages.shape[0])

    @property
    def exact_share(self) -> Tensor:
        """(N,), `share` in fp64."""
        counts = (self.target != IGNORE).double()
        return counts / counts.sum()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.logits is None else (self.logits,)


def make_inputs(case: Case, seed: int = 0) -> Inputs | TokenInputs:
    """Logits of standard deviation 2; half of the targets are planted to be likely, the others are in the tails."""
    if on_tokens(case.op):
        return token_inputs.make_inputs(case, seed)
    n, d, v = case.shape[1:4]
    unit = 2 * LENGTH if case.op == "dpo" else LENGTH
    if n % unit:
        raise ValueError(f"N must be a multiple of {unit}, the benchmark's sequence length or pair, got {n}")
    g = torch.Generator(case.device).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, device=case.device)  # noqa: E731
    dtype = DTYPES[case.dtype]
    target = torch.randint(v, (n,), generator=g, device=case.device)
    weight = (draw(v, d) * (2 / d**0.5)).to(dtype)
    hidden = draw(n, d)
    hidden[::2] += 5.5 * torch.nn.functional.normalize(weight[target[::2]].float(), dim=1)
    hidden = hidden.to(dtype)
    # log-ratios on both sides of the clip range, but none near its edges: there rounding decides the gradient
    centres = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=case.device)
    ratio = centres[torch.randint(4, (n,), generator=g, device=case.device)] + 0.02 * draw(n)
    blocks = _blocks(hidden, weight, target, torch.float32, case.shape.softcap)
    old = torch.cat([_logprob(z, t) for z, _, t in blocks]) - ratio
    advantages = draw(n if case.op == "ppo" else n // LENGTH)
    advantages[: round(case.zero_rows * advantages.shape[0])] = 0
    dlogprob = draw(n) / n
    dlogprob[: round(case.zero_rows * n)] = 0
    target.view(-1, LENGTH)[:, : round(case.masked * LENGTH)] = IGNORE
    share = (target != IGNORE).float()
    rest = (target, dlogprob, old, advantages, share / share.sum())
    if OPS[case.op].passes:
        return Inputs(None, None, None, None, (hidden @ weight.t()).requires_grad_(), *rest)
    reference = (None, None)
    if case.op in WITH_REFERENCE:
        near = lambda x: (x.float() + 0.1 * x.float().std() * draw(*x.shape)).to(dtype)  # noqa: E731
        reference = (near(hidden), near(weight))
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), *reference, None, *rest)


# ---- objectives around providers that have none; arguments (N,) -------------------------------------------


def grpo_objective(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, share: Tensor) -> Tensor:
    """-sum share min(r A, clip(r, 0.8, 1.2) A)"""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -(torch.minimum(ratio * advantages, clipped * advantages) * share).sum()


def ppo_objective(logprob: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, share: Tensor) -> Tensor:
    """The same, less the bonus: ENTROPY_COEF sum share H."""
    return grpo_objective(logprob, old, advantages, share) - ENTROPY_COEF * (entropy.float() * share).sum()


def dpo_objective(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """mean over pairs of -log sigmoid(beta (chosen - rejected)) of the sums of log-ratios; masked tokens are 0."""
    score = (logprob - ref_logprob).view(-1, 2, LENGTH).sum(-1)
    return -torch.nn.functional.logsigmoid(BETA * (score[:, 0] - score[:, 1])).mean()


# ---- answers ----------------------------------------------------------------------------------------------


def answer(case: Case, x: Inputs | TokenInputs) -> dict[str, Tensor]:
    """The op's outputs in fp64, from the inputs as they were rounded."""
    if isinstance(x, TokenInputs):
        return token_inputs.answer(case, x)
    with torch.no_grad():
        if x.logits is not None:
            return _answer_from_logits(case, x)
        if case.op in ("forward_kl", "jsd"):
            return _answer_divergence(case, x)
        return _answer_logprob(case, x)


def objective(case: Case, x: Inputs, ref_logprob: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """(logprob, entropy), each (N,) -> the scalar whose gradient the op returns."""
    if case.op == "cross_entropy":
        return lambda logprob, entropy: -(logprob * x.exact_share).sum()
    if case.op == "dpo":
        return lambda logprob, entropy: dpo_objective(logprob, ref_logprob)
    if case.op not in ("grpo", "ppo"):
        return lambda logprob, entropy: torch.dot(logprob, x.dlogprob.double())
    args = (x.old_logprob.double(), x.token_advantages.double(), x.exact_share)
    bonus = ENTROPY_COEF if case.op == "ppo" else 0.0
    return lambda logprob, entropy: grpo_objective(logprob, *args) - bonus * (entropy * args[-1]).sum()


def _answer_logprob(case: Case, x: Inputs) -> dict[str, Tensor]:
    hidden, weight, cap = x.hidden.double(), x.weight.double(), case.shape.softcap
    rows = [(_logprob(z, t), _entropy(z)) for z, _, t in _blocks(hidden, weight, x.target, torch.float64, cap)]
    logprob, entropy = (torch.cat(column) for column in zip(*rows, strict=True))
    ref = None
    if x.ref_hidden is not None:
        ref = torch.cat(
            [_logprob(z, t) for z, _, t in _blocks(x.ref_hidden, x.ref_weight, x.target, hidden.dtype, cap)]
        )
    loss, dlogprob, dentropy = _slope(objective(case, x, ref), logprob, entropy)
    out = {"logprob": logprob, "loss": loss}
    if "dhidden" in OPS[case.op].outputs:
        grads = (
            jac * _dlogits(z, t, dlogprob[rows], dentropy[rows])
            for (z, jac, t), rows in _numbered(_blocks(hidden, weight, x.target, torch.float64, cap))
        )
        out |= _head_grads(hidden, weight, grads)
    return {name: out[name] for name in OPS[case.op].outputs}


def _answer_divergence(case: Case, x: Inputs) -> dict[str, Tensor]:
    """forward_kl: d/dz = p - q. jsd, M = (p + q) / 2: d/dz = p (log p - log M - KL(p || M)) / 2."""
    hidden, weight, share = x.hidden.double(), x.weight.double(), x.exact_share
    loss, grads = torch.zeros((), dtype=torch.float64, device=hidden.device), []
    policy = _blocks(hidden, weight, x.target, torch.float64, case.shape.softcap)
    reference = _blocks(x.ref_hidden, x.ref_weight, x.target, torch.float64, case.shape.softcap)

    def gradients() -> Iterator[Tensor]:
        for ((z, jac, _), (y, _, _)), rows in _numbered(zip(policy, reference, strict=True)):
            log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
            if case.op == "forward_kl":
                loss.add_(((log_q.exp() * (log_q - log_p)).sum(-1) * share[rows]).sum())
                dz = log_p.exp() - log_q.exp()
            else:
                log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
                kl = (log_p.exp() * (log_p - log_m)).sum(-1)
                other = (log_q.exp() * (log_q - log_m)).sum(-1)
                loss.add_(((kl + other) / 2 * share[rows]).sum())
                dz = log_p.exp() * (log_p - log_m - kl.unsqueeze(-1)) / 2
            yield jac * dz * share[rows].unsqueeze(-1)

    grads = _head_grads(hidden, weight, gradients())
    return {"loss": loss, **grads}


def _head_grads(hidden: Tensor, weight: Tensor, dlogits: Iterator[Tensor]) -> dict[str, Tensor]:
    dhidden, dweight, row = torch.empty_like(hidden), torch.zeros_like(weight), 0
    for dz in dlogits:
        rows = slice(row, row := row + dz.shape[0])
        dhidden[rows] = dz @ weight
        dweight.addmm_(dz.t(), hidden[rows])
    return {"dhidden": dhidden, "dweight": dweight}


def _answer_from_logits(case: Case, x: Inputs) -> dict[str, Tensor]:
    logprob, dlogits = [], []
    rows = max(1, BLOCK_BYTES // (8 * x.logits.shape[1]))
    for start in range(0, x.logits.shape[0], rows):
        part = slice(start, start + rows)
        z, t = x.logits[part].double(), x.target[part]
        logprob.append(_logprob(z, t))
        if "dlogits" in OPS[case.op].outputs:
            dlogits.append(_dlogits(z, t, x.dlogprob[part].double(), None))
    out = {"logprob": torch.cat(logprob)}
    return out | ({"dlogits": torch.cat(dlogits)} if dlogits else {})


def _blocks(
    hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, softcap: float | None
) -> Iterator[tuple[Tensor, Tensor | float, Tensor]]:
    """Shaped logits s of a block of rows, ds/dz, targets."""
    rows = max(1, BLOCK_BYTES // (dtype.itemsize * weight.shape[0]))
    weight = weight.to(dtype)
    for start in range(0, hidden.shape[0], rows):
        z, t = hidden[start : start + rows].to(dtype) @ weight.t(), target[start : start + rows]
        if softcap is None:
            yield z, 1.0, t
        else:
            squashed = torch.tanh(z / softcap)
            yield softcap * squashed, 1 - squashed.square(), t


def _numbered(blocks: Iterator) -> Iterator[tuple]:
    """Blocks and the rows they are."""
    row = 0
    for block in blocks:
        first = block[0] if isinstance(block[0], Tensor) else block[0][0]
        yield block, slice(row, row := row + first.shape[0])


def _logprob(z: Tensor, target: Tensor) -> Tensor:
    found = z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
    return torch.where(target == IGNORE, torch.zeros_like(found), found)


def _entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _dlogits(z: Tensor, target: Tensor, dlogprob: Tensor, dentropy: Tensor | None) -> Tensor:
    """dlogprob (onehot - p) - dentropy p (log p + H); zero rows where the target is ignored."""
    counts = (target != IGNORE).to(z.dtype)
    dlogprob = (dlogprob * counts).unsqueeze(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    dz = p * -dlogprob
    if dentropy is not None and bool(dentropy.any()):
        entropy = -(p * log_p).sum(-1, keepdim=True)
        dz -= (dentropy * counts).unsqueeze(-1) * p * (log_p + entropy)
    return dz.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), dlogprob)


def _slope(
    function: Callable[[Tensor, Tensor], Tensor], logprob: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = (logprob.detach().requires_grad_(), entropy.detach().requires_grad_())
        loss = function(*leaves)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), *grads

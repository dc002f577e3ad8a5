"""Batches for the policy-loss tests: ragged lengths, both signs and zero advantages, ratios beyond the clips."""

from __future__ import annotations

import torch

from rlhf_fast.losses import PolicyLoss, policy_loss_kinds

KINDS = [
    "ppo", "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "cispo", "sapo", "vespo", "gpg", "reinforce",
    "geo_mean", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl", "dro",
]  # fmt: skip


def options_of(kind: str) -> dict:
    """What a kind needs to be interesting on a small batch."""
    if kind == "dr_grpo":
        return {"max_length": 16}
    if kind == "clip_cov":
        return {"fraction": 0.2, "cov_low": 0.05, "cov_high": 50.0}
    if kind == "kl_cov":
        return {"fraction": 0.2}
    if kind.startswith("dppo"):
        return {"clip_low": 0.02, "clip_high": 0.03}
    return {}


def make_batch(
    lengths=(7, 1, 0, 12, 5), width=12, *, seed=0, dtype=torch.float64, spread=0.3, per_token=False
) -> dict[str, torch.Tensor]:
    """A padded (B, T) batch: every tensor that a policy loss may take, with finite numbers everywhere."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logprob = -normal(b, width).abs() - 0.1
    batch = {
        "logprob": logprob,
        "old_logprob": logprob + spread * normal(b, width),
        "ref_logprob": logprob + 0.5 * normal(b, width),
        "rollout_logprob": logprob + 0.4 * normal(b, width),
        "advantages": normal(b, width) if per_token else normal(b),
        "entropy": normal(b, width).abs(),
        "noise": torch.rand(b, width, generator=g, dtype=torch.float64),
    }
    batch["advantages"][0] = 0.0  # no signal: no gradient from the policy term
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    if width > 4 and b > 3:
        mask[3, 2:4] = False  # a hole, as a tool call leaves it
    return {"mask": mask} | {name: t.to(dtype) for name, t in batch.items()}


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch as (N,) tensors with cu_seqlens, only counted tokens."""
    mask = batch["mask"]
    out = {name: t[mask] for name, t in batch.items() if t.shape == mask.shape and name != "mask"}
    lengths = mask.sum(1)
    out["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    if batch["advantages"].dim() == 1:
        out["advantages"] = batch["advantages"]
    return out


def run(loss_of, batch, kind, *, with_noise=False, gradients=True, **options):
    """(loss, metrics, gradient by logprob, gradient by entropy or None) of one implementation."""
    batch = dict(batch)
    noise = batch.pop("noise")
    logprob = batch.pop("logprob").detach().clone().requires_grad_()
    entropy = batch.pop("entropy").detach().clone().requires_grad_()
    if with_noise:
        options["noise"] = noise
    loss, metrics = loss_of(
        logprob, batch.pop("old_logprob"), batch.pop("advantages"), kind=kind, entropy=entropy, **batch, **options
    )
    if not gradients:
        return loss, metrics, None, None
    grads = torch.autograd.grad(loss, [logprob, entropy], allow_unused=True)
    return loss.detach(), metrics, *grads


def ours_with_noise(logprob, old_logprob, advantages, *, kind, noise, **kwargs):
    """`policy_loss` with the draw of clip_cov given: through the loss_fn protocol, as `policy_loss` itself does."""
    names = ("mask", "cu_seqlens", "ref_logprob", "entropy", "rollout_logprob", "importance_weight")
    tensors = {name: kwargs.pop(name, None) for name in names}
    loss_fn = PolicyLoss(kind, **kwargs)
    batch = {"old_logprob": old_logprob, "logprob": logprob.detach(), "noise": noise}
    batch.update({name: tensors[name] for name in ("ref_logprob", "rollout_logprob", "importance_weight")})
    cu_seqlens, entropy = tensors["cu_seqlens"], tensors["entropy"]
    if logprob.dim() == 2:
        rows, columns = logprob.shape
        cu_seqlens = torch.arange(rows + 1) * columns
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(rows, columns)
    if entropy is not None and loss_fn.top_entropy is not None:
        batch["old_entropy"] = entropy.detach()
    batch["advantages"] = advantages
    prepared = loss_fn.prepare(
        {k: None if t is None else t.reshape(-1) for k, t in batch.items()}, tensors["mask"], cu_seqlens
    )
    return loss_fn(logprob.reshape(-1), None if entropy is None else entropy.reshape(-1), prepared)


def test_cases_cover_every_registered_kind():
    assert set(KINDS) <= set(policy_loss_kinds())

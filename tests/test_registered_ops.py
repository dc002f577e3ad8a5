"""opcheck of every registered op; those with many forms have theirs in the files of the op."""

import pytest
import torch
from torch.library import opcheck

import rlhf_fast  # noqa: F401  (registers the ops)

OPS = torch.ops.rlhf_fast
ELSEWHERE = {
    "discounted_returns": "test_value",
    "fused_linear_loss": "test_fused_ready_made",
    "gae": "test_value",
    "group_stats": "test_advantages",
    "linear_divergence": "test_divergence",
    "linear_logprob": "test_linear_logprob",
    "logprob_from_logits": "test_from_logits",
    "moments": "test_value",
    "policy_clip": "test_policy_op",
    "policy_clip_scale": "test_policy_op",
    "ppo_advantages": "test_ppo_advantages",
    "segment_counts": "test_policy_cpp",
    "vocab_parallel_logprob": "vocab_parallel_checks",
    "vocab_parallel_logprob_backward": "vocab_parallel_checks",  # through the forward: it needs ranks
    "whiten": "test_value",
}
N, D, V = 5, 4, 9


def head(trained=False):
    torch.manual_seed(0)
    return [torch.randn(s, requires_grad=trained) for s in ((N, D), (V, D), V)]


def vectors(count):
    return [torch.randn(N) for _ in range(count)]


def linear_logprob_backward():
    low = torch.randn(2, D), torch.randn(V, 2)
    target = torch.tensor([0, 3, -100, 8, 2])
    args = (*head(), *low, target, *vectors(6), 0.5, 1.0, 3.0, 0.8, -100, 2, None)
    return [(*args, [True] * 5), (*args, [True, False, False, False, True])]


def logprob_from_logits_backward():
    schema = OPS.logprob_from_logits_backward.default._schema
    given = dict(logits=torch.randn(N, V), target=torch.tensor([0, 3, -100, 8, 2]), scale=1.0, softcap=None)
    given |= dict(inv_temperature=0.8, ignore_index=-100)
    return [tuple(given[a.name] if a.name in given else torch.randn(N) for a in schema.arguments)]


def divergence_tail(want):
    return (1.0, None, 0.8, 1.0, 2.0, 1.0, 2, None, want)


def linear_divergence_backward():
    keep, stats = torch.tensor([True, True, False, True, True]), torch.rand(6, N)
    heads = (*head(), *head())
    return [(*heads, keep, stats, torch.randn(N), "jsd", 0.4, *divergence_tail([True] * 6))]


def linear_divergence_loss():
    keep, weights = torch.tensor([True, True, False, True, True]), torch.rand(N)
    heads = (*head(trained=True), *head())
    return [
        (*heads, keep, weights, kind, 0.4, *divergence_tail([True] * 3 + [False] * 3))
        for kind in ("forward", "reverse", "jsd")
    ]


WAITING = {
    "fused_linear_loss",
    "linear_divergence",
    "linear_divergence_backward",
    "linear_divergence_loss",
    "linear_logprob",
    "linear_logprob_backward",
    "logprob_from_logits",
    "vocab_parallel_logprob",
    "vocab_parallel_logprob_backward",
}
"""Ops that look at targets or count rows on the host."""
HERE = {
    f.__name__: f
    for f in (
        linear_logprob_backward,
        logprob_from_logits_backward,
        linear_divergence_backward,
        linear_divergence_loss,
    )
}


def names():
    every = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in every if "rlhf_fast::" in name}


def test_every_op_is_checked_somewhere():
    assert names() == set(HERE) | set(ELSEWHERE)


def test_ops_that_wait_for_the_device_stay_out_of_cuda_graphs():
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this torch has no such tag")
    assert {name for name in names() if tag in getattr(OPS, name).default.tags} == WAITING


@pytest.mark.parametrize("name", HERE)
def test_opcheck(name):
    for arguments in HERE[name]():
        opcheck(getattr(OPS, name).default, arguments)

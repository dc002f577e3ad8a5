"""What both ranks of a gloo group assert about the ops inside wrappers; `test_data_parallel.py` starts the ranks.

Each rank holds some sequences; losses are sums over the rank's tokens divided by counts over all ranks, times the
number of ranks, because the wrappers average. The gradients must then be those of one process with all sequences.
"""

import itertools
from contextlib import nullcontext

import torch
import torch.distributed as dist
from ranks import registry
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rlhf_fast import fused_linear_loss, linear_logprob, masked_whiten
from rlhf_fast.losses import NLL, PolicyLoss

CHECKS, check = registry()
D, V = 6, 31
LENGTHS = (4, 1, 6, 3, 5)
SHARES = {"uneven": ((0, 4), (4, 5)), "empty": ((0, 5), (5, 5)), "nothing scored": ((0, 3), (3, 5))}
"""Sequences of each rank. An empty rank has no sequence at all; under "nothing scored" rank 1 has ignored ones only."""
KINDS = ("logprob", "nll", "grpo", "user")


class Head(nn.Linear):
    """The loss is taken within the head's own call, where wrappers have gathered its parameters."""

    group = None  # over which its rows are spread

    def forward(self, h, part, kind):
        inputs = (h, self.weight, part["target"])
        tokens, sequences = part["tokens"], part["sequences"]
        options = dict(bias=self.bias, group=self.group)
        if kind == "logprob":
            out = linear_logprob(*inputs, entropy=True, **options)
            return -(out.logprob * part["old"].cos() + 0.1 * out.entropy).sum() / tokens
        if kind == "user":
            own = lambda logprob, entropy, batch: (logprob.exp() * batch["old"]).sum() / tokens  # noqa: E731
            return fused_linear_loss(*inputs, own, batch={"old": part["old"]}, chunk_size=3, **options).loss
        if kind == "nll":
            return fused_linear_loss(*inputs, NLL(tokens), chunk_size=4, **options).loss
        loss_fn = PolicyLoss("grpo", normalizer=sequences, entropy_coef=0.1, entropy_normalizer=tokens)
        batch = dict(advantages=part["advantages"], old_logprob=part["old"])
        return fused_linear_loss(*inputs, loss_fn, batch=batch, segments=part["cu"], chunk_size=4, **options).loss


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body, self.head = nn.Linear(D, D), Head(D, V)
        self.double()

    def forward(self, x, part, kind, again=False):
        whole = lambda x: self.head(torch.tanh(self.body(x)), part, kind)  # noqa: E731
        return checkpoint(whole, x, use_reentrant=False) if again else whole(x)


def data(share, first, last):
    """(x, part) of the sequences [first, last) of one batch."""
    g = torch.Generator().manual_seed(1)
    n = sum(LENGTHS)
    target = torch.randint(V, (n,), generator=g)
    target[[2, 6]] = -100
    if share == "nothing scored":
        target[sum(LENGTHS[:3]) :] = -100
    x, old = torch.randn(n, D, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64) - 3
    advantages = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    rows = slice(int(cu[first]), int(cu[last]))
    part = dict(target=target[rows], old=old[rows], advantages=advantages[first:last])
    part |= dict(cu=cu[first : last + 1] - cu[first], tokens=float((target >= 0).sum()), sequences=float(len(LENGTHS)))
    return x[rows], part


def one_process(share, kind):
    """Gradients by name."""
    model = Model()
    model(*data(share, 0, len(LENGTHS)), kind).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare(wrap, group):
    """Every kind of loss, every share, with and without recomputation, against one process."""
    for share, kind, again in itertools.product(SHARES, KINDS, (False, True)):
        model = Model()
        wrapped = wrap(model)
        x, part = data(share, *SHARES[share][dist.get_rank(group)])
        (group.size() * wrapped(x, part, kind, again)).backward()
        want = one_process(share, kind)
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            where = f"{share}, {kind}, {'recomputed' if again else 'kept'}, {name}"
            torch.testing.assert_close(grad, want[name], msg=lambda m, where=where: f"{where}: {m}")
        assert all(bool(g.abs().sum() > 0) for g in want.values())


@check(2)
def distributed_data_parallel(group):
    compare(lambda model: DistributedDataParallel(model, process_group=group), group)


@check(2)
def fully_sharded(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def wrap(model):
        fully_shard(model.head, mesh=mesh, reshard_after_forward=True)
        return fully_shard(model, mesh=mesh)

    compare(wrap, group)


@check(2)
def micro_batches_into_one_buffer(group):
    """`weight_grad`: the head's gradient gathers in a buffer that no wrapper knows; one sum over ranks at the end."""
    model, rank = Model(), dist.get_rank(group)
    model.head.weight.requires_grad_(False)
    wrapped = DistributedDataParallel(model.body, process_group=group)
    buffer = torch.zeros_like(model.head.weight)
    first, last = SHARES["uneven"][rank]
    for i in range(first, last):
        x, part = data("uneven", i, i + 1)
        loss_fn, head = NLL(part["tokens"]), model.head
        with nullcontext() if i + 1 == last else wrapped.no_sync():
            inputs = (torch.tanh(wrapped(x)), head.weight, part["target"])
            loss = fused_linear_loss(*inputs, loss_fn, bias=head.bias, weight_grad=buffer).loss
            (2 * loss).backward()
    dist.all_reduce(buffer, group=group)
    want = one_process("uneven", "nll")
    torch.testing.assert_close(buffer / 2, want["head.weight"])
    torch.testing.assert_close(wrapped.module.weight.grad, want["body.weight"])


@check(2)
def whitening_is_global_and_an_empty_shard_joins(group):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 5
    want = masked_whiten(x)
    for cut in (37, 50):
        own = slice(0, cut) if dist.get_rank(group) == 0 else slice(cut, 50)
        got = masked_whiten(x[own], process_group=group)
        torch.testing.assert_close(got, want[own], rtol=1e-6, atol=1e-6)

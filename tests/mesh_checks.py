"""What four ranks assert: data parallel times vocabulary parallel on one mesh, and sequences spread over the ranks.

`test_mesh.py` starts them. The truth is one process with everything, as in `data_parallel_checks.py`.
"""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from data_parallel_checks import KINDS, LENGTHS, SHARES, Model, data, one_process
from ranks import registry
from snippets import DOCS, snippet
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from vocab_parallel_checks import raises

from rlhf_fast import fused_linear_loss, linear_logprob
from rlhf_fast.losses import NLL, PolicyLoss

CHECKS, check = registry()
SIZES = (20, 11)  # rows of the head on each rank of "tp"


def two_by_two():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@check(4)
def data_times_vocabulary_parallel(group):
    """Sequences over "dp", rows of the head over "tp": every gradient is that of one process."""
    mesh = two_by_two()
    (dp, tp), tensor = mesh.get_coordinate(), mesh["tp"]
    for share, kind, again in itertools.product(SHARES, KINDS, (False, True)):
        model = Model()
        model.head.group = tensor
        for name, parameter in list(model.head.named_parameters()):
            setattr(model.head, name, torch.nn.Parameter(parameter.detach().split(SIZES)[tp].clone()))
        wrapped = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        x, part = data(share, *SHARES[share][dp])
        (2 * wrapped(x, part, kind, again)).backward()
        want = one_process(share, kind)
        for name, p in model.named_parameters():
            expected = want[name].split(SIZES)[tp] if name.startswith("head") else want[name]
            where = f"{share}, {kind}, {'recomputed' if again else 'kept'}, {name}"
            torch.testing.assert_close(p.grad, expected, msg=lambda m, where=where: f"{where}: {m}")


@check(4)
def a_mesh_is_not_a_dimension(group):
    mesh, x, w = two_by_two(), torch.randn(3, 4), torch.randn(5, 4)
    with raises(ValueError, "group must be one dimension of a mesh, such as mesh['tp'], got ('dp', 'tp')"):
        linear_logprob(x, w, torch.tensor([0, 1, 2]), group=mesh)


def split_sequences(group):
    """(hidden, targets, weight, tokens of this rank, offsets of the sequences): cut where no sequence ends.

    The targets are those of the whole batch, aligned before they are cut: the last token of a rank predicts the first
    one of the next rank, which a roll within the rank would not know.
    """
    g = torch.Generator().manual_seed(2)
    n, d, v = sum(LENGTHS), 6, 31
    ids = torch.randint(v, (n + 1,), generator=g)
    hidden, weight = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, d), (v, d)))
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    target = ids[1:].clone()
    target[cu[1:] - 1] = -100  # nothing follows the end of a sequence
    cuts = (0, 2, 9, 9, n)  # a rank without tokens, too
    assert not set(cuts[1:-1]) & set(cu.tolist())
    rank = dist.get_rank(group)
    return hidden, target, weight, slice(cuts[rank], cuts[rank + 1]), cu


@check(4)
def split_sequences_with_losses_of_tokens(group):
    """Each rank its tokens, the count of all as the normalizer: the sum over ranks is the loss of one."""
    hidden, target, weight, mine, _ = split_sequences(group)
    old, advantages = torch.full_like(hidden[:, 0], -3.0), hidden[:, 1].clone()
    tokens = float((target >= 0).sum())
    for loss_fn in (NLL(tokens), PolicyLoss("dapo", normalizer=tokens)):

        def run(part, loss_fn=loss_fn):
            h, w = (x.clone().requires_grad_() for x in (hidden[part], weight))
            batch = {} if isinstance(loss_fn, NLL) else dict(advantages=advantages[part], old_logprob=old[part])
            out = fused_linear_loss(h, w, target[part], loss_fn, batch=batch, chunk_size=4)
            out.loss.backward()
            return out.loss.detach(), h.grad, w.grad

        (loss, dh, dw), (all_loss, all_dh, all_dw) = run(mine), run(slice(None))
        for part, want in ((loss, all_loss), (dw, all_dw)):
            dist.all_reduce(part, group=group)
            torch.testing.assert_close(part, want)
        torch.testing.assert_close(dh, all_dh[mine])
        assert all_dw.abs().sum() > 0


@check(4)
def split_sequences_with_losses_of_sequences(group):
    """A loss of whole sequences takes their sums over the ranks, by the lines in docs/training.md as they stand."""
    hidden, target, weight, mine, cu = split_sequences(group)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))

    def my_loss(sums):
        return torch.nn.functional.softplus(-(sums[::2] - sums[[1, 3, 1]])).sum()

    h, w, all_h, all_w = (x.clone().requires_grad_() for x in (hidden[mine], weight, hidden, weight))
    names = dict(hidden=h, weight=w, target=target[mine], sequence_of_token=owner[mine], sequences=len(LENGTHS))
    names |= dict(my_loss=my_loss, group=group, linear_logprob=linear_logprob)
    exec(snippet(DOCS / "training.md", "dist.all_reduce"), names)
    loss = names["loss"]
    dist.all_reduce(w.grad, group=group)
    logprob = linear_logprob(all_h, all_w, target).logprob
    whole = my_loss(logprob.new_zeros(len(LENGTHS)).index_add(0, owner, logprob))
    whole.backward()
    for got, want in ((loss.detach(), whole.detach()), (h.grad, all_h.grad[mine]), (w.grad, all_w.grad)):
        torch.testing.assert_close(got, want)
    assert all_h.grad.abs().sum() > 0


@check(4)
def the_example_learns(group):
    """`examples/mesh.py` as it stands: from log 12 to less than half of it, the same loss on every rank."""
    examples = Path(__file__).resolve().parent.parent / "examples"
    sys.path.insert(0, str(examples))
    losses = torch.tensor(runpy.run_path(str(examples / "mesh.py"))["main"](40))
    every = [torch.empty_like(losses) for _ in range(group.size())]
    dist.all_gather(every, losses)
    assert all(torch.equal(other, losses) for other in every)
    assert losses[0] > 2.3
    assert losses[-5:].mean() < 1.2

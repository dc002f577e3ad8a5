"""`rlhf_fast.packing`: padded to flat and back, targets shifted once, and the same loss either way."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import PolicyLoss, fused_linear_loss
from rlhf_fast.packing import cu_seqlens, next_tokens, pack

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_there_and_back(dtype):
    flat = pack(MASK.to(dtype))
    assert flat.cu_seqlens.dtype == torch.int32
    assert flat.cu_seqlens.tolist() == [0, 3, 6, 6, 11]
    assert flat.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]
    padded = torch.randn(4, 5, 3, dtype=torch.float64).masked_fill(~MASK[..., None], float("nan")).requires_grad_()
    rows = flat.take(padded)
    assert torch.equal(rows, padded[MASK])
    back = flat.put(rows, fill=-7)
    assert torch.equal(back[MASK], padded[MASK])
    assert (back[~MASK] == -7).all()
    weight = torch.randn(4, 5, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((back * weight).sum(), padded)
    assert torch.equal(grad, weight.masked_fill(~MASK[..., None], 0))


def test_no_token_at_all():
    flat = pack(torch.zeros(2, 3, dtype=torch.bool))
    assert flat.cu_seqlens.tolist() == [0, 0, 0]
    assert flat.take(torch.ones(2, 3)).shape == (0,)
    assert torch.equal(flat.put(torch.ones(0)), torch.zeros(2, 3))
    assert pack(torch.zeros(0, 3)).cu_seqlens.tolist() == [0]


def test_targets_end_with_their_sequence():
    ids = torch.arange(10, 21)
    want = [11, 12, -100, 14, 15, -100, 17, 18, 19, 20, -100]
    assert next_tokens(ids, torch.tensor([0, 3, 6, 6, 11])).tolist() == want
    assert next_tokens(ids, torch.tensor([0, 0, 3, 6, 11, 11], dtype=torch.int32)).tolist() == want
    scored = torch.tensor([0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1])  # the first token of a sequence is nobody's target
    expected = [11, 12, -100, -100, 15, -100, -100, -100, 19, 20, -100]
    assert next_tokens(ids, torch.tensor([0, 3, 6, 11]), scored=scored).tolist() == expected
    assert next_tokens(ids[:0], torch.tensor([0, 0])).tolist() == []
    assert next_tokens(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    padded = next_tokens(ids[:6].view(2, 3).int(), ignore_index=-1)
    assert padded.tolist() == [[11, 12, -1], [14, 15, -1]]
    assert padded.dtype == torch.int64


@pytest.mark.parametrize("left", [False, True])
def test_flat_equals_padded(left):
    """One loss over sequences, by either layout: value and both gradients, in fp64."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(0, 11, (3, 6), generator=g)
    scored = mask & (torch.rand(3, 6, generator=g) < 0.7) & (mask.cumsum(1) > 1)
    hidden = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64, requires_grad=True)
    advantages, old = (torch.randn(3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    old = old - 2
    loss = PolicyLoss("gspo", normalizer=3)

    def padded(h):
        segments = torch.arange(4) * 6
        batch = dict(advantages=advantages.flatten(), old_logprob=old.flatten())
        target = next_tokens(ids, scored=scored).flatten()
        return fused_linear_loss(h.flatten(0, 1), weight, target, loss, batch=batch, segments=segments)

    def packed(h):
        flat = pack(mask)
        batch = dict(advantages=flat.take(advantages), old_logprob=flat.take(old))
        target = next_tokens(flat.take(ids), flat.cu_seqlens, scored=flat.take(scored))
        return fused_linear_loss(flat.take(h), weight, target, loss, batch=batch, segments=flat.cu_seqlens)

    results = []
    for layout in (padded, packed):
        h = hidden.clone().requires_grad_()
        out = layout(h)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (h, weight))))
    assert results[0][1].abs().sum() > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bad_input_is_named():
    flat = pack(MASK)
    with pytest.raises(ValueError, match=r"mask must be \(B, T\), got \(5,\)"):
        pack(MASK[0])
    with pytest.raises(ValueError, match="mask must be bool"):
        pack(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"mask must be a torch.Tensor, got list"):
        pack([[1, 0]])
    with pytest.raises(ValueError, match=r"padded must be \(B, T, ...\)=\(4, 5, ...\), got \(5, 4\)"):
        flat.take(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"flat must be \(N, ...\) with N=11, got \(10,\)"):
        flat.put(torch.zeros(10))
    with pytest.raises(ValueError, match=r"lengths must be \(B,\) integers, got \(2,\) torch.float32"):
        cu_seqlens(torch.ones(2))
    with pytest.raises(ValueError, match="lengths must not be negative, got -1 in row 1"):
        cu_seqlens(torch.tensor([2, -1]))
    with pytest.raises(ValueError, match=r"ids must be \(B, T\), or \(N,\) with cu_seqlens, got \(3,\)"):
        next_tokens(torch.arange(3))
    with pytest.raises(ValueError, match="cu_seqlens"):
        next_tokens(torch.arange(3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="scored must be ids' shape"):
        next_tokens(torch.zeros(2, 3, dtype=torch.long), scored=torch.ones(3, 2))

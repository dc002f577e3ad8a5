"""What takes the place of TRL's functions, against them and against fp64; and putting it there and taking it back."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
import torch
from _budget import assert_within_budget
from trl_cases import saved, tiny, trainer

from rlhf_fast import reference
from rlhf_fast.integrations import trl as integration
from rlhf_fast.integrations import trl_head
from rlhf_fast.integrations.trl import PatchError, patch, unpatch
from rlhf_fast.ops._head import Head

utils = importlib.import_module("trl.trainer.utils")
THEIRS = utils._ChunkedLogProbFunction
DIVERGENCE = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
FUNCTIONS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
OWN = {name: getattr(utils, name) for name in FUNCTIONS}
N, D, V = 23, 12, 57
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRANSFORMS = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap and scale": (1.3, 5.0, 0.4),
}


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


@pytest.fixture
def ours():
    """Our scorer, from where TRL reads it."""
    with patch():
        yield utils._ChunkedLogProbFunction


def head(dtype, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g) * 2, torch.randn(V, D, generator=g)
    values = [hidden, weight, torch.randn(V, generator=g)] if bias else [hidden, weight]
    target = torch.randint(0, V, (N,), generator=g)
    target[::4] = (hidden @ weight.t())[::4].argmax(-1)  # some are top-1
    return [x.to(dtype).requires_grad_() for x in values] + [None] * (not bias), target


def score(function, inputs, target, transform, outputs=OUTPUTS):
    temperature, softcap, scale = transform
    return function.apply(*inputs, target, temperature, 16, softcap, scale, outputs)


def truth(inputs, target, transform):
    """(outputs, gradients of `cotangent`) by reference formulas in fp64 on the same numbers."""
    temperature, softcap, scale = transform
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    logits = doubles[0] @ doubles[1].t() + (0 if doubles[2] is None else doubles[2])
    options = dict(temperature=temperature, softcap=softcap, logit_scale=scale)
    out = reference.logprob_from_logits(logits, target, entropy=True, **options)
    s = logits * scale
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    extra = (2 * s.log_softmax(-1)).logsumexp(-1), s.mean(-1), s.argmax(-1) == target
    return (out.logprob, out.entropy, *extra), gradients((out.logprob, out.entropy), doubles)


def gradients(outputs, inputs):
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    total = (outputs[0] * weights.to(outputs[0].dtype)).sum() + (
        outputs[1] * weights.flip(0).to(outputs[1].dtype)
    ).sum()
    wanted = [x for x in inputs if x is not None]
    return torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_no_further_from_fp64_than_trls(ours, dtype, bias, transform):
    inputs, target = head(dtype, bias)
    transform = TRANSFORMS[transform]
    want, want_grads = truth(inputs, target, transform)
    theirs, got = score(THEIRS, inputs, target, transform), score(ours, inputs, target, transform)
    for name, w, t, g in zip(OUTPUTS[:4], want, theirs, got, strict=False):
        assert g.dtype == t.dtype == torch.float32
        assert_within_budget(g, t, w, dtype, scale=max(1.0, w.abs().max().item()), name=name)
    if dtype == torch.float32:
        assert torch.equal(got[4], theirs[4])
        assert torch.equal(got[4], want[4])
        assert 0 < int(got[4].sum()) < N
    assert [x.requires_grad for x in got] == [x.requires_grad for x in theirs] == [True, True, False, False, False]
    grads, their_grads = gradients(got, inputs), gradients(theirs, inputs)
    for name, w, t, g in zip(("hidden", "weight", "bias"), want_grads, their_grads, grads, strict=False):
        assert g.dtype == t.dtype == dtype
        scale = max(1.0, w.abs().max().item())
        # both end by rounding a sum to bf16, from either side of it
        rounding = torch.finfo(dtype).eps / 2 * scale if dtype == torch.bfloat16 else 0.0
        assert_within_budget(g, t, w, dtype, scale=scale, rounding=rounding, name=name)


def test_outputs_that_are_not_asked_for_are_none(ours):
    inputs, target = head(torch.float32)
    for outputs in (("log_probs",), ("log_probs", "entropy"), ("log_probs", "is_top1"), ("mean_logits", "entropy")):
        theirs = score(THEIRS, inputs, target, TRANSFORMS["plain"], outputs)
        got = score(ours, inputs, target, TRANSFORMS["plain"], outputs)
        assert [x is None for x in got] == [x is None for x in theirs]
    defaults = ours.apply(*inputs, target, 1.0, 16)
    assert [x is None for x in defaults] == [x is None for x in THEIRS.apply(*inputs, target, 1.0, 16)]


@pytest.mark.parametrize("used", [(0,), (1,)])
def test_cotangents_that_do_not_come(ours, used, monkeypatch):
    inputs, target = head(torch.float32)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    naive = reference.logprob_from_logits(doubles[0] @ doubles[1].t() + doubles[2], target, entropy=True)
    want = torch.autograd.grad(sum((naive[i] ** 2).sum() for i in used), doubles)
    grads = []
    for function in (THEIRS, ours):
        out = score(function, inputs, target, TRANSFORMS["plain"])
        grads.append(torch.autograd.grad(sum((out[i] ** 2).sum() for i in used), inputs))
    for w, a, b in zip(want, *grads, strict=True):
        assert_within_budget(b, a, w, torch.float32, scale=w.abs().max().item())
    rows = []
    monkeypatch.setattr(Head, "backward", lambda *a, **k: rows.append(1))
    out = score(ours, inputs, target, TRANSFORMS["plain"])
    torch.autograd.grad(out[0].sum() * 0 + inputs[0].sum(), inputs[0])
    assert not rows  # a cotangent of zeros: nothing is recomputed


def test_no_rows(ours):
    inputs, _ = head(torch.float32)
    empty = [inputs[0][:0], *inputs[1:]]
    out = score(ours, empty, torch.zeros(0, dtype=torch.long), TRANSFORMS["plain"])
    assert [tuple(x.shape) for x in out] == [(0,)] * 5
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), inputs)
    assert all(bool((g == 0).all()) for g in grads)


def test_frozen_head_and_frozen_hidden(ours):
    (hidden, weight, bias), target = head(torch.float32)
    want = gradients(score(ours, (hidden, weight, bias), target, TRANSFORMS["plain"]), [hidden, weight, bias])
    for keep in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [x if k else x.detach() for x, k in zip((hidden, weight, bias), keep, strict=True)]
        trained = [x for x, k in zip(inputs, keep, strict=True) if k]
        (got,) = gradients(score(ours, inputs, target, TRANSFORMS["plain"]), trained)
        torch.testing.assert_close(got, want[keep.index(True)], rtol=0, atol=0)
    with torch.no_grad():
        assert not score(ours, (hidden, weight, bias), target, TRANSFORMS["plain"])[0].requires_grad


def test_autocast(ours):
    inputs, target = head(torch.float32)
    want, want_grads = truth(inputs, target, TRANSFORMS["plain"])
    with torch.autocast("cpu", torch.bfloat16):
        got = score(ours, inputs, target, TRANSFORMS["plain"])
        logits = torch.nn.functional.linear(*inputs)
    naive = reference.logprob_from_logits(logits, target, entropy=True)
    naive_grads = gradients(naive, inputs)
    grads = gradients(got, inputs)  # autocast is off by now, as in a trainer's backward
    assert got[0].dtype == torch.float32
    largest = logits.abs().max().item()  # each logit is rounded to bf16 once, before or after the bias
    rounding = torch.finfo(torch.bfloat16).eps / 2 * largest
    assert_within_budget(got[0], naive.logprob, want[0], torch.bfloat16, rounding=rounding)
    for name, w, n, g in zip(("hidden", "weight", "bias"), want_grads, naive_grads, grads, strict=True):
        assert g.dtype == torch.float32
        assert_within_budget(g, n, w, torch.bfloat16, scale=w.abs().max().item(), name=name)


def test_a_masked_target_is_not_scored(ours):
    inputs, target = head(torch.float32)
    target[3] = -100
    out = score(ours, inputs, target, TRANSFORMS["plain"])
    assert all(float(x[3]) == 0 for x in out)
    (grad,) = torch.autograd.grad(out[0].sum(), inputs[0])
    assert bool((grad[3] == 0).all())


class ZeRO3:
    """What ZeRO-3 does to parameters, without DeepSpeed: empty but inside a gathering context."""

    def __init__(self, *params):
        self.full = {p: p.data for p in params}
        self.entered = []
        self.partition()

    def install(self, monkeypatch):
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", self.gather)
        monkeypatch.setattr(trl_head, "_zero3", lambda: True)

    def partition(self):
        for p in self.full:
            p.data = torch.empty(0)

    @contextlib.contextmanager
    def gather(self, *params):
        params = [p for p in params if p in self.full]
        self.entered.append(len(params))
        for p in params:
            p.data = self.full[p]
        yield
        self.partition()


def test_zero3_gathers_in_the_backward_too(ours, monkeypatch):
    inputs, target = head(torch.float32)
    want = gradients(score(ours, inputs, target, TRANSFORMS["plain"]), inputs)
    params = [torch.nn.Parameter(x.detach().clone()) for x in inputs[1:]]
    zero = ZeRO3(*params)
    zero.install(monkeypatch)
    with zero.gather(*params):  # TRL's, around the call
        out = score(ours, [inputs[0], *params], target, TRANSFORMS["plain"])
    assert params[0].numel() == 0
    got = gradients(out, [inputs[0], *params])
    assert zero.entered[-1] == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # one of the two keeps its logits


# ---- through TRL's forward ---------------------------------------------------------------------------------------


def ids_and_labels():
    ids = torch.randint(4, 40, (3, 9))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[4], [6], [2]]), -100)
    return ids, labels


def test_masked_positions_reach_no_product_on_the_cpu(monkeypatch):
    rows = []
    monkeypatch.setattr(Head, "logits", lambda self, h, own=Head.logits: rows.append(h.shape[0]) or own(self, h))
    ids, labels = ids_and_labels()
    outs = []
    for patched in (False, True):
        model = tiny()
        utils.add_fused_lm_head(model, outputs=OUTPUTS)
        with patch() if patched else contextlib.nullcontext():
            out = model(ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        outs.append((out, [p.grad for p in model.parameters()]))
    assert sum(rows) == 2 * int((labels[:, 1:] != -100).sum())  # forward, and once more in the backward
    torch.testing.assert_close(outs[1][0].loss, outs[0][0].loss)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"):
        torch.testing.assert_close(outs[1][0][name], outs[0][0][name], rtol=1e-5, atol=1e-5)
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_stays_on_the_graph():
    model = tiny()
    utils.add_fused_lm_head(model)
    ids, _ = ids_and_labels()
    with patch():
        out = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


# ---- the divergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(dtype, beta):
    own, _ = head(dtype)
    teacher, _ = head(dtype, seed=1)
    options = (beta, 0.9, 0.5, 6.0, 0.7, None)
    kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
    doubles = [x.detach().double().requires_grad_() for x in (*own, *teacher)]
    want = reference.linear_divergence(
        *doubles[:2], *doubles[3:5], kind=kind, ref_share=beta if kind == "jsd" else 0.5, bias=doubles[2],
        ref_bias=doubles[5], temperature=0.9, logit_scale=0.5, softcap=6.0,
        ref_options={"logit_scale": 0.7, "softcap": None},
    )  # fmt: skip
    weights = torch.linspace(0.5, 2, N)
    want_grads = torch.autograd.grad((want * weights).sum(), doubles[:3])
    logits = 6 * torch.tanh((doubles[0] @ doubles[1].t() + doubles[2]) * 0.5 / 6) / 0.9
    logp = logits.log_softmax(-1)
    results = []
    for patched in (False, True):
        with patch() if patched else contextlib.nullcontext():
            function = importlib.import_module("trl.trainer.distillation_trainer").ChunkedDivergenceFunction
            assert (function is DIVERGENCE) != patched
            out = function.apply(*own, *teacher, *options)
            results.append((*out, *torch.autograd.grad((out[0] * weights).sum(), own)))
            assert not out[1].requires_grad
    names = ("divergence", "entropy", "hidden", "weight", "bias")
    for name, t, g, w in zip(names, *results, (want, -(logp.exp() * logp).sum(-1), *want_grads), strict=True):
        scale = max(1.0, w.abs().max().item())
        # TRL's products are fp32 here, ours bf16 with oneDNN: one rounding of each logit (up to 6) and of each sum
        rounding = 8 * torch.finfo(dtype).eps * scale if dtype == torch.bfloat16 else 0.0
        assert_within_budget(g, t, w, dtype, scale=scale, rounding=rounding, name=name)


def test_divergence_gathers_both_heads(monkeypatch):
    own, _ = head(torch.float32)
    teacher, _ = head(torch.float32, seed=1)
    with patch():
        function = importlib.import_module("trl.trainer.distillation_trainer").ChunkedDivergenceFunction
        out = function.apply(*own, *teacher, 0.5)
        want = torch.autograd.grad(out[0].sum(), own)
        params = [torch.nn.Parameter(x.detach().clone()) for x in (*own[1:], *teacher[1:])]
        zero = ZeRO3(*params)
        zero.install(monkeypatch)
        got = function.apply(own[0], *params[:2], teacher[0].detach(), *params[2:], 0.5)
        assert torch.equal(got[0], out[0])
        grads = torch.autograd.grad(got[0].sum(), [own[0], *params[:2]])
    assert zero.entered == [4, 4]
    for a, b in zip(grads, want, strict=True):
        assert torch.equal(a, b)


# ---- from logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_log_softmax(dtype, several, sliced):
    logits = (torch.randn(3, 6, V) * 5).to(dtype)
    index = torch.randint(0, V, (3, 5, 4) if several else (3, 5))
    if not sliced:
        logits = logits[:, :-1].contiguous()
    logits.requires_grad_()
    view = logits[:, :-1] if sliced else logits
    mask = torch.rand(index.shape) > 0.3
    double = view.detach().double().requires_grad_()
    logp = (double / 0.8).log_softmax(-1)
    want = logp.gather(-1, index if several else index[..., None]).view(index.shape) * mask
    (want_grad,) = torch.autograd.grad((want**2).sum(), double)
    with patch():
        got = utils.selective_log_softmax(view, index, 0.8, mask)
    theirs = OWN["selective_log_softmax"](view, index, 0.8, mask)
    assert_within_budget(got, theirs, want, dtype, scale=20)
    (grad,) = torch.autograd.grad((got**2).sum(), view)
    (their_grad,) = torch.autograd.grad((theirs.float() ** 2).sum(), view)
    scale = want_grad.abs().max().item()
    rounding = torch.finfo(dtype).eps / 2 * scale if dtype == torch.bfloat16 else 0.0  # both round the result
    assert_within_budget(grad, their_grad, want_grad, dtype, scale=scale, rounding=rounding)
    with pytest.raises(ValueError, match="temperature"), patch():
        utils.selective_log_softmax(view, index, 0.0)
    with pytest.raises(ValueError, match="-100"), patch():
        utils.selective_log_softmax(view, index.fill_(-100))  # TRL's is an IndexError


def test_entropy_and_both_at_once():
    logits = (torch.randn(2, 5, V) * 4).requires_grad_()
    index, mask = torch.randint(0, V, (2, 5)), torch.arange(10).view(2, 5) % 3 > 0
    want = [OWN["selective_log_softmax_and_entropy"](logits, index, True, 0.7, mask)]
    want.append(OWN["entropy_from_logits"](logits))
    with patch():
        got = [utils.selective_log_softmax_and_entropy(logits, index, True, 0.7, mask)]
        got.append(utils.entropy_from_logits(logits, chunk_size=3))
        detached = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((x[0][0].sin() + x[0][1]).sum() + x[1].sum(), logits)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert detached[0].requires_grad
    assert not detached[1].requires_grad


# ---- putting it there, taking it back ----------------------------------------------------------------------------


def foreign() -> list[str]:
    """Names in TRL's modules that hold something of ours."""
    return [
        f"{name}.{key}"
        for name, module in list(sys.modules.items())
        if module is not None and name.partition(".")[0] == "trl"
        for key, value in list(vars(module).items())
        if (getattr(value, "__module__", None) or "").startswith("rlhf_fast")
    ]


def test_every_reference_is_replaced_and_given_back():
    early = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    sys.modules.pop("trl.experimental.sdft.loss_utils", None)
    with patch():
        assert early.selective_log_softmax is utils.selective_log_softmax is not OWN["selective_log_softmax"]
        late = importlib.import_module("trl.experimental.sdft.loss_utils")
        assert late.selective_log_softmax is utils.selective_log_softmax
        assert sys.modules["trl.kernels"].ChunkedLogProbFunction is utils._ChunkedLogProbFunction is not THEIRS
        cpu = torch.device("cpu")
        assert utils._use_triton(cpu)
        assert not sys.modules["trl.kernels.chunked_logprob"]._use_triton(cpu)  # TRL's own kernels know what they are
        assert foreign()
    assert not foreign()
    assert early.selective_log_softmax is late.selective_log_softmax is OWN["selective_log_softmax"]
    assert utils._ChunkedLogProbFunction is THEIRS
    unpatch()  # a second time: nothing to do


def test_twice_is_refused():
    patch()
    with pytest.raises(PatchError, match="patched already"):
        patch()
    assert foreign()


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "selective_log_softmax", "add_fused_lm_head"])
def test_over_somebody_elses_patch_is_refused(monkeypatch, name):
    def theirs():
        """Liger's, say."""

    theirs.__module__ = "liger_kernel.transformers.trl"
    monkeypatch.setattr(utils, name, theirs)
    with pytest.raises(PatchError, match=rf"{name} has been replaced .* liger_kernel\.transformers\.trl"):
        patch()
    assert not foreign()


def test_another_version_or_signature_is_refused(monkeypatch):
    monkeypatch.setattr(integration, "VERSIONS", ">=9")
    with pytest.raises(PatchError, match=r"trl 1\.16\.\d+ is outside >=9"):
        patch()
    patch(any_version=True).undo()

    def forward(ctx, hidden, weight, targets):
        """A later release's."""

    monkeypatch.setattr(THEIRS, "forward", staticmethod(forward))
    with pytest.raises(PatchError, match=r"signature \(ctx, hidden, weight, targets\); .* \(ctx, hidden, weight, bias"):
        patch(any_version=True)
    assert not foreign()


def test_a_release_without_one_of_the_names_is_refused(monkeypatch):
    """TRL 1.15 has no `_use_triton`."""
    import trl.kernels.chunked_logprob as kernel

    monkeypatch.delattr(kernel, "_use_triton")
    with pytest.raises(PatchError, match="not the TRL that the patch knows: cannot import name '_use_triton'"):
        patch(any_version=True)
    assert not foreign()


def test_undo_over_a_later_patch_is_refused(monkeypatch):
    patch()
    with monkeypatch.context() as m:
        m.setattr(utils, "entropy_from_logits", lambda logits, chunk_size=128: None)
        with pytest.raises(PatchError, match="entropy_from_logits has been replaced again"):
            unpatch()


# ---- adapters on the head ----------------------------------------------------------------------------------------


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, lora_alpha=3, init_lora_weights=False, **options)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_lora_on_the_head_is_refused_without_the_patch_only(kind, tmp_path):
    path = saved(tmp_path / "model")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(kind, path, tmp_path, peft_config=lora())
    patch()
    for other in (lora(use_dora=True), lora(lora_dropout=0.1)):
        with pytest.raises(ValueError, match="one plain LoRA adapter without dropout"):
            trainer(kind, path, tmp_path, peft_config=other).train()
    made = trainer(kind, path, tmp_path, peft_config=lora())
    unpatch()
    with pytest.raises(RuntimeError, match="lm_head carries an adapter"):
        made.train()


def test_lora_on_the_head_is_scored_and_trained():
    peft = pytest.importorskip("peft")
    ids, labels = ids_and_labels()
    model = peft.get_peft_model(tiny(torch.float64), lora()).double()
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    scored = labels[:, 1:] != -100
    want = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1).masked_fill(~scored, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    want_grads = torch.autograd.grad((want**2).sum(), trained)
    assert len(trained) == 4
    with patch():
        utils.add_fused_lm_head(model.get_base_model())
        got = model(ids, labels=labels, fused_lm_head=True).log_probs
        grads = torch.autograd.grad((got**2).sum(), trained)
        with model.disable_adapter():
            off = model(ids, labels=labels, fused_lm_head=True).log_probs
        # nothing is left behind for a model without an adapter
        plain = tiny(torch.float64)
        utils.add_fused_lm_head(plain)
        assert torch.equal(plain(ids, labels=labels, fused_lm_head=True).log_probs, off)
        with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
            utils.add_fused_lm_head(model.get_base_model(), cast_lm_head_to_fp32=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(off, got)


def test_lora_on_the_head_under_zero3(monkeypatch):
    peft = pytest.importorskip("peft")
    ids, labels = ids_and_labels()
    model = peft.get_peft_model(tiny(), lora())
    trained = [p for n, p in model.named_parameters() if "lm_head.lora" in n]
    with patch():
        utils.add_fused_lm_head(model.get_base_model())
        want = torch.autograd.grad(model(ids, labels=labels, fused_lm_head=True).loss, trained)
        zero = ZeRO3(*trained)
        zero.install(monkeypatch)
        loss = model(ids, labels=labels, fused_lm_head=True).loss
        assert trained[0].numel() == 0
        for a, b in zip(torch.autograd.grad(loss, trained), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

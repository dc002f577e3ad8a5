"""The losses against TRL's own trainers, called on canned log-probabilities without model or hub. Runs on the CPU.

Where they differ on purpose, the difference is a test too.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from preference_cases import NEEDED, make_pairs

from rlhf_fast.losses import kto_kl, kto_loss, preference_loss, reward_loss

pytest.importorskip("trl", reason="TRL is not installed: its trainers cannot be asked")

# TRL runs in fp32 here; sums of some ten log-probabilities, IPO and SPPO square numbers up to 20.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
KINDS = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]


def accelerator():
    return SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
    )


def trainer(cls, **attributes):
    """A trainer that has only what its loss reads."""
    it = cls.__new__(cls)
    it.model = SimpleNamespace(training=True)
    it.accelerator, it.aux_loss_enabled, it.precompute_ref_logps = accelerator(), False, True
    it._metrics, it._total_train_tokens, it._tp_size = defaultdict(lambda: defaultdict(list)), 0, 1
    for name, value in attributes.items():
        setattr(it, name, value)
    return it


def outputs_of(tokens, lss):
    zeros = torch.zeros_like(tokens)
    more = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_sum_sq_probs": lss}
    return SimpleNamespace(log_probs=tokens, **more)


def trl_dpo(pairs, kinds, weights=None, *, beta=0.1, smoothing=0.0, divergence="reverse_kl", ld_alpha=None, wpo=False):
    from trl import DPOTrainer

    width = max(pairs.chosen.shape[1], pairs.rejected.shape[1])

    def stack(both, fill):
        padded = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in both]
        return torch.cat(padded)

    mask = stack(pairs.mask, False)
    clean = [torch.where(m, x, 0) for x, m in zip(pairs[:4], pairs.mask * 2, strict=True)]
    tokens = stack(clean[:2], 0.0).requires_grad_()
    refs = [x.clone() for x in (clean[2].sum(1), clean[3].sum(1))]
    if ld_alpha is not None:  # TRL wants precomputed references desensitised
        shared = torch.minimum(*pairs.lengths())[:, None]
        refs = [(r * torch.where(m.cumsum(1) > shared, ld_alpha, 1.0)).sum(1)
                for r, m in zip(clean[2:], pairs.mask, strict=True)]  # fmt: skip
    first = torch.zeros(len(mask), 1, dtype=torch.long)  # TRL shifts: the first position is nobody's target
    inputs = {
        "input_ids": torch.cat([first, torch.ones_like(mask, dtype=torch.long)], 1),
        "attention_mask": torch.cat([first, mask.long()], 1),
        "completion_mask": torch.cat([first, mask.long()], 1),
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
    }
    it = trainer(
        DPOTrainer, loss_types=kinds, loss_weights=weights or [1.0] * len(kinds), beta=beta, ld_alpha=ld_alpha,
        label_smoothing=smoothing, f_divergence_type=divergence, f_alpha_divergence_coef=0.5, use_weighting=wpo,
        args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    lss = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    loss = it._compute_loss(lambda **_: outputs_of(tokens, lss), inputs, False)
    loss.backward()
    metrics = {name: values[0] for name, values in it._metrics["train"].items()}
    # the model gives 0 at positions that are not scored: their gradient ends there
    grads = [g[:, : m.shape[1]] * m for g, m in zip(tokens.grad.chunk(2), pairs.mask, strict=True)]
    return loss.detach(), grads, metrics, [s[:, : x.shape[1]] for s, x in zip(lss.chunk(2), pairs[:2], strict=True)]


def ours(pairs, **options):
    chosen, rejected = (x.clone().requires_grad_() for x in pairs[:2])
    loss, metrics = preference_loss(chosen, rejected, *pairs[2:4], mask=pairs.mask, **options)
    loss.backward()
    return loss.detach(), [chosen.grad, rejected.grad], metrics


def compare(mine, theirs):
    torch.testing.assert_close(mine[0], theirs[0], **CLOSE)
    for a, b in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, **CLOSE)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert float(mine[2][name]) == pytest.approx(theirs[2][name], rel=1e-4, abs=1e-6), name


def short(seed=0):
    """fp32 pairs whose masks have no holes, as TRL's completions."""
    pairs = make_pairs(pairs=4, seed=seed, dtype=torch.float32)
    filled = [x.nan_to_num(nan=-1.5) for x in pairs[:4]]
    lengths = [torch.tensor([3, 7, 2, 5]), torch.tensor([9, 4, 2, 6])]
    masks = tuple(torch.arange(x.shape[1]) < n[:, None] for x, n in zip(filled, lengths, strict=False))
    return pairs._replace(
        chosen=filled[0], rejected=filled[1], ref_chosen=filled[2], ref_rejected=filled[3], mask=masks
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("ipo", "sigmoid_norm", "sft")])
def test_dpo_kinds(kind, beta):
    e = NEEDED.get(kind, {}).get("label_smoothing", 0.0)
    compare(ours(short(), kind=kind, beta=beta, label_smoothing=e), trl_dpo(short(), [kind], beta=beta, smoothing=e))


@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm"])
def test_length_averages(kind):
    compare(ours(short(), kind=kind), trl_dpo(short(), [kind]))


def test_sft():
    mine, theirs = ours(short(), kind="sft"), trl_dpo(short(), ["sft"])
    torch.testing.assert_close(mine[0], theirs[0], **CLOSE)
    torch.testing.assert_close(mine[1][0], theirs[1][0], **CLOSE)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "discopop"])
def test_f_divergences(kind, divergence):
    e = NEEDED.get(kind, {}).get("label_smoothing", 0.0)
    mine = ours(short(), kind=kind, f_divergence=divergence, label_smoothing=e, beta=0.02)
    theirs = trl_dpo(short(), [kind], divergence=divergence, smoothing=e, beta=0.02)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)  # exp(12) of fp32 sums
    for a, b in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mixes():
    weights = [0.8, 0.2, 1.0]
    mine = ours(short(), kind=["sigmoid", "bco_pair", "sft"], loss_weights=weights)
    compare(mine, trl_dpo(short(), ["sigmoid", "bco_pair", "sft"], weights))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_alpha(alpha):
    for kind in ("sigmoid", "ipo"):
        compare(ours(short(), kind=kind, ld_alpha=alpha), trl_dpo(short(), [kind], ld_alpha=alpha))


def test_wpo_weighting():
    theirs = trl_dpo(short(), ["sigmoid"], wpo=True)
    compare(ours(short(), kind="sigmoid", weighting="wpo", log_sum_sq=tuple(theirs[3])), theirs)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorting_kinds_with_label_smoothing(kind):
    compare(ours(short(), kind=kind, label_smoothing=0.2), trl_dpo(short(), [kind], smoothing=0.2))


def test_difference_label_smoothing_of_sigmoid():
    """TRL ignores it; ours is conservative DPO."""
    plain = trl_dpo(short(), ["sigmoid"], smoothing=0.2)[0]
    torch.testing.assert_close(ours(short(), kind="sigmoid")[0], plain, **CLOSE)
    assert ours(short(), kind="sigmoid", label_smoothing=0.2)[0] != pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize("labels", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(kind, labels):
    from trl import KTOTrainer

    pairs = short(seed=3)
    mask, first = pairs.mask[0], torch.zeros(4, 1, dtype=torch.long)
    tokens = torch.where(mask, pairs.chosen, 0).requires_grad_()
    ref = torch.where(mask, pairs.ref_chosen, 0).sum(1)
    kl = torch.tensor([-3.0, -4.0, -2.5, -6.0]), torch.tensor([-5.0, -3.0, -2.0, -7.5])
    it = trainer(KTOTrainer, loss_type=kind, beta=0.2, desirable_weight=1.2, undesirable_weight=0.6,
                 calculate_KL=kind == "kto", _compute_kl_logps=lambda *_: kl[0])  # fmt: skip
    batch = {
        "input_ids": torch.cat([first, torch.ones_like(mask, dtype=torch.long)], 1),
        "attention_mask": torch.cat([first, mask.long()], 1),
        "completion_mask": torch.cat([first, mask.long()], 1),
        "label": torch.tensor(labels, dtype=torch.bool),
        "ref_logps": ref,
        "ref_KL_logps": kl[1],
    }
    theirs = it._compute_loss(lambda **_: outputs_of(tokens, torch.zeros_like(tokens)), batch, False)
    theirs.backward()
    logprob = tokens.detach().clone().requires_grad_()
    mine, _ = kto_loss(
        logprob.sum(1), ref, batch["label"], kl=kto_kl(*kl), kind=kind, beta=0.2, desirable_weight=1.2,
        undesirable_weight=0.6,
    )  # fmt: skip
    mine.backward()
    torch.testing.assert_close(mine.detach(), theirs.detach(), **CLOSE)
    torch.testing.assert_close(logprob.grad * mask, tokens.grad * mask, **CLOSE)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 1.0])])
@pytest.mark.parametrize("center", [None, 0.01])
def test_reward(margin, center):
    from trl import RewardTrainer

    scores = torch.randn(6, generator=torch.Generator().manual_seed(2))
    it = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(6, 2), **({} if margin is None else {"margin": margin})}
    model = lambda **_: SimpleNamespace(logits=scores[:, None])  # noqa: E731
    theirs = it.compute_loss(model, dict(inputs))
    mine, metrics = reward_loss(scores[:3], scores[3:], margin=margin, center=center or 0.0)
    torch.testing.assert_close(mine, theirs, **CLOSE)
    assert float(metrics["rewards/margins"]) == pytest.approx(it._metrics["train"]["margin"][0], rel=1e-5)


def test_cpo_and_simpo():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="this TRL has no CPO trainer")
    pairs = short()
    chosen, rejected, *_ = pairs.sums()
    lengths = pairs.lengths()
    options = {"alpha": 0.0, "beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.7}
    mine = preference_loss(chosen, rejected, kind="cpo", lengths=lengths, beta=0.3, label_smoothing=0.1, nll_weight=0.0)
    it = trainer(cpo.CPOTrainer, loss_type="sigmoid", **options)
    torch.testing.assert_close(mine.loss, it.cpo_loss(chosen, rejected)[0].mean(), **CLOSE)
    mine = preference_loss(chosen, rejected, kind="simpo", lengths=lengths, beta=0.3, label_smoothing=0.1,
                           simpo_gamma=0.7)  # fmt: skip
    it = trainer(cpo.CPOTrainer, loss_type="simpo", **options)
    theirs, win, _ = it.cpo_loss(chosen / lengths[0], rejected / lengths[1])
    torch.testing.assert_close(mine.loss, theirs.mean(), **CLOSE)
    torch.testing.assert_close(mine.metrics["rewards/chosen"], win.mean(), **CLOSE)


def test_orpo():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="this TRL has no ORPO trainer")
    pairs = short()
    (chosen, rejected, *_), lengths = pairs.sums(), pairs.lengths()
    it = trainer(orpo.ORPOTrainer, beta=0.3)
    ratio = it.odds_ratio_loss(chosen / lengths[0], rejected / lengths[1])[0]
    nll = -chosen.sum() / lengths[0].sum()
    mine = preference_loss(chosen, rejected, kind="orpo", lengths=lengths, beta=0.3).loss
    torch.testing.assert_close(mine, nll - ratio.mean(), **CLOSE)

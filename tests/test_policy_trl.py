"""Against TRL's own loss code, every loss_type and the options it shares with ours. Skipped without trl. CPU."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from policy_cases import make_batch

from rlhf_fast.losses import policy_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
Trainer = grpo_trainer.GRPOTrainer
if not hasattr(Trainer, "_compute_loss"):
    pytest.skip("this trl has no GRPOTrainer._compute_loss", allow_module_level=True)

MAX_LENGTH = 20
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
# TRL's loss_type, our kind and what it takes to be the same formula
LOSS_TYPES = {
    "grpo": ("grpo", CLIP),
    "bnpo": ("bnpo", CLIP),
    "dr_grpo": ("dr_grpo", {**CLIP, "max_length": MAX_LENGTH}),
    "dapo": ("dapo", CLIP),
    "luspo": ("luspo", CLIP),
    "cispo": ("cispo", {"clip_high": 1.3}),
    "sapo": ("sapo", {"temperature_neg": 1.0625}),  # TRL rounds the number to fp32: one that survives it
    "vespo": ("vespo", {}),
}


class _Accelerator:
    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def pad_across_processes(self, x, **_):
        return x

    def reduce(self, x, reduction):
        return x


class FakeTrainer(SimpleNamespace):
    """What TRL's loss reads from its trainer."""

    get_off_policy_mask = staticmethod(Trainer.get_off_policy_mask)
    get_gamma_weights = staticmethod(Trainer.get_gamma_weights)
    get_high_entropy_mask = Trainer.get_high_entropy_mask

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logprob, self.entropy, None


def trl_loss(
    batch, loss_type, level, *, beta=0.0, delta=None, bias=False, top=1.0, threshold=None, bonus=0.0, ratio=None
):
    """(loss, metrics) of TRL's method on our tensors; lengths are the mask's."""
    args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=bias, sapo_temperature_pos=1.0, sapo_temperature_neg=1.0625,
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=1,
    )  # fmt: skip
    trainer = FakeTrainer(
        logprob=batch["logprob"], entropy=batch["entropy"], args=args, accelerator=_Accelerator(), loss_type=loss_type,
        importance_sampling_level=level, beta=beta, epsilon_low=0.2, epsilon_high=1.3 if loss_type == "cispo" else 0.2,
        top_entropy_quantile=top, off_policy_mask_threshold=threshold, use_vllm=ratio is not None,
        vllm_importance_sampling_correction=True, max_completion_length=MAX_LENGTH, entropy_coef=bonus,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=bonus != 0, use_adaptive_entropy=False,
        aux_loss_enabled=False, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    mask = batch["mask"].to(batch["logprob"].dtype)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": batch["advantages"], "old_per_token_logps": batch["old_logprob"],
        "ref_per_token_logps": batch["ref_logprob"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if ratio is not None:
        inputs |= {"importance_sampling_ratio": ratio, "sampling_per_token_logps": batch["rollout_logprob"]}
    loss = Trainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def compare(loss_type, theirs: dict, level="token", with_rollout=False, **ours):
    batch = make_batch((7, 1, 3, 12, 5), seed=6, spread=0.4)
    batch["entropy"] = batch["entropy"].float().double()  # TRL takes the quantile in fp32
    kind, options = LOSS_TYPES[loss_type]
    grads, losses = [], []
    for is_trl in (True, False):
        b = dict(batch)
        b["logprob"] = batch["logprob"].clone().requires_grad_()
        b["entropy"] = batch["entropy"].clone().requires_grad_()
        if is_trl:
            loss, trl_metrics = trl_loss(b, loss_type, level, **theirs)
        else:
            loss, metrics = policy_loss(
                b["logprob"], b["old_logprob"], b["advantages"], kind=kind, mask=b["mask"],
                ref_logprob=b["ref_logprob"], entropy=b["entropy"],
                rollout_logprob=b["rollout_logprob"] if with_rollout else None,
                **{**options, "importance_level": level, **ours},
            )  # fmt: skip
        got = torch.autograd.grad(loss, [b["logprob"], b["entropy"]], allow_unused=True)
        grads.append([torch.zeros_like(batch["logprob"]) if g is None else g for g in got])
        losses.append(loss.detach())
    # fp64, the same formula summed in another order
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-13)
    return trl_metrics, metrics


LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])


@LEVELS
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_plain(loss_type, level):
    compare(loss_type, {}, level)


@LEVELS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_kl(loss_type, bias, level):
    compare(loss_type, {"beta": 0.1, "bias": bias}, level, beta=0.1, kl_correction=bias)


@LEVELS
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_delta(loss_type, level):
    compare(loss_type, {"delta": 1.5}, level, delta=1.5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_and_top_entropy(loss_type):
    compare(loss_type, {"bonus": 0.03, "top": 0.43}, entropy_coef=0.03, top_entropy=0.43)
    compare(loss_type, {"bonus": 0.03}, entropy_coef=0.03)
    compare(loss_type, {"top": 0.0}, top_entropy=0.0)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy_mask(loss_type, threshold):
    compare(loss_type, {"threshold": threshold}, off_policy_threshold=threshold)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rollout_correction(loss_type, mode):
    """TRL forms the ratio while it generates, not in a method: its documented modes, written out here."""
    batch = make_batch((7, 1, 3, 12, 5), seed=6, spread=0.4)
    gap = (batch["old_logprob"] - batch["rollout_logprob"]) * batch["mask"]
    ratio = gap.sum(1, keepdim=True).exp() if mode.startswith("sequence") else gap.exp()
    outside = (ratio < 0.5) | (ratio > 1.4)
    ratio = ratio.clamp(0.5, 1.4) if mode.endswith("truncate") else ratio.masked_fill(outside, 0.0)
    compare(
        loss_type, {"ratio": ratio, "threshold": 0.2}, with_rollout=True, correction=mode, correction_min=0.5,
        correction_max=1.4, off_policy_threshold=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_metrics(loss_type):
    theirs, ours = compare(loss_type, {"beta": 0.1}, beta=0.1)
    pairs = {"kl": "kl", "entropy": "entropy"}
    if loss_type == "cispo":
        pairs["cispo_clip_ratio"] = "clip_fraction"
    else:
        pairs |= {
            "clip_ratio/low_mean": "clip_fraction_low", "clip_ratio/high_mean": "clip_fraction_high",
            "clip_ratio/region_mean": "clip_fraction",
        }  # fmt: skip
    for trl_name, name in pairs.items():
        assert ours[name].item() == pytest.approx(theirs[trl_name], rel=1e-6), name  # TRL counts in fp32

"""TRL's GRPOTrainer with its loss formed where the model calls its head: three products with it instead of four.

The gradient of a policy loss by the log-probabilities is known as soon as these are, so the tile of logits becomes its
own gradient before it is thrown away (`fused_linear_loss`). TRL's code still builds the model's inputs, and still
computes its loss from the log-probabilities: that value is compared with ours in every step, and its metrics are TRL's.
"""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rlhf_fast.integrations._patching import PatchError, check_version
from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.integrations.trl import VERSIONS
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops.kl import MAX_LOG_RATIO
from rlhf_fast.types import FusedLoss

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
BY_TOKENS = ("dapo", "cispo", "vespo")  # normalised by the tokens of the whole generation batch
KNOWN = {  # what the value of the loss is made by
    "_compute_loss": "(self, model, inputs)",
    "get_off_policy_mask": "(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)",
    "get_gamma_weights": "(advantages, log_ratio_per_token, mask, importance_sampling_ratio, k_pos=2.0, "
    "lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)",
}
PER_TOKEN = {
    "old_per_token_logps": "old_logprob",
    "ref_per_token_logps": "ref_logprob",
    "sampling_per_token_logps": "rollout_logprob",
}


class GRPOLossMixin:
    """Before a GRPOTrainer of TRL 1.16 among the bases: `class Mine(GRPOLossMixin, GRPOTrainer)`.

    Every `loss_type` of TRL 1.16 (grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, vespo), both importance sampling
    levels, beta, delta, the entropy bonus, off-policy masks and vLLM's importance correction. What needs more than one
    pass takes TRL's own road, with a warning that says what: see `own_road`. Gradients are those of TRL's loss, but
    for log-ratios beyond 20, where ours are clamped.

    Raises: PatchError on another release of TRL (`any_version = True` on the class leaves it to the signatures), or a
        base that has changed TRL's loss; RuntimeError when TRL computes another loss from the same log-probabilities.
    """

    any_version = False

    def __init__(self, *args: Any, **kwargs: Any):
        _check_host(type(self))
        self._single_pass: _SinglePass | None = None
        self.own_road: str | None = "the trainer is being made"
        super().__init__(*args, **kwargs)
        self.own_road = _needs_own_road(self)
        if self.own_road is None:
            fuse_lm_head(self.model)
        else:
            warnings.warn(f"{type(self).__name__} takes TRL's own loss: {self.own_road}", stacklevel=2)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.own_road is not None:
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        inputs = inputs | {  # what is not scored is 0 on both sides, so that no exp of it overflows
            key: torch.where(mask.bool(), inputs[key], 0) for key in PER_TOKEN if inputs.get(key) is not None
        }
        self._single_pass = once = _SinglePass(_loss(self), _batch(self, inputs, mask), mask, self.temperature)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._single_pass = None
        _check_value(self, value, once.result, inputs["advantages"], mask.shape[1])
        return once.result.loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._single_pass is not None:
            self._single_pass.model = model
            model = self._single_pass
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


class FastGRPOTrainer(GRPOLossMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the single-pass loss. Call `patch()` too, and the old and the reference policy's
    log-probabilities are ours as well."""

    _tag_names = [*GRPOTrainer._tag_names, "rlhf-fast"]


class _SinglePass:
    """Called by TRL in the model's place: one forward with the loss in it; TRL gets the log-probabilities, constant."""

    def __init__(self, loss_fn: PolicyLoss, batch: dict[str, Any], mask: Tensor, temperature: float):
        self.loss_fn, self.batch, self.mask, self.temperature = loss_fn, batch, mask, temperature
        self.model: Any = None
        self.result: FusedLoss | None = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> SimpleNamespace:
        rows, length = labels.shape
        first = length - self.mask.shape[1]  # the first completion token, predicted one position before
        target = torch.full_like(labels, -100)
        target[:, first - 1 : -1] = labels[:, first:].masked_fill(self.mask == 0, -100)
        batch = {
            key: torch.nn.functional.pad(value, (first - 1, 1)) if value.shape == self.mask.shape else value
            for key, value in self.batch.items()
        }
        self.result = self.model(
            **model_inputs,
            target_ids=target,
            loss_fn=self.loss_fn,
            batch=batch,
            segments=torch.arange(rows + 1, device=labels.device) * length,
            entropy=True,
            temperature=self.temperature,
        )
        logprob, entropy = self.result.logprob[:, :-1], self.result.entropy[:, :-1]
        return SimpleNamespace(log_probs=logprob, entropy=entropy, aux_loss=None)


def _loss(trainer: GRPOTrainer) -> PolicyLoss:
    """TRL's options under our names."""
    args, kind = trainer.args, trainer.loss_type
    options: dict[str, Any] = dict(importance_level=trainer.importance_sampling_level)
    if kind in CLIPPED:
        options |= dict(clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high, delta=args.delta)
    elif kind == "cispo":
        options |= dict(clip_high=trainer.epsilon_high)
    elif kind == "sapo":
        options |= dict(temperature_pos=args.sapo_temperature_pos, temperature_neg=args.sapo_temperature_neg)
    else:
        options |= {name: getattr(args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    if kind == "dr_grpo":
        options |= dict(max_length=trainer.max_completion_length)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
        options |= dict(correction=trainer.vllm_importance_sampling_mode, correction_min=low)
        options |= dict(correction_max=math.inf if high is None else high)
    return PolicyLoss(
        kind,
        beta=trainer.beta,
        kl_correction=args.use_bias_correction_kl,
        entropy_coef=_entropy_coef(trainer),
        off_policy_threshold=trainer.off_policy_mask_threshold,
        **options,
    )


def _entropy_coef(trainer: GRPOTrainer) -> float:
    """The coefficient of this step: the adaptive controller switches the bonus off above its target."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef


def _batch(trainer: GRPOTrainer, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """What the loss takes beside the log-probabilities: per token (B, C) or per sequence (B,), and its counts."""
    train = trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if train else 1
    tokens = mask.sum().clamp(min=1)
    if trainer.loss_type in BY_TOKENS:
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if train:
            normalizer = normalizer * steps / trainer.args.steps_per_generation
    else:
        normalizer = (tokens if trainer.loss_type == "bnpo" else mask.shape[0]) * steps
    advantages = inputs["advantages"]
    if advantages.shape == (mask.shape[0], 1):
        advantages = advantages.squeeze(1)
    number = lambda x: torch.as_tensor(x, dtype=torch.float64, device=mask.device)  # noqa: E731
    batch = dict(advantages=advantages, normalizer=number(normalizer), entropy_normalizer=number(tokens * steps))
    return batch | {name: inputs[key] for key, name in PER_TOKEN.items() if inputs.get(key) is not None}


def _check_host(cls: type) -> None:
    from rlhf_fast.integrations._patching import _signature

    if not cls.any_version:
        check_version("trl", VERSIONS)
    for name, expected in KNOWN.items():
        got = _signature(getattr(GRPOTrainer, name), name)
        if got != expected:
            raise PatchError(f"GRPOTrainer.{name} has the signature {got}; the single-pass loss knows {expected}")
        bases = cls.__mro__[cls.__mro__.index(GRPOLossMixin) + 1 :]
        owner = next((base for base in bases if name in vars(base)), None)
        if owner is not GRPOTrainer:
            raise PatchError(
                f"{cls.__name__}: the loss must be that of trl.GRPOTrainer, but {name} is "
                f"{'missing' if owner is None else 'that of ' + owner.__name__}"
            )


def _needs_own_road(trainer: GRPOTrainer) -> str | None:
    """What stands against a single pass; None: nothing."""
    config = getattr(trainer.model, "active_peft_config", None)
    reasons = {
        f"loss_type {trainer.loss_type!r} is not one of {', '.join(LOSS_TYPES)}": trainer.loss_type not in LOSS_TYPES,
        "top_entropy_quantile < 1 needs the entropy of all tokens before the loss of any": (
            trainer.top_entropy_quantile < 1.0
        ),
        "the model's load-balancing loss (router_aux_loss_coef) comes with TRL's forward": trainer.aux_loss_enabled,
        "cast_lm_head_to_fp32 mixes dtypes at the head": trainer.args.cast_lm_head_to_fp32,
        "prompt learning adds positions to the sequences": getattr(config, "is_prompt_learning", False),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _check_value(trainer: GRPOTrainer, value: Tensor, ours: FusedLoss, advantages: Tensor, length: int) -> None:
    """Raise unless TRL's own code has made the same loss of the same log-probabilities."""
    ratio = float(ours.metrics.get("ratio_max", 0.0))  # none where nothing is scored
    if not ratio < 0.99 * math.exp(MAX_LOG_RATIO):  # NaN, or clamped here and not there
        return
    size = advantages.abs().max().item() * max(ratio, 1.0) * (length if trainer.loss_type == "luspo" else 1)
    theirs, mine = value.item(), ours.loss.item()
    if not math.isclose(theirs, mine, rel_tol=1e-3, abs_tol=1e-4 * size + 1e-6) and theirs == theirs:
        raise RuntimeError(
            f"TRL makes the loss {theirs:.6g} of the log-probabilities of which the single pass makes {mine:.6g}: this "
            "release or a subclass computes something else; use trl.GRPOTrainer with patch()"
        )

"""LLaMA-Factory's preference stages without logits: `patch()`, `unpatch()`, or `with patch(): ...`.

    get_batch_logps                         from logits that exist: one read of them instead of a log-softmax
    CustomDPOTrainer.concatenated_forward   DPO, ORPO, SimPO ...: the model's fused head, logits never formed
    CustomKTOTrainer.forward                the same for KTO

Both forwards stay LLaMA-Factory's own: they are handed a model whose logits are a promise, and `get_batch_logps`, which
knows the labels, makes the call. The logged logits/chosen and logits/rejected are NaN: there are no logits to average.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.integrations._patching import Patch, PatchError, Replace
from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.ops.from_logits import logprob_from_logits

VERSIONS = ">=0.9.5,<0.10"
IGNORE = -100


def patch(*, any_version: bool = False) -> Patch:
    """Put our functions in the place of LLaMA-Factory's; undone by `unpatch()`, or by leaving a `with` block.

    Call it before or after trainers are made. The head of a trainer's model is fused at its first batch; the model's
    forward without `target_ids` stays as it is.

    Args:
        any_version: accept other releases if every signature is the known one.
    Returns: the patch, a context manager.
    Raises: PatchError, and nothing is changed, when LLaMA-Factory is missing or of another version, when a signature is
        not the known one, when somebody else has replaced a symbol, or when the patch is in place already. In training,
        TypeError or ValueError for a model whose head cannot be fused; see `fuse_lm_head`.
    """
    return PATCH.apply(any_version=any_version)


def unpatch() -> None:
    """Take `patch` back."""
    PATCH.undo()


class _Promise:
    """The logits of a forward that has not been made, as far as LLaMA-Factory looks at them."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]):
        self.model, self.inputs = model, inputs

    def to(self, *_: Any, **__: Any) -> _Promise:
        return self

    def logprob(self, target: Tensor) -> Tensor:
        return self.model(**self.inputs, target_ids=target).logprob

    def split(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self[0], self[1]

    def __getitem__(self, _: Any) -> Tensor:
        return torch.tensor([torch.inf, -torch.inf])  # NaN as a mean, and as a sum that skips NaN


class _Promising:
    """A model that promises its logits."""

    def __init__(self, trainer: Any, model: nn.Module):
        fuse_lm_head(trainer.accelerator.unwrap_model(model))
        self.model = model

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=_Promise(self.model, inputs))


def get_batch_logps(
    logits: Tensor | _Promise, labels: Tensor, label_pad_token_id: int = IGNORE, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probabilities summed over each row's labels (B,), number of labels (B,)); position i predicts label i + 1.

    ld_alpha: of both rows of a pair (the first half of the batch is chosen), what lies beyond as many positions from
    the first label as the shorter one has labels weighs ld_alpha.
    """
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=label_pad_token_id)
    mask = target != label_pad_token_id
    target = target.masked_fill(~mask, IGNORE)
    if isinstance(logits, _Promise):
        logprob = logits.logprob(target)
    else:
        if logits.shape[:-1] != labels.shape:
            raise ValueError("Logits (batchsize x seqlen) and labels must have the same shape.")
        logprob = logprob_from_logits(logits, target).logprob
    lengths = mask.sum(-1)
    if ld_alpha is not None:
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        public = mask.int().argmax(1) + shorter
        position = torch.arange(mask.shape[1], device=mask.device)
        logprob = torch.where(position < public[:, None], logprob, ld_alpha * logprob)
    return logprob.sum(-1), lengths


def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False) -> dict:
    """`CustomDPOTrainer.concatenated_forward` without logits."""
    return _PAIRS.original(self, _Promising(self, model), batch, is_ref_model)


def kto_forward(self: Any, model: nn.Module, batch: dict[str, Any], prefix: str = "") -> tuple[Any, Tensor, Tensor]:
    """`CustomKTOTrainer.forward` without logits."""
    return _KTO.original(self, _Promising(self, model), batch, prefix)


_PAIRS = Replace(
    "llamafactory.train.dpo.trainer",
    "CustomDPOTrainer.concatenated_forward",
    concatenated_forward,
    {"": "(self, model, batch, is_ref_model=False)"},
)
_KTO = Replace(
    "llamafactory.train.kto.trainer", "CustomKTOTrainer.forward", kto_forward, {"": "(self, model, batch, prefix='')"}
)
PATCH = Patch(
    "llamafactory",
    VERSIONS,
    [
        Replace(
            "llamafactory.train.trainer_utils",
            "get_batch_logps",
            get_batch_logps,
            {"": "(logits, labels, label_pad_token_id=-100, ld_alpha=None)"},
        ),
        _PAIRS,
        _KTO,
    ],
)

__all__ = ["PATCH", "PatchError", "patch", "unpatch"]

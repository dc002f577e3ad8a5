"""TRL with our scorers: one call, and the same call taken back.

    from rlhf_fast.integrations import trl
    trl.patch()                        # until trl.unpatch()
    with trl.patch(): ...              # or inside the block

SFT, DPO, KTO, GRPO and RLOO of TRL 1.16 score tokens through one autograd function, which they look up when they call
it; it is replaced, so trainers that exist already are served too. Also the distillation trainer's divergence, and
`selective_log_softmax`, `entropy_from_logits` and `selective_log_softmax_and_entropy` wherever TRL has imported them.
Masked positions are left out on the CPU as well, and `lm_head` may carry a LoRA adapter, which TRL refuses.

`FastGRPOTrainer` goes further: TRL's GRPOTrainer whose loss is formed in one pass, three products instead of four.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from rlhf_fast.integrations._patching import Expect, Patch, PatchError, Replace, check_version

__all__ = ["PatchError", "patch", "unpatch"]  # and, made when first asked for: FastGRPOTrainer, GRPOLossMixin

VERSIONS = ">=1.16,<1.17"
UTILS, DISTILLATION = "trl.trainer.utils", "trl.trainer.distillation_trainer"
TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "kto", "grpo", "rloo"))

_patch: Patch | None = None


def patch(*, any_version: bool = False) -> Patch:
    """Put our scorers in the place of TRL's; undone by `unpatch()`, or by leaving a `with` block.

    Call it before or after trainers are made; for LoRA on `lm_head` before, since TRL's trainers refuse it when they
    are made. Models keep nothing of it, but for those whose head carries an adapter: they raise when they run without.

    Args:
        any_version: accept TRL releases other than 1.16 if every signature is the known one.
    Returns: the patch, a context manager.
    Raises: PatchError, and nothing is changed, when TRL is missing or of another version, when a signature is not the
        known one (the message has both), when somebody else (Liger, say) has replaced a symbol, or when it is in
        place already.
    Example:
        >>> with patch():  # doctest: +SKIP
        ...     trl.DPOTrainer(model, args=args, train_dataset=pairs).train()
    """
    global _patch
    if _patch is not None and _patch.active:
        raise PatchError("trl is patched already: call unpatch() first")
    if importlib.util.find_spec("trl") is None:
        raise PatchError("trl is not installed")
    if not any_version:
        check_version("trl", VERSIONS)  # before anything of it is imported: other releases lack some of the names
    try:
        changes = list(_changes())
    except ImportError as error:
        raise PatchError(f"this is not the TRL that the patch knows: {error}") from error
    _patch = Patch("trl", VERSIONS, changes).apply(any_version=any_version)
    return _patch


def unpatch() -> None:
    """Give TRL its own functions back. Nothing to do when they are there."""
    if _patch is not None:
        _patch.undo()


class ReplaceHere(Replace):
    """A replacement in the named module alone: what other modules hold under that name serves another purpose."""

    def _holders(self, value: Any) -> Iterator[tuple[Any, str]]:
        yield self._owner()


def _changes() -> Iterator[Replace | Expect]:
    """Everything that the patch touches or counts on. Imports TRL."""
    from rlhf_fast.integrations import trl_head as ours

    yield Expect(UTILS, "maybe_gather_lm_head_ctx", {"": "(*params)"})
    yield Replace(
        UTILS,
        "_ChunkedLogProbFunction",
        ours.ChunkedLogProb,
        {
            "forward": "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
            "logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))"
        },
        origin="trl.kernels.chunked_logprob",
    )
    yield Replace(
        "trl.kernels.chunked_divergence",
        "ChunkedDivergenceFunction",
        ours.ChunkedDivergence,
        {
            "forward": "(ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, "
            "teacher_bias, beta, temperature=1.0, student_logit_scale=1.0, student_final_logit_softcapping=None, "
            "teacher_logit_scale=1.0, teacher_final_logit_softcapping=None)"
        },
    )
    for new, signature in (
        (ours.selective_log_softmax, "(logits, index, temperature=1.0, row_mask=None)"),
        (ours.entropy_from_logits, "(logits, chunk_size=128)"),
        (
            ours.selective_log_softmax_and_entropy,
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
        ),
    ):
        yield Replace(UTILS, new.__name__, new, {"": signature})
    from trl.kernels.chunked_logprob import _use_triton

    for module in (UTILS, DISTILLATION):
        new = ours.scored_rows_only(_use_triton)
        yield ReplaceHere(module, "_use_triton", new, {"": "(device)"}, origin="trl.kernels.chunked_logprob")
    yield from _adapter_changes(ours)


def _adapter_changes(ours: Any) -> Iterator[Replace]:
    """LoRA on the head: TRL's refusal lifted where our function is what scores."""
    if importlib.util.find_spec("peft") is None:
        return
    from trl.trainer.utils import add_fused_lm_head

    signature = "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))"
    yield Replace(UTILS, "add_fused_lm_head", ours.with_adapters(add_fused_lm_head), {"": signature})
    refused = ours.refused_adapter()
    for module in TRAINERS:
        yield ReplaceHere(module, "BaseTunerLayer", refused, {}, origin="peft.tuners.tuners_utils")


def __getattr__(name: str) -> Any:
    """`FastGRPOTrainer` and `GRPOLossMixin`, made when first asked for: they need TRL."""
    if name not in ("FastGRPOTrainer", "GRPOLossMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_fast.integrations import trl_grpo

    return getattr(trl_grpo, name)

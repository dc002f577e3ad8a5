"""Reward models: transformers' sequence classifiers with one label, saved and loaded as such, pooled by length.

    r(x) = w . h_last,   h_last = the hidden state of the sequence's last real token: where its answer ends

transformers finds that token by comparing ids with the padding id, which fails where padding and EOS share an id. Here
it is told by the lengths, and only these states meet the score head: nothing of size (B, T) is scored.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import _checks
from rlhf_fast.trainers.config import RunConfig, find_model
from rlhf_fast.trainers.data.sequences import last_scored
from rlhf_fast.trainers.models.hf_utils import CLASSIFIER, load_folder, load_model


def score_sequences(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    lengths: Tensor,  # (B,)
) -> Tensor:
    """(B,) fp32 scores of right-padded sequences, each at its last real token, told by length.

    Args:
        model: a sequence classifier with one label, plain or a PEFT model around one. Differentiable.
        input_ids: int64; what stands behind a sequence's length is ignored, whatever its ids.
        lengths: tokens of each sequence, 1 to T.
    Raises: ValueError naming the tensor, what was expected and what came.
    Example:
        >>> from transformers import Qwen2Config, Qwen2ForSequenceClassification
        >>> tiny = dict(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = Qwen2ForSequenceClassification(Qwen2Config(**tiny, num_key_value_heads=2, num_labels=1))
        >>> score_sequences(model, torch.randint(0, 17, (2, 5)), torch.tensor([3, 5])).shape
        torch.Size([2])
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (B, T), got {_checks.shape_str(input_ids.shape)}")
    rows, width = input_ids.shape
    _checks.check_shape("lengths", lengths, (rows,), "(B,)")
    lengths = lengths.to(input_ids.device)
    if rows == 0:
        return input_ids.new_zeros(0, dtype=torch.float32)
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"lengths must be in 1..T={width}, got {int(lengths.min())}..{int(lengths.max())}")
    mask = torch.arange(width, device=input_ids.device) < lengths[:, None]
    return score_batch(pool_by_length(model), {"input_ids": input_ids, "attention_mask": mask.long()})


def score_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(S,) scores of a collated batch: padded on either side (`attention_mask`), or packed (`cu_seqlens`).

    A sequence is scored at its last real token, told by length; in a batch with `target_ids`, at the last one of these
    that is scored: behind the EOS of an answer, where a policy's completions end, a template may write more.
    `model` has been through `pool_by_length`; a wrapper around it (DDP, FSDP) will do.
    """
    ids = batch["input_ids"]
    if "cu_seqlens" in batch:
        last = batch["cu_seqlens"][1:].long() - 1
        return model(input_ids=ids, position_ids=batch["position_ids"], last=_last_answered(batch, last))
    rows, width = ids.shape
    positions = torch.arange(width, device=ids.device)
    last = (batch["attention_mask"] * positions).argmax(1) + torch.arange(rows, device=ids.device) * width
    given = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    return model(input_ids=ids, attention_mask=batch["attention_mask"], last=_last_answered(batch, last), **given)


def _last_answered(batch: Mapping[str, Tensor], last: Tensor) -> Tensor:
    """Where `target_ids` tell, the last scored tokens; else `last`, the last real ones."""
    if "target_ids" not in batch:
        return last
    scored = last_scored(batch)
    return torch.where(scored > 0, scored, last)


def pool_by_length(model: nn.Module) -> nn.Module:
    """Give a sequence classifier's forward the keyword `last`; returns the model.

    Afterwards `model(input_ids, ..., last=l)` with l (S,) int64, indices into the flattened (B * T) positions, returns
    the scores (S,) there in fp32 (fp64 of an fp64 model). Without `last` the forward is the model's own.

    Raises: TypeError unless the model has a body and a linear head `score` with one output.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "_unpooled_forward"):
        return model
    heads = score_heads(base)
    if not heads or any(head.out_features != 1 for head in heads) or base.base_model is base:
        raise TypeError(f"{type(base).__name__} is no reward model: it needs a linear head 'score' with one output")
    base._unpooled_forward = base.forward
    wrapped = functools.wraps(type(base).forward)(_forward)
    base.forward = types.MethodType(wrapped, base)
    for head in heads:
        head.forward = types.MethodType(_score, head)
    return model


def score_heads(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of `score`: one, or with PEFT's `modules_to_save` the original and its trained copies."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    score = getattr(base, "score", None)
    return [] if score is None else [module for module in score.modules() if isinstance(module, nn.Linear)]


def _forward(self, *args: Any, last: Tensor | None = None, **kwargs: Any) -> Any:
    if last is None:
        return self._unpooled_forward(*args, **kwargs)
    if kwargs.pop("labels", None) is not None:
        raise ValueError("give last (positions to score) or labels, not both")
    kwargs["use_cache"] = False
    hidden = self.base_model(*args, **kwargs)[0]
    return self.score(hidden.flatten(0, 1)[last]).squeeze(-1)


def _score(self: nn.Linear, hidden: Tensor) -> Tensor:
    """The head in fp32 (or fp64): the scores' differences are what counts, and a bf16 score has three digits."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)


def new_reward_model(config: RunConfig, tokenizer: Any = None) -> nn.Module:
    """The reward model to train: the body of `model_name_or_path`, and its score head or, where it has none, a new one.

    A new head is drawn from N(0, 1 / (D + 1)^2): for hidden states of unit mean square the first scores are about
    1 / sqrt(D), so that training starts at a loss of log 2. The head is always trained, whatever else stays frozen.

    Raises: ValueError when transformers has no sequence classifier of the model's family.
    """
    fresh = not _has_score(Path(find_model("model_name_or_path", config.model_name_or_path)))
    model = pool_by_length(load_model(config, tokenizer, auto_class=CLASSIFIER, num_labels=1))
    heads = score_heads(model)
    if config.finetuning_type == "freeze":
        heads[0].weight.requires_grad_(True)
    if fresh:
        nn.init.normal_(heads[0].weight, std=1 / (heads[0].in_features + 1))
        for other in heads[1:]:
            other.weight.data.copy_(heads[0].weight)
    return model


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A trained reward model, frozen, in eval mode: a full folder, or an adapter folder over its base.

    Args:
        dtype: of the body's weights; None: as saved. Scores are fp32.
    Raises: FileNotFoundError, or ValueError when the folder holds no reward model.
    """
    folder = Path(find_model("reward_model", str(path)))
    if not _has_score(folder):
        raise ValueError(f"reward_model: {folder} has no trained score head; train one with stage: rm")
    model = load_folder(folder, auto_class=CLASSIFIER, dtype=dtype, trust_remote_code=trust_remote_code, num_labels=1)
    return pool_by_length(model).requires_grad_(False).eval()


def _has_score(folder: Path) -> bool:
    """Whether the folder's own description names a score head: a sequence classifier, or an adapter that saves one."""
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    if config.is_file():
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        return any(name.endswith("ForSequenceClassification") for name in names)
    return False

"""Bytes that a model's own code needs, from a run of it on fake tensors (shapes, dtypes and storages, no data).

Every storage that an operator makes is counted while it lives, so that activations, checkpointing, autocast's copies
and attention masks are what the model does, whatever its architecture.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rlhf_fast.trainers.config import RunConfig, find_model
from rlhf_fast.trainers.models.hf_utils import choose_attention, find_adapters, is_adapter, weights_dtype
from rlhf_fast.trainers.models.lora import adapter_like, add_lora, base_of, freeze_layers, train_in_fp32
from rlhf_fast.trainers.models.policy import enable_checkpointing

CANNOT_RUN = (RuntimeError, NotImplementedError, TypeError, AttributeError)  # a forward that looks at its data


class Footprint(NamedTuple):
    """Bytes of a forward and backward beyond the weights."""

    saved: int  # after the forward: what the backward needs
    forward: int  # most during the forward
    backward: int  # most during the backward, gradients of the trunk's weights included
    without_grad: int  # most during a forward without gradients


class Work(NamedTuple):
    """The sequences of one micro-batch."""

    rows: int
    length: int  # tokens of each
    scored: int  # tokens whose logits are needed
    shared: int = 1  # completions in a row, behind one copy of their prompt


# ---- models of fake tensors


def build(config: RunConfig, folder: str | None = None, *, classifier: bool = False) -> nn.Module:
    """The model of a run (or of `folder`) with what is trained and what is not: fake tensors, under FakeTensorMode."""
    base, adapters = find_adapters(config)
    classifier = classifier or config.stage == "rm"
    if folder is not None:
        base, adapters = (base_of(folder), []) if is_adapter(folder) else (folder, [])
    with _disable_current_modes(), torch.device("meta"):
        model = from_config(base, classifier, weights_dtype(config), choose_attention(config), config.trust_remote_code)
        if config.finetuning_type == "freeze":
            freeze_layers(model, config)
        elif config.finetuning_type == "lora":
            continued = adapters and not config.create_new_adapter
            model = adapter_like(model, adapters[-1], config) if continued else add_lora(model, config)
        train_in_fp32(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return _fake(model).train()


def from_config(base: str, classifier: bool, dtype: Any, attention: str | None, trust: bool) -> nn.Module:
    """A causal LM or a classifier with one label, as the config in `base` says; `dtype` None: as it is saved."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(find_model("model", base), trust_remote_code=trust)
    kind = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    if classifier:
        settings.num_labels = 1
    options = dict(dtype=dtype or settings.dtype or torch.float32, attn_implementation=attention)
    return getattr(transformers, kind).from_config(settings, trust_remote_code=trust, **options)


def _fake(model: nn.Module) -> nn.Module:
    """The same model with its meta tensors replaced by fake ones on the current device."""
    made: dict[int, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = tensors is module._parameters
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                if tensor is not None:
                    tensors[name] = made[id(tensor)]
    return model


def trunk_of(model: nn.Module) -> nn.Module:
    """Everything up to the hidden states that the head takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def head_of(model: nn.Module) -> nn.Module | None:
    """The head over the vocabulary; None for a classifier."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()


# ---- counting


class Live(TorchDispatchMode):
    """Bytes of the storages that operators make, while they live; those of `model` are not counted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        known = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.living: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.living or key in self.known:
            return
        self.living[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.living.pop(key)


def footprint(model: nn.Module, work: Work, config: RunConfig, notes: list[str]) -> Footprint:
    """Of one micro-batch through the model's trunk; with accumulation of the second one, beside gradients."""
    trunk, live = trunk_of(model), Live(model)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it would print is in the note
    try:
        for _ in range(1 if config.gradient_accumulation_steps == 1 else 2):
            live.peak = live.now
            with live, autocast(model, config):
                hidden = trunk(**_inputs(model, work, config), use_cache=False)[0]
            saved, forward = live.now, live.peak
            if hidden.requires_grad:
                with live:
                    hidden.backward(torch.ones_like(hidden))
            backward = live.peak
            del hidden
        without = forward_bytes(model, work, config)
    except CANNOT_RUN as error:
        notes.append(f"activations are not counted: {type(trunk).__name__} cannot be run without data ({error})")
        return Footprint(0, 0, 0, 0)
    finally:
        log.setLevel(level)
        model.zero_grad()
    return Footprint(saved, forward, backward, without)


def forward_bytes(model: nn.Module, work: Work, config: RunConfig) -> int:
    """The most that a forward without gradients holds."""
    live = Live(model)
    with torch.no_grad(), live, autocast(model, config):
        trunk_of(model)(**_inputs(model, work, config), use_cache=False)
    return live.peak


def _inputs(model: nn.Module, work: Work, config: RunConfig) -> dict[str, Tensor]:
    """Ids and what tells the sequences apart; `config.packing` lays them side by side."""
    if work.shared > 1:
        shape = (work.rows, work.length)
        seen = torch.ones((work.rows, 1, work.length, work.length), dtype=torch.bool)
        ids = torch.zeros(shape, dtype=torch.long)
        return {"input_ids": ids, "position_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": seen}
    shape = (1, work.rows * work.length) if config.packing else (work.rows, work.length)
    ids = torch.zeros(shape, dtype=torch.long)
    if config.packing:
        return {"input_ids": ids, "position_ids": torch.zeros(shape, dtype=torch.long)}
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}


@contextmanager
def autocast(model: nn.Module, config: RunConfig) -> Iterator[None]:
    """The run's precision."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16 if config.bf16 else torch.float16, enabled=config.bf16 or config.fp16):
        yield


def cache_bytes(model: nn.Module, config: RunConfig, notes: list[str]) -> int:
    """Keys and values of one token of one sequence."""
    try:
        with torch.no_grad(), autocast(model, config):
            out = trunk_of(model.eval())(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=True)
        cache = out.cache if "cache" in out else out.past_key_values  # transformers 5.24 renamed it
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 2
    except CANNOT_RUN as error:
        notes.append(f"the rollout's keys and values are not counted: {error}")
        return 0
    finally:
        model.train()

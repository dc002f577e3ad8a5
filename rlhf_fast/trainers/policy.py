"""The policy as a module: its reference, its mode while it is updated, activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_fast.integrations.lm_head import fuse_lm_head


class Reference:
    """The policy as it is now: with its adapters off where nothing but fresh adapters trains, else a frozen copy.

    An adapter that has been trained before is part of the policy, and so are weights that train beside an adapter
    (norms, embeddings): in both cases the base model alone would be the wrong reference.
    """

    def __init__(self, model: nn.Module):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        only_adapters = hasattr(model, "disable_adapter") and all("lora_" in name for name in trained)
        fresh = all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)
        self.adapters_off = only_adapters and fresh
        self.model = fuse_lm_head(model if self.adapters_off else copy.deepcopy(model).requires_grad_(False).eval())

    def to(self, device: torch.device) -> Reference:
        self.model.to(device)
        return self

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference's forward, inside the block."""
        if not self.adapters_off:
            yield self.model
            return
        with self.model.disable_adapter():
            yield self.model


def updating_mode(model: nn.Module, disable_dropout: bool) -> None:
    """train(); or, with dropout disabled, eval() with checkpointing still on, which goes by the layer's own mode."""
    model.train(not disable_dropout)
    for module in model.modules():
        if disable_dropout and isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute layers in the backward; the name of the switch depends on the transformers version."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})

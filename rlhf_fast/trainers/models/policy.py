"""The policy as a module: its reference, its mode while it is updated, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.sharding import held, lay_beside, shape_of, state_of, taking_whole, whole


class Reference:
    """The policy as it is now: with its adapters off where nothing but fresh adapters trains, else a frozen copy.

    An adapter that has been trained before is part of the policy, and so are weights that train beside an adapter
    (norms, embeddings): in both cases the base model alone would be the wrong reference.

    Args:
        model: the policy.
        other: another causal LM as the reference; it is frozen.
        copy: keep a copy even where adapters off would do, so that `sync` can move it.
    """

    def __init__(self, model: nn.Module, other: nn.Module | None = None, *, copy: bool = False):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        only_adapters = hasattr(model, "disable_adapter") and all("lora_" in name for name in trained)
        zero_at_first = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
        fresh = not any(p.any() for p in zero_at_first)
        self.adapters_off = only_adapters and fresh and not copy and other is None
        self.moved = False
        if other is None:
            other = model if self.adapters_off else deepcopy(model)
        self.model = fuse_lm_head(other if self.adapters_off else other.requires_grad_(False).eval())
        self.called = self.model  # what forwards go through

    def lay_beside(self, accelerator: Accelerator) -> None:
        """Spread it as transformers' Trainer spreads the policy, which is only put on the device where it is both."""
        if self.adapters_off:
            self.model.to(accelerator.device)
        else:
            self.called = lay_beside(accelerator, self.model)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference's forward, inside the block."""
        if not self.adapters_off:
            yield self.called
            return
        with self.model.disable_adapter():
            yield self.called

    @torch.no_grad()
    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """reference <- alpha policy + (1 - alpha) reference, weight by weight; alpha 1 copies.

        Source: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656, eq. 1 and 2).
        """
        if self.adapters_off:
            raise ValueError("the reference is the policy with its adapters off: only a copy can follow the policy")
        current = dict(policy.named_parameters())
        for name, kept in self.model.named_parameters():
            if name not in current or shape_of(current[name]) != shape_of(kept):
                shape = (*shape_of(kept),)
                raise ValueError(f"the reference cannot follow the policy: it has no {name} of shape {shape}")
            part = hasattr(kept, "full_tensor") or hasattr(kept, "ds_tensor")
            new, own = held(current[name]) if part else whole(current[name]), held(kept)
            own.lerp_(new.to(own.device, own.dtype), alpha)
            if own is not kept:
                kept.partition()  # drops what DeepSpeed keeps gathered for the next forward
        self.moved = True

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights once `sync` has moved it, as they lie; empty before, when it is what it was at first."""
        return state_of(self.model) if self.moved else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back its weights, whole."""
        if state:
            with taking_whole(self.model):
                self.model.load_state_dict(state)
            self.moved = True


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

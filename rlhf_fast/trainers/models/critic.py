"""PPO's critic: a value for every position, from a model of its own or from a head on the actor's trunk.

A model of its own is a sequence classifier with one label, the same kind of model as a reward model, so that one can
begin where the other ended and both are saved and loaded alike.
"""

from __future__ import annotations

import dataclasses
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.trainers.models.lora import merged
from rlhf_fast.trainers.models.reward_model import new_reward_model, pool_by_length, score_heads
from rlhf_fast.trainers.rl_config import RLConfig

HEAD_NAME = "value_head.safetensors"


class ValueHead(nn.Module):
    """V = w . h + b on the hidden states of another model's trunk, in fp32 or fp64; 0 everywhere at the start."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        dtype = torch.promote_types(dtype, torch.float32)
        self.weight, self.bias = (nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (width, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(self.weight.dtype) @ self.weight + self.bias

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the head to `value_head.safetensors` in `folder`; `state_dict` has its weights where it is sharded."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        save_file({name: p.detach().cpu().contiguous() for name, p in state.items()}, _head_file(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> ValueHead:
        """The head that `save_pretrained` wrote; FileNotFoundError when there is none."""
        from safetensors.torch import load_file

        state = load_file(_head_file(folder))
        head = cls(len(state["weight"]), state["weight"].dtype)
        head.load_state_dict(state | {"bias": state["bias"].reshape(1)})
        return head


def _head_file(folder: str | os.PathLike) -> Path:
    return Path(folder) / HEAD_NAME


def critic_of_policy(policy: nn.Module) -> nn.Module:
    """A critic with a copy of the policy's trunk and a head of zeros; what is frozen in the policy is frozen here too.

    Of a PEFT model its merged weights, under a fresh adapter of the same shape; the head is trained beside it.

    Raises: ValueError when transformers has no sequence classifier of the model's family.
    """
    from transformers import AutoModelForSequenceClassification

    adapted = hasattr(policy, "peft_config")
    plain = merged(deepcopy(policy)) if adapted else policy
    config = deepcopy(plain.config)
    config.num_labels = 1
    try:
        critic = AutoModelForSequenceClassification.from_config(config, dtype=plain.dtype)
    except ValueError as error:
        raise ValueError(f"no critic for {type(plain).__name__}: {str(error).splitlines()[0]}") from error
    trunk = plain.base_model
    critic.base_model.load_state_dict(trunk.state_dict())
    critic.to(trunk.device)
    for head in score_heads(critic):
        nn.init.zeros_(head.weight)
    if adapted:
        critic = _adapted(critic, policy)
    else:
        frozen = {name for name, p in trunk.named_parameters() if not p.requires_grad}
        for name, parameter in critic.base_model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return pool_by_length(critic)


def _adapted(critic: nn.Module, policy: nn.Module) -> nn.Module:
    """The critic under an adapter like the policy's, on those modules that it has too."""
    from peft import TaskType, get_peft_model

    shape = deepcopy(policy.peft_config[policy.active_adapter])
    shape.task_type, shape.modules_to_save, shape.inference_mode = TaskType.SEQ_CLS, None, False
    if not isinstance(shape.target_modules, str):
        have = {name.rsplit(".", 1)[-1] for name, _ in critic.named_modules()}
        shape.target_modules = {t for t in shape.target_modules if t.rsplit(".", 1)[-1] in have - {"score"}}
    return get_peft_model(critic, shape)


def load_critic(config: RLConfig, folder: str, tokenizer: Any = None) -> nn.Module:
    """The classifier in `folder` (a reward model, an earlier run's critic) as a critic, trained as the config says."""
    start = dataclasses.replace(config, model_name_or_path=folder, adapter_name_or_path=None)
    return new_reward_model(start, tokenizer)

"""How the models and the optimiser of PPO and GRPO lie over the processes: what differs is here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhf_fast.trainers import restore
from rlhf_fast.trainers.sharding import (
    check_launch,
    exact_precision,
    full_state,
    gathered,
    gathered_state,
    shard,
    whole,
)

Modules = Mapping[str, nn.Module]  # by role


class Replicated:
    """Every process has all weights (one process, or DDP); gradients meet in an update's last backward."""

    sharded = False  # whether every process has to make as many forwards as the others

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(
        self, modules: Modules, make_optimizer: Callable[[Modules], torch.optim.Optimizer]
    ) -> tuple[dict[str, nn.Module], Any]:
        """The trained modules and their optimiser, ready."""
        *models, optimizer = self.accelerator.prepare(*modules.values(), make_optimizer(modules))
        return dict(zip(modules, models, strict=True)), optimizer

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model that is not trained, where the trained ones are."""
        return model.to(self.accelerator.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    @contextmanager
    def micro_batch(self, models: Modules, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch."""
        with ExitStack() as stack:
            for model in () if last else models.values():
                stack.enter_context(self.accelerator.no_sync(model))
            yield

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, parameters: list[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip the gradient of these by its norm over all processes, which is returned; None: none has reached them."""
        if all(p.grad is None for p in parameters):
            return None
        return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    def gathered(self, *models: nn.Module) -> AbstractContextManager:
        """Inside the block every process holds the whole weights: forwards, as many as it likes, are its own."""
        return nullcontext()

    # ---- checkpoints; every process calls these

    def state_dict(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The whole weights on the first process; None: the model holds them itself."""
        return None

    def load_weights(self, model: nn.Module, folder: Path) -> None:
        restore.load_weights(self.unwrap(model), folder)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any] | None:
        """The whole state on the first process."""
        return optimizer.state_dict() if self.accelerator.is_main_process else None

    def load_optimizer(self, optimizer: Any, folder: Path) -> None:
        restore.load_optimizer(optimizer, folder)

    def parts(self, optimizer: Any) -> dict[str, Any]:
        """What else every process saves of its own, by name: with `state_dict` and `load_state_dict`."""
        return {}


class Sharded(Replicated):
    """FSDP2: weights, gradients and moments are spread; each micro-batch's gradients are summed at once."""

    sharded = True

    def prepare(
        self, modules: Modules, make_optimizer: Callable[[Modules], torch.optim.Optimizer]
    ) -> tuple[dict[str, nn.Module], Any]:
        exact_precision(self.accelerator)
        models = {role: shard(self.accelerator, module) for role, module in modules.items()}
        return models, self.accelerator.prepare_optimizer(make_optimizer(models))

    def frozen(self, model: nn.Module) -> nn.Module:
        return shard(self.accelerator, model)

    @contextmanager
    def micro_batch(self, models: Modules, *, last: bool) -> Iterator[None]:
        yield

    def gathered(self, *models: nn.Module) -> AbstractContextManager:
        return gathered(*models)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor] | None:
        return full_state(self.accelerator, model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any] | None:
        return gathered_state(self.accelerator, optimizer.state_dict())


def spread_of(accelerator: Accelerator, stage: str, *, bf16: bool = False) -> Replicated:
    """What the launcher asked for; ValueError where the stage's loop cannot follow."""
    check_launch(accelerator, stage)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from rlhf_fast.trainers.zero import Zero

        return Zero(accelerator, stage, bf16=bf16)
    return (Sharded if accelerator.is_fsdp2 else Replicated)(accelerator)

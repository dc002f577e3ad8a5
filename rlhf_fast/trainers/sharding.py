"""Models whose weights are spread over the processes: FSDP2, as `accelerate launch --use_fsdp` asks for it.

accelerate shards one model with its optimiser; here the policy, PPO's critic and the reference are sharded one by one
by its function, and the optimiser is made over the shards. A sharded model gathers weights in every forward, so all
processes must make as many: while sampling, and in other forwards without a gradient, they hold the whole weights
instead (`gathered`), and minibatches have as many micro-batches on every process.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_fast.trainers.config import RunConfig

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)

SAME_PROCESSES = "under DeepSpeed a run goes on with as many processes as before"


def join_processes(config: RunConfig) -> None:
    """Start the process group where transformers would forget `ddp_timeout`: on the CPU. Before its arguments."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if config.use_cpu and launched and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=config.ddp_timeout))


def load_whole() -> None:
    """From here on models are loaded whole by every process, whatever FSDP's or DeepSpeed's configuration says:
    references and critics are copies of them, and reward models stay as they are."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    disable_fsdp_ram_efficient_loading()
    unset_hf_deepspeed_config()


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights DeepSpeed has partitioned while it was loaded."""
    if partitioned(model):
        raise ValueError(
            "the model was loaded under DeepSpeed's zero.Init (zero3_init_flag, or TrainingArguments of ZeRO-3 before "
            "it): load it whole, it is partitioned afterwards"
        )


def check_launch(accelerator: Accelerator, stage: str) -> None:
    """Raise ValueError when the stage's loop cannot run as the launcher says."""
    kind, plugin = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    if kind not in SUPPORTED and not accelerator.is_fsdp2:
        raise ValueError(
            f"stage {stage!r} runs on one process, under DDP, DeepSpeed or FSDP2 (accelerate launch --use_fsdp "
            f"--fsdp_version 2), got {kind.value}; sft, rm, dpo and kto run under whatever transformers' Trainer does"
        )
    if not accelerator.is_fsdp2:
        return
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading must be false in stage {stage!r}: reference, critic and reward models are "
            "loaded by every process"
        )
    if plugin.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing must be false: gradient_checkpointing: true does the same")


def exact_precision(accelerator: Accelerator) -> None:
    """Under FSDP2 half precision is for weights and what they compute: advantages, log-probabilities and losses pass in
    and out as they are, and gradients are summed in fp32. (accelerate's own policy rounds all of them.)"""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if accelerator.is_fsdp2 and policy is not None and policy.param_dtype is not None:
        exact = dict(reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)
        plugin.mixed_precision_policy = dataclasses.replace(policy, **exact)


def shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model sharded in place. One without a transformer, such as a value head, is replicated instead."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    if not hasattr(model, "get_input_embeddings"):
        device = accelerator.device
        return DistributedDataParallel(model.to(device), device_ids=None if device.type == "cpu" else [device])
    model = fsdp2_prepare_model(accelerator, model)
    model.set_reshard_after_forward(False, recurse=False)  # the root's few weights; torch's own choice for it
    return model


def lay_beside(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A frozen model spread as transformers' Trainer spreads the one that it trains; returns what forwards go through.

    FSDP2 and ZeRO-3 shard it: every process makes as many forwards. Elsewhere, FSDP1 among them, it is whole.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from rlhf_fast.trainers.zero import engine_for_forwards

        return engine_for_forwards(accelerator, model)
    if not accelerator.is_fsdp2:
        return model.to(accelerator.device)
    model = shard(accelerator, model)
    model.set_reshard_after_forward(True)  # everywhere: no backward does it for what else would stay
    return model


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Inside the block every process holds the whole weights: forwards, as many as it likes, are its own.

    For forwards without a gradient. Models that are not sharded are left alone.
    """
    roots = [model for model in models if is_sharded(model)]
    modules = [module for root in roots for module in root.modules() if is_sharded(module)]
    groups = [group for module in modules for group in _groups(module)]
    kept = [group.post_forward_mesh_info for group in groups]
    for root in roots:
        root._get_fsdp_state()._lazy_init()
        root.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
        for group, info in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = info


def _groups(module: Any) -> list[Any]:
    """The parameter groups that a module gathers; torch before 2.13 has one at most."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def autocast(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager:
    """What a forward of a model that was not prepared runs under, to compute as the prepared ones do."""
    return nullcontext() if is_sharded(model) else accelerator.autocast()


@contextmanager
def taking_whole(model: nn.Module) -> Iterator[None]:
    """Inside the block `load_state_dict` of a sharded model takes whole tensors; each process keeps its part."""
    if parameters := partitioned(model):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
        return

    def cut(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, own in module.named_parameters(recurse=False):
            if prefix + name in state:
                state[prefix + name] = part_of(state[prefix + name], own)

    for module in model.modules():
        if is_sharded(module):
            module.reshard()
    handles = [module.register_load_state_dict_pre_hook(cut) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(tensor: Tensor, own: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that is to lie as `own` does; all of it where `own` is not sharded.

    Every process has read the tensor itself: nothing is sent.
    """
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None).clone()


def gathered_state(accelerator: Accelerator, state: Any) -> Any:
    """Nested dicts and lists with their tensors whole, on the first process's CPU; None in their place on the others.

    Every process calls it; one tensor at a time is whole on the device.
    """
    if isinstance(state, Mapping):
        return {name: gathered_state(accelerator, value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered_state(accelerator, value) for value in state)
    if not isinstance(state, Tensor):
        return state
    tensor = whole(state)
    return tensor.cpu() if accelerator.is_main_process else None


def full_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's whole weights on the first process, in their own dtype; None: the model holds them itself.

    Tied weights are one tensor, so that they are saved once. Every process calls it.
    """
    if partitioned(model):
        state = state_of(model, keep=accelerator.is_main_process)
    elif is_sharded(model):
        state = accelerator.get_state_dict(model)
    else:
        return None
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(parameter), name)]
    return state


def partitioned(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that DeepSpeed (ZeRO-3) has partitioned."""
    return [p for p in model.parameters() if hasattr(p, "ds_id")]


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that DeepSpeed has partitioned; any other as it is."""
    return getattr(parameter, "ds_tensor", parameter)


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def state_of(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """A model's weights as they lie; those that DeepSpeed has partitioned whole, on the CPU of processes that `keep`
    them. Every process calls it."""
    parameters = partitioned(model)
    if not parameters:
        return dict(model.state_dict())
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()} if keep else {}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every process; any other as it is."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

"""DeepSpeed's ZeRO for PPO and GRPO: moments (stage 1), gradients (2) and weights (3) spread over the processes.

Every role that is trained has an engine of its own, so that each is clipped by its own norm and one that nothing
reaches stays as it is; one backward reaches all of them. DeepSpeed reduces, partitions and steps. Micro-batches,
clipping, schedule and checkpoints are the run's: batch sizes, accumulation and clipping of DeepSpeed's configuration
are not looked at, and its other "auto" values are filled in here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from packaging.version import Version
from torch import Tensor, nn

from rlhf_fast.trainers.sharding import SAME_PROCESSES, full_state, load_whole
from rlhf_fast.trainers.spread import Modules, Replicated
from rlhf_fast.trainers.zero_state import engine_state, load_engine

MINIMUM = "0.19"  # one backward through several engines; steps whose gradients are not finite are dropped


def check_config(config: Mapping[str, Any], stage: str, *, bf16: bool = False) -> None:
    """Raise ValueError on a DeepSpeed configuration that the stage's loop cannot follow."""
    zero = config["zero_optimization"]
    enabled = {name: (config.get(name) or {}).get("enabled") for name in ("fp16", "torch_autocast")}
    rows = [("zero_optimization.stage", zero["stage"], (1, 2, 3), "be 1, 2 or 3")]
    rows += [(f"{name}.enabled", on, (None, False, "auto"), "be false: take bf16") for name, on in enabled.items()]
    half = (config.get("bf16") or {}).get("enabled")
    rows.append(("bf16.enabled", half, (bf16, "auto") if bf16 else (None, False, "auto"), "be the run's own bf16"))
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device")
        rows.append((f"zero_optimization.{name}.device", device, (None, "none", "auto"), "be none"))
    for name in ("optimizer", "scheduler"):
        rows.append((name, config.get(name), (None,), "be left out: the run's own options say it"))
    for name, value, fine, must in rows:
        if value not in fine:
            raise ValueError(f"stage {stage!r}: {name} of DeepSpeed's configuration must {must}, got {value!r}")


def engine_for_forwards(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """An engine without an optimiser: a model in the dtype of those that are trained, partitioned under stage 3."""
    import deepspeed

    plugin = accelerator.state.deepspeed_plugin
    config = engine_config(plugin.deepspeed_config, model)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    if plugin.zero_stage != 3:
        config["zero_optimization"] = {"stage": 0}
    if accelerator.mixed_precision in ("bf16", "fp16"):  # where it was "auto"
        config.setdefault(accelerator.mixed_precision, {}).setdefault("enabled", True)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def engine_config(given: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """DeepSpeed's configuration for one engine, whose caller sees to micro-batches and clipping."""
    found = _without_auto(copy.deepcopy(dict(given)))
    zero, width = found["zero_optimization"], _width(module)
    if width is not None:  # as transformers' Trainer chooses them
        zero.setdefault("reduce_bucket_size", width * width)
        zero.setdefault("stage3_prefetch_bucket_size", int(0.9 * width * width))
        zero.setdefault("stage3_param_persistence_threshold", 10 * width)
    found.pop("train_batch_size", None)
    found |= dict(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.0)
    return found | dict(zero_allow_untested_optimizer=True)


class Zero(Replicated):
    """ZeRO-1, 2 and 3."""

    sharded = True  # each micro-batch's gradients are reduced at once, and stage 3 gathers weights in every forward

    def __init__(self, accelerator: Accelerator, stage: str, *, bf16: bool):
        import deepspeed

        if Version(deepspeed.__version__) < Version(MINIMUM):
            raise ValueError(f"stage {stage!r} needs DeepSpeed {MINIMUM} or later, got {deepspeed.__version__}")
        super().__init__(accelerator)
        plugin = accelerator.state.deepspeed_plugin
        check_config(plugin.deepspeed_config, stage, bf16=bf16)
        load_whole()  # accelerate's state has just asked for the opposite
        self.stage, self.given = plugin.zero_stage, plugin.deepspeed_config
        self.bf16 = bf16

    def prepare(
        self, modules: Modules, make_optimizer: Callable[[Modules], torch.optim.Optimizer]
    ) -> tuple[dict[str, nn.Module], Any]:
        import deepspeed

        engines = {}
        for role, module in modules.items():
            optimizer = make_optimizer({role: module})
            engines[role], *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.settings(module))
        return engines, _Optimizers(engines)

    def settings(self, module: nn.Module) -> dict[str, Any]:
        """The configuration of a role's engine."""
        found = engine_config(self.given, module)
        if self.bf16 and _width(module) is None:
            found["bf16"] = {"enabled": False}  # a value head stays in fp32
        elif self.bf16:
            found["bf16"] = found.get("bf16", {}) | {"enabled": True, "check_grad_overflow": True}
            found.setdefault("communication_data_type", "fp32")
            found.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            zero = found["zero_optimization"]
            zero["stage"] = max(self.stage, 2)  # stage 1 in bf16 is another optimiser of DeepSpeed's
        return found

    def frozen(self, model: nn.Module) -> nn.Module:
        """Stage 3 partitions it; it has no engine, and its forwards are made where its weights are `gathered`."""
        import deepspeed

        if self.bf16:  # as the engines compute; buffers stay as they are there too
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        model.to(self.accelerator.device)
        if self.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=self.settings(model))
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if hasattr(model, "zero_optimization_stage") else model

    @contextmanager
    def micro_batch(self, models: Modules, *, last: bool) -> Iterator[None]:
        for engine in models.values():
            engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # the engines have hooks on what their forwards gave

    def clip(self, model: Any, parameters: list[nn.Parameter], max_norm: float) -> Tensor | None:
        gradients = _gradients(model)
        if not gradients:
            return None
        square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        dist.all_reduce(square)
        norm = square.sqrt().float()
        scale = torch.where(norm.isfinite(), max_norm / (norm + 1e-6), 1.0).clamp(max=1.0)  # padding stays 0
        torch._foreach_mul_(gradients, scale)
        return norm

    @contextmanager
    def gathered(self, *models: nn.Module) -> Iterator[None]:
        import deepspeed

        inside = {id(self.unwrap(m)) for m in models if self.unwrap(m) is not m}  # adapters off: the policy once more
        with ExitStack() as stack:
            for model in models if self.stage == 3 else ():
                if self.unwrap(model) is not model:
                    stack.enter_context(deepspeed.zero.unwrap_model_for_generation(model))
                elif id(model) not in inside:
                    stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
            yield

    # ---- checkpoints

    def state_dict(self, model: nn.Module) -> dict[str, Tensor] | None:
        return full_state(self.accelerator, self.unwrap(model))

    def load_weights(self, model: Any, folder: Path) -> None:
        super().load_weights(model, folder)
        model.optimizer.refresh_fp32_params()

    def optimizer_state(self, optimizer: _Optimizers) -> dict[str, Any]:
        return {"state": {}, "param_groups": []}  # every process saves its own, with `parts`

    def load_optimizer(self, optimizer: _Optimizers, folder: Path) -> None:
        pass

    def parts(self, optimizer: _Optimizers) -> dict[str, Any]:
        return {"zero": optimizer}


class _Optimizers(torch.optim.Optimizer):
    """The engines' optimisers as one."""

    def __init__(self, engines: Mapping[str, Any]):  # torch's would want parameters
        self.engines, self.defaults = engines, {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # loading a state makes new ones
        return [group for engine in self.engines.values() for group in engine.optimizer.param_groups]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        return {key: value for engine in self.engines.values() for key, value in engine.optimizer.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """What this process has of moments, and of the weights in full precision."""
        return {role: engine_state(engine) for role, engine in self.engines.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for role, engine in self.engines.items():
            load_engine(engine, state[role])

    def load_state_of_others(self, state: Mapping[str, Any]) -> None:
        raise ValueError(f"resume_from_checkpoint: {SAME_PROCESSES}")

    def step(self, closure: Any = None) -> None:
        """Those that have a gradient; the others stay as they are."""
        for engine in self.engines.values():
            if _gradients(engine):
                engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step has used up: DeepSpeed's own step does when they are not finite."""
        for engine in self.engines.values():
            if gradients := _gradients(engine):
                for gradient in gradients:
                    gradient.fill_(torch.nan)
                engine.step()
                for gradient in gradients:  # stage 3 keeps them, with their padding
                    gradient.zero_()


def _gradients(engine: Any) -> list[Tensor]:
    """This process's part of the reduced gradients; empty where no backward has reached the role."""
    return [g for group in engine.optimizer.averaged_gradients.values() for g in group or ()]


def _width(module: nn.Module) -> int | None:
    """The hidden size; None of a head alone."""
    return module.get_input_embeddings().weight.shape[-1] if hasattr(module, "get_input_embeddings") else None


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_auto(v) for k, v in value.items() if v != "auto"}

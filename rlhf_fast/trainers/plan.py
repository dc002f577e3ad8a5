"""What a run needs of memory, by part, before anything of it is loaded.

The model is built from its config with fake tensors (shapes, dtypes and storages, no bytes), adapters and frozen layers
included, and one micro-batch is run through it, forward and backward. Every storage is counted while it lives, so that
activations, checkpointing, autocast's copies and attention masks are those of the model's own code. The fused head is
not run but counted by the sizes of its buffers.

    peak = resident + max over phases of what comes and goes in them

Not counted: the interpreter, its libraries and the kernels that they compile, the allocator's fragmentation, the CUDA
context, the data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_fast.ops._head import tile_dtype, tile_rows, tile_stride
from rlhf_fast.trainers.config import RunConfig
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.footprint import (
    CANNOT_RUN,
    Footprint,
    Work,
    build,
    cache_bytes,
    footprint,
    forward_bytes,
    from_config,
    head_of,
)
from rlhf_fast.trainers.layout import Layout
from rlhf_fast.trainers.models.hf_utils import find_adapters, is_adapter
from rlhf_fast.trainers.models.lora import base_of

# Bytes a parameter of the optimizer's states, where they are not two copies of it (AdamW).
STATES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4}
STATES |= dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2)
STATES |= dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1)


class Part(NamedTuple):
    """Bytes of one thing, and what makes them fewer."""

    name: str
    bytes: int
    knob: str = ""


class Phase(NamedTuple):
    """A time of the run, and what is there only then."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


class Plan(NamedTuple):
    """Predicted memory of one device."""

    resident: tuple[Part, ...]  # there throughout
    phases: tuple[Phase, ...]
    device: str
    processes: int
    notes: tuple[str, ...]

    @property
    def largest(self) -> Phase:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(part.bytes for part in self.resident) + self.largest.bytes


def plan(config: RunConfig, *, length: int | None = None, processes: int | None = None) -> Plan:
    """Predict a run's memory on each of `processes` devices.

    Args:
        length: tokens of the longest sequence; None: `cutoff_len`.
        processes: default: as many as the launcher says (WORLD_SIZE).
    Raises: ValueError and FileNotFoundError as loading the model would.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    notes: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        roles = {"": build(config)}
        if config.stage == "ppo" and config.critic == "own":
            roles["critic: "] = build(config, config.critic_folder, classifier=True)
        work = micro_batch(config, length or config.cutoff_len, roles[""])
        prints = {name: footprint(model, work, config, notes) for name, model in roles.items()}
        resident = [part for name, model in roles.items() for part in _weights(name, model, config, processes)]
        resident += _frozen_models(config, roles[""], processes)
        phases = _update_phases(config, roles, prints, work, device, processes)
        if config.stage in ("ppo", "grpo"):
            phases += _rollout_phases(config, roles[""], work, device, processes, notes)
    return Plan(
        tuple(p for p in resident if p.bytes), tuple(phases), device.type, processes, tuple(dict.fromkeys(notes))
    )


def micro_batch(config: RunConfig, length: int, model: nn.Module) -> Work:
    """The sequences that a stage puts through its model at once, all of the greatest length."""
    rows = config.per_device_train_batch_size
    if config.stage == "sft" and config.packing:
        length = config.cutoff_len  # rows are filled up
    if config.stage in ("ppo", "grpo"):
        prompt, completion = min(length, config.prompt_length), config.max_completion_length
        length = prompt + completion
        if config.max_tokens_per_micro_batch:
            rows = max(1, config.max_tokens_per_micro_batch // length)
        scored = rows * completion
        shared = min(_shared(config, model, prompt), rows)
        return Work(-(-rows // shared), prompt + shared * completion, scored, shared)
    if config.stage in ("rm", "dpo"):
        rows *= 2
    return Work(rows, length, 0 if config.stage == "rm" else rows * length)


def _shared(config: RunConfig, model: nn.Module, prompt: int) -> int:
    """Completions that GRPO computes behind one copy of their prompt, where the model's attention can."""
    share = getattr(config, "share_prompts", False)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if share is False or config.packing or kinds - {"full_attention"} or model.config._attn_implementation != "sdpa":
        return 1
    layout = Layout(model, share=False)
    layout.shares, layout.always = True, share is True
    return layout.per_row(prompt, config.max_completion_length, config.num_generations)


# ---- parts


def _weights(role: str, model: nn.Module, config: RunConfig, processes: int) -> list[Part]:
    """Weights and optimizer states of a model that is trained."""
    weights, _, states = _shares(config, processes)
    optim = str(getattr(config, "training_arguments", {}).get("optim", "adamw_torch"))
    trained = [p for p in model.parameters() if p.requires_grad]
    per_parameter = STATES.get(optim)
    moments = sum(2 * p.nbytes if per_parameter is None else per_parameter * p.numel() for p in trained)
    fewer = "quantization_bit" if config.quantization_bit is None else "a smaller model"
    return [
        Part(f"{role}weights", _stored(model, config) // weights, f"bf16 with lora or pure_bf16; {fewer}"),
        Part(
            f"{role}optimizer states",
            moments // states,
            "finetuning_type: lora or freeze; optim: adamw_8bit, adafactor",
        ),
    ]


def _stored(model: nn.Module, config: RunConfig) -> int:
    """Bytes of parameters and buffers; of the linear layers that are quantised, those of their codes and scales."""
    total = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if config.quantization_bit:
        bits = config.quantization_bit + (0.127 if config.double_quantization else 0.5) * (config.quantization_bit == 4)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head_of(model) and "lora_" not in name:
                total -= module.weight.nbytes - round(module.weight.numel() * bits / 8)
    return total


def _shares(config: RunConfig, processes: int) -> tuple[int, int, int]:
    """Over how many devices weights, gradients and optimizer states are spread."""
    arguments = getattr(config, "training_arguments", {})
    if processes > 1 and arguments.get("fsdp"):
        return processes, processes, processes
    settings = arguments.get("deepspeed") or getattr(config, "deepspeed", None)
    if processes == 1 or not settings:
        return 1, 1, 1
    if isinstance(settings, str):
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
    stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    return tuple(processes if stage >= needed else 1 for needed in (3, 2, 1))


def _gradients(model: nn.Module, config: RunConfig, processes: int) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad) // _shares(config, processes)[1]


def _frozen_models(config: RunConfig, model: nn.Module, processes: int) -> list[Part]:
    """Reference, which is spread as the policy is, and reward models, which are not."""
    parts, shares = [], _shares(config, processes)[0]
    if needs_reference(config):
        fresh = config.finetuning_type == "lora" and not config.additional_target and not find_adapters(config)[1]
        folder, followed = getattr(config, "ref_model", None), getattr(config, "sync_ref_model", False)
        knob = "finetuning_type: lora (the reference is the base)"
        if folder:
            parts.append(Part("reference", _folder_bytes(folder, config, False) // shares, f"no ref_model; {knob}"))
        elif not fresh or followed:
            parts.append(Part("reference", sum(p.nbytes for p in model.parameters()) // shares, knob))
    for folder in names(getattr(config, "reward_model", None)):
        parts.append(
            Part(f"reward model {folder}", _folder_bytes(folder, config, True), "a smaller one, or saved in bf16")
        )
    return parts


def needs_reference(config: RunConfig) -> bool:
    """Whether a second policy is kept."""
    if getattr(config, "precompute_ref_log_probs", False):
        return False
    if config.stage == "dpo":
        return config.preference_loss().needs_reference
    return config.stage == "kto" or (config.stage in ("ppo", "grpo") and config.needs_reference)


def _folder_bytes(folder: str, config: RunConfig, classifier: bool) -> int:
    base = base_of(folder) if is_adapter(folder) else folder
    model = from_config(base, classifier, None, None, config.trust_remote_code)
    return sum(p.nbytes for p in model.parameters())


class HeadBytes(NamedTuple):
    """Of the fused head's buffers in one call."""

    tile: int
    weight_grad: int  # while tiles are summed
    kept_grad: int  # until it is the parameter's
    hidden_grad: int
    copy: int  # of the weight in autocast's dtype


def _head_bytes(model: nn.Module, work: Work, config: RunConfig, device: torch.device) -> HeadBytes:
    """The buffers of `fused_linear_loss`; nothing without scored tokens."""
    head = head_of(model)
    if head is None or not work.scored:
        return HeadBytes(0, 0, 0, 0, 0)
    weight = getattr(head, "base_layer", head).weight
    (vocab, width), autocast = weight.shape, config.bf16 or config.fp16
    dtype = (torch.bfloat16 if config.bf16 else torch.float16) if autocast else weight.dtype
    rows = tile_rows(work.scored, vocab, dtype, device, None, None)
    tile = rows * tile_stride(vocab, device) * tile_dtype(dtype, device).itemsize
    hidden = work.rows * work.length * width * dtype.itemsize
    copy = weight.numel() * dtype.itemsize if dtype != weight.dtype else 0
    if not weight.requires_grad:
        return HeadBytes(tile, 0, 0, hidden, copy)
    several = rows < work.scored
    wide = 4 if dtype.itemsize == 2 and (several or device.type == "cuda") else 0
    narrow = dtype.itemsize if device.type == "cpu" or dtype.itemsize == 4 else 0
    kept = weight.nbytes + (weight.numel() * dtype.itemsize if dtype != weight.dtype else 0)
    return HeadBytes(tile, weight.numel() * (wide + narrow), kept, hidden, copy)


# ---- phases


def _update_phases(
    config: RunConfig,
    roles: dict[str, nn.Module],
    prints: dict[str, Footprint],
    work: Work,
    device: torch.device,
    processes: int,
) -> list[Phase]:
    """Forward with the head, backward, the optimizer's step, the reference."""
    head = _head_bytes(roles[""], work, config, device)
    checkpointing = "" if config.gradient_checkpointing else "gradient_checkpointing; "
    smaller = f"{checkpointing}per_device_train_batch_size; cutoff_len"
    if config.stage in ("ppo", "grpo"):
        smaller = f"{checkpointing}max_tokens_per_micro_batch; max_completion_length"
    saved = [Part(f"{role}activations", print_.saved, smaller) for role, print_ in prints.items()]
    fewer = "finetuning_type: lora or freeze"
    gradients = [Part(f"{r}gradients", _gradients(m, config, processes), fewer) for r, m in roles.items()]
    buckets = [Part(f"{p.name} in DDP's buckets", p.bytes, fewer) for p in gradients]
    buckets = buckets if processes > 1 and _shares(config, processes) == (1, 1, 1) else []
    tile = Part("tile of logits", head.tile, "memory_budget of the fused head")
    hidden = Part("gradient of the hidden states", head.hidden_grad, smaller)
    copy = Part("head in autocast's dtype", head.copy, "pure_bf16")
    most = max(prints.values(), key=lambda p: p.backward - p.saved)
    others = [part for part, p in zip(saved, prints.values(), strict=True) if p is not most]
    phases = [
        Phase("forward", (*others, Part("activations", most.forward, smaller), *buckets)),
        Phase("head", (*saved, tile, Part("gradient of the head", head.weight_grad, fewer), hidden, copy, *buckets)),
        Phase(
            "backward",
            (
                *others,
                Part("activations and gradients", most.backward, smaller),
                Part("gradient of the head", head.kept_grad, fewer),
                hidden,
                copy,
                *buckets,
            ),
        ),
        Phase("optimizer step", (*gradients, *buckets)),
    ]
    if needs_reference(config) or config.stage == "ppo":
        at_once, part, beside = work, prints[""].without_grad, tile
        if config.stage == "ppo":  # asks every role about the rollout, per_device_eval_batch_size sequences at once
            count = min(config.per_device_eval_batch_size, config.sizes(processes)[0] * config.num_generations)
            share = count / work.rows
            at_once = Work(count, work.length, round(work.scored * share))
            part, beside = (
                round(part * share),
                tile._replace(bytes=_head_bytes(roles[""], at_once, config, device).tile),
            )
        phases.append(Phase("reference", (Part("forward without gradients", part, smaller), beside)))
    return [Phase(phase.name, tuple(p for p in phase.parts if p.bytes)) for phase in phases]


def _longest(config: RunConfig, work: Work) -> int:
    """Tokens of a prompt with one completion."""
    return work.length - (work.shared - 1) * config.max_completion_length


def _rollout_phases(
    config: RunConfig, model: nn.Module, work: Work, device: torch.device, processes: int, notes: list[str]
) -> list[Phase]:
    """Prefill and decoding of a rollout, and the reward models' scores."""
    prompts = config.sizes(processes)[0]
    total, group = prompts * config.num_generations, config.num_generations
    together = max(1, min(total, config.rollout_batch_size or total) // group)
    rows, whole = together * group, _longest(config, work)
    prompt = whole - config.max_completion_length
    phases = []
    if config.sampler != "server":
        vocab = head_of(model).weight.shape[0]
        fewer = "rollout_batch_size; max_completion_length"
        cache = cache_bytes(model, config, notes)
        alone = Work(together, prompt, 0)
        try:
            prefill = forward_bytes(model.eval(), alone, config)
        except CANNOT_RUN:
            prefill = 0  # said by footprint
        narrow = 2 if config.bf16 or config.fp16 else next(model.parameters()).element_size()
        # logits, log-probabilities, noise and their difference
        draw = rows * vocab * (narrow + 3 * 4)
        keys = Part("keys and values", rows * whole * cache, fewer)
        phases.append(
            Phase(
                "prefill", (Part("keys and values", together * prompt * cache, fewer), Part("forward", prefill, fewer))
            )
        )
        phases.append(Phase("decoding", (keys, Part("logits of a token", draw, fewer))))
    for folder in names(getattr(config, "reward_model", None)):
        base = base_of(folder) if is_adapter(folder) else folder
        judge = from_config(base, True, None, None, config.trust_remote_code).eval()
        at_once = Work(min(config.per_device_eval_batch_size, total), whole, 0)
        try:
            phases.append(Phase("scoring", (Part(f"forward of {folder}", forward_bytes(judge, at_once, config)),)))
        except CANNOT_RUN:
            notes.append(f"the scoring by {folder} is not counted: it cannot be run without data")
    return phases

"""What of a model is trained: low-rank adapters (new, continued, merged), some of its layers, and at which rates."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_fast.trainers.config import RunConfig
from rlhf_fast.trainers.config_types import names, nearest

MERGED = "merged_base"  # folder in output_dir: the base with the adapters that were merged before training
CLASSIFIERS = ("score", "classifier")  # heads of sequence classifiers, which PEFT trains in full by itself


def choose_trained(model: nn.Module, config: RunConfig, adapters: Sequence[str] = ()) -> nn.Module:
    """The model with what `finetuning_type` names trainable and everything else frozen.

    `adapters` are merged one after the other; with lora, training continues with the last of them unless
    `create_new_adapter` asks for a new one. The base that a saved adapter belongs to is then `output_dir/merged_base`.
    """
    if (adapters or config.finetuning_type == "lora") and importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need peft: pip install peft")
    continued = config.finetuning_type == "lora" and not config.create_new_adapter
    merged = adapters[:-1] if continued else adapters
    if merged and config.quantization_bit:
        raise ValueError(f"adapters cannot be merged into weights of {config.quantization_bit} bits: merge them first")
    for folder in merged:
        model = merge_adapter(model, folder).requires_grad_(True)  # PEFT has frozen it
    if config.finetuning_type == "freeze":
        freeze_layers(model, config)
    elif config.finetuning_type == "lora":
        if merged and config.do_train:
            _save_base(model, config)
        model = _continue_adapter(model, adapters[-1], config) if continued and adapters else add_lora(model, config)
    train_in_fp32(model, config)
    return model


def train_in_fp32(model: nn.Module, config: RunConfig) -> None:
    """Under autocast, widen what is trained beside frozen weights: Adam's small steps vanish in half precision."""
    if config.finetuning_type != "full" and not config.pure_bf16 and (config.bf16 or config.fp16):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()


# ---- adapters


def add_lora(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with a new trainable low-rank adapter."""
    from peft import LoraConfig, TaskType

    classifies = type(model).__name__.endswith("ForSequenceClassification")
    targets, extra = (
        _targets(model, config),
        _known_modules(model, "additional_target", names(config.additional_target)),
    )
    tied = _head(model) is not None and _head(model).weight is model.get_input_embeddings().weight
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=_exactly(model, extra) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ensure_weight_tying=tied and bool({_head_name(model), _embedding_name(model)} & set(extra)),
    )
    return _attach(model, lora, config)


def adapter_like(model: nn.Module, folder: str | Path, config: RunConfig) -> nn.Module:
    """The model with a new adapter of the kind that a folder holds, without its weights."""
    from peft import PeftConfig

    kind = PeftConfig.from_pretrained(str(Path(folder).expanduser()))
    kind.inference_mode = False
    return _attach(model, kind, config)


def _attach(model: nn.Module, kind: Any, config: RunConfig) -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's own call
        return get_peft_model(model, kind, autocast_adapter_dtype=not config.pure_bf16)


def base_of(folder: str | Path) -> str:
    """The model that an adapter folder belongs to, by its own record or beside it."""
    folder = Path(folder).expanduser()
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    beside = folder / MERGED
    if base and Path(base).expanduser().is_dir():
        return str(base)
    if (beside / "config.json").is_file():
        return str(beside)
    if not base:
        raise ValueError(f"{folder}/adapter_config.json names no base_model_name_or_path")
    return str(base)


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The plain model with the change of an adapter folder added to its weights."""
    from peft import PeftModel

    return merged(_read_adapter(PeftModel, model, folder, is_trainable=False))


def merged(peft_model: nn.Module) -> nn.Module:
    """The plain model of a PEFT model, whose weights take the adapter's change in place; frozen, as PEFT leaves it."""
    base = peft_model.get_base_model()
    head = _head(base)
    if hasattr(head, "base_layer") and head.base_layer.weight is base.get_input_embeddings().weight:
        # the change is the head's alone: adding it to a shared weight would change the embedding too
        head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return peft_model.merge_and_unload()


def _continue_adapter(model: nn.Module, folder: str, config: RunConfig) -> nn.Module:
    """The model with an adapter that was trained before, trainable again; its rank and targets are its own."""
    from peft import PeftModel

    options = dict(is_trainable=config.do_train, autocast_adapter_dtype=not config.pure_bf16)
    return _read_adapter(PeftModel, model, folder, **options)


def _read_adapter(peft_class: Any, model: nn.Module, folder: str | Path, **options: Any) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            return peft_class.from_pretrained(model, str(Path(folder).expanduser()), **options)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the adapter in {folder} does not fit the model: {first}") from error


def _save_base(model: nn.Module, config: RunConfig) -> None:
    """Keep the merged base, so that the adapter to be trained can be loaded again."""
    from accelerate import PartialState

    folder = Path(config.output_dir) / MERGED
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            model.save_pretrained(folder)
    model.name_or_path = str(folder)


def _targets(model: nn.Module, config: RunConfig) -> list[str]:
    """Names of the modules that get an adapter; "all" is every linear layer but the head."""
    from transformers.pytorch_utils import Conv1D

    wanted, head = names(config.lora_target), _head_name(model)
    if not head:  # a classifier, such as PPO's critic beside an actor with an adapter on its head
        wanted = [name for name in wanted if name != "lm_head"] or ["all"]
    wanted = [head if name == "lm_head" else name for name in wanted]
    if "all" in wanted:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        wanted = sorted(linear - {head, *CLASSIFIERS}) + [name for name in wanted if name != "all"]
    wanted = _known_modules(model, "lora_target", wanted)
    if head in wanted:
        if config.use_dora:
            raise ValueError(f"use_dora: the fused head takes a plain adapter; leave {head} out of lora_target")
        if config.lora_dropout and not getattr(config, "disable_dropout", False):
            raise ValueError(f"lora_dropout: the fused head takes no dropout; set it to 0 or leave {head} out")
    return wanted


def _known_modules(model: nn.Module, key: str, wanted: list[str]) -> list[str]:
    known = [name for name, _ in model.named_modules() if name]
    leaves = {name.rpartition(".")[2] for name in known} - {""}
    for name in wanted:
        if not _named(known, name):
            raise ValueError(f"{key}: the model has no module {name!r}{nearest(name, leaves)}")
    return list(dict.fromkeys(wanted))


def _named(paths: Iterable[str], name: str) -> list[str]:
    return [path for path in paths if path == name or path.endswith("." + name)]


def _exactly(model: nn.Module, wanted: list[str]) -> list[str]:
    """Names for `modules_to_save`, where PEFT goes by endings: "norm" would take every layer's input_layernorm too."""
    paths = [name for name, _ in model.named_modules() if name]
    out = []
    for name in wanted:
        meant = _named(paths, name)
        out += [name] if meant == [path for path in paths if path.endswith(name)] else meant
    return out


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _head_name(model: nn.Module) -> str:
    return _name_of(model, _head(model))


def _embedding_name(model: nn.Module) -> str:
    return _name_of(model, model.get_input_embeddings())


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((n.rpartition(".")[2] for n, m in model.named_modules() if m is module and n), "")


# ---- some of the layers


def freeze_layers(model: nn.Module, config: RunConfig) -> None:
    """Train `freeze_trainable_modules` of the last `freeze_trainable_layers` layers (first if < 0), and the extra."""
    in_layer = {name: re.match(r"(?:.*?\.)?(\d+)\.(.+)\.[^.]+$", name) for name, _ in model.named_parameters()}
    total = 1 + max((int(m[1]) for m in in_layer.values() if m), default=-1)
    if not total:
        raise ValueError("finetuning_type: freeze needs a model with numbered layers")
    count = config.freeze_trainable_layers
    chosen = range(max(0, total - count), total) if count > 0 else range(min(-count, total))
    inside = {part for m in in_layer.values() if m for part in m[2].split(".")}
    wanted = set(names(config.freeze_trainable_modules))
    _check_names("freeze_trainable_modules", wanted - {"all"}, inside)
    for name, p in model.named_parameters():
        m = in_layer[name]
        p.requires_grad_(bool(m) and int(m[1]) in chosen and ("all" in wanted or bool(wanted & set(m[2].split(".")))))
    outside = {n.rpartition(".")[2]: m for n, m in model.named_modules() if n and not re.search(r"(^|\.)\d+(\.|$)", n)}
    outside = {
        name: module for name, module in outside.items() if next(module.parameters(recurse=False), None) is not None
    }
    extra = set(names(config.freeze_extra_modules))
    _check_names("freeze_extra_modules", extra, outside)
    for name in extra:
        outside[name].requires_grad_(True)


def _check_names(key: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    for name in wanted:
        if name not in known:
            choice = ", ".join(sorted(known))
            raise ValueError(f"{key}: the model has no {name!r}; choose from {choice}{nearest(name, known)}")


# ---- rates


def optimizer_groups(model: nn.Module, config: RunConfig, learning_rate: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with their rates: weight decay on matrices alone, and LoRA+'s rates where they are asked for.

        lr(B) = loraplus_lr_ratio lr(A),   lr(adapters of embeddings) = loraplus_lr_embedding

    `learning_rate` None is the config's.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    """
    base = config.learning_rate if learning_rate is None else learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((_rate(name, config, base), decay), []).append(p)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def _rate(name: str, config: RunConfig, base: float) -> float:
    if config.loraplus_lr_ratio is None:
        return base
    if "lora_embedding_" in name:
        return config.loraplus_lr_embedding
    return base * (config.loraplus_lr_ratio if "lora_B" in name else 1.0)

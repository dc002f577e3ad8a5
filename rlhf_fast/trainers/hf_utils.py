"""Models and tokenizers of transformers: loading with clear errors, adapters, checkpoints, saving."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import RunConfig, find_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a run. One without a padding token pads with EOS: padding is told by length, not by id."""
    from transformers import AutoTokenizer

    key = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
    name = find_model(key, getattr(config, key))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{key}: no tokenizer could be loaded from {name}: {_first_line(error)}") from error
    return ready_tokenizer(tokenizer)


def ready_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer with a padding token; ValueError when it has no EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: a completion could not learn to end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: RunConfig, tokenizer: Any = None) -> nn.Module:
    """The causal LM of a run, on the CPU, with its adapter when `finetuning_type` is lora."""
    from transformers import AutoModelForCausalLM

    name = find_model("model_name_or_path", config.model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[config.dtype or "float32"],
            attn_implementation=config.attn_implementation or choose_attention(config),
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model_name_or_path: no model could be loaded from {name}: {_first_line(error)}") from error
    if tokenizer is not None:
        align_special_tokens(model, tokenizer)
    return add_lora(model, config) if config.finetuning_type == "lora" else model


def choose_attention(config: RunConfig) -> str:
    """flash-attn where it is installed and can run (CUDA, half precision), else SDPA."""
    half = config.dtype in ("bfloat16", "float16") or config.bf16 or config.fp16
    installed = importlib.util.find_spec("flash_attn") is not None
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    return "flash_attention_2" if installed and half and on_gpu else "sdpa"


def align_special_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Tell the model's configs about the tokenizer's special ids, so that `generate` stops and pads."""
    generation = getattr(model, "generation_config", None)
    for config in (model.config, generation):
        if config is None:
            continue
        config.pad_token_id = tokenizer.pad_token_id
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_token_id
    if generation is None:
        return
    eos = generation.eos_token_id
    known = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    if tokenizer.eos_token_id not in known:  # what training ends completions with must end generation
        known.append(tokenizer.eos_token_id)
    generation.eos_token_id = known[0] if len(known) == 1 else known


def add_lora(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with trainable low-rank adapters; everything else is frozen."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise ValueError("finetuning_type: lora needs peft: pip install peft") from None
    target = config.lora_target
    if isinstance(target, str):
        target = "all-linear" if target == "all" else [t.strip() for t in target.split(",")]
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(f"lora_target={config.lora_target!r}: {_first_line(error)}") from error


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete `checkpoint-N`; incomplete ones (a kill in mid-save) are skipped with a warning."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and path.is_dir():
            found.append((int(number[1]), path))
    for _, path in sorted(found, reverse=True):
        if (path / "trainer_state.json").is_file():  # written last
            return path
        warnings.warn(f"{path} is incomplete and is skipped", stacklevel=2)
    return None


def resume_path(config: RunConfig) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; ValueError when there is none."""
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        path = last_checkpoint(config.output_dir)
        if path is None:
            raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {config.output_dir}")
        return path
    path = Path(wanted)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint: {path} is no complete checkpoint (no trainer_state.json)")
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Frozen weights in 4 or 8 bits (QLoRA), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from rlhf_fast.trainers.config import RunConfig


def quantization_options(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs to load a quantised model; nothing without `quantization_bit`.

    Args:
        dtype: of the products and of the modules that are not quantised (embedding, norms, head).
    Raises: ValueError when there is no CUDA device or no bitsandbytes.
    """
    bits = config.quantization_bit
    if not bits:
        return {}
    if config.use_cpu or not torch.cuda.is_available():
        raise ValueError(f"quantization_bit: {bits} needs a CUDA device: leave it out, or train on one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization_bit: {bits} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    four = dict(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_quant_storage=dtype,  # FSDP shards tensors of one dtype alone
    )
    how = BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": how, "device_map": {"": torch.cuda.current_device()}}

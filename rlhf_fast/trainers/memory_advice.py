"""When memory runs out: the same error, with the options that would have helped, the most likely one first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU_ALLOCATOR = ("DefaultCPUAllocator", "std::bad_alloc")  # what a RuntimeError of a failed allocation says


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out; names the part of the run and the options that reduce what it takes."""


@contextmanager
def memory_advice(config: Any, part: str) -> Iterator[None]:
    """Turn an allocation that fails inside into `OutOfMemory`.

    Args:
        config: a `RunConfig` or `TrainingArguments`: what is set already is not suggested, values are named.
        part: of the run: "load", "rollout", "scoring", "evaluate"; anything else is an update.
    """
    try:
        yield
    except OutOfMemory:
        raise  # from an inner part, which knows better
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"out of memory in {PARTS.get(part, part)}: {reason}. What helps: {'; '.join(advice(config, part))}"
        raise OutOfMemory(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in CPU_ALLOCATOR)


PARTS = {"load": "loading the models", "rollout": "the rollout", "scoring": "scoring", "evaluate": "the evaluation"}


def advice(config: Any, part: str) -> list[str]:
    """Options that make a part smaller."""

    def less(name: str, why: str = "") -> list[str]:
        value = getattr(config, name, None)
        return [f"a smaller {name} (now {value}){why}"] if isinstance(value, int) and value > 1 else []

    if part == "load":
        found = [f"{name}: {value}" for name, value in LIGHTER if getattr(config, name, value) in (None, False, "full")]
    elif part == "rollout":
        batch = getattr(config, "rollout_batch_size", None)
        found = less("rollout_batch_size") if batch else ["rollout_batch_size, which decodes fewer sequences at once"]
        found += less("max_completion_length")
    elif part in ("scoring", "evaluate"):
        found = less("per_device_eval_batch_size") + less("rollout_batch_size")
    else:
        tokens = getattr(config, "max_tokens_per_micro_batch", None)
        found = less("max_tokens_per_micro_batch")
        if tokens is None:
            same = ", with gradient_accumulation_steps raised to match: the result is the same"
            found += less("per_device_train_batch_size", same)
            if hasattr(config, "max_tokens_per_micro_batch"):
                found.append("max_tokens_per_micro_batch, which bounds a forward by its tokens")
        if not getattr(config, "gradient_checkpointing", False):
            found.append("gradient_checkpointing: true")
        found += less("cutoff_len")
    return [*found, "`rlhf-fast plan` shows the parts of the peak"]


LIGHTER = (("pure_bf16", "true"), ("finetuning_type", "lora"), ("quantization_bit", "4"))

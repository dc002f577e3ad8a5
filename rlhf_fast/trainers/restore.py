"""What a run takes back from a checkpoint: does it fit, weights, optimiser, generators."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_fast.trainers.checkpoint import read_marker
from rlhf_fast.trainers.sharding import part_of, taking_whole

OPTIMIZER = "optimizer.pt"
OWN = ("reference", "stage_state")  # safetensors beside the model's that are no weights of it
# Options that a resumed run may change without being another run.
FREE = frozenset(
    ("ddp_timeout", "disable_tqdm", "do_eval", "eval_steps", "logging_steps", "output_dir", "overwrite_output_dir")
    + ("per_device_eval_batch_size", "plot_loss", "report_to", "resume_from_checkpoint", "run_name")
    + ("save_only_model", "save_steps", "save_total_limit")
)


def check_fits(folder: Path, *, stage: str, processes: int, options: Mapping[str, Any]) -> int:
    """Raise ValueError on a checkpoint of another stage; warn of options that were others, and of other processes.

    Returns: the number of processes that wrote it.
    """
    marker = read_marker(folder)
    if marker.get("stage") != stage:
        raise ValueError(f"resume_from_checkpoint: {folder} is of {marker.get('stage')}, this run is {stage}")
    before = marker.get("processes", processes)
    if before != processes:
        text = f"{folder} was written by {before} process{'es' * (before > 1)}, this run has {processes}"
        warnings.warn(f"{text}: data order and random numbers will not be those of an unbroken run", stacklevel=2)
    then, now = marker.get("options", {}), json.loads(json.dumps(dict(options), default=str))
    changed = [n for n in sorted(then.keys() & now.keys()) if n not in FREE and then[n] != now[n]]
    if changed:
        pairs = ", ".join(f"{n} ({then[n]!r} -> {now[n]!r})" for n in changed)
        warnings.warn(f"{folder}: options changed since it was written: {pairs}", stacklevel=2)
    return before


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put the weights that `save_pretrained` wrote to `folder` into a live model, plain or of PEFT, sharded or not.

    Raises: ValueError when the folder holds no such weights, or those of another model.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(OWN)]
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not state:
        raise ValueError(f"{folder} holds no weights in safetensors")
    try:
        with taking_whole(model):
            missing, unexpected = _load_state(model, state)
    except RuntimeError as error:  # torch's words on other shapes
        raise ValueError(f"{folder} holds another model: {' '.join(str(error).split())[:300]}") from error
    if missing or unexpected:
        raise ValueError(f"{folder} holds another model: missing {missing[:3]}, unexpected {list(unexpected)[:3]}")


def _load_state(model: nn.Module, state: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """(missing, unexpected) names."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        return [], set_peft_model_state_dict(model, state).unexpected_keys
    missing, unexpected = model.load_state_dict(state, strict=False)
    saved = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    return [n for n in missing if id(model.get_parameter(n)) not in saved], unexpected  # tied: saved under one name


def save_tensors(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """In safetensors; nothing where there is nothing to save."""
    if state:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.is_file() else {}


def load_state(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote of tensors and plain values; no code is run. `mmap`: read when it is looked at."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """The state of all parameters, whole, into an optimiser of whole or of sharded ones.

    Raises: ValueError when the optimiser in the folder has other parameters, or lies in DeepSpeed's parts.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = any(hasattr(p, "full_tensor") for p in parameters)
    state = load_state(folder / OPTIMIZER, mmap=sharded)
    if not state["param_groups"]:
        raise ValueError(f"resume_from_checkpoint: {folder} was written under DeepSpeed and goes on under it alone")
    if sharded:
        state["state"] = {i: _parts(own, parameters[i]) for i, own in state["state"].items() if i < len(parameters)}
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        before, now = ([len(g["params"]) for g in s["param_groups"]] for s in (state, optimizer.state_dict()))
        raise ValueError(
            f"resume_from_checkpoint: the optimiser in {folder} has parameter groups of {before} tensors, "
            f"this run's of {now}"
        ) from error


def _parts(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """What this process keeps of a parameter's state: of tensors in its shape as much as of the parameter."""
    parts = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            cut = value.dim() > 0 and hasattr(parameter, "full_tensor")
            if cut and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {(*value.shape,)} cannot be sharded like its parameter")
            value = part_of(value, parameter) if cut else value.clone()  # not the file's pages
        parts[name] = value
    return parts


def own_file(process: int) -> str:
    """What a checkpoint holds of one process alone."""
    return f"process_{process}.pt"


def seed_from(seed: int, step: int, accelerator: Any) -> int:
    """Of a process's generators that begin at this step."""
    return (seed + accelerator.process_index + 1_000_003 * step) % 2**32


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators of this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

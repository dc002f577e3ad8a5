"""All that a run of `Loop` is, on the disk and back: models, optimiser, every process's own state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers import restore
from rlhf_fast.trainers.models.hf_utils import save_model

if TYPE_CHECKING:
    from rlhf_fast.trainers.loop import Loop

POLICY = "policy"  # the role of the model that a run is about


class Snapshot:
    """What a checkpoint of a loop holds.

    Attributes:
        parts: what else has a `state_dict` that a checkpoint must hold, of each process.
        weights: the same of tensors that all processes have alike.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.parts: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}

    # ---- writing

    def save_model(self, folder: str | os.PathLike) -> None:
        """Model in safetensors with its configs and tokenizer; the other roles in folders of their own."""
        loop = self.loop
        states = {role: loop.spread.state_dict(model) for role, model in loop.models.items()}
        if loop.main:
            save_model(loop.unwrapped, folder, loop.processing_class, state=states.pop(POLICY))
            for role, state in states.items():
                options = {} if state is None else {"state_dict": state}
                loop.spread.unwrap(loop.models[role]).save_pretrained(Path(folder) / role, **options)

    def save(self) -> None:
        """`checkpoint-<step>` in the output folder; see `rlhf_fast.trainers.checkpoint`."""
        loop, config, step = self.loop, self.loop.config, self.loop.state.global_step
        folder = Path(config.output_dir) / f"checkpoint-{step}"
        whole = loop.spread.resumable and not config.save_only_model
        about = dict(step=step, stage=config.stage, processes=loop.accelerator.num_processes)
        about |= dict(resumable=whole, options=config.to_dict())
        keep = dict(limit=config.save_total_limit, best=loop.state.best_model_checkpoint)
        needed = files.expected_bytes(loop.models.values(), loop.optimizer if whole else None)
        with files.writing(folder, loop.accelerator, needed=needed, **keep, **about) as part:
            self.save_model(part)
            if loop.main:
                loop.state.save_to_json(str(part / "trainer_state.json"))
            if whole:
                self._save_training(part)

    def _save_training(self, part: Path) -> None:
        optimizer = self.loop.spread.optimizer_state(self.loop.optimizer)
        if self.loop.main:
            torch.save(optimizer, part / restore.OPTIMIZER)
            for name, holder in self.weights.items():
                restore.save_tensors(holder.state_dict(), part / f"{name}.safetensors")
        torch.save(self._own_state(), part / self._own_file)

    @property
    def _own_file(self) -> str:
        return f"process_{self.loop.accelerator.process_index}.pt"

    def _stateful(self) -> dict[str, Any]:
        """By name, what has `state_dict` and `load_state_dict` beside models and optimiser."""
        loop = self.loop
        callbacks = {type(c).__name__: c for c in loop.callbacks.callbacks if hasattr(c, "load_state_dict")}
        scaler = {} if loop.accelerator.scaler is None else {"scaler": loop.accelerator.scaler}
        return {"loop": loop, "scheduler": loop.scheduler, **scaler, **self.parts, **callbacks}

    def _exported(self) -> list[Any]:
        return [c for c in self.loop.callbacks.callbacks if isinstance(c, ExportableState)]

    def _own_state(self) -> dict[str, Any]:
        """This process's state beside models, optimiser and `TrainerState`."""
        return {
            "random": restore.random_state(),
            "parts": {name: part.state_dict() for name, part in self._stateful().items()},
            "callbacks": [c.state()["attributes"] for c in self._exported()],
        }

    # ---- reading

    def restore(self, folder: Path) -> None:
        """Everything as it was when the checkpoint was written."""
        loop, config = self.loop, self.loop.config
        processes = loop.accelerator.num_processes
        restore.check_fits(folder, stage=config.stage, processes=processes, options=config.to_dict(), strict=True)
        for role, model in loop.models.items():
            loop.spread.load_weights(model, folder if role == POLICY else folder / role)
        loop.spread.load_optimizer(loop.optimizer, folder)
        for name, holder in self.weights.items():
            holder.load_state_dict(restore.load_tensors(folder / f"{name}.safetensors"))
        self._restore_progress(folder)
        self._load_own_state(restore.load_state(folder / self._own_file), folder)

    def _restore_progress(self, folder: Path) -> None:
        state, saved = self.loop.state, TrainerState.load_from_json(str(folder / "trainer_state.json"))
        for name in ("epoch", "global_step", "num_input_tokens_seen", "log_history"):
            setattr(state, name, getattr(saved, name))
        if saved.best_global_step is not None:
            state.best_metric, state.best_global_step = saved.best_metric, saved.best_global_step
            best = folder.parent / f"checkpoint-{saved.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_own_state(self, state: Mapping[str, Any], folder: Path) -> None:
        stateful = self._stateful()
        if stateful.keys() != state["parts"].keys():
            differ = ", ".join(sorted(stateful.keys() ^ state["parts"].keys()))
            raise ValueError(f"resume_from_checkpoint: {folder} and this run do not both have {differ}")
        for name, part in stateful.items():
            part.load_state_dict(state["parts"][name])
        for callback, attributes in zip(self._exported(), state["callbacks"], strict=False):
            vars(callback).update(attributes)
        restore.set_random_state(state["random"])

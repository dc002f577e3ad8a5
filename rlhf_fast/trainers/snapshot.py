"""All that a run of `Loop` is, on the disk and back: models, optimiser, every process's own state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState, set_seed
from transformers.trainer_callback import ExportableState

from rlhf_fast.trainers import checkpoint as files
from rlhf_fast.trainers import restore
from rlhf_fast.trainers.models.hf_utils import save_model
from rlhf_fast.trainers.sharding import gathered_state

if TYPE_CHECKING:
    from rlhf_fast.trainers.loop import Loop

POLICY = "policy"  # the role of the model that a run is about


class Snapshot:
    """What a checkpoint of a loop holds.

    Attributes:
        parts: what else has a `state_dict` that a checkpoint must hold, of each process.
        weights: the same of tensors that all processes have alike, or have shards of.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.parts: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}

    # ---- writing

    def model_states(self) -> dict[str, dict[str, torch.Tensor] | None]:
        """By role the whole weights on the first process, None where the model holds them. Every process calls it."""
        return {role: self.loop.spread.state_dict(model) for role, model in self.loop.models.items()}

    def save_model(self, folder: str | os.PathLike, states: dict[str, Any] | None = None) -> None:
        """Model in safetensors with its configs and tokenizer; the other roles in folders of their own."""
        loop = self.loop
        states = self.model_states() if states is None else states
        if loop.main:
            save_model(loop.unwrapped, folder, loop.processing_class, state=states.pop(POLICY))
            for role, state in states.items():
                options = {} if state is None else {"state_dict": state}
                loop.spread.unwrap(loop.models[role]).save_pretrained(Path(folder) / role, **options)

    def save(self) -> None:
        """`checkpoint-<step>` in the output folder; see `rlhf_fast.trainers.checkpoint`."""
        loop, config, step = self.loop, self.loop.config, self.loop.state.global_step
        folder = Path(config.output_dir) / f"checkpoint-{step}"
        whole = not config.save_only_model
        about = dict(step=step, stage=config.stage, processes=loop.accelerator.num_processes)
        about |= dict(resumable=whole, options=config.to_dict())
        keep = dict(limit=config.save_total_limit, best=loop.state.best_model_checkpoint)
        needed = files.expected_bytes(loop.models.values(), loop.optimizer if whole else None)
        states = self.model_states()  # gathered before a process can fail to write, and leave the others waiting
        optimizer = loop.spread.optimizer_state(loop.optimizer) if whole else None
        kept = self.weights.items() if whole else ()
        weights = {name: gathered_state(loop.accelerator, holder.state_dict()) for name, holder in kept}
        with files.writing(folder, loop.accelerator, needed=needed, **keep, **about) as part:
            self.save_model(part, states)
            if loop.main:
                loop.state.save_to_json(str(part / "trainer_state.json"))
            if whole:
                torch.save(self._own_state(), part / restore.own_file(loop.accelerator.process_index))
            if whole and loop.main:
                torch.save(optimizer, part / restore.OPTIMIZER)
                for name, state in weights.items():
                    restore.save_tensors(state, part / f"{name}.safetensors")

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
        """Everything as it was when the checkpoint was written.

        With another number of processes than then, what belongs to a process alone begins anew: its generators, its
        part of a rollout.
        """
        loop, config = self.loop, self.loop.config
        processes, process = loop.accelerator.num_processes, loop.accelerator.process_index
        before = restore.check_fits(folder, stage=config.stage, processes=processes, options=config.to_dict())
        for role, model in loop.models.items():
            loop.spread.load_weights(model, folder if role == POLICY else folder / role)
        loop.spread.load_optimizer(loop.optimizer, folder)
        for name, holder in self.weights.items():
            holder.load_state_dict(restore.load_tensors(folder / f"{name}.safetensors"))
        self._restore_progress(folder)
        state = restore.load_state(folder / restore.own_file(process % before))
        self._load_own_state(state, folder, same=before == processes)

    def _restore_progress(self, folder: Path) -> None:
        state, saved = self.loop.state, TrainerState.load_from_json(str(folder / "trainer_state.json"))
        for name in ("epoch", "global_step", "num_input_tokens_seen", "log_history"):
            setattr(state, name, getattr(saved, name))
        if saved.best_global_step is not None:
            state.best_metric, state.best_global_step = saved.best_metric, saved.best_global_step
            best = folder.parent / f"checkpoint-{saved.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_own_state(self, state: Mapping[str, Any], folder: Path, *, same: bool) -> None:
        stateful = self._stateful()
        if stateful.keys() != state["parts"].keys():
            differ = ", ".join(sorted(stateful.keys() ^ state["parts"].keys()))
            raise ValueError(f"resume_from_checkpoint: {folder} and this run do not both have {differ}")
        for name, part in stateful.items():
            load = part.load_state_dict if same else getattr(part, "load_state_of_others", part.load_state_dict)
            load(state["parts"][name])
        for callback, attributes in zip(self._exported(), state["callbacks"], strict=False):
            vars(callback).update(attributes)
        if same:
            restore.set_random_state(state["random"])
        else:
            set_seed(restore.seed_from(self.loop.config.seed, self.loop.state.global_step, self.loop.accelerator))

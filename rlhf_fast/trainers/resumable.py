"""A `transformers.Trainer` whose models and checkpoints are whole or not there, and from which every stage goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from rlhf_fast.trainers.checkpoint import expected_bytes, find_checkpoint, placing, read_marker, writing
from rlhf_fast.trainers.restore import (
    OPTIMIZER,
    check_fits,
    load_optimizer,
    load_state,
    load_tensors,
    load_weights,
    own_file,
    save_tensors,
)
from rlhf_fast.trainers.sharding import SAME_PROCESSES, full_state, gathered_state

EXTRA_STATE = "stage_state.safetensors"
SCHEDULER = "scheduler.pt"  # as the Trainer calls it


class ResumableTrainer(Trainer):
    """The Trainer's files, written as `rlhf_fast.trainers.checkpoint` says, under every layout over processes.

    Attributes:
        run_options: the run's configuration: a resumed run is held against it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run_options: dict[str, Any] = {}
        self._resumed: str | None = None  # the checkpoint that this run goes on from

    @property
    def _optimizer_name(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    # ---- what else a stage is

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside model, optimiser, schedule and random states; tensors may be sharded."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `extra_state` gave."""

    def _window_state(self) -> dict[str, Any]:
        """What this process has of its own beside its random state."""
        raise NotImplementedError

    # ---- writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model, also where it is sharded; put into `output_dir` once all of it is written."""
        folder, state = output_dir or self.args.output_dir, full_state(self.accelerator, self.model)
        if _internal_call:
            self._write_model(folder, state)
            return
        with placing(folder, self.accelerator, needed=expected_bytes([self.model])) as part:
            self._write_model(str(part), state)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: str, state: dict[str, Tensor] | None) -> None:
        if state is None:
            super().save_model(folder, True)
        elif self.args.should_save:
            self._save(folder, state_dict=state)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config") and getattr(model, "generation_config", None):
            model.generation_config.save_pretrained(folder)  # what an adapter is saved without
        (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """The Trainer's files, written as `rlhf_fast.trainers.checkpoint` says."""
        args, state = self.args, self.state
        run_dir = Path(self._get_output_dir(trial))
        self.store_flos()
        if state.best_global_step:
            best = run_dir / f"checkpoint-{state.best_global_step}"
            if best.is_dir() or state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(best)
        about = dict(step=state.global_step, stage=type(self).__name__, processes=args.world_size)
        about |= dict(resumable=not args.save_only_model, options=self.run_options, optimizer=self._optimizer_name)
        keep = dict(limit=args.save_total_limit, best=state.best_model_checkpoint)
        needed = expected_bytes([self.model], None if args.save_only_model else self.optimizer)
        folder = run_dir / f"checkpoint-{state.global_step}"
        weights, optimizer = full_state(self.accelerator, self.model), None
        sharded = weights is not None and not self.is_deepspeed_enabled
        extra = gathered_state(self.accelerator, self.extra_state())  # before a process can fail to write
        if sharded and not args.save_only_model:
            optimizer = gathered_state(self.accelerator, self.optimizer.state_dict())
        with writing(folder, self.accelerator, needed=needed, **keep, **about) as part:
            self._write_model(str(part), weights)
            if not args.save_only_model:
                self._save_training(part, optimizer, extra)
            if args.should_save:
                self._export_callbacks()
                state.save_to_json(str(part / "trainer_state.json"))
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _export_callbacks(self) -> None:
        kept = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, own = type(callback).__name__, callback.state()
                kept[name] = [*kept[name], own] if isinstance(kept.get(name), list) else own

    def _save_training(self, part: Path, optimizer: dict[str, Any] | None, extra: dict[str, Tensor]) -> None:
        """What else a run needs to go on; `optimizer` is its whole state where it is sharded, `extra` the stage's."""
        if optimizer is None:
            self._save_optimizer_and_scheduler(str(part))
        elif self.args.should_save:
            torch.save(optimizer, part / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), part / SCHEDULER)
        self._save_scaler(str(part))
        self._save_rng_state(str(part))
        torch.save(self._window_state(), part / own_file(self.args.process_index))
        if self.args.should_save:
            save_tensors(extra, part / EXTRA_STATE)

    # ---- reading

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The folder that `resume_from_checkpoint` names; ValueError when it cannot be gone on from."""
        folder = find_checkpoint(self.args.output_dir, wanted)
        if folder is None:
            return None
        if self.is_deepspeed_enabled:  # the Trainer leaves all else to the engine
            fits = dict(stage=type(self).__name__, processes=self.args.world_size, options=self.run_options)
            if check_fits(folder, **fits) != self.args.world_size:
                raise ValueError(f"resume_from_checkpoint: {SAME_PROCESSES}")
        return str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        options, processes = self.run_options, self.args.world_size
        check_fits(folder, stage=type(self).__name__, processes=processes, options=options)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(target, folder)  # the Trainer only warns where the weights are another model's

    def _load_best_model(self) -> None:
        if self.accelerator.is_fsdp2:
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._resumed = checkpoint
        if checkpoint is None:
            return
        before = read_marker(checkpoint).get("optimizer", self._optimizer_name)
        if before != self._optimizer_name:
            raise ValueError(
                f"resume_from_checkpoint: the optimiser in {checkpoint} is {before}, this run's {self._optimizer_name}"
            )
        if self.accelerator.is_fsdp2:
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))
        else:
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except (ValueError, KeyError) as error:
                words = f"resume_from_checkpoint: the optimiser in {checkpoint} is of other parameters: {error}"
                raise ValueError(words) from error
        self.load_extra_state(load_tensors(Path(checkpoint) / EXTRA_STATE))

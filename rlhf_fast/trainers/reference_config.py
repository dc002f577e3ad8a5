"""Options of the stages that hold the policy against a reference."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.trainers.config import RunConfig, TrainerConfig, find_model, require
from rlhf_fast.trainers.config_types import names


@dataclass(kw_only=True)
class ReferenceOptions(RunConfig):
    """The reference is the policy as it was at the start, unless `ref_model` names another."""

    ref_model: str | None = None  # a folder of a model or of an adapter
    ref_model_adapters: str | list[str] | None = None  # adapters to merge into ref_model
    sync_ref_model: bool = False  # every ref_model_sync_steps: reference <- a policy + (1 - a) reference
    ref_model_mixup_alpha: float = 0.6  # a; 1 copies, and small values with ref_model_sync_steps 1 are an EMA
    ref_model_sync_steps: int = 512

    def validate(self) -> None:
        super().validate()
        alpha, steps = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        require("ref_model_mixup_alpha", alpha, 0 < alpha <= 1, "in (0, 1]")
        require("ref_model_sync_steps", steps, steps >= 1, "at least 1")
        if self.ref_model_adapters and not self.ref_model:
            raise ValueError("ref_model_adapters goes with ref_model, the model under them")

    def check_paths(self) -> None:
        super().check_paths()
        for name in ("ref_model", "ref_model_adapters"):
            for folder in names(getattr(self, name)):
                find_model(name, folder)


@dataclass(kw_only=True)
class ReferenceConfig(ReferenceOptions, TrainerConfig):
    """What DPO and KTO have beside."""

    precompute_ref_log_probs: bool = False  # once before training, kept in output_dir; the reference is then dropped
    precompute_ref_batch_size: int | None = None  # None: per_device_eval_batch_size
    log_entropy: bool = False
    disable_dropout: bool = True  # else the policy differs from the reference before the first step

    def validate(self) -> None:
        super().validate()
        batch = self.precompute_ref_batch_size
        require("precompute_ref_batch_size", batch, batch is None or batch >= 1, "at least 1")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference, precompute_ref_log_probs fixes it; choose one")

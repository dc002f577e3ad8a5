"""One flat configuration per stage: dataclasses, read from YAML with `key=value` overrides.

Keys are those of LLaMA-Factory where it has them. A new stage is a subclass of `RunConfig` and an entry in
`STAGES`; a new key is a field with its type, from which the checks and the error messages follow.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from rlhf_fast.trainers import config_keys
from rlhf_fast.trainers.config_types import (
    convert,
    field_types,
    names,
    nearest,
    read_yaml,
    require,
    split_override,
)
from rlhf_fast.trainers.data.templates import check_name


class Stage(NamedTuple):
    """Where a stage's configuration class and its `run(config) -> summary` are: "module:name", imported on demand."""

    config: str
    run: str


STAGES = {
    "sft": Stage("rlhf_fast.trainers.sft_config:SFTConfig", "rlhf_fast.trainers.sft:run_sft"),
    "rm": Stage("rlhf_fast.trainers.rm_config:RMConfig", "rlhf_fast.trainers.rm:run_rm"),
    "dpo": Stage("rlhf_fast.trainers.dpo_config:DPOConfig", "rlhf_fast.trainers.dpo:run_dpo"),
    "kto": Stage("rlhf_fast.trainers.kto_config:KTOConfig", "rlhf_fast.trainers.kto:run_kto"),
    "ppo": Stage("rlhf_fast.trainers.ppo_config:PPOConfig", "rlhf_fast.trainers.ppo:run_ppo"),
    "grpo": Stage("rlhf_fast.trainers.grpo_config:GRPOConfig", "rlhf_fast.trainers.grpo:run_grpo"),
}


@dataclass(kw_only=True)
class RunConfig:
    """What every stage needs: model, data, output, optimiser. Values are checked and converted on creation."""

    stage: str = ""
    do_train: bool = True  # False: only evaluate
    do_eval: bool | None = None  # None: when there is an evaluation set
    # ---- model
    model_name_or_path: str = ""  # a folder (of a model or an adapter), or a name in the local Hugging Face cache
    adapter_name_or_path: str | list[str] | None = None  # all but the last are merged; training continues with that
    tokenizer_name_or_path: str | None = None  # default: the model's
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: see hf_utils.weights_dtype
    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # the same with do_train: false
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = "auto"  # auto: fa2 when it is there on CUDA, else sdpa
    attn_implementation: str | None = None  # transformers' name for the same, which has more
    quantization_bit: Literal[4, 8] | None = None  # QLoRA: the frozen weights in 4 or 8 bits
    quantization_method: Literal["bitsandbytes"] = "bitsandbytes"
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    # ---- what is trained
    finetuning_type: Literal["full", "lora", "freeze"] = "full"
    lora_rank: int = 8
    lora_alpha: int | None = None  # None: twice the rank
    lora_dropout: float = 0.0
    lora_target: str | list[str] = "all"  # "all": every linear layer but the head; with the head: "all,lm_head"
    additional_target: str | list[str] | None = None  # modules trained in full beside the adapter, and saved with it
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float | None = None  # learning rate of B over that of A
    loraplus_lr_embedding: float = 1e-6
    create_new_adapter: bool = False  # merge every adapter that is given and train a new one
    freeze_trainable_layers: int = 2  # freeze: the last n layers are trained, the first n when negative
    freeze_trainable_modules: str | list[str] = "all"  # of those layers, such as "mlp, self_attn"
    freeze_extra_modules: str | list[str] | None = None  # outside of the layers, such as "lm_head, norm"
    # ---- data
    template: str | None = None  # chat template, for tokenizers without one of their own
    dataset: str | list[str] = field(default_factory=list)  # paths, or names in dataset_dir or its dataset_info.json
    dataset_dir: str = "data"
    eval_dataset: str | list[str] | None = None
    val_size: float = 0.0  # held out from `dataset`: a fraction below 1, or a number of rows
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    interleave_probs: str | list[float] | None = None
    cutoff_len: int = 2048  # prompt + completion, tokens
    max_samples: int | None = None  # of each dataset
    overlong_prompt: Literal["drop", "truncate", "error"] = "drop"  # truncate keeps the end of the prompt
    packing: bool = False  # the sequences of a batch side by side, without padding; none sees another
    neat_packing: bool = False  # LLaMA-Factory's name for packing where none sees another
    # ---- output
    output_dir: str = ""
    overwrite_output_dir: bool = True  # False: resume from the newest checkpoint there; a finished model is an error
    run_name: str | None = None
    logging_steps: int = 1
    save_steps: int = 0  # 0: only the final model
    save_total_limit: int | None = None
    save_only_model: bool = False  # checkpoints without optimiser and schedule, from which no run resumes
    eval_steps: int = 0  # 0: only at the end, when there is an evaluation set
    plot_loss: bool = True
    report_to: str | list[str] = "none"
    resume_from_checkpoint: str | bool | None = None  # True: the last one in output_dir
    disable_tqdm: bool = False
    # ---- optimisation
    seed: int = 42
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    num_train_epochs: float = 1.0
    max_steps: int = -1  # -1: by num_train_epochs
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10  # steps in a row with a NaN or infinite loss or gradient before the run is given up
    gradient_checkpointing: bool = False
    disable_gradient_checkpointing: bool = False  # LLaMA-Factory's switch, where checkpointing is on by default
    bf16: bool = False  # autocast
    fp16: bool = False
    pure_bf16: bool = False  # weights, gradients and optimiser states in bf16, no autocast
    use_cpu: bool = False
    ddp_timeout: int = 1800  # seconds

    # Whether other fields of transformers.TrainingArguments are accepted and handed on.
    takes_training_arguments: ClassVar[bool] = False
    # {other name of a key: field}, collected along the bases.
    aliases: ClassVar[Mapping[str, str]] = config_keys.RENAMED

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for name, expected in hints.items():
            setattr(self, name, convert(name, getattr(self, name), expected))
        self.packing = self.packing or self.neat_packing
        self.validate()

    @classmethod
    def imply(cls, given: dict[str, Any], renamed: Collection[str]) -> None:
        """Put into `given` what keys under their other names mean beside their value."""

    def validate(self) -> None:
        """Raise ValueError on values that have the right type but make no sense."""
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        positive += ("cutoff_len", "logging_steps", "lora_rank", "ddp_timeout", "max_skipped_steps")
        for name in positive:
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "save_steps", "eval_steps", "val_size"):
            value = getattr(self, name)
            require(name, value, 0 <= value < float("inf"), "at least 0 and finite")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        require("max_steps", self.max_steps, self.max_steps == -1 or self.max_steps > 0, "-1 or at least 1")
        require("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2^32)")
        require("adam_epsilon", self.adam_epsilon, 0 <= self.adam_epsilon < float("inf"), "at least 0 and finite")
        require("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "above 0")
        for name in ("max_samples", "save_total_limit"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1 or null")
        check_name(self.template)
        self._validate_finetuning()
        self._validate_evaluation()
        precisions = [name for name in ("bf16", "fp16", "pure_bf16") if getattr(self, name)]
        if len(precisions) > 1:
            raise ValueError(f"{' and '.join(precisions)} are both true; choose one")
        if self.gradient_checkpointing and self.disable_gradient_checkpointing:
            raise ValueError("gradient_checkpointing and disable_gradient_checkpointing are both true; choose one")
        if self.flash_attn != "auto" and self.attn_implementation:
            raise ValueError("flash_attn and attn_implementation name the same choice; give one of them")

    def _validate_finetuning(self) -> None:
        kind = self.finetuning_type
        if self.quantization_bit and kind != "lora":
            raise ValueError(f"quantization_bit needs finetuning_type: lora (frozen weights), got {kind}")
        if self.quantization_bit and self.pure_bf16:
            raise ValueError("quantization_bit and pure_bf16 exclude each other: use bf16")
        require("lora_target", self.lora_target, bool(names(self.lora_target)), "all, or names of modules")
        if self.loraplus_lr_ratio is not None:
            require("loraplus_lr_ratio", self.loraplus_lr_ratio, self.loraplus_lr_ratio > 0, "above 0")
        require("freeze_trainable_layers", self.freeze_trainable_layers, self.freeze_trainable_layers != 0, "not 0")

    def _validate_evaluation(self) -> None:
        if self.eval_dataset and self.val_size:
            raise ValueError("eval_dataset and val_size both make an evaluation set; choose one")
        held_out = bool(self.eval_dataset or self.val_size)
        for key, wanted in (("do_eval: true", self.do_eval), ("do_train: false", not self.do_train)):
            if wanted and not held_out:
                raise ValueError(f"{key} needs eval_dataset or val_size")
        if self.do_eval is False and (held_out or not self.do_train):
            raise ValueError("do_eval is false: leave out eval_dataset, val_size and do_train: false")
        if not self.do_train and not self.takes_training_arguments:
            raise ValueError(
                f"do_train: false is not supported in stage {self.stage}: evaluate the model with stage sft"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values."""
        return dataclasses.asdict(self)

    def check_paths(self) -> None:
        """Raise before anything heavy is loaded when the model, the data or the output folder cannot be used."""
        for name in ("model_name_or_path", "output_dir", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is required")
        find_model("model_name_or_path", self.model_name_or_path)
        if self.tokenizer_name_or_path:
            find_model("tokenizer_name_or_path", self.tokenizer_name_or_path)
        for adapter in names(self.adapter_name_or_path):
            if not (Path(adapter).expanduser() / "adapter_config.json").is_file():
                raise FileNotFoundError(f"adapter_name_or_path: no adapter_config.json in {adapter}")
        self.dataset_paths("dataset")
        self.dataset_paths("eval_dataset")
        output = Path(self.output_dir)
        if output.expanduser().resolve() == Path(self.model_name_or_path).expanduser().resolve():
            raise ValueError(f"output_dir is the folder of model_name_or_path, {output}: it would be overwritten")
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"output_dir must be a folder, got {output}, and {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"output_dir: {output} cannot be written: no permission in {there}")

    def dataset_paths(self, key: str = "dataset") -> list[Path]:
        """The paths of `dataset` or `eval_dataset`: entries of dataset_info.json, or paths here or in `dataset_dir`."""
        from rlhf_fast.trainers.data.dataset_info import resolve

        try:
            return [source.path for source in resolve(names(getattr(self, key)), self.dataset_dir)]
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{key}: {error}") from None


@dataclass(kw_only=True)
class TrainerConfig(RunConfig):
    """A stage that runs on `transformers.Trainer`: the other fields of its TrainingArguments are keys as well."""

    training_arguments: dict[str, Any] = field(default_factory=dict)

    takes_training_arguments: ClassVar[bool] = True


def config_class(stage: str) -> type[RunConfig]:
    """The configuration class of a stage."""
    if stage == "pt":
        raise ValueError("stage pt is not there: use stage sft with rows that hold only text, which are scored whole")
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}{nearest(str(stage), STAGES)}")
    return _import(STAGES[stage].config)


def run(config: RunConfig) -> dict[str, Any]:
    """Run the stage of a configuration; returns its summary."""
    from rlhf_fast.trainers.memory_advice import memory_advice

    with memory_advice(config, "load"):
        return _import(STAGES[config.stage].run)(config)


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with `key=value` overrides on top.

    Args:
        path: YAML with flat keys; `stage` chooses the class.
        overrides: such as ["learning_rate=1e-4", "lora_target=[q_proj, v_proj]"]; values are YAML, and a dotted key
            such as "lr_scheduler_kwargs.num_cycles=2" sets one entry of a mapping.
    Raises: FileNotFoundError, or ValueError naming the file, the key, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        config = make_config(read_yaml(path), overrides)
        config.check_paths()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def make_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration object of a mapping that holds `stage`; unknown keys are errors."""
    given = dict(values)
    texts = dict(map(split_override, overrides))
    stage = texts.get("stage", given.get("stage"))
    if stage is None:
        raise ValueError(f"stage is required: one of {', '.join(STAGES)}")
    cls = config_class(stage)
    known = field_types(cls)
    nested = given.pop("training_arguments", None) or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"training_arguments must be a mapping, got {nested!r:.60} ({type(nested).__name__})")
    for key, value in nested.items():
        given.setdefault(key, value)
    config_keys.override(given, texts, cls)
    renamed = {other: name for other, name in config_keys.aliases(cls).items() if other in given}
    for other, name in renamed.items():
        if name in given:
            raise ValueError(f"{other} and {name} are two names of one key; give one of them")
        given[name] = given.pop(other)
    cls.imply(given, renamed)
    config_keys.drop_inert(given, known, stage)
    accepted = config_keys.training_argument_types() if set(given) - set(known) else {}
    if not cls.takes_training_arguments:
        config_keys.loop_values(given, stage)
    extra = {key: given.pop(key) for key in list(given) if key not in known}
    for key, value in extra.items():
        if key not in accepted or not cls.takes_training_arguments:
            raise ValueError(_unknown(key, cls, stage, accepted))
        if value is not None:
            value = "no" if value is False and key.endswith("_strategy") else value  # YAML 1.1 reads `no` as false
            extra[key] = convert(key, value, accepted[key])
    if extra:
        given["training_arguments"] = extra
    return cls(**given)


def _unknown(key: str, cls: type, stage: str, training_arguments: Mapping[str, Any]) -> str:
    """What to say about a key that the stage does not take."""
    if key in training_arguments:
        return f"{key} is an option of transformers.Trainer, which does not run stage {stage}: not supported there"
    others = [s for s in STAGES if s != stage and key in _keys(config_class(s))]
    if others:
        return f"{key} is an option of stage {', '.join(others)}, not of {stage}"
    meant = config_keys.MEANT.get(str(key), "")
    if meant:
        return f"unknown key {key!r}" + (f"; did you mean {meant!r}?" if meant.partition(":")[0] in _keys(cls) else "")
    accepted = set(training_arguments if cls.takes_training_arguments else ()) - set(config_keys.REFUSED)
    return f"unknown key {key!r}{nearest(str(key), [*_keys(cls), *sorted(accepted)])}"


def _keys(cls: type) -> set[str]:
    return {*field_types(cls), *config_keys.aliases(cls)}


def find_model(key: str, name: str) -> str:
    """`name` when it is a model folder, or in the local cache; else FileNotFoundError. Nothing is downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        kept = ("config.json", "adapter_config.json", "tokenizer_config.json")
        if not any((folder / file).is_file() for file in kept):
            raise FileNotFoundError(f"{key}: the folder {folder} holds no config.json")
        return str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            pass
        else:
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return name
        raise FileNotFoundError(f"{key}: no folder {folder}, and no such model in the local Hugging Face cache")
    raise FileNotFoundError(f"{key}: no folder {folder}")


def _import(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)

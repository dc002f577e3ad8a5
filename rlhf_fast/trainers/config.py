"""One flat configuration per stage: dataclasses, read from YAML with `key=value` overrides.

Keys are those of LLaMA-Factory where it has them. A new stage is a subclass of `RunConfig` and an entry in
`STAGES`; a new key is a field with its type, from which the checks and the error messages follow.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple


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
    # ---- model
    model_name_or_path: str = ""  # a folder on disk, or a name that is already in the local Hugging Face cache
    tokenizer_name_or_path: str | None = None  # default: the model's
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: float32
    attn_implementation: str | None = None  # None: flash-attn when it is there on CUDA, else SDPA
    finetuning_type: Literal["full", "lora"] = "full"
    lora_rank: int = 8
    lora_alpha: int | None = None  # None: twice the rank
    lora_dropout: float = 0.0
    lora_target: str | list[str] = "all"  # "all": every linear layer but the head
    # ---- data
    dataset: str | list[str] = field(default_factory=list)  # files or folders of .json and .jsonl
    dataset_dir: str = "."  # where `dataset` is looked for when it is not found as it stands
    eval_dataset: str | list[str] | None = None
    val_size: float = 0.0  # held out from `dataset`: a fraction below 1, or a number of rows
    cutoff_len: int = 2048  # prompt + completion, tokens
    max_samples: int | None = None
    overlong_prompt: Literal["drop", "truncate", "error"] = "drop"  # truncate keeps the end of the prompt
    # ---- output
    output_dir: str = ""
    run_name: str | None = None
    logging_steps: int = 1
    save_steps: int = 0  # 0: only the final model
    save_total_limit: int | None = None
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
    gradient_checkpointing: bool = False
    bf16: bool = False  # autocast; the weights keep `dtype`
    fp16: bool = False
    use_cpu: bool = False

    # Whether other fields of transformers.TrainingArguments are accepted and handed on.
    takes_training_arguments: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for name, expected in hints.items():
            setattr(self, name, convert(name, getattr(self, name), expected))
        self.validate()

    def validate(self) -> None:
        """Raise ValueError on values that have the right type but make no sense."""
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        positive += ("cutoff_len", "logging_steps", "lora_rank")
        for name in positive:
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "save_steps", "eval_steps", "val_size"):
            value = getattr(self, name)
            require(name, value, 0 <= value < float("inf"), "at least 0 and finite")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        require("max_steps", self.max_steps, self.max_steps == -1 or self.max_steps > 0, "-1 or at least 1")
        require("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "above 0")
        if self.max_samples is not None:
            require("max_samples", self.max_samples, self.max_samples >= 1, "at least 1")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; choose one")

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
        self.dataset_paths("dataset")
        self.dataset_paths("eval_dataset")
        output = Path(self.output_dir)
        if output.exists() and not output.is_dir():
            raise ValueError(f"output_dir must be a folder, got the file {output}")

    def dataset_paths(self, key: str = "dataset") -> list[Path]:
        """The paths of `dataset` or `eval_dataset`, looked up in `dataset_dir` where they do not exist as given."""
        value = getattr(self, key) or []
        names = [n.strip() for n in value.split(",") if n.strip()] if isinstance(value, str) else list(value)
        paths = []
        for name in names:
            candidates = [Path(name).expanduser(), Path(self.dataset_dir).expanduser() / name]
            found = next((p for p in candidates if p.exists()), None)
            if found is None:
                tried = " or ".join(dict.fromkeys(os.path.normpath(p) for p in candidates))
                raise FileNotFoundError(f"{key}: no file or folder {tried}")
            paths.append(found)
        return paths


@dataclass(kw_only=True)
class TrainerConfig(RunConfig):
    """A stage that runs on `transformers.Trainer`: the other fields of its TrainingArguments are keys as well."""

    training_arguments: dict[str, Any] = field(default_factory=dict)

    takes_training_arguments: ClassVar[bool] = True


def config_class(stage: str) -> type[RunConfig]:
    """The configuration class of a stage."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}{_nearest(str(stage), STAGES)}")
    return _import(STAGES[stage].config)


def run(config: RunConfig) -> dict[str, Any]:
    """Run the stage of a configuration; returns its summary."""
    return _import(STAGES[config.stage].run)(config)


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with `key=value` overrides on top.

    Args:
        path: YAML with flat keys; `stage` chooses the class.
        overrides: such as ["learning_rate=1e-4", "lora_target=[q_proj, v_proj]"]; values are YAML.
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
    texts = dict(map(_split_override, overrides))
    stage = texts.get("stage", given.get("stage"))
    if stage is None:
        raise ValueError(f"stage is required: one of {', '.join(STAGES)}")
    cls = config_class(stage)
    given.update((key, parse_override(cls, key, text)) for key, text in texts.items())

    known = field_types(cls)
    extra = {key: given.pop(key) for key in list(given) if key not in known}
    if extra:
        accepted = _training_argument_types() if cls.takes_training_arguments else {}
        for key, value in extra.items():
            if key not in accepted:
                raise ValueError(f"unknown key {key!r}{_nearest(str(key), [*known, *accepted])}")
            if value is not None:
                extra[key] = convert(key, value, accepted[key])
        if extra:
            given["training_arguments"] = {**(given.get("training_arguments") or {}), **extra}
    return cls(**given)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read safely; a key given twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise ValueError(f"key {key!r} is given twice, again in line {key_node.start_mark.line + 1}")
                seen.add(key if isinstance(key, str) else str(key))
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None
    if values is None:
        raise ValueError("the file is empty")
    if not isinstance(values, dict):
        raise ValueError(f"must hold 'key: value' lines, got a {type(values).__name__}")
    return values


def parse_override(cls: type[RunConfig], key: str, text: str) -> Any:
    """The value of `key=text`: the text itself where the key takes a string, else YAML."""
    import yaml

    expected = field_types(cls).get(key)
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    takes_text = expected is str or str in typing.get_args(expected)
    if takes_text and not isinstance(value, (str, list, bool, type(None))):
        return text  # run_name=7 is the name "7"
    if expected is str and isinstance(value, bool):
        return text
    return value


def convert(name: str, value: Any, expected: Any) -> Any:
    """`value` as the annotated type, converting only where nothing can be lost; else ValueError.

    "1e-6" is a float (YAML 1.1 reads it as text), 8.0 an int, "true" a bool; True is not an int.
    """
    options = typing.get_args(expected) if _is_union(expected) else (expected,)
    for option in options:  # an exact match first: True stays a bool in `str | bool`
        if _is_exactly(value, option):
            return value
    for option in options:
        try:
            return _convert_one(value, option)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{name} must be {describe(expected)}, got {value!r} ({type(value).__name__})")


def describe(expected: Any) -> str:
    """A type in words, for error messages."""
    if _is_union(expected):
        return " or ".join(describe(option) for option in typing.get_args(expected))
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list" + (f" of {getattr(args[0], '__name__', args[0])}" if args else "")
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping"}
    names[type(None)] = "null"
    return names.get(origin or expected, str(expected))


def require(name: str, value: Any, ok: bool, expected: str) -> None:
    """Raise ValueError unless `ok` (False for NaN by construction of the comparison)."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def find_model(key: str, name: str) -> str:
    """`name` when it is a model folder, or in the local cache; else FileNotFoundError. Nothing is downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
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


@cache
def field_types(cls: type) -> dict[str, Any]:
    """{field: type} of a dataclass, annotations resolved along its bases."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


@cache
def _training_argument_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    managed = {"remove_unused_columns", "label_names", "push_to_hub", "do_predict"}
    known = {k: v for k, v in field_types(TrainingArguments).items() if k not in managed}
    # Enumerations and the like are left to TrainingArguments itself.
    plain = (str, int, float, bool, dict, list, type(None))
    for name, hint in known.items():
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        if not all((typing.get_origin(o) or o) in plain for o in options):
            known[name] = Any
    return known


def _is_union(expected: Any) -> bool:
    return typing.get_origin(expected) in (typing.Union, types.UnionType)


def _is_exactly(value: Any, option: Any) -> bool:
    if option is Any:
        return True
    origin = typing.get_origin(option)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in typing.get_args(option))
    if origin is list:
        args = typing.get_args(option) or (Any,)
        return isinstance(value, list) and all(_is_exactly(v, args[0]) for v in value)
    if origin is dict or option is dict:
        return isinstance(value, dict)
    return type(value) is option


def _convert_one(value: Any, option: Any) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if option is float and not isinstance(value, bool):
        number = float(text if text is not None else value)
        if number != number:
            raise ValueError
        return number
    if option is int and not isinstance(value, bool):
        number = float(text if text is not None else value)
        if not number.is_integer():
            raise ValueError
        return int(text) if text is not None and re.fullmatch(r"[+-]?\d+", text) else int(number)
    if option is bool and text is not None and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if option is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if typing.get_origin(option) is list and isinstance(value, (list, tuple)):
        (inner,) = typing.get_args(option)
        return [v if _is_exactly(v, inner) else _convert_one(v, inner) for v in value]
    raise ValueError


def _import(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"overrides are key=value, got {text!r}")
    return key.strip().removeprefix("--"), value


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""

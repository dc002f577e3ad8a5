"""Models and tokenizers of transformers: loading with clear errors, adapters, checkpoints, saving."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.trainers.config import RunConfig, find_model
from rlhf_fast.trainers.config_types import first_line, names
from rlhf_fast.trainers.data.templates import apply_template
from rlhf_fast.trainers.memory_advice import is_out_of_memory
from rlhf_fast.trainers.models.lora import base_of, choose_trained, merge_adapter
from rlhf_fast.trainers.models.quantization import quantization_options
from rlhf_fast.trainers.sharding import shape_of

CLASSIFIER = "AutoModelForSequenceClassification"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a run. One without a padding token pads with EOS: padding is told by length, not by id."""
    from transformers import AutoTokenizer

    key = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
    name = find_model(key, getattr(config, key))
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        name = find_model(f"the base of {name}", base_of(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of its own reader, of JSON, of transformers
        raise ValueError(f"{key}: no tokenizer could be loaded from {name}: {first_line(error)}") from error
    if missing := _missing_vocabulary(tokenizer, Path(name)):
        raise ValueError(f"{key}: the tokenizer in {name} has no vocabulary: {missing} is missing")
    return ready_tokenizer(apply_template(tokenizer, config.template))


def _missing_vocabulary(tokenizer: Any, folder: Path) -> str:
    """The file without which transformers makes some tokenizers of their special tokens alone; "" when it is there."""
    files = dict(getattr(tokenizer, "vocab_files_names", None) or {})
    if not files or not folder.is_dir() or any((folder / file).is_file() for file in files.values()):
        return ""
    made_of = set(tokenizer("a0", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    return "" if made_of else files.get("tokenizer_file", next(iter(files.values())))


def ready_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer with a padding token; ValueError when it has no EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: a completion could not learn to end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: RunConfig, tokenizer: Any = None, *, auto_class: str = "AutoModelForCausalLM", **options: Any
) -> nn.Module:
    """The model of a run, with what `finetuning_type` names trainable; on the CPU unless it is quantised.

    Args:
        auto_class: of transformers; with AutoModelForSequenceClassification give `num_labels` among the options.
        options: handed to `from_pretrained`.
    """
    base, adapters = find_adapters(config)
    dtype = weights_dtype(config)
    options |= quantization_options(config, dtype)
    options["attn_implementation"] = choose_attention(config)
    model = _from_pretrained(
        "model_name_or_path", base, auto_class, dtype=dtype, trust_remote_code=config.trust_remote_code, **options
    )
    if tokenizer is not None:
        align_special_tokens(model, tokenizer)
    return choose_trained(model, config, adapters)


def load_folder(
    path: str | os.PathLike,
    *,
    auto_class: str = "AutoModelForCausalLM",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """A frozen model in eval mode: from a plain folder, or from an adapter folder, merged into its base.

    `dtype` None keeps what the weights are saved in.
    """
    folder = find_model("model", os.fspath(path))
    adapter = is_adapter(folder)
    base = find_model("base_model_name_or_path", base_of(folder)) if adapter else folder
    model = _from_pretrained(
        "model", base, auto_class, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **options
    )
    if adapter:
        model = merge_adapter(model, folder)
    return model.requires_grad_(False).eval()


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    path = Path(folder).expanduser()
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def find_adapters(config: RunConfig) -> tuple[str, list[str]]:
    """The plain base of a run, and the adapters on it in their order: `model_name_or_path` may be one itself."""
    name = find_model("model_name_or_path", config.model_name_or_path)
    adapters = names(config.adapter_name_or_path)
    if not is_adapter(name):
        return name, adapters
    return find_model(f"the base of {name}", base_of(name)), [name, *adapters]


def weights_dtype(config: RunConfig) -> torch.dtype:
    """The dtype in which weights are loaded.

    `dtype` where it is given (`infer_dtype` with do_train: false); with pure_bf16 bf16; with bf16 or fp16 that type for
    weights that stay frozen (lora, freeze), while what is trained is kept in fp32; else fp32.
    """
    if config.dtype:
        return DTYPES[config.dtype]
    if not config.do_train and config.infer_dtype != "auto":
        return DTYPES[config.infer_dtype]
    half = "bfloat16" if config.bf16 or config.pure_bf16 else "float16" if config.fp16 else "float32"
    return DTYPES[half if config.pure_bf16 or config.finetuning_type != "full" else "float32"]


def _from_pretrained(key: str, name: str, auto_class: str, **options: Any) -> nn.Module:
    """Raises: ValueError with the reason, which may be any file of the folder; also where weights are missing."""
    import transformers

    try:
        model, found = getattr(transformers, auto_class).from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # transformers, safetensors and torch have a type each for a file that is damaged
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{key}: no model could be loaded from {name}: {reason}") from error
    body = f"{model.base_model_prefix}." if auto_class == CLASSIFIER else ""  # its head may be a new one
    missing = sorted(n for n in found["missing_keys"] if n.startswith(body))
    if missing:
        raise ValueError(
            f"{key}: {name} lacks {len(missing)} of the weights that its config.json describes, such as {missing[0]}"
        )
    return model


def save_model(
    model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, *, state: dict[str, Tensor] | None = None
) -> None:
    """Model or adapter in safetensors, with its generation config and tokenizer beside.

    `state` holds the weights where the model does not (sharded).
    """
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(model, "peft_config"):  # an adapter is saved without it
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def choose_attention(config: RunConfig) -> str | None:
    """What the config says; else flash-attn where it is installed and can run (CUDA, half precision); else None, which
    is transformers' choice: SDPA where the model has it."""
    named = {"sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}.get(config.flash_attn)
    if config.attn_implementation or named:
        return config.attn_implementation or named
    half = weights_dtype(config) != torch.float32 or config.bf16 or config.fp16
    installed = importlib.util.find_spec("flash_attn") is not None
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    return "flash_attention_2" if installed and half and on_gpu else None


def align_special_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Tell the model's configs about the tokenizer's special ids, so that `generate` stops and pads."""
    check_special_tokens(model, tokenizer)
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


def ending_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a sampled completion: EOS, and what the model's generation config (None: no such) names."""
    eos = getattr(generation, "eos_token_id", None)
    if not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos or 0])):
        raise ValueError(f"eos_token_id in generation_config.json must be an id or a list of ids, got {eos!r}")
    return tuple(sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}))


def read_ending_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    """`ending_ids` of a run's model before it is loaded: of its generation_config.json or, without one, config.json.

    Raises: ValueError when neither can be read.
    """
    from transformers import AutoConfig, GenerationConfig

    base, _ = find_adapters(config)
    try:
        try:
            generation: Any = GenerationConfig.from_pretrained(base)
        except OSError:
            generation = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code).get_text_config()
    except Exception as error:  # what a damaged file makes transformers raise has many types
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"model_name_or_path: no model could be loaded from {base}: {reason}") from error
    return ending_ids(generation, tokenizer)


def check_special_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError where the tokenizer pads or ends with a token that the model has no embedding for."""
    size = vocabulary_size(model)
    for name in ("pad", "eos"):
        token, index = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if index is not None and index >= size:
            raise ValueError(
                f"the tokenizer's {name}_token {token!r} has id {index}, the model's embedding {size} rows: "
                "model.resize_token_embeddings makes room for it, or take a token that is there"
            )


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return shape_of(model.get_input_embeddings().weight)[0]


def check_window(model: nn.Module, longest: int, what: str) -> None:
    """Warn when sequences are longer than the model's window; ValueError where positions are looked up in a table."""
    window = getattr(model.config, "max_position_embeddings", None)
    if window is None or longest <= window:
        return
    text = f"{what} has {longest} tokens, the model's window is {window} (max_position_embeddings): set cutoff_len"
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    if any(table.num_embeddings in (window, window + 2) for table in tables):  # OPT's table has two rows more
        raise ValueError(text)
    warnings.warn(text, stacklevel=2)

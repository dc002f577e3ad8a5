"""Keys of LLaMA-Factory and of `TrainingArguments` that are no option of a stage, each with what to say about it.

Three kinds: keys on which nothing depends here (`INERT`), keys of features that are not there (`REFUSED`; a value that
means "off" is let through), and keys of `TrainingArguments` that a loop of its own takes (`LOOP_KEYS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from rlhf_fast.trainers.config_types import convert, field_types, is_union, parse_override

INERT: dict[str, Any] = {
    "overwrite_cache": bool,  # tokenised data is not cached on disk
    "preprocessing_batch_size": int,  # fast tokenizers share the work over threads
    "preprocessing_num_workers": int | None,
    "data_shared_file_system": bool,  # every process reads for itself
    "low_cpu_mem_usage": bool,  # transformers >= 5 always loads shard by shard
    "upcast_lmhead_output": bool,  # statistics over the logits are fp32 in any case
    "include_effective_tokens_per_second": bool,  # tokens_per_second is always logged
    "print_param_status": bool,
    "use_reentrant_gc": bool,  # checkpointing is the non-reentrant one, which gives the same gradients
    "offload_folder": str,
    "cache_dir": str | None,  # nothing is downloaded
    "hf_hub_token": str | None,
    "ms_hub_token": str | None,
    "om_hub_token": str | None,
    "remove_unused_columns": bool,  # columns are kept or left out by what the stage needs
    "average_tokens_across_devices": bool,  # losses are normalised by counts over all devices
}


class Refused(NamedTuple):
    """A key whose feature is not there: values that switch it off are dropped, others are an error with the reason."""

    off: tuple[Any, ...]
    reason: str


_GENERATES = "only the stages ppo and grpo generate"
_HUB = "nothing is uploaded or downloaded"
_OPTIMIZER = "choose an optimizer of transformers with optim"
_MEDIA = "the models are text models"
_SERVING = "it is an option of inference servers"

REFUSED: dict[str, Refused] = {
    # ---- data
    "streaming": Refused((False,), "datasets are read and counted before the run starts"),
    "buffer_size": Refused((16384,), "it belongs to streaming, which is not there"),
    "eval_on_each_dataset": Refused((False,), "evaluation sets are scored together"),
    "tokenized_path": Refused((None,), "tokenised data is not kept on disk"),
    "tool_format": Refused((None,), "tools are formatted by the tokenizer's chat template"),
    "default_system": Refused((None,), "put the system message into the data"),
    "enable_thinking": Refused((True, None), "put the thoughts into the data, or set the tokenizer's chat template"),
    "ignore_pad_token_for_loss": Refused((True,), "padding is never scored"),
    "media_dir": Refused((None,), _MEDIA),
    "image_max_pixels": Refused((768 * 768, None), _MEDIA),
    "image_min_pixels": Refused((32 * 32, None), _MEDIA),
    "image_resolution": Refused((512 * 512, None), _MEDIA),
    "video_max_pixels": Refused((256 * 256, None), _MEDIA),
    "video_min_pixels": Refused((16 * 16, None), _MEDIA),
    "video_resolution": Refused((128 * 128, None), _MEDIA),
    "video_fps": Refused((2.0, None), _MEDIA),
    "video_maxlen": Refused((64, 128, None), _MEDIA),
    "use_audio_in_video": Refused((False,), _MEDIA),
    "freeze_vision_tower": Refused((True,), _MEDIA),
    "freeze_multi_modal_projector": Refused((True,), _MEDIA),
    "freeze_language_model": Refused((False,), _MEDIA),
    "train_mm_proj_only": Refused((False,), _MEDIA),
    # ---- model
    "model_revision": Refused(("main",), "give the folder of the revision"),
    "adapter_folder": Refused((None,), "give the whole path in adapter_name_or_path"),
    "use_fast_tokenizer": Refused((True,), "transformers >= 5 has fast tokenizers only"),
    "split_special_tokens": Refused((False,), "transformers >= 5 has fast tokenizers only"),
    "resize_vocab": Refused((False,), "resize the embedding once and save the model"),
    "add_tokens": Refused((None,), "add tokens to tokenizer and embedding once and save both"),
    "add_special_tokens": Refused((None,), "add tokens to tokenizer and embedding once and save both"),
    "new_special_tokens": Refused((None,), "add tokens to tokenizer and embedding once and save both"),
    "rope_scaling": Refused((None,), "set it in the model's config.json"),
    "shift_attn": Refused((False,), "S^2 attention changes what the model computes; use packing with long sequences"),
    "mixture_of_depths": Refused((None,), "models are taken as they are"),
    "moe_aux_loss_coef": Refused((None, 0.0), "the router's loss is not added to the stages' losses"),
    "use_unsloth": Refused((False,), "it replaces the model's forward, in which the head is fused"),
    "use_unsloth_gc": Refused((False,), "use gradient_checkpointing"),
    "use_liger_kernel": Refused((False,), "it replaces the model's forward, in which the head is fused"),
    "enable_liger_kernel": Refused((False,), "it replaces the model's forward, in which the head is fused"),
    "liger_kernel_config": Refused((None,), "it replaces the model's forward, in which the head is fused"),
    "use_kt": Refused((False,), "it replaces the model's layers"),
    "upcast_layernorm": Refused((False,), "give the weights' dtype with dtype: float32"),
    "train_from_scratch": Refused((False,), "make the model once with AutoModelForCausalLM.from_config and save it"),
    "use_cache": Refused((True, None), "rollouts keep keys and values, training does not"),
    "quantization_device_map": Refused((None,), "training puts the whole model on each process's device"),
    "infer_backend": Refused(("huggingface", "hf"), _SERVING),
    "vllm_maxlen": Refused((4096,), _SERVING),
    "vllm_gpu_util": Refused((0.7, 0.9), _SERVING),
    "vllm_enforce_eager": Refused((False,), _SERVING),
    "vllm_max_lora_rank": Refused((32,), _SERVING),
    "vllm_config": Refused((None,), _SERVING),
    "export_dir": Refused((None,), "the model is saved in output_dir as transformers and peft load it"),
    "export_size": Refused((1, 5), "the model is saved in output_dir as transformers and peft load it"),
    "export_legacy_format": Refused((False,), "models are saved as safetensors"),
    "export_quantization_bit": Refused((None,), "quantise the saved model with the tool that will serve it"),
    # ---- fine-tuning
    "pissa_init": Refused((False,), "it moves weights into the adapter, so that the base alone is no reference"),
    "pissa_iter": Refused((16,), "it belongs to pissa_init, which is not there"),
    "pissa_convert": Refused((False,), "it belongs to pissa_init, which is not there"),
    "use_llama_pro": Refused((False,), "expand the blocks once, save the model and use finetuning_type: freeze"),
    "use_galore": Refused((False,), _OPTIMIZER + ": galore_adamw"),
    "use_apollo": Refused((False,), _OPTIMIZER + ": apollo_adamw"),
    "use_badam": Refused((False,), _OPTIMIZER),
    "use_adam_mini": Refused((False,), _OPTIMIZER),
    "use_muon": Refused((False,), _OPTIMIZER),
    "use_dft_loss": Refused((False,), "the loss of stage sft is the plain likelihood"),
    "use_asft_loss": Refused((False,), "the loss of stage sft is the plain likelihood"),
    "use_eaft_loss": Refused((False,), "the loss of stage sft is the plain likelihood"),
    "compute_accuracy": Refused((False,), "the logits are never formed; perplexity is logged"),
    "disable_shuffling": Refused((False,), "use train_sampling_strategy: sequential"),
    "early_stopping_steps": Refused((None,), "use load_best_model_at_end"),
    "use_swanlab": Refused((False,), "use report_to: swanlab"),
    "ref_model_quantization_bit": Refused((None,), "the reference has the policy's dtype"),
    "reward_model_quantization_bit": Refused((None,), "reward models keep the dtype they are saved in"),
    # ---- generation
    "do_predict": Refused((False,), "generate with the saved model"),
    "predict_with_generate": Refused((False,), "generate with the saved model"),
    "generation_max_length": Refused((None,), "generate with the saved model"),
    "generation_num_beams": Refused((None,), "generate with the saved model"),
    "eval_num_beams": Refused((None,), "generate with the saved model"),
    "do_sample": Refused((True,), "rollouts are sampled: a greedy one has no distribution to learn from"),
    "num_beams": Refused((1,), "rollouts are sampled"),
    "length_penalty": Refused((1.0,), "it belongs to beam search"),
    "repetition_penalty": Refused((1.0,), "it would bias the importance ratios"),
    "max_length": Refused((None, 1024), "use max_new_tokens; cutoff_len limits prompt + completion"),
    "skip_special_tokens": Refused((True,), "special tokens are never part of a text"),
    "max_new_tokens": Refused((), _GENERATES),
    "temperature": Refused((), _GENERATES),
    "top_p": Refused((), _GENERATES),
    "top_k": Refused((), _GENERATES),
    # ---- TrainingArguments
    "label_smoothing_factor": Refused((0.0,), "see dpo_label_smoothing for preferences"),
    "label_names": Refused((None,), "batches are the stage's own"),
    "include_for_metrics": Refused((None, []), "the logits are never formed"),
    "batch_eval_metrics": Refused((False,), "the logits are never formed"),
    "group_by_length": Refused((False,), "transformers >= 5 has train_sampling_strategy: group_by_length"),
    "logging_dir": Refused((None,), "transformers >= 5 has the environment variable TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": Refused((True,), "models are saved as safetensors"),
    "push_to_hub": Refused((False,), _HUB),
    "hub_model_id": Refused((None,), _HUB),
    "hub_token": Refused((None,), _HUB),
    "activation_checkpointing": Refused((), "its key is gradient_checkpointing"),
}

# Prefixes of options that only refine a feature which is not there.
FAMILIES = {
    "galore_": "use_galore",
    "apollo_": "use_apollo",
    "badam_": "use_badam",
    "swanlab_": "use_swanlab",
    "ray_": "Ray, which is not used",
    "oft_": "finetuning_type: oft",
    "sglang_": "inference servers",
    "export_quantization_": "export_quantization_bit",
}

# What is meant by names that other projects have, and that are near to no key of ours.
MEANT = {
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "use_vllm": "sampler: server",
    "vllm_mode": "sampler: server",
    "vllm_server_base_url": "rollout_server_url",
}

RENAMED = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}  # in every stage
LOOP_KEYS: dict[str, tuple[Any, ...] | None] = {
    # TrainingArguments that ppo and grpo take, with the values that mean what their loop does; None: any
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "logging_strategy": ("steps",),
    "logging_first_step": (False,),
    "full_determinism": (False,),
    "group_by_length": (False,),
    "dataloader_num_workers": None,  # prompts are tokenised before the run
    "dataloader_pin_memory": None,
    "dataloader_drop_last": (False,),
    "ddp_find_unused_parameters": (None, False),
    "fsdp": (None, "", [], False),
    "torch_compile": (False,),
    "neftune_noise_alpha": (None, 0),
    "log_level": None,
}


def drop_inert(given: dict[str, Any], known: Mapping[str, Any], stage: str) -> None:
    """Take keys without effect out of `given`; ValueError for those of features that are not there."""
    for key in [k for k in given if k not in known]:
        if key in INERT:
            convert(key, given.pop(key), INERT[key])
        elif key in REFUSED:
            off, reason = REFUSED[key]
            if not any(_same(given[key], value) for value in off):
                raise ValueError(f"{key}: {given[key]!r} is not supported in stage {stage}: {reason}")
            del given[key]
        elif family := next((f for f in FAMILIES if str(key).startswith(f)), None):
            raise ValueError(f"{key} is not supported: it belongs to {FAMILIES[family]}")


def loop_values(given: dict[str, Any], stage: str) -> None:
    """Turn the TrainingArguments that a loop of its own takes into its options; ValueError for the others."""
    for kind, steps in (("save", 500), ("eval", given.get("logging_steps") or 1)):
        if (strategy := given.pop(f"{kind}_strategy", None)) is None:
            continue
        strategy = "no" if strategy is False else strategy  # YAML 1.1 reads a bare `no` as false
        if strategy not in ("no", "steps"):
            raise ValueError(f"{kind}_strategy must be one of no, steps in stage {stage}, got {strategy!r}")
        given[f"{kind}_steps"] = 0 if strategy == "no" else given.get(f"{kind}_steps") or steps
    for key in [k for k in given if k in LOOP_KEYS]:
        value, accepted = given.pop(key), LOOP_KEYS[key]
        if accepted is not None and not any(_same(value, v) for v in accepted):
            words = " or ".join("null" if v is None else str(v) for v in accepted)
            raise ValueError(f"{key} must be {words} in stage {stage}, whose loop is its own, got {value!r}")


def override(given: dict[str, Any], texts: Mapping[str, str], cls: type) -> None:
    """Put the overrides into `given`, under the name by which the file has them."""
    known, same = field_types(cls), aliases(cls)
    for key, text in texts.items():
        key = key.removeprefix("training_arguments.")
        outer, dot, inner = key.partition(".")
        if dot:
            mapping = given.get(outer) or {}
            if not isinstance(mapping, dict):
                raise ValueError(f"{outer} is no mapping, so that {key} has no place in it")
            given[outer] = {**mapping, inner: parse_override(Any, text)}
            continue
        field_name = same.get(key, key)
        for other in [k for k in given if same.get(k, k) == field_name]:
            del given[other]  # the file's value, under either name
        given[key] = parse_override(known.get(field_name), text)


def aliases(cls: type) -> dict[str, str]:
    """{other name: field} of a configuration class and its bases."""
    return {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get("aliases", {}).items()}


@cache
def training_argument_types() -> dict[str, Any]:
    """{field: type} of TrainingArguments; enumerations and the like are left to TrainingArguments itself."""
    from transformers import TrainingArguments

    known = dict(field_types(TrainingArguments))
    plain = (str, int, float, bool, dict, list, type(None))
    for name, hint in known.items():
        options = hint.__args__ if is_union(hint) else (hint,)
        if not all((getattr(o, "__origin__", None) or o) in plain for o in options):
            known[name] = Any
    return known


def _same(value: Any, other: Any) -> bool:
    """Equality that tells True from 1 and takes "1.0" for 1.0."""
    if isinstance(value, str) and isinstance(other, (int, float)) and not isinstance(other, bool):
        try:
            value = float(value)
        except ValueError:
            return False
    return value == other and isinstance(value, bool) == isinstance(other, bool)

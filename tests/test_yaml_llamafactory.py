"""LLaMA-Factory's YAML: the keys mean what they mean there, and what is not there says so."""

from __future__ import annotations

import json
import warnings

import pytest
import yaml

pytest.importorskip("transformers")

from rlhf_fast.trainers import config_keys
from rlhf_fast.trainers.config import STAGES, config_class, load_config, make_config
from rlhf_fast.trainers.config_types import field_types

REWARD = """
model_name_or_path: {model}
stage: rm
finetuning_type: lora
dataset: my_preference_data
template: qwen
output_dir: saves/lora/reward
"""
PPO = """
model_name_or_path: {model}
stage: ppo
do_train: true
finetuning_type: lora
reward_model: saves/lora/reward
ppo_epochs: 4
ppo_target: 6.0
lora_rank: 64
lora_target: all
dataset: my_ppo_prompts
template: qwen
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-6
bf16: true
output_dir: saves/lora/ppo
"""
COMMON = """
### model
model_name_or_path: {model}
trust_remote_code: true
low_cpu_mem_usage: true
infer_dtype: auto
flash_attn: auto
### method
stage: {stage}
do_train: true
do_predict: false
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target: q_proj,v_proj
use_rslora: true
use_galore: false
pissa_init: false
### dataset
dataset: my_preference_data
dataset_dir: data
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
streaming: false
mix_strategy: concat
### output
output_dir: saves/x
logging_steps: 10
save_steps: 500
save_strategy: steps
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, a registry of data sets and the reward model of the first YAML; the working directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "data", "saves/lora/reward"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "saves/lora/reward/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "model"}))
    (tmp_path / "data" / "pairs.jsonl").write_text("{}\n")
    registry = {"my_preference_data": {"file_name": "pairs.jsonl", "ranking": True}}
    registry["my_ppo_prompts"] = {"file_name": "pairs.jsonl"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))

    def load(text, *overrides, **values):
        (tmp_path / "run.yaml").write_text(text.format(**({"model": "model"} | values)))
        return load_config("run.yaml", overrides)

    return load


def make(stage="sft", **values):
    return make_config(dict(stage=stage, **values))


# ---- as it stands


def test_the_reward_models_yaml(place):
    config = place(REWARD)
    assert (config.stage, config.finetuning_type, config.template) == ("rm", "lora", "qwen")
    assert [str(p) for p in config.dataset_paths()] == ["data/pairs.jsonl"]


def test_the_ppo_yaml(place):
    config = place(PPO)
    assert (config.ppo_epochs, config.ppo_target, config.lora_rank, config.lora_target) == (4, 6.0, 64, "all")
    assert (config.learning_rate, config.bf16, config.reward_model) == (1e-6, True, "saves/lora/reward")
    assert config.sizes() == (8, 1)


@pytest.mark.parametrize("stage", list(STAGES))
def test_an_example_of_its_own(place, stage):
    rewards = ["reward_model=saves/lora/reward"] if stage in ("ppo", "grpo") else []
    config = place(COMMON, *rewards, stage=stage)
    assert (config.warmup_ratio, config.save_steps, config.eval_steps) == (0.1, 500, 500)
    assert (config.ddp_timeout, config.max_samples, config.report_to) == (180000000, 1000, "none")
    again = make_config(config.to_dict())
    assert again == config  # run_config.yaml starts the same run


@pytest.mark.parametrize("where", ["data", "here", "path"])
def test_datasets_are_found_by_name_and_by_path(place, tmp_path, where):
    (tmp_path / "other.jsonl").write_text("{}\n")
    name = {"data": "pairs.jsonl", "here": "other.jsonl", "path": str(tmp_path / "other.jsonl")}[where]
    assert place(REWARD, f"dataset={name}").dataset_paths()[0].name == name.rpartition("/")[2]
    with pytest.raises(FileNotFoundError, match="dataset: .*my_preference_dat"):
        place(REWARD, "dataset=my_preference_dat")


# ---- every key of the tables


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_keys_without_effect_are_checked_and_dropped(stage):
    values = dict(overwrite_cache=True, preprocessing_num_workers=16, low_cpu_mem_usage=False, print_param_status=True)
    assert make(stage, **values) == make(stage)
    with pytest.raises(ValueError, match="preprocessing_num_workers must be an integer or null, got 'many'"):
        make(stage, preprocessing_num_workers="many")
    with pytest.raises(ValueError, match="overwrite_cache must be true or false, got 'yes please'"):
        make(stage, overwrite_cache="yes please")


@pytest.mark.parametrize("key", sorted(config_keys.REFUSED))
def test_what_is_not_there_gives_its_reason_and_may_be_off(key):
    stage = "sft" if key not in field_types(config_class("sft")) else "rm"
    off, reason = config_keys.REFUSED[key]
    for value in off:
        assert make(stage, **{key: value}) == make(stage)
    other = next(v for v in (True, 7, "x") if v not in off and (v is not True or 1 not in off))
    with pytest.raises(ValueError, match=f"^{key}: .* is not supported in stage {stage}: ") as error:
        make(stage, **{key: other})
    assert str(error.value).endswith(reason)
    assert len(reason) > 10


def test_no_key_is_in_two_tables():
    tables = [set(config_keys.INERT), set(config_keys.REFUSED), set(config_keys.RENAMED)]
    assert len(set().union(*tables)) == sum(map(len, tables))
    every = set().union(*(field_types(config_class(s)) for s in STAGES if s not in ("ppo", "grpo")))
    assert not every & set().union(*tables)


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("sft", dict(use_galore=True), "use_galore: True is not supported in stage sft: choose an optimizer"),
        ("sft", dict(galore_rank=8), "galore_rank is not supported: it belongs to use_galore"),
        ("sft", dict(max_new_tokens=8), "max_new_tokens: 8 .*only the stages ppo and grpo generate"),
        ("sft", dict(ppo_epochs=2), "^ppo_epochs is an option of stage ppo, not of sft"),
        ("ppo", dict(pref_beta=0.1), "^pref_beta is an option of stage dpo, kto, not of ppo"),
        ("ppo", dict(do_sample=False), "do_sample: False .*rollouts are sampled"),
        ("grpo", dict(repetition_penalty=1.1), "repetition_penalty: 1.1 .*bias the importance ratios"),
        ("grpo", dict(num_beams=4), "num_beams: 4 is not supported in stage grpo"),
        ("ppo", dict(neftune_noise_alpha=5), "neftune_noise_alpha must be null or 0 in stage ppo"),
        ("grpo", dict(optim="sgd"), "optim must be adamw_torch or adamw_torch_fused in stage grpo"),
        ("grpo", dict(tf32=True), "tf32 is an option of transformers.Trainer, which does not run stage grpo"),
        ("grpo", dict(save_strategy="epoch"), "save_strategy must be one of no, steps in stage grpo, got 'epoch'"),
        ("sft", dict(flash_attn="fa3"), "flash_attn must be one of auto, disabled, sdpa, fa2, got 'fa3'"),
        ("sft", dict(quantization_bit=3, finetuning_type="lora"), "quantization_bit must be one of 4, 8 or null"),
        ("sft", dict(quantization_bit=4), "quantization_bit needs finetuning_type: lora"),
        ("sft", dict(quantization_method="hqq"), "quantization_method must be one of bitsandbytes, got 'hqq'"),
        ("sft", dict(template="qwne"), "qwne.*did you mean 'qwen'"),
        ("sft", dict(label_smoothing_factor=0.1), "label_smoothing_factor: 0.1 is not supported"),
        ("sft", dict(use_liger_kernel=True), "use_liger_kernel: True .*in which the head is fused"),
    ],
)  # fmt: skip
def test_errors_say_what_and_why(stage, values, message):
    with pytest.raises(ValueError, match=message):
        make(stage, **values)


def test_stage_pt_points_to_sft():
    with pytest.raises(ValueError, match="stage pt is not there: use stage sft with rows that hold only text"):
        make("pt")


# ---- meaning


def test_no_and_false_are_one_word_to_yaml(place):
    """A bare `no` is false in YAML 1.1."""
    assert place(COMMON + "logging_strategy: no\n", stage="sft").training_arguments["logging_strategy"] == "no"
    text = COMMON.replace("save_strategy: steps", "save_strategy: no")
    assert place(text + "reward_funcs: a:b\n", stage="grpo").save_steps == 0
    assert place(text, stage="sft").training_arguments["save_strategy"] == "no"


def test_strategies_of_loops():
    assert make("grpo", save_strategy="steps").save_steps == 500
    assert make("grpo", save_strategy="steps", save_steps=7).save_steps == 7
    assert make("grpo", evaluation_strategy="steps", logging_steps=3).eval_steps == 3
    assert make("grpo", eval_strategy="no", eval_steps=5).eval_steps == 0


def test_two_names_of_a_key():
    assert make("dpo", pref_beta=0.3).beta == 0.3
    assert make("sft", evaluation_strategy="epoch").training_arguments == {"eval_strategy": "epoch"}
    assert make("ppo", max_new_tokens=32).max_completion_length == 32
    with pytest.raises(ValueError, match="pref_beta and beta are two names of one key"):
        make("dpo", pref_beta=0.3, beta=0.3)
    assert make_config(dict(stage="dpo", pref_beta=0.3), ["beta=0.5"]).beta == 0.5  # the override wins
    assert make_config(dict(stage="dpo", beta=0.3), ["pref_beta=0.5"]).beta == 0.5


def test_packing():
    assert not make().packing
    assert make(packing=True).packing
    assert make(neat_packing=True).packing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(eval_dataset="x", val_size=0.1), "eval_dataset and val_size both make an evaluation set"),
        (dict(do_eval=True), "do_eval: true needs eval_dataset or val_size"),
        (dict(do_train=False), "do_train: false needs eval_dataset or val_size"),
        (dict(do_eval=False, val_size=0.1), "do_eval is false: leave out"),
        (dict(bf16=True, pure_bf16=True), "bf16 and pure_bf16 are both true; choose one"),
        (dict(gradient_checkpointing=True, disable_gradient_checkpointing=True), "choose one"),
        (dict(flash_attn="sdpa", attn_implementation="eager"), "name the same choice"),
        (dict(freeze_trainable_layers=0), "freeze_trainable_layers must be not 0, got 0"),
        (dict(loraplus_lr_ratio=0), "loraplus_lr_ratio must be above 0, got 0"),
        (dict(lora_target=""), "lora_target must be all, or names of modules"),
    ],
)
def test_options_that_contradict_each_other(values, message):
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_do_train_false_is_for_the_trainer_stages():
    assert not make(do_train=False, val_size=0.1).do_train
    with pytest.raises(ValueError, match="do_train: false is not supported in stage ppo"):
        make("ppo", do_train=False, val_size=0.1)


def test_gradient_checkpointing_warns_of_nothing(tmp_path, recwarn):
    from rlhf_fast.trainers.stage import training_arguments

    for on in (True, False):
        config = make(gradient_checkpointing=on, output_dir=str(tmp_path), use_cpu=True)
        assert training_arguments(config, has_eval=False).gradient_checkpointing is on
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


# ---- overrides


def test_nested_overrides():
    values = dict(stage="sft", lr_scheduler_kwargs={"num_cycles": 1})
    config = make_config(
        values, ["lr_scheduler_kwargs.num_cycles=2", "training_arguments.optim=sgd", "fsdp_config.x=[1]"]
    )
    assert config.training_arguments == {
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "optim": "sgd",
        "fsdp_config": {"x": [1]},
    }
    assert values["lr_scheduler_kwargs"] == {"num_cycles": 1}
    with pytest.raises(ValueError, match="seed is no mapping, so that seed.x has no place in it"):
        make_config(dict(stage="sft", seed=3), ["seed.x=1"])
    with pytest.raises(ValueError, match="unknown key 'optm'; did you mean 'optim'"):
        make_config(dict(stage="sft", training_arguments={"optm": "sgd"}))


def test_every_field_survives_yaml(place):
    config = place(COMMON, stage="sft")
    assert make_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


# ---- run


def test_both_run_as_they_stand(tmp_path, monkeypatch):
    """The reward model's YAML, and PPO's with that reward model, on a model of two layers."""
    pytest.importorskip("peft")
    from test_data import word_tokenizer
    from test_sft import tiny_model
    from transformers import AutoModelForCausalLM

    from rlhf_fast.trainers.config import run

    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    word_tokenizer().save_pretrained("model")
    (tmp_path / "data").mkdir()
    pairs = [{"instruction": "a b c", "input": "", "chosen": "c b a", "rejected": "a a"} for _ in range(8)]
    prompts = [{"instruction": "a b", "input": "", "output": ""} for _ in range(8)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows))
    registry = {"my_preference_data": {"file_name": "pairs.json", "ranking": True}}
    registry["my_ppo_prompts"] = {"file_name": "prompts.json"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))

    fast = ["use_cpu=true", "disable_tqdm=true", "plot_loss=false"]
    for text, more in ((REWARD, ["max_steps=2"]), (PPO, ["max_steps=1", "max_completion_length=4"])):
        (tmp_path / "run.yaml").write_text(text.format(model="model"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three of the template's marks are no tokens of this tokenizer
            summary = run(load_config("run.yaml", [*fast, *more]))
        assert summary["steps"] == int(more[0][-1])
    AutoModelForCausalLM.from_pretrained("saves/lora/ppo")
    assert (tmp_path / "saves/lora/reward/adapter_config.json").is_file()

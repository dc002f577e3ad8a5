"""Configuration: types, nearest keys, overrides, paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_fast.trainers.config import load_config, make_config
from rlhf_fast.trainers.config_keys import REFUSED, training_argument_types
from rlhf_fast.trainers.sft_config import SFTConfig

pytest.importorskip("yaml")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")

    def write(text="", **changes):
        values = dict(
            stage="sft",
            model_name_or_path=tmp_path / "model",
            dataset="train.jsonl",
            dataset_dir=tmp_path / "data",
            output_dir=tmp_path / "out",
        )
        values |= changes
        lines = [f"{key}: {value}" for key, value in values.items() if value is not None]
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")
        return path

    return write


def test_yaml_as_people_write_it(place):
    text = "learning_rate: 1e-6\nnum_train_epochs: 3\nbf16: true\nmax_samples: 1000.0\nlora_target: [q_proj, v_proj]"
    path = place(text)
    path.write_text("\ufeff# comment\n" + path.read_text(), encoding="utf-8")
    config = load_config(path)
    assert isinstance(config, SFTConfig)
    assert config.learning_rate == 1e-6
    assert isinstance(config.learning_rate, float)  # YAML 1.1 reads 1e-6 as text
    assert (config.num_train_epochs, type(config.num_train_epochs)) == (3.0, float)
    assert config.bf16 is True
    assert (config.max_samples, type(config.max_samples)) == (1000, int)
    assert config.lora_target == ["q_proj", "v_proj"]
    assert [p.name for p in config.dataset_paths()] == ["train.jsonl"]


def test_overrides_win_and_are_typed_by_their_key(place):
    path = place("seed: 1\nrun_name: first")
    given = ["seed=7", "learning_rate=1e-4", "run_name=12", "resume_from_checkpoint=true", "max_samples="]
    config = load_config(path, [*given, "lora_target=[a, b]", "--warmup_ratio=0.1", "report_to=none"])
    assert (config.seed, config.learning_rate, config.run_name) == (7, 1e-4, "12")
    assert config.resume_from_checkpoint is True
    assert config.max_samples is None
    assert config.lora_target == ["a", "b"]
    assert (config.warmup_ratio, config.report_to) == (0.1, "none")
    with pytest.raises(ValueError, match=r"overrides are key=value, got 'seed'"):
        load_config(path, ["seed"])
    with pytest.raises(ValueError, match=r"run\.yaml: unknown key 'sed'; did you mean 'seed'"):
        load_config(path, ["sed=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"run\.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ("perdevice_train_batch_size: 1", r"did you mean 'per_device_train_batch_size'"),
        ("zzzzqqqq: 1", r"unknown key 'zzzzqqqq'$"),
        ("model: x", r"unknown key 'model'; did you mean 'model_name_or_path'\?$"),
        ("use_vllm: true", r"unknown key 'use_vllm'$"),
        ("max_steps: many", r"run\.yaml: max_steps must be an integer, got 'many' \(str\)"),
        ("max_steps: 2.5", r"max_steps must be an integer, got 2\.5 \(float\)"),
        ("max_steps: true", r"max_steps must be an integer, got True \(bool\)"),
        ("seed: null", r"seed must be an integer, got None"),
        ("bf16: 1", r"bf16 must be true or false, got 1 \(int\)"),
        ("learning_rate: [1]", r"learning_rate must be a number, got \[1\] \(list\)"),
        ("learning_rate: .nan", r"learning_rate must be"),
        ("learning_rate: .inf", r"learning_rate must be at least 0 and finite, got inf"),
        ("learning_rate: -1", r"learning_rate must be at least 0"),
        ("run_name: {a: 1}", r"run_name must be a string or null, got \{'a': 1\}"),
        ("finetuning_type: dora", r"finetuning_type must be one of full, lora, freeze, got 'dora'"),
        ("lora_target: [1, 2]", r"lora_target must be a string or a list of str"),
        ("per_device_train_batch_size: 0", r"per_device_train_batch_size must be at least 1, got 0"),
        ("max_steps: 0", r"max_steps must be -1 or at least 1, got 0"),
        ("warmup_ratio: 1", r"warmup_ratio must be in \[0, 1\)"),
        ("bf16: true\nfp16: true", r"bf16 and fp16"),
        ("seed: 1\nseed: 2", r"key 'seed' is given twice, again in line 7"),
        ("- a", r"run\.yaml: not valid YAML"),
    ],
)
def test_errors_name_file_key_expected_and_got(place, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(place(text))


def test_no_refused_key_is_suggested(place):
    refused = [key for key in REFUSED if key in training_argument_types()]
    assert "push_to_hub" in refused
    for key in refused:
        with pytest.raises(ValueError, match="unknown key") as caught:
            load_config(place(f"{key}x: true"))
        suggested = str(caught.value).partition("did you mean '")[2].partition("'")[0]
        assert suggested not in REFUSED
    with pytest.raises(ValueError, match="unknown key 'use_vllm'; did you mean 'sampler: server'"):
        load_config(place("use_vllm: true", stage="grpo"))


def test_stage(place):
    with pytest.raises(ValueError, match=r"stage must be one of .*sft.*, got 'sftt'; did you mean 'sft'"):
        load_config(place(stage="sftt"))
    with pytest.raises(ValueError, match="stage is required"):
        load_config(place(stage=None))
    assert type(load_config(place(stage=None), ["stage=sft"])) is SFTConfig


def test_paths_are_checked_before_anything_runs(place, tmp_path, monkeypatch):
    cases = [
        (dict(model_name_or_path=tmp_path / "nowhere"), r"run\.yaml: model_name_or_path: no folder .*nowhere"),
        (dict(model_name_or_path="org/model"), r"no such model in the local Hugging Face cache"),
        (dict(model_name_or_path=tmp_path / "data"), r"holds no config\.json"),
        (dict(dataset="other.jsonl"), r"dataset: no file or folder other\.jsonl or .*data/other\.jsonl"),
        (dict(eval_dataset="train.jsonl, gone.json"), r"eval_dataset: no file or folder gone\.json"),
    ]
    for changes, message in cases:
        with pytest.raises(FileNotFoundError, match=message):
            load_config(place(**changes))
    for name in ("model_name_or_path", "dataset", "output_dir"):
        with pytest.raises(ValueError, match=f"{name} is required"):
            load_config(place(**{name: None}))
    with pytest.raises(ValueError, match="output_dir must be a folder"):
        load_config(place(output_dir=tmp_path / "model" / "config.json"))
    with pytest.raises(ValueError, match=r"output_dir must be a folder, got .*run, and .*config\.json is a file"):
        load_config(place(output_dir=tmp_path / "model" / "config.json" / "run"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: .*out/run cannot be written: no permission in "):
        load_config(place(output_dir=tmp_path / "out" / "run"))
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*gone\.yaml"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ("just words", "must hold"), ("a: [", "not valid YAML")]
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.yaml: .*{message}"):
        load_config(tmp_path / "x.yaml")


def test_yaml_cannot_run_code(place, tmp_path):
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(place(f"run_name: !!python/object/apply:os.mkdir [{tmp_path / 'owned'}]"))
    assert not (tmp_path / "owned").exists()


def test_other_training_arguments_are_handed_on(place):
    pytest.importorskip("transformers")
    from rlhf_fast.trainers.stage import training_arguments

    config = load_config(place("ddp_timeout: '1800'\noptim: sgd\nneftune_noise_alpha: 5\nuse_cpu: true"))
    assert config.training_arguments == {"optim": "sgd", "neftune_noise_alpha": 5}
    assert config.ddp_timeout == 1800
    args = training_arguments(config, has_eval=False)
    assert (args.ddp_timeout, str(args.optim.value), args.neftune_noise_alpha) == (1800, "sgd", 5)
    with pytest.raises(ValueError, match="ddp_timeout must be an integer"):
        load_config(place("ddp_timeout: soon"))
    with pytest.raises(ValueError, match="training arguments do not fit"):
        training_arguments(load_config(place("optim: no_such_thing\nuse_cpu: true")), has_eval=False)


def test_training_arguments_mean_what_they_say(tmp_path):
    pytest.importorskip("transformers")
    from rlhf_fast.trainers.stage import training_arguments

    def make(**values):
        return training_arguments(SFTConfig(output_dir=str(tmp_path), use_cpu=True, **values), has_eval=True)

    assert make(warmup_ratio=0.1, max_steps=50).get_warmup_steps(50) == 5
    assert make(warmup_steps=3).get_warmup_steps(50) == 3
    assert make().save_strategy == "no"
    assert make().report_to == []
    assert (make(save_steps=4).save_strategy, make(save_steps=4).save_steps) == ("steps", 4)
    assert (make(eval_steps=4).eval_strategy, make().eval_strategy) == ("steps", "no")
    assert make(gradient_checkpointing=True).gradient_checkpointing
    assert not make().gradient_checkpointing


def test_python_callers_get_the_same_checks():
    assert SFTConfig(learning_rate="1e-3", max_steps=5.0).max_steps == 5
    with pytest.raises(ValueError, match="seed must be an integer"):
        SFTConfig(seed="one")
    with pytest.raises(ValueError, match="stage is required"):
        make_config({})
    assert make_config(SFTConfig(seed=3).to_dict()) == SFTConfig(seed=3)

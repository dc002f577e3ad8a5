"""Models of a run: what is trained, in which dtype, adapters continued, merged and saved."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from test_data import word_tokenizer
from test_sft import make_rows, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.checkpoint import resume_path, seal
from rlhf_fast.trainers.config import make_config, run
from rlhf_fast.trainers.models.critic import critic_of_policy
from rlhf_fast.trainers.models.hf_utils import (
    is_adapter,
    load_folder,
    load_model,
    load_tokenizer,
    save_model,
    weights_dtype,
)
from rlhf_fast.trainers.models.lora import optimizer_groups
from rlhf_fast.trainers.models.quantization import quantization_options
from rlhf_fast.trainers.sft_config import SFTConfig

IDS = torch.tensor([[3, 4, 5, 6, 7], [7, 3, 9, 4, 4]])


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def untied(folder, **changes):
    """A model whose head has weights of its own, named lm_head."""
    torch.manual_seed(5)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = Qwen2Config(vocab_size=18, num_key_value_heads=2, tie_word_embeddings=False, **shape, **changes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def config(base, **changes):
    values = dict(model_name_or_path=str(base), output_dir=str(base.parent / "out"), use_cpu=True)
    return SFTConfig(**(values | changes))


def lora(base, **changes):
    return load_model(config(base, finetuning_type="lora", lora_rank=2, **changes))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted_modules(model):
    return {name.split(".lora_A")[0].rpartition(".")[2] for name in trained(model) if ".lora_A" in name}


def shake(model, seed=0):
    """Give fresh adapters something to do: B starts at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model


def saved(model, folder):
    save_model(model, folder, word_tokenizer())
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


EVERY_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# ---- LoRA: what is trained


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all", EVERY_LINEAR),
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        (["down_proj"], {"down_proj"}),
        ("all,lm_head", EVERY_LINEAR | {"lm_head"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_lora_target(tmp_path, target, expected):
    model = lora(untied(tmp_path / "model"), lora_target=target)
    assert adapted_modules(model) == expected
    assert all("lora_" in name for name in trained(model))


def test_a_classifier_has_no_head_to_adapt(base):
    values = dict(auto_class="AutoModelForSequenceClassification", num_labels=1)
    for target in ("all,lm_head", "lm_head"):
        model = load_model(config(base, finetuning_type="lora", lora_target=target), **values)
        assert adapted_modules(model) == EVERY_LINEAR
        assert any("score.modules_to_save" in name for name in trained(model))
        assert model.peft_config["default"].task_type == "SEQ_CLS"


def test_lora_options_reach_the_adapter(base):
    model = lora(base, lora_dropout=0.25, use_rslora=True, lora_target="q_proj", additional_target="norm")
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora) == (2, 4, 0.25, True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(4 / 2**0.5)  # alpha / sqrt(r)
    assert {n for n in trained(model) if "lora_" not in n} == {
        "base_model.model.model.norm.modules_to_save.default.weight"
    }
    assert lora(base, lora_alpha=7).peft_config["default"].lora_alpha == 7
    assert lora(base, use_dora=True).peft_config["default"].use_dora


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lora_target="q_proj, v_prjo"), r"lora_target: the model has no module 'v_prjo'; did you mean 'v_proj'"),
        (dict(additional_target="nrom"), r"additional_target: the model has no module 'nrom'; did you mean 'norm'"),
        (dict(lora_target="all,lm_head", use_dora=True), r"use_dora: the fused head takes a plain adapter"),
        (dict(lora_target="lm_head", lora_dropout=0.1), r"lora_dropout: the fused head takes no dropout"),
    ],
)
def test_adapters_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        lora(untied(tmp_path / "model"), **changes)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_on_the_head_trains_through_the_fused_head(tmp_path, base, tie, dtype):
    folder = base if tie else untied(tmp_path / "untied")
    model = shake(lora(folder, lora_target="all,lm_head", dtype=dtype))
    plain = torch.log_softmax(logits(model), -1).gather(-1, IDS[..., None])[..., 0]
    out = fuse_lm_head(model)(IDS, target_ids=IDS)
    # bf16: logits of order 1 are rounded once more where W and B A are added in the tile
    torch.testing.assert_close(out.logprob, plain, rtol=0, atol=2e-6 if dtype is None else 0.02)
    out.logprob.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_head_trained_in_full_beside_an_adapter(tmp_path):
    model = shake(lora(untied(tmp_path / "model"), additional_target="lm_head"))
    plain = torch.log_softmax(logits(model), -1).gather(-1, IDS[..., None])[..., 0]
    out = fuse_lm_head(model)(IDS, target_ids=IDS)
    torch.testing.assert_close(out.logprob, plain, rtol=0, atol=2e-6)
    out.logprob.sum().backward()
    head = model.get_base_model().lm_head
    assert head.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert head.original_module.weight.grad is None


# ---- dtypes


@pytest.mark.parametrize(
    ("changes", "frozen", "trainable"),
    [
        (dict(), None, "float32"),
        (dict(bf16=True), None, "float32"),
        (dict(pure_bf16=True), None, "bfloat16"),
        (dict(dtype="bfloat16", bf16=True), None, "bfloat16"),
        (dict(finetuning_type="lora"), "float32", "float32"),
        (dict(finetuning_type="lora", bf16=True), "bfloat16", "float32"),
        (dict(finetuning_type="lora", bf16=True, additional_target="norm"), "bfloat16", "float32"),
        (dict(finetuning_type="lora", fp16=True), "float16", "float32"),
        (dict(finetuning_type="lora", dtype="bfloat16"), "bfloat16", "float32"),
        (dict(finetuning_type="lora", pure_bf16=True), "bfloat16", "bfloat16"),
        (dict(finetuning_type="freeze", freeze_trainable_layers=1, bf16=True), "bfloat16", "float32"),
        (dict(finetuning_type="freeze", freeze_trainable_layers=1, pure_bf16=True), "bfloat16", "bfloat16"),
        (dict(finetuning_type="freeze", freeze_trainable_layers=1, dtype="bfloat16"), "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_frozen_weights_may_be_narrow_and_trained_ones_are_not(base, changes, frozen, trainable):
    model = load_model(config(base, **changes))
    kinds = {True: set(), False: set()}
    for p in model.parameters():
        kinds[p.requires_grad].add(str(p.dtype).removeprefix("torch."))
    assert kinds[True] == {trainable}
    assert kinds[False] == (set() if frozen is None else {frozen})
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(changes.get("bf16"))):
        if not changes.get("fp16"):
            assert fuse_lm_head(model)(IDS, target_ids=IDS).logprob.isfinite().all()


def test_infer_dtype_is_for_evaluation(base):
    values = dict(eval_dataset="x", infer_dtype="bfloat16")
    assert weights_dtype(config(base, do_train=False, **values)) == torch.bfloat16
    assert weights_dtype(config(base, **values)) == torch.float32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(), "sdpa"),
        (dict(flash_attn="sdpa"), "sdpa"),
        (dict(flash_attn="disabled"), "eager"),
        (dict(attn_implementation="eager"), "eager"),
    ],
    ids=str,
)
def test_attention(base, changes, expected):
    assert load_model(config(base, **changes)).config._attn_implementation == expected


def test_attention_of_a_model_without_sdpa(tmp_path):
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=18, num_key_value_heads=2, **shape)).save_pretrained(tmp_path)
    own = Gemma2ForCausalLM.from_pretrained(tmp_path).config._attn_implementation  # eager; sdpa in transformers 5.17
    assert load_model(config(tmp_path)).config._attn_implementation == own


# ---- frozen layers


@pytest.mark.parametrize(
    ("changes", "layers", "modules", "extra"),
    [
        (dict(), {1, 2}, None, set()),
        (dict(freeze_trainable_layers=1), {2}, None, set()),
        (dict(freeze_trainable_layers=-1), {0}, None, set()),
        (dict(freeze_trainable_layers=-9), {0, 1, 2}, None, set()),
        (dict(freeze_trainable_modules="mlp"), {1, 2}, "mlp", set()),
        (dict(freeze_trainable_modules=["q_proj"]), {1, 2}, "q_proj", set()),
        (dict(freeze_extra_modules="lm_head, norm"), {1, 2}, None, {"lm_head.weight", "model.norm.weight"}),
    ],
    ids=str,
)
def test_freeze(tmp_path, changes, layers, modules, extra):
    model = load_model(config(untied(tmp_path / "model"), finetuning_type="freeze", **changes))
    names = trained(model)
    in_layers = {n for n in names if ".layers." in n}
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in in_layers} == layers
    assert all(modules is None or f".{modules}." in n for n in in_layers)
    assert names - in_layers == extra
    every = {n for n, _ in model.named_parameters() if any(f".layers.{i}." in n for i in layers)}
    assert in_layers == {n for n in every if modules is None or f".{modules}." in n}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(freeze_trainable_modules="mpl"),
            r"freeze_trainable_modules: the model has no 'mpl'; .*did you mean 'mlp'",
        ),
        (
            dict(freeze_extra_modules="q_proj"),
            r"freeze_extra_modules: the model has no 'q_proj'; choose from embed_tok",
        ),
    ],
)
def test_freeze_names_that_are_not_there(base, changes, message):
    with pytest.raises(ValueError, match=message):
        load_model(config(base, finetuning_type="freeze", **changes))


def test_tied_head_as_an_extra_module(base):
    assert "model.embed_tokens.weight" in trained(
        load_model(config(base, finetuning_type="freeze", freeze_extra_modules="lm_head"))
    )


# ---- adapters from folders


def test_saved_adapter_loads_everywhere(base, tmp_path):
    model = shake(lora(base))
    model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[1, 2])
    folder = saved(model, tmp_path / "adapter")
    assert is_adapter(folder)
    assert not is_adapter(base)
    expected = logits(model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    with_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    for again in (with_peft, AutoModelForCausalLM.from_pretrained(folder), load_folder(folder)):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6)
    assert not trained(load_folder(folder))
    assert not hasattr(load_folder(folder), "peft_config")  # merged
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 2]
    assert AutoTokenizer.from_pretrained(folder).eos_token == word_tokenizer().eos_token


@pytest.mark.parametrize("key", ["model_name_or_path", "adapter_name_or_path"])
def test_training_continues_with_an_adapter(base, tmp_path, key):
    first = saved(shake(lora(base, lora_target="q_proj", lora_alpha=3)), tmp_path / "first")
    model = lora(base, **{key: str(first)})
    assert adapted_modules(model) == {"q_proj"}  # its own targets and scale
    assert model.peft_config["default"].lora_alpha == 3
    torch.testing.assert_close(logits(model), logits(load_folder(first)), rtol=0, atol=2e-6)
    again = saved(shake(model, seed=1), tmp_path / "again")
    torch.testing.assert_close(logits(load_folder(again)), logits(model), rtol=0, atol=2e-6)
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(("new", "merged"), [(False, 1), (True, 2)])
def test_several_adapters(base, tmp_path, new, merged):
    one = saved(shake(lora(base, lora_target="q_proj")), tmp_path / "one")
    on_one = lora(base, model_name_or_path=str(one), create_new_adapter=True, lora_target="v_proj")
    two = saved(shake(on_one, seed=1), tmp_path / "two")
    expected = logits(on_one)
    model = lora(base, adapter_name_or_path=f"{one}, {two}", create_new_adapter=new, lora_target="down_proj")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)
    assert adapted_modules(model) == ({"down_proj"} if new else {"v_proj"})
    # The base of the new adapter is not the one on disk: it was kept, and is what the adapter names.
    again = saved(shake(model, seed=2), tmp_path / "again")
    torch.testing.assert_close(logits(load_folder(again)), logits(model), rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model), rtol=0, atol=2e-6)


def test_full_training_from_an_adapter_trains_the_merged_model(base, tmp_path):
    first = saved(shake(lora(base)), tmp_path / "first")
    model = load_model(config(base, model_name_or_path=str(first)))
    torch.testing.assert_close(logits(model), logits(load_folder(first)), rtol=0, atol=2e-6)
    assert len(trained(model)) == len(list(model.parameters()))
    whole = saved(model, tmp_path / "whole")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(whole)), logits(model), rtol=0, atol=0)


def test_merging_an_adapter_on_a_tied_head_leaves_the_embedding_alone(base, tmp_path):
    model = shake(lora(base, lora_target="q_proj, lm_head"))
    folder = saved(model, tmp_path / "adapter")
    merged = load_folder(folder)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=2e-6)
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before)
    again = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "merged"))
    critic = critic_of_policy(model)
    assert torch.equal(critic.get_input_embeddings().weight, before)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-6)


def test_adapter_folders_that_do_not_fit(base, tmp_path):
    folder = saved(lora(base), tmp_path / "adapter")
    shape = dict(hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=18, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"the adapter in .*adapter does not fit the model"):
        lora(tmp_path / "wide", adapter_name_or_path=str(folder))
    with pytest.raises(FileNotFoundError, match=r"adapter_name_or_path: no adapter_config.json in"):
        config(base, adapter_name_or_path=str(base), dataset="x").check_paths()
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(FileNotFoundError, match="no folder /gone"):
        load_folder(folder)


def test_tokenizer_of_an_adapter_is_its_own_or_the_base_models(base, tmp_path):
    model = lora(base)
    model.save_pretrained(tmp_path / "bare")
    for folder in (tmp_path / "bare", saved(model, tmp_path / "full")):
        assert load_tokenizer(config(base, model_name_or_path=str(folder))).eos_token == word_tokenizer().eos_token


# ---- through the stages


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_runs_with_an_adapter_on_the_head_in_bf16(base, tmp_path, stage, monkeypatch):
    """Two rates, checkpointing, the head's adapter through the fused head; the folder loads and has learnt."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    values = dict(finetuning_type="lora", lora_rank=2, lora_target="all,lm_head", bf16=True, loraplus_lr_ratio=4.0)
    values |= dict(gradient_checkpointing=True, weight_decay=0.1, learning_rate=1e-2, max_steps=2, use_cpu=True)
    values |= dict(
        disable_tqdm=True, plot_loss=False, dataset=str(tmp_path / "d.jsonl"), output_dir=str(tmp_path / "o")
    )
    if stage == "grpo":
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        (tmp_path / "judge_of_lengths.py").write_text("def f(completions, **_):\n    return [*map(len, completions)]\n")
        values |= dict(reward_funcs="judge_of_lengths:f", num_generations=4, max_completion_length=4)
    seen = []
    monkeypatch.setattr("torch.optim.AdamW", spy(torch.optim.AdamW, seen))
    run(make_config(dict(stage=stage, model_name_or_path=str(base), **values)))
    rates = {group["lr"]: group["weight_decay"] for groups in seen for group in groups}
    assert rates == {1e-2: 0.1, 4e-2: 0.1}
    before, after = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert (logits(after) - logits(before)).abs().max() > 1e-4
    assert (tmp_path / "o" / "tokenizer.json").is_file()


def spy(optimizer, seen):
    class Spy(optimizer):
        def __init__(self, params, *args, **kwargs):
            params = [dict(g) if isinstance(g, dict) else g for g in params]
            seen.append(params)
            super().__init__(params, *args, **kwargs)

    return Spy


# ---- optimiser groups


def test_lora_plus_rates(base):
    options = dict(learning_rate=1e-3, weight_decay=0.1, lora_target="q_proj, embed_tokens", additional_target="norm")
    groups = lambda **more: {  # noqa: E731
        (g["lr"], g["weight_decay"]): g["params"]
        for g in optimizer_groups(model, config(base, finetuning_type="lora", **options, **more))
    }
    model = lora(base, **options)
    names = {id(p): n for n, p in model.named_parameters()}
    plain = groups()
    assert set(plain) == {(1e-3, 0.1), (1e-3, 0.0)}
    assert all("norm" in names[id(p)] for p in plain[1e-3, 0.0])
    plus = groups(loraplus_lr_ratio=16.0)
    assert set(plus) == {(1e-3, 0.1), (1e-3, 0.0), (1.6e-2, 0.1), (1e-6, 0.1)}
    assert all("lora_B" in names[id(p)] for p in plus[1.6e-2, 0.1])
    assert all("lora_embedding_" in names[id(p)] for p in plus[1e-6, 0.1])
    assert all("lora_A" in names[id(p)] for p in plus[1e-3, 0.1])
    assert sum(map(len, plus.values())) == len(trained(model))


# ---- quantisation


def test_quantisation_needs_cuda_and_bitsandbytes(base, monkeypatch):
    four = config(base, finetuning_type="lora", quantization_bit=4, use_cpu=False, bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="quantization_bit: 4 needs a CUDA device"):
        load_model(four)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantization_bit: 4 needs bitsandbytes: pip install bitsandbytes"):
        quantization_options(four, torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_options(base, monkeypatch, bits):
    made = {}
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **kwargs: made.update(kwargs) or "how")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    settings = config(base, finetuning_type="lora", quantization_bit=bits, use_cpu=False, bf16=True)
    options = quantization_options(settings, weights_dtype(settings))
    assert options == {"quantization_config": "how", "device_map": {"": 1}}
    if bits == 8:
        assert made == {"load_in_8bit": True}
    else:
        assert made["bnb_4bit_compute_dtype"] == torch.bfloat16
        assert (made["bnb_4bit_quant_type"], made["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert quantization_options(config(base), torch.float32) == {}


def test_adapters_are_not_merged_into_quantised_weights(base, tmp_path, monkeypatch):
    one = saved(lora(base), tmp_path / "one")
    monkeypatch.setattr("rlhf_fast.trainers.models.hf_utils.quantization_options", lambda *a: {})
    with pytest.raises(ValueError, match="cannot be merged into weights of 8 bits"):
        lora(base, adapter_name_or_path=[str(one), str(one)], quantization_bit=8)


# ---- where to resume


def test_overwrite_output_dir(base, tmp_path):
    out = tmp_path / "out"
    assert resume_path(config(base, overwrite_output_dir=False)) is None
    saved(tiny_model(), out)
    assert resume_path(config(base)) is None
    with pytest.raises(ValueError, match="out holds a model, and overwrite_output_dir is false"):
        resume_path(config(base, overwrite_output_dir=False))
    (out / "checkpoint-3").mkdir()
    seal(out / "checkpoint-3", dict(step=3))
    assert resume_path(config(base, overwrite_output_dir=False)).name == "checkpoint-3"
    assert resume_path(config(base)) is None

"""The fused head inside real architectures, against the unfused model."""

import copy
import inspect
import multiprocessing
import pickle
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402

from rlhf_fast import reference  # noqa: E402
from rlhf_fast.cli.train import leave_ranks  # noqa: E402
from rlhf_fast.integrations.lm_head import fuse_lm_head, is_fused, unfuse_lm_head  # noqa: E402
from rlhf_fast.types import FusedLoss, LogProb  # noqa: E402

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
SMALL_GPT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "Qwen2Config": TINY | {"tie_word_embeddings": True},
    "Qwen3Config": TINY | {"head_dim": 8},
    "LlamaConfig": TINY,
    "MistralConfig": TINY,
    "Gemma2Config": TINY | {"head_dim": 8, "final_logit_softcapping": 5.0},
    "Gemma3TextConfig": TINY | {"head_dim": 8, "final_logit_softcapping": 7.0},
    "CohereConfig": TINY | {"logit_scale": 0.3},
    "GraniteConfig": TINY | {"logits_scaling": 3.0},
    "FalconH1Config": TINY | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "PhiConfig": TINY,
    "OlmoConfig": TINY,
    "Cohere2Config": TINY | {"logit_scale": 0.3},
    "HyperCLOVAXConfig": TINY | {"logits_scaling": 3.0},  # the key that Granite divides by
    "MiniCPM3Config": TINY
    | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    | {"dim_model_base": 16},
    "MixtralConfig": TINY | dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3MoeConfig": TINY | dict(head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "GPTNeoXConfig": SMALL_GPT | {"intermediate_size": 48},
    "OPTConfig": SMALL_GPT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPT2Config": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1),
}

MIXTURES = ("MixtralConfig", "Qwen3MoeConfig")


def build(family: str, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**FAMILIES[family] | options)
    experts = {"experts_implementation": "eager"} if family in MIXTURES else {}  # the others know no fp64
    return AutoModelForCausalLM.from_config(config, **experts).to(dtype).eval()


def tokens():
    """(ids, attention mask, targets): right padding, prompts not scored."""
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    targets = torch.full_like(ids, -100)
    targets[:, 3:-1] = ids[:, 4:]
    targets[0, 5:] = -100
    return ids, mask, targets


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_of_a_dozen_families(family):
    model = build(family)
    ids, mask, targets = tokens()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = reference.logprob_from_logits(logits, targets, temperature=0.7, entropy=True)
    (want.logprob.sum() + want.entropy.sum()).backward()
    expected = gradients(model)
    model.zero_grad()
    fuse_lm_head(model)
    got = model(input_ids=ids, attention_mask=mask, target_ids=targets, temperature=0.7, entropy=True)
    assert isinstance(got, LogProb)
    (got.logprob.sum() + got.entropy.sum()).backward()
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-10, atol=1e-10)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-9, atol=1e-11, msg=name)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)  # untouched without target_ids
    unfuse_lm_head(model)
    assert not is_fused(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)


def test_only_scored_rows_reach_the_head():
    model = fuse_lm_head(build("Qwen2Config"))
    ids, mask, targets = tokens()

    def nll(logprob, entropy, batch):
        return -(logprob * batch["w"]).sum()

    out = model(input_ids=ids, attention_mask=mask, target_ids=targets, loss_fn=nll, batch={"w": torch.ones(3, 9)})
    assert isinstance(out, FusedLoss)
    assert int(out.metrics["rows_forward"]) == int((targets != -100).sum())
    assert int(out.metrics["rows_total"]) == targets.numel()
    out.loss.backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied: one gradient, from both ends
    grad = model.lm_head.weight.grad
    assert grad[ids.unique()].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("family", MIXTURES)
def test_the_balancing_loss_of_a_mixture_of_experts(family):
    model = build(family)
    ids, mask, targets = tokens()
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    logprob = reference.logprob_from_logits(output.logits, targets).logprob
    (0.1 * output.aux_loss - logprob.sum()).backward()
    expected = gradients(model)
    model.zero_grad()
    fuse_lm_head(model)
    inputs = dict(input_ids=ids, attention_mask=mask, target_ids=targets)
    got, aux_loss = model(**inputs, return_aux_loss=True)
    (0.1 * aux_loss - got.logprob.sum()).backward()
    torch.testing.assert_close(aux_loss, output.aux_loss, rtol=1e-12, atol=0)
    assert gradients(model).keys() == expected.keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    assert any(expected[n].abs().max() > 0 for n in expected if n.endswith("gate.weight"))
    hidden = model(**inputs, return_hidden=True, return_aux_loss=True)[1]
    assert hidden.shape == (3, 9, 32)
    with pytest.raises(ValueError, match="return_aux_loss needs target_ids"):
        model(input_ids=ids, return_aux_loss=True)
    with pytest.raises(ValueError, match="return_aux_loss: Qwen2ForCausalLM gives no aux_loss"):
        fuse_lm_head(build("Qwen2Config"))(**inputs, return_aux_loss=True)


def test_a_copy_is_fused_and_independent():
    model = fuse_lm_head(build("LlamaConfig"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    ids, mask, targets = tokens()
    a = model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    b = other(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    want = reference.logprob_from_logits(other(input_ids=ids, attention_mask=mask).logits, targets).logprob
    torch.testing.assert_close(b, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config", "GraniteConfig", "CohereConfig"])
def test_tied_embeddings_get_one_gradient_from_both_ends(family):
    model = build(family, tie_word_embeddings=True)
    ids, mask, targets = tokens()
    logits = model(input_ids=ids, attention_mask=mask).logits
    (want,) = torch.autograd.grad(reference.logprob_from_logits(logits, targets).logprob.sum(), model.lm_head.weight)
    out = fuse_lm_head(model)(
        input_ids=ids, attention_mask=mask, target_ids=targets, loss_fn=lambda logprob, entropy, batch: logprob.sum()
    )
    out.loss.backward()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.lm_head.weight.grad, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("family", ["Qwen2Config", "Gemma2Config", "CohereConfig", "FalconH1Config"])
def test_generate_is_unchanged(family, sample):
    model = build(family, torch.float32)
    ids = torch.randint(3, 97, (2, 4))
    options = dict(max_new_tokens=5, do_sample=sample)
    outs = []
    for fused in (model, fuse_lm_head(model)):
        torch.manual_seed(1)
        outs.append(fused.generate(ids, **options))
    assert torch.equal(*outs)


def test_dropout_draws_the_same_numbers_on_the_first_fused_call():
    model = fuse_lm_head(build("GPT2Config")).train()
    ids, mask, targets = tokens()
    values = []
    for _ in range(2):  # the first call also finds out what the model does to its logits
        torch.manual_seed(3)
        values.append(model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob)
    assert torch.equal(*values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = fuse_lm_head(build("Qwen2Config")).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids, mask, targets = tokens()
        torch.manual_seed(1)
        ids = torch.randint(3, 97, ids.shape)
        model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob.sum().backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_the_whole_model_recomputed():
    """Non-reentrant checkpointing around the model's call runs the fused head once more."""
    model = fuse_lm_head(build("Qwen2Config"))
    ids, mask, targets = tokens()
    call = lambda: model(input_ids=ids, attention_mask=mask, target_ids=targets, entropy=True)[:2]  # noqa: E731
    grads = []
    for run in (call, lambda: torch.utils.checkpoint.checkpoint(call, use_reentrant=False)):
        model.zero_grad()
        logprob, entropy = run()
        (logprob.sum() + entropy.square().sum()).backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("hooks_first", [False, True])
def test_device_map(hooks_first):
    """accelerate's hooks: weights on the CPU are brought in for each module's call alone, and go again."""
    accelerate = pytest.importorskip("accelerate")
    plain, model = build("LlamaConfig"), build("LlamaConfig")
    ids, mask, targets = tokens()
    want = fuse_lm_head(plain)(input_ids=ids, attention_mask=mask, target_ids=targets).logprob.detach()
    if not hooks_first:
        fuse_lm_head(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    fuse_lm_head(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob, want)
        logits = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(reference.logprob_from_logits(logits, targets).logprob, want)
        if hooks_first:
            unfuse_lm_head(model)
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)


def test_device_map_of_one_device_trains(tmp_path):
    build("LlamaConfig").save_pretrained(tmp_path)
    grads = []
    for options in ({}, {"device_map": {"": "cpu"}}):
        model = fuse_lm_head(AutoModelForCausalLM.from_pretrained(tmp_path, **options))
        torch.manual_seed(1)
        ids, mask, targets = tokens()
        model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob.sum().backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad)


def test_peft_adapters_off_the_head():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(build("Qwen2Config"), lora)
    ids, mask, targets = tokens()
    want = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    got = fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["LlamaConfig", "CohereConfig"])
def test_peft_lora_on_the_head(family):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, lora_alpha=6, init_lora_weights=False)
    model = peft.get_peft_model(build(family, tie_word_embeddings=False), lora)
    ids, mask, targets = tokens()
    want = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    want.sum().backward()
    expected = gradients(model)
    assert any("lm_head.lora_A" in name for name in expected)
    assert not any("base_layer" in name for name in expected)
    model.zero_grad()
    got = fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name, grad in expected.items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-9, atol=1e-11, msg=name)
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
        plain = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    torch.testing.assert_close(off, plain, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(off, got)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_dropout=0.5), "IA3Config", "two"], ids=str)
def test_other_adapters_on_the_head_are_refused(options):
    peft = pytest.importorskip("peft")
    if options == "IA3Config":
        config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    else:
        config = peft.LoraConfig(target_modules=["lm_head"], r=2, **(options if isinstance(options, dict) else {}))
    model = peft.get_peft_model(build("LlamaConfig"), config).train()
    if options == "two":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    ids, mask, targets = tokens()
    with pytest.raises(ValueError, match="one plain LoRA adapter without dropout"):
        fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets)


def test_peft_trains_a_copy_of_the_head():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("LlamaConfig"), lora).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)  # the copy has moved away from the original
    ids, mask, targets = tokens()
    want = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    want.sum().backward()
    expected = gradients(model)
    assert any("lm_head.modules_to_save" in name for name in expected)
    model.zero_grad()
    got = fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-9, atol=1e-11, msg=name)
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
        plain = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    torch.testing.assert_close(off, plain, rtol=1e-10, atol=1e-10)


def lora_on_the_head(model, **options):
    """PEFT around a fused model, its adapters away from 0."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    return model.double()


def resized(model):
    model.resize_token_embeddings(105, mean_resizing=False)
    return model


LATER = {
    "LoRA": lambda m: lora_on_the_head(m, target_modules=["lm_head"]),
    "a copy of the head": lambda m: lora_on_the_head(m, modules_to_save=["lm_head"]),
    "new tokens": lambda m: lora_on_the_head(m, trainable_token_indices={"lm_head": [3, 4]}),
    "merged": lambda m: lora_on_the_head(m, target_modules=["lm_head", "q_proj"]).merge_and_unload(),
    "resized": resized,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("change", LATER)
def test_a_head_that_is_wrapped_or_replaced_after_fusing(change):
    model = fuse_lm_head(build("LlamaConfig"))
    ids, mask, targets = tokens()
    model(input_ids=ids, target_ids=targets)
    model = LATER[change](model).requires_grad_()
    want = reference.logprob_from_logits(model(input_ids=ids, attention_mask=mask).logits, targets).logprob
    want.sum().backward()
    expected = gradients(model)
    model.zero_grad()
    got = model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        for full in (n for n in expected if n.endswith(name)):
            torch.testing.assert_close(gradients(model)[full], expected[full], rtol=1e-9, atol=1e-11)
    assert fuse_lm_head(model) is model
    unfuse_lm_head(model)
    assert not [name for name, module in model.named_modules() if "_unfused_forward" in module.__dict__]
    assert model(input_ids=ids, attention_mask=mask).logits.shape[-1] in (97, 105)


def test_adapters_by_row_go_through_a_fused_head():
    model = lora_on_the_head(build("LlamaConfig"), target_modules=["lm_head"])
    model.add_adapter("second", model.peft_config["default"])
    ids, mask, _ = tokens()
    names = ["default", "second", "default"]
    want = model.eval()(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    assert torch.equal(fuse_lm_head(model)(input_ids=ids, attention_mask=mask, adapter_names=names).logits, want)


def test_a_compiled_model_gives_log_probs_with_gradients_and_plain_logits_in_one_graph():
    model = fuse_lm_head(build("LlamaConfig", torch.float32))
    ids, mask, targets = tokens()
    want = model(input_ids=ids, target_ids=targets).logprob
    want.sum().backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        got = compiled(input_ids=ids, target_ids=targets).logprob
        got.sum().backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    loss = compiled(input_ids=ids, target_ids=targets, loss_fn=lambda logprob, *_: -logprob.sum()).loss
    torch.testing.assert_close(loss, -want.sum(), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_threads_do_not_meet():
    """A fused call in one thread, the model's own forward in another."""
    model = fuse_lm_head(build("LlamaConfig"))
    ids, _, targets = tokens()
    with torch.no_grad():
        logits, stop, results = model(input_ids=ids).logits, threading.Event(), []

        def fused():
            with torch.no_grad():
                while not stop.is_set():
                    results.append(model(input_ids=ids.repeat(8, 8), target_ids=targets.repeat(8, 8)).logprob.shape)

        thread = threading.Thread(target=fused)
        thread.start()
        try:
            assert all(torch.equal(model(input_ids=ids).logits, logits) for _ in range(100))
        finally:
            stop.set()
            thread.join()
    assert set(results) == {torch.Size((24, 72))}


def test_accelerate_wraps_and_unwraps_it():
    accelerate = pytest.importorskip("accelerate")
    ids, _, targets = tokens()
    model = fuse_lm_head(build("LlamaConfig", torch.float32))
    parameters = list(inspect.signature(model.forward).parameters)
    assert parameters == list(inspect.signature(type(model)(model.config).forward).parameters)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision
    try:
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        for keep in (True, False):
            unwrapped = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=keep)
            assert isinstance(unwrapped(input_ids=ids, target_ids=targets), LogProb)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_an_unknown_transformation_is_refused():
    model = build("CohereConfig")
    model.config.logit_scale = 0.5  # no longer what the forward multiplies by
    ids, mask, targets = tokens()
    with pytest.raises(ValueError, match="does not explain"):
        fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets)


def test_bad_calls():
    model = fuse_lm_head(build("Qwen2Config"))
    ids, mask, targets = tokens()
    with pytest.raises(ValueError, match=r"target_ids must be \(B, T\)=\(3, 9\), got \(3, 8\)"):
        model(input_ids=ids, attention_mask=mask, target_ids=targets[:, 1:])
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=ids, target_ids=targets, labels=ids)
    with pytest.raises(ValueError, match="loss_fn needs target_ids"):
        model(input_ids=ids, loss_fn=lambda lp, h, b: lp.sum())
    with pytest.raises(TypeError, match="no linear output head"):
        fuse_lm_head(torch.nn.Linear(2, 2))
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (3, 9, 97)  # an error leaves no request behind


# ---- FSDP2, two gloo ranks ----


def fsdp_rank(rank: int, folder: str) -> None:
    """Every way to wrap the head, log-probs and loss, against the whole model; what was wrong goes to a file."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timeout)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    ids, mask, targets = tokens()
    whole = build("LlamaConfig")
    want = reference.logprob_from_logits(whole(input_ids=ids, attention_mask=mask).logits, targets).logprob
    want.sum().backward()
    expected, wrong = gradients(whole), []
    for wrapped in ("with the root", "kept", "by itself"):
        model = build("LlamaConfig")
        if wrapped == "kept":
            fuse_lm_head(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if wrapped != "with the root":
            fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=wrapped == "by itself")
        fully_shard(model, mesh=mesh)
        fuse_lm_head(model)
        for loss_fn in (None, lambda logprob, entropy, batch: logprob.sum()):
            out = model(input_ids=ids, attention_mask=mask, target_ids=targets, loss_fn=loss_fn)
            case = f"head {wrapped}, {'log-probs' if loss_fn is None else 'loss'}"
            try:
                (out.logprob.sum() if loss_fn is None else out.loss).backward()
            except RuntimeError as error:
                if wrapped != "by itself" or loss_fn is not None or "resharded after its forward" not in str(error):
                    wrong.append(f"{case}: {error}")
            else:
                grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
                if wrapped == "by itself" and loss_fn is None:
                    wrong.append(f"{case}: no error")
                elif not (torch.allclose(out.logprob, want) and grads.keys() == expected.keys()):
                    wrong.append(f"{case}: values")
                elif not all(torch.allclose(grads[name], grad) for name, grad in expected.items()):
                    wrong.append(f"{case}: gradients")
            model.zero_grad()
    Path(folder, f"{rank}.txt").write_text("\n".join(wrong))
    leave_ranks()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_fsdp2(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=fsdp_rank, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]

"""The fused head inside real architectures, against the unfused model."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402

from rlhf_fast import reference  # noqa: E402
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
    "GPTNeoXConfig": SMALL_GPT | {"intermediate_size": 48},
    "OPTConfig": SMALL_GPT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPT2Config": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1),
}


def build(family: str, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**FAMILIES[family] | options)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


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


def test_generate_is_unchanged():
    model = build("Qwen2Config", torch.float32)
    ids = torch.randint(3, 97, (2, 4))
    options = dict(max_new_tokens=5, do_sample=False)
    before = model.generate(ids, **options)
    assert torch.equal(fuse_lm_head(model).generate(ids, **options), before)


def test_dropout_draws_the_same_numbers_on_the_first_fused_call():
    model = fuse_lm_head(build("GPT2Config")).train()
    ids, mask, targets = tokens()
    values = []
    for _ in range(2):  # the first call also finds out what the model does to its logits
        torch.manual_seed(3)
        values.append(model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob)
    assert torch.equal(*values)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = fuse_lm_head(build("Qwen2Config")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask, targets = tokens()
        torch.manual_seed(1)
        ids = torch.randint(3, 97, ids.shape)
        model(input_ids=ids, attention_mask=mask, target_ids=targets).logprob.sum().backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-12, msg=name)


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


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_dropout=0.5)], ids=str)
def test_other_adapters_on_the_head_are_refused(options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["lm_head"], r=2, **options)
    model = peft.get_peft_model(build("LlamaConfig"), lora).train()
    ids, mask, targets = tokens()
    with pytest.raises(ValueError, match="one plain LoRA adapter without dropout"):
        fuse_lm_head(model)(input_ids=ids, attention_mask=mask, target_ids=targets)


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

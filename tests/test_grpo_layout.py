"""Completions that share a row with their prompt: the same numbers, fewer tokens, and models that cannot."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import PROMPTS, config, exact_norms, experience_of, log_rows, tiny, trainer  # noqa: E402

from rlhf_fast.cli.demos.task import make_tokenizer  # noqa: E402
from rlhf_fast.trainers.experience import collate, shared_mask  # noqa: E402
from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer  # noqa: E402
from rlhf_fast.trainers.layout import Layout, why_not_shared  # noqa: E402
from rlhf_fast.trainers.models.policy import updating_mode  # noqa: E402

SIZES = dict(
    vocab_size=15, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def llama(**kwargs):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **kwargs))


def mistral(window):
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=window))


def gradients(it, experience, **layout):
    it.layout = Layout(it.model, **layout)
    it.model.zero_grad()
    (minibatch,) = it.minibatches(experience)
    loss = sum(it.fused_loss(m, minibatch, on_policy=False).loss for m in minibatch.micros)
    loss.backward()
    tokens = sum(m.input_ids.numel() for m in minibatch.micros)
    return loss.item(), {n: p.grad.clone() for n, p in it.model.named_parameters() if p.grad is not None}, tokens


def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(tiny(), plain)


@pytest.mark.parametrize("make", [llama, lora], ids=["llama", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_shared_and_packed_rows_give_the_gradient_of_plain_rows(tmp_path, monkeypatch, make, checkpointing):
    exact_norms(monkeypatch)
    it = trainer(tmp_path, make().double(), gradient_checkpointing=checkpointing, beta=0.1)
    it.minibatches_per_rollout = 1
    updating_mode(it.model, True)
    experience = experience_of(it)
    loss, want, tokens = gradients(it, experience, share=False)
    for options in (dict(share=True), dict(packed=True, share=False)):
        got, grads, fewer = gradients(it, experience, **options)
        assert got == pytest.approx(loss, rel=1e-12)
        assert fewer < 0.8 * tokens
        for name, grad in want.items():
            gap = (grads[name] - grad).abs().max()
            assert gap <= 1e-12 * max(1.0, grad.abs().max()), f"{options}: {name} is off by {gap}"
    assert max(g.abs().max() for g in want.values()) > 1e-3


def test_a_group_costs_its_prompt_once(tmp_path):
    it = trainer(tmp_path, share_prompts=True, beta=0.1)
    it.minibatches_per_rollout = 1
    experience = experience_of(it)
    (minibatch,) = it.minibatches(experience)
    (micro,) = minibatch.micros
    lengths = experience.completion_lengths.view(4, 4).sum(1) + experience.prompt_lengths[::4] - 1
    assert micro.input_ids.shape == (4, int(lengths.max()))
    assert micro.attention_mask.shape == (4, 1, *[int(lengths.max())] * 2)
    assert (micro.target_ids != -100).sum() == len(experience.logprob)


def test_what_a_position_sees(tmp_path):
    it = trainer(tmp_path)
    experience = experience_of(it)
    micro = collate(experience, [torch.arange(2)], 0)
    prompt, (a, b) = int(experience.prompt_lengths[0]), experience.completion_lengths[:2].tolist()
    seen = micro.attention_mask[0, 0]
    for i in range(prompt - 1 + a + b):
        for j in range(prompt - 1 + a + b):
            in_prompt, in_first = j < prompt - 1, prompt - 1 <= j < prompt - 1 + a
            own = in_first == (prompt - 1 <= i < prompt - 1 + a) and i >= prompt - 1
            assert seen[i, j] == (j <= i and (in_prompt or own)), (i, j)
    want = [*range(prompt - 1), *range(prompt - 1, prompt - 1 + a), *range(prompt - 1, prompt - 1 + b)]
    assert micro.position_ids[0].tolist() == want
    assert micro.cu_seqlens.tolist() == [0, prompt - 1 + a, prompt - 1 + a + b]


def test_rows_are_shared_as_far_as_it_pays():
    model = tiny()  # weights 2 x 1,648: attention costs soon
    layout = Layout(model)
    assert layout.shares
    per_token, per_pair = 2 * layout.weights, 4 * layout.attention
    for prompt, completion, group in ((100, 5, 8), (20, 20, 8), (5, 200, 8), (1, 1, 8), (40, 40, 4), (60, 20, 5)):
        costs = {1: group * (per_token * (prompt + completion) + per_pair * (prompt + completion) ** 2 / 2)}
        for k in range(2, group + 1):
            rows, width = -(-group // k), prompt + k * completion  # the last row is padded to the others
            costs[k] = rows * (per_token * width + per_pair * width**2)
        assert layout.per_row(prompt, completion, group) == min(costs, key=costs.get)
    layout.weights, layout.attention = 10**6, 768  # an even 3 of 4 would be the cheapest, but 3 and 1 are two rows of 3
    assert layout.per_row(128, 128, 4) == 2
    assert layout.per_row(100, 5, 8) > 1
    assert layout.per_row(5, 200, 8) == 1
    assert Layout(model, share=True).per_row(5, 200, 8) == 8
    assert Layout(model, share=False).per_row(100, 5, 8) == 1
    head = sum(p.numel() for p in llama(tie_word_embeddings=False).lm_head.parameters())
    assert Layout(llama(tie_word_embeddings=False)).weights == Layout(llama(tie_word_embeddings=True)).weights
    assert head > 0


def eager():
    model = tiny()
    model.set_attn_implementation("eager")
    return model


def deaf():
    """A model that does not listen to its mask."""
    model = tiny()
    inner = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: inner(*args, **kwargs)
    return model


def without_positions():
    model = tiny()

    class Bare(type(model)):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            return super().forward(input_ids, attention_mask, **kwargs)

    model.__class__ = Bare
    return model


CANNOT = {
    "eager": (eager, "attention 'eager' takes no mask of its own"),
    "sliding window": (lambda: mistral(4), "MistralForCausalLM has layers other than full attention"),
    "no positions": (without_positions, "Bare takes no position ids"),
    "deaf": (deaf, "Qwen2ForCausalLM does not give the same numbers under a mask of shared prompts"),
}


@pytest.mark.parametrize("name", CANNOT, ids=str)
def test_models_that_cannot_share_keep_their_rows(name, tmp_path):
    make, reason = CANNOT[name]
    model = make()
    assert reason in why_not_shared(model)
    assert Layout(model).per_row(100, 5, 8) == 1
    with pytest.raises(ValueError, match=f"share_prompts is true, but {reason}"):
        Layout(model, share=True)


def test_models_that_can():
    assert why_not_shared(tiny()) is None
    assert why_not_shared(llama()) is None
    assert why_not_shared(mistral(None)) is None
    assert why_not_shared(tiny().bfloat16()) is None


def test_step_zero_is_exact_in_every_layout(tmp_path):
    """Ratio 1, KL 0, whatever the rows; a reference forward lies in the same rows as the policy's."""
    rows = [{"prompt": p} for p in PROMPTS]
    for options in (dict(share_prompts=True), dict(share_prompts=False), dict(packing=True)):
        options = config(tmp_path, beta=0.1, max_steps=1, temperature=0.7, **options)
        GRPOTrainer(tiny(attention_dropout=0.5), make_tokenizer(), rows, lambda completion_ids, **_: [
            float(sum(ids) % 7) for ids in completion_ids
        ], options).train()  # fmt: skip
        (first,) = log_rows(tmp_path)
        assert first["ratio_max"] == first["ratio_min"] == 1.0
        assert first["kl"] == 0.0
        assert first["sampler_logprob_gap_max"] < 2e-5


def test_the_same_run_whatever_the_rows(tmp_path):
    """Four steps end within rounding of each other: shared, plain, packed, one micro-batch or many."""
    results = []
    for options in (
        dict(share_prompts=False),
        dict(share_prompts=True),
        dict(packing=True),
        dict(share_prompts=True, max_tokens_per_micro_batch=40),
    ):
        it = trainer(tmp_path, max_steps=4, **options)
        it.train()
        results.append({n: p.detach().clone() for n, p in it.model.named_parameters()})
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-4, atol=2e-5)
    assert any(not torch.equal(v, results[0][n]) for n, v in results[1].items())  # it was another computation


def test_the_mask_of_two_rows():
    mask = shared_mask(torch.tensor([[0, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def test_packing_and_sharing_are_a_choice():
    with pytest.raises(ValueError, match="share_prompts and packing are both true"):
        GRPOConfig(packing=True, share_prompts=True)

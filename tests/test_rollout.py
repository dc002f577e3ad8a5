"""Samplers: what is recorded is what the model says, whatever the padding, the grouping and the compaction."""

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rlhf_fast.trainers.rollout.samplers import (  # noqa: E402
    GroupSampler,
    SamplerSettings,
    make_sampler,
    restrict,
)

PAD, EOS, VOCAB = 0, 1, 23
RAGGED = [[5, 6, 7], [9, 3, 4, 8, 2, 11], [12], [4, 4, 4, 4]]


def tiny(seed=0, model_type="qwen2", scale=3.0, **kwargs):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **kwargs,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # outliers: distributions far from uniform
        parameter.data.mul_(scale if parameter.dim() > 1 else 1.0)
    return model


def settings(**kwargs):
    return SamplerSettings(**{"max_new_tokens": 8, "eos_token_ids": (EOS,), "pad_token_id": PAD, **kwargs})


@torch.no_grad()
def full_forward(model, prompt, completion, temperature):
    """Log-probs of the completion by one unpadded forward of the whole sequence."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


def check_recorded(model, prompts, group, rollout):
    model.eval()
    completions = rollout.completions()
    assert len(completions) == len(prompts) * group == len(rollout.finish)
    lengths = rollout.lengths.tolist()
    for row, completion in enumerate(completions):
        start, end = rollout.cu_seqlens[row], rollout.cu_seqlens[row + 1]
        want = full_forward(model, prompts[row // group], completion, rollout.settings.temperature)
        torch.testing.assert_close(rollout.logprob[start:end].double(), want, rtol=1e-5, atol=2e-5)
        assert EOS not in completion[:-1]
        assert rollout.finish[row] == ("stop" if completion[-1] == EOS else "length")
        assert lengths[row] == rollout.settings.max_new_tokens or rollout.finish[row] == "stop"


@pytest.mark.parametrize("kind", ["group", "generate"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt_neox"])
def test_recorded_logprobs_are_the_models(kind, temperature, model_type):
    """Ragged prompts under left padding; Mistral's window of 4 is narrower than the sequences."""
    model = tiny(model_type=model_type, **({"sliding_window": 4} if model_type == "mistral" else {}))
    sampler = make_sampler(kind, model, settings(temperature=temperature), seed=3)
    rollout = sampler(RAGGED, 4)
    assert rollout.logprob.dtype == torch.float32
    assert rollout.ids.dtype == torch.int64
    assert {"stop", "length"} >= set(rollout.finish)
    assert len(set(map(tuple, rollout.completions()))) > 4  # not all alike
    check_recorded(model, RAGGED, 4, rollout)


def test_eos_is_kept_and_ends_a_sequence():
    model = tiny()
    several = settings(eos_token_ids=(EOS, 7, 15), max_new_tokens=12)
    rollout = GroupSampler(model, several, seed=0)(RAGGED, 16)
    ends = {c[-1] for c, f in zip(rollout.completions(), rollout.finish, strict=True) if f == "stop"}
    assert ends <= {EOS, 7, 15}
    assert len(ends) > 1
    for completion, finish in zip(rollout.completions(), rollout.finish, strict=True):
        assert not {EOS, 7, 15} & set(completion[:-1])
        assert (finish == "length") == (completion[-1] not in (EOS, 7, 15))
        assert finish == "stop" or len(completion) == 12


@pytest.mark.parametrize("prompts", [RAGGED, [[5, 6, 7], [9, 3, 4]]], ids=["ragged", "even"])
def test_shared_prefill_equals_one_prefill_per_sequence(prompts):
    model = tiny()
    shared = GroupSampler(model, settings(), seed=5)(prompts, 4)
    single = GroupSampler(model, settings(), seed=5)([p for p in prompts for _ in range(4)], 1)
    assert shared.completions() == single.completions()
    assert shared.finish == single.finish
    torch.testing.assert_close(shared.logprob, single.logprob, rtol=1e-5, atol=2e-6)


def test_each_prompt_is_prefilled_once(monkeypatch):
    model = tiny()
    shapes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: (shapes.append(tuple(k["input_ids"].shape)), forward(*a, **k))[1]
    )
    GroupSampler(model, settings(max_new_tokens=3, eos_token_ids=(99,)))(RAGGED, 4)
    assert shapes == [(4, 6), (16, 1), (16, 1)]  # the last token is drawn, not fed


def test_compaction_changes_nothing_but_the_batch(monkeypatch):
    """Greedy, so that the draws do not depend on who is in the batch."""
    model = tiny(seed=4)
    prompts = [[a, b] for a in range(2, 12) for b in (3, 14, 20)] + [[5, 6, 7, 8]]
    common = settings(max_new_tokens=24, eos_token_ids=tuple(range(1, 6)), greedy=True)
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (rows.append(len(k["input_ids"])), forward(*a, **k))[1])
    whole = GroupSampler(model, common, compact_below=0)(prompts, 1)
    assert set(rows) == {31}
    rows.clear()
    compacted = GroupSampler(model, common)(prompts, 1)
    assert min(rows) < 31 / 2
    assert whole.finish == compacted.finish
    assert len(set(whole.finish)) == 2
    assert whole.completions() == compacted.completions()
    torch.testing.assert_close(whole.logprob, compacted.logprob, rtol=1e-5, atol=2e-6)


def test_compaction_when_sampling_records_the_models_logprobs():
    model = tiny(seed=4)
    rollout = GroupSampler(model, settings(max_new_tokens=20, eos_token_ids=(EOS,)), seed=1)(RAGGED, 16)
    assert len(set(rollout.lengths.tolist())) > 3
    check_recorded(model, RAGGED, 16, rollout)


@pytest.mark.parametrize("kind", ["group", "generate"])
def test_same_seed_same_rollout_and_resume(kind):
    model = tiny()
    torch.manual_seed(1)
    first = make_sampler(kind, model, settings(), seed=7)
    a = first(RAGGED, 3)
    state = first.state_dict()
    b = first(RAGGED, 3)
    assert a.completions() != b.completions()
    torch.manual_seed(2)  # the global generator has no say
    second = make_sampler(kind, model, settings(), seed=7)
    assert second(RAGGED, 3).completions() == a.completions()
    third = make_sampler(kind, model, settings(), seed=0)
    third.load_state_dict(state)
    again = third(RAGGED, 3)
    assert again.completions() == b.completions()
    assert torch.equal(again.logprob, b.logprob)


@pytest.mark.parametrize("kind", ["group", "generate"])
def test_global_generator_and_modes_are_left_alone(kind):
    model = tiny(attention_dropout=0.5)
    model.train()
    model.model.norm.eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler = make_sampler(kind, model, settings())
    rollout = sampler(RAGGED, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.model.norm.training
    assert model.model.layers[0].training
    check_recorded(model, RAGGED, 2, rollout)  # dropout was off


def test_rollout_tensors_can_be_trained_on():
    model = tiny()
    rollout = GroupSampler(model, settings())(RAGGED, 2)
    assert not rollout.ids.is_inference()
    assert not rollout.logprob.is_inference()
    model(rollout.ids[None]).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["group", "generate"])
def test_frequencies_follow_the_model(kind):
    """First tokens of 4000 draws against the model's distribution, within five standard errors."""
    model, n = tiny(scale=1.5), 4000
    sampler = make_sampler(kind, model, settings(max_new_tokens=1, temperature=0.8))
    first = sampler([[5, 6]], n).ids
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1] / 0.8, -1)
    counts = torch.bincount(first, minlength=VOCAB) / n
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


@pytest.mark.parametrize("kind", ["group", "generate"])
@pytest.mark.parametrize("limits", [{"top_k": 2}, {"top_p": 0.6}])
def test_restricted_sampling_warns_and_stays_inside(kind, limits):
    model = tiny()
    with pytest.warns(UserWarning, match="ratios are biased"):
        chosen = settings(max_new_tokens=1, **limits)
    assert not chosen.exact
    drawn = set(make_sampler(kind, model, chosen)([[5, 6]], 300).ids.tolist())
    model.eval()
    with torch.no_grad():
        p, order = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1], -1).sort(descending=True)
    size = limits.get("top_k") or int((p.cumsum(0) < limits["top_p"]).sum()) + 1
    assert drawn == set(order[:size].tolist())


UNASKED = {
    "min_p": 0.5, "typical_p": 0.3, "top_h": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_k": 1,
    "min_new_tokens": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 2.0, "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [5, 6], "bad_words_ids": [[8]], "forced_eos_token_id": EOS, "temperature": 3.0,
    "return_dict_in_generate": True, "num_return_sequences": 2, "num_beams": 3, "use_cache": False,
    "sequence_bias": [[[9], 5.0]], "renormalize_logits": True, "output_scores": True, "max_time": 1e-9,
}  # fmt: skip


@pytest.mark.parametrize("adapter", [False, True], ids=["", "adapter"])
@pytest.mark.parametrize("greedy", [False, True], ids=["", "greedy"])
def test_the_models_generation_config_changes_nothing(adapter, greedy):
    model = tiny()
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    base = model.get_base_model() if adapter else model
    plain = base.generation_config
    want = make_sampler("generate", model, settings(greedy=greedy), seed=1)(RAGGED, 2)
    check_recorded(model, RAGGED, 2, want)
    for name, value in UNASKED.items():
        own = base.generation_config = copy.deepcopy(plain)
        assert hasattr(own, name)
        setattr(own, name, value)
        before = own.to_dict()
        got = make_sampler("generate", model, settings(greedy=greedy), seed=1)(RAGGED, 2)
        assert got.completions() == want.completions(), name
        torch.testing.assert_close(got.logprob, want.logprob, msg=name)
        assert base.generation_config is own
        assert own.to_dict() == before


def test_restrict_keeps_the_smallest_sufficient_set():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = restrict(logprobs, 0, 0.8).isfinite()  # 0.5 + 0.3 suffice
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert restrict(logprobs, 1, 1.0).isfinite().tolist() == [[True, False, False, False], [False, False, False, True]]
    assert restrict(logprobs, 0, 1e-6).isfinite().sum() == 2


def test_batches_of_sequences():
    model = tiny()
    greedy = settings(greedy=True)
    whole = GroupSampler(model, greedy)(RAGGED, 2)
    parts = GroupSampler(model, greedy, batch_size=4)(RAGGED, 2)
    assert whole.completions() == parts.completions()
    torch.testing.assert_close(whole.logprob, parts.logprob, rtol=1e-5, atol=2e-6)


def with_states(kind):
    """A tiny model that keeps states, most of them beside keys and values."""
    base = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, initializer_range=0.4, eos_token_id=EOS)
    attention = base | dict(intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, pad_token_id=PAD)
    mamba = dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
    hybrid = dict(lru_width=16, attention_window_size=4, num_hidden_layers=3, w_init_variance_scale=0.5)
    options = {
        "mamba": base,
        "falcon_mamba": base,
        "falcon_h1": attention | mamba | dict(mamba_d_ssm=32, head_dim=8),
        "recurrent_gemma": attention | hybrid,
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options[kind]))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "falcon_h1"])
def test_states_are_repeated_and_selected_like_keys(kind):
    """Ragged prompts, groups, and rows that leave the batch."""
    model = with_states(kind)
    sampler = GroupSampler(model, settings(), seed=3, compact_below=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group in (1, 3):
            check_recorded(model, RAGGED, group, sampler(RAGGED, group))


def test_a_cache_without_the_states_is_not_repeated():
    """RecurrentGemma keeps them in its modules: each prompt is prefilled for the group, and nobody leaves the batch."""
    model = with_states("recurrent_gemma")
    sampler = GroupSampler(model, settings(), seed=3, compact_below=1.0)
    with pytest.warns(UserWarning, match="RecurrentGemmaForCausalLM's cache cannot be repeated for a group"):
        check_recorded(model, RAGGED, 3, sampler(RAGGED, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        check_recorded(model, RAGGED, 1, sampler(RAGGED))


def test_prompts_of_one_length_at_a_time_where_padding_is_read(monkeypatch):
    model = with_states("mamba")
    mixer = type(model.backbone.layers[0].mixer)
    forward = mixer.forward
    monkeypatch.setattr(mixer, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs | blind))
    blind = {"attention_mask": None}
    sampler = GroupSampler(model, settings(), seed=3, batch_size=9)
    prompts = [*RAGGED, [6], [8, 9, 10]]
    with pytest.warns(UserWarning, match="reads padding: only prompts of one length are sampled together"):
        rollout = sampler(prompts, 3)
    check_recorded(model, prompts, 3, rollout)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        settings(temperature=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        settings(max_new_tokens=0)
    with pytest.raises(ValueError, match="top_p must be in"):
        settings(top_p=0.0)
    sampler = GroupSampler(tiny(), settings())
    with pytest.raises(ValueError, match="row 1 is empty"):
        sampler([[1], []], 2)
    with pytest.raises(ValueError, match="at least one prompt"):
        sampler([], 2)
    with pytest.raises(ValueError, match="sampler must be one of"):
        make_sampler("vlm", tiny(), settings())


def test_modes_are_restored_after_an_error():
    model = tiny()
    model.train()
    with pytest.raises(IndexError):
        GroupSampler(model, settings())([[VOCAB + 100]])
    assert model.training

"""The sampler over transformers' continuous batching: what is recorded is what the model says. Works on the CPU."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_rollout import EOS, RAGGED, VOCAB, check_recorded, settings, tiny  # noqa: E402

from rlhf_fast.trainers.rollout import continuous as rollout_continuous  # noqa: E402
from rlhf_fast.trainers.rollout.samplers import SamplerSettings, make_sampler  # noqa: E402

if rollout_continuous.ContinuousBatchingConfig is None:
    pytest.skip("this transformers has no continuous batching", allow_module_level=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recorded_logprobs_are_the_models(attention):
    """Ragged prompts, one of a single token (which cannot be forked)."""
    model = tiny(attn_implementation=attention).train()
    before = torch.random.get_rng_state()
    rollout = make_sampler("continuous", model, settings(temperature=0.7), seed=3)(RAGGED, 4)
    assert model.training
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(map(tuple, rollout.completions()))) > 4
    assert set(rollout.finish) == {"stop", "length"}
    assert rollout.logprob.dtype == torch.float32
    check_recorded(model, RAGGED, 4, rollout)


def test_forked_groups_are_independent_draws():
    """Prompts of several tokens are prefilled once for the group: first tokens must still follow the model."""
    model = tiny(scale=1.5)
    prompt, count = [5, 6, 7], 512
    rollout = make_sampler("continuous", model, settings(max_new_tokens=1, temperature=0.8), seed=1)([prompt], count)
    assert rollout.lengths.tolist() == [1] * count
    with torch.no_grad():
        want = torch.softmax(model.eval()(torch.tensor([prompt])).logits[0, -1] / 0.8, -1)
    got = torch.bincount(rollout.ids, minlength=VOCAB) / count
    # each frequency has variance p (1 - p) / count: five standard deviations, and one count for the rare ones
    assert ((got - want).abs() <= 5 * (want * (1 - want) / count).sqrt() + 1 / count).all()
    assert (got > 0).sum() > 5


def test_seeds_and_state():
    model = tiny()
    first, second = (make_sampler("continuous", model, settings(max_new_tokens=4), seed=7) for _ in range(2))
    a = first(RAGGED[:2], 2)
    assert a.completions() == second(RAGGED[:2], 2).completions()
    state = first.state_dict()
    b = first(RAGGED[:2], 2)
    assert b.completions() != a.completions()
    second.load_state_dict(state)
    assert second(RAGGED[:2], 2).completions() == b.completions()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_greedy_is_the_group_samplers(batch_size):
    """Log-probabilities at the temperature too, and more sequences than fit in at once."""
    model, greedy = tiny(), settings(greedy=True, temperature=0.7)
    rollout = make_sampler("continuous", model, greedy, batch_size=batch_size)(RAGGED, 2)
    want = make_sampler("group", model, greedy)(RAGGED, 2)
    assert rollout.completions() == want.completions()
    assert rollout.finish == want.finish
    torch.testing.assert_close(rollout.logprob, want.logprob, rtol=1e-5, atol=2e-6)


def test_under_peft_with_a_fused_head():
    peft = pytest.importorskip("peft")
    from rlhf_fast.integrations.lm_head import fuse_lm_head

    model = fuse_lm_head(peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    check_recorded(model, RAGGED[:2], 2, make_sampler("continuous", model, settings())(RAGGED[:2], 2))


def test_what_it_cannot_serve_is_refused(monkeypatch):
    model = tiny()
    with pytest.warns(UserWarning, match="biased"):
        restricted = SamplerSettings(4, (EOS,), 0, top_k=3)
    with pytest.raises(ValueError, match="takes no top_k=3, top_p=1.0: use 'group'"):
        make_sampler("continuous", model, restricted)
    with pytest.raises(ValueError, match="transformers >= 5.23 and a model with its continuous batching, got Linear"):
        make_sampler("continuous", torch.nn.Linear(2, 2), settings())
    sampler = make_sampler("continuous", model, settings())
    with pytest.raises(ValueError, match="row 1 is empty"):
        sampler([[1], []], 2)

    def broken(*_, **__):
        raise FloatingPointError("no luck")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="failed on prompt 0: no luck"):
        sampler([[1, 2], [3]], 2)

"""Conversations with an environment: only what the policy sampled counts, and it is scored as it was sampled."""

from __future__ import annotations

import types

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_rollout import EOS, PAD, VOCAB, full_forward, settings, tiny  # noqa: E402

from rlhf_fast.integrations.lm_head import fuse_lm_head  # noqa: E402
from rlhf_fast.losses import PolicyLoss  # noqa: E402
from rlhf_fast.trainers.experience import IGNORE, build_experience, collate  # noqa: E402
from rlhf_fast.trainers.rollout.samplers import GroupSampler, Rollout, make_sampler  # noqa: E402
from rlhf_fast.trainers.rollout.turns import MultiTurnSampler, chat_turn, conversations  # noqa: E402

LETTERS = "abcdefghijklmnopqrstu"
PROMPTS = [[5, 6, 7], [9, 3, 4, 8]]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {"<pad>": PAD, "<eos>": EOS, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


class Script:
    """A sampler of prepared turns."""

    def __init__(self, *turns, **changes):
        self.settings, self.turns, self.asked = settings(**changes), list(turns), []

    def state_dict(self):
        return {"left": len(self.turns)}

    def load_state_dict(self, state):
        self.turns = self.turns[-state["left"] :]

    def __call__(self, prompts, group_size=1):
        self.asked.append(([list(p) for p in prompts], group_size))
        completions = self.turns.pop(0)
        assert len(completions) == len(prompts) * group_size
        ids = torch.tensor([t for c in completions for t in c])
        ends = torch.tensor([0, *map(len, completions)]).cumsum(0).int()
        finish = ["stop" if c[-1] in self.settings.eos_token_ids else "length" for c in completions]
        return Rollout(ids, -ids.float(), ends, finish, self.settings)


def weather(prompts, completions, columns):
    return ["cd" for _ in prompts]


def test_turns_are_put_behind_one_another(tokenizer):
    """Two prompts of two: one is cut, one is over, two go on, one of them again."""
    turns = Script(
        [[5, EOS], [6, 6, 6], [7, EOS], [8, EOS]],
        [[9, EOS], [10, EOS]],
        [[11, EOS]],
    )
    asked = []

    def environment(prompts, completions, columns):
        asked.append((prompts, completions, columns))
        return [["cd", None, "e"], ["ff", None]][len(asked) - 1]

    sampler = MultiTurnSampler(turns, environment, tokenizer, max_turns=3, max_length=20)
    rollout = sampler(PROMPTS, 2, columns={"answer": ["x", "y"]})
    c, d, e, f = (tokenizer.convert_tokens_to_ids(letter) for letter in "cdef")
    assert rollout.completions() == [[5, EOS, c, d, 9, EOS, f, f, 11, EOS], [6, 6, 6], [7, EOS], [8, EOS, e, 10, EOS]]
    assert rollout.finish == ["stop", "length", "stop", "stop"]
    assert rollout.mask.tolist() == [*map(bool, [1, 1, 0, 0, 1, 1, 0, 0, 1, 1] + [1] * 3 + [1, 1] + [1, 1, 0, 1, 1])]
    assert torch.equal(rollout.logprob, -rollout.ids.float() * rollout.mask)
    assert rollout.lengths.tolist() == [10, 3, 2, 5]
    assert rollout.sampled_lengths.tolist() == [6, 3, 2, 4]
    assert turns.asked == [
        (PROMPTS, 2),
        ([[*PROMPTS[0], 5, EOS, c, d], [*PROMPTS[1], 8, EOS, e]], 1),
        ([[*PROMPTS[0], 5, EOS, c, d, 9, EOS, f, f]], 1),
    ]
    first, second = asked
    text = tokenizer.decode
    assert first == (
        [text(PROMPTS[0]), text(PROMPTS[1]), text(PROMPTS[1])],
        [["d<eos>"], ["f<eos>"], ["g<eos>"]],
        {"answer": ["x", "y", "y"]},
    )
    assert second[1] == [["d<eos>", "cd", "h<eos>"], ["g<eos>", "e", "i<eos>"]]


def test_limits(tokenizer):
    turn = [[5, EOS]]

    def run(max_turns, max_length, turns):
        script = Script(*turns)
        return MultiTurnSampler(script, weather, tokenizer, max_turns=max_turns, max_length=max_length)(PROMPTS[:1])

    assert run(1, 20, [turn]).completions() == [[5, EOS]]  # the environment is not asked after the last turn
    assert run(2, 20, [turn, turn]).lengths.tolist() == [6]
    cut = run(2, 5, [turn, turn])  # one token of the second turn fits
    assert cut.completions()[0][4:] == [5]
    assert cut.finish == ["length"]
    assert run(2, 6, [turn, turn]).finish == ["stop"]  # it just fits
    none = run(2, 4, [turn])  # no room behind the answer: it is left out
    assert none.completions() == turn
    assert none.finish == ["length"]
    assert run(1, 1, [turn]).completions() == [[5]]


def test_log_probabilities_are_those_of_a_fresh_forward(tokenizer):
    model = tiny()
    sampler = MultiTurnSampler(
        make_sampler("group", model, settings(max_new_tokens=6, temperature=0.8), seed=4),
        weather, tokenizer, max_turns=3, max_length=24,
    )  # fmt: skip
    rollout = sampler(PROMPTS, 8)
    model.eval()
    assert rollout.mask.any()
    assert not rollout.mask.all()
    for row, completion in enumerate(rollout.completions()):
        part = slice(rollout.cu_seqlens[row], rollout.cu_seqlens[row + 1])
        want = full_forward(model, PROMPTS[row // 8], completion, 0.8)
        mask = rollout.mask[part]
        torch.testing.assert_close(rollout.logprob[part].double()[mask], want[mask], rtol=1e-5, atol=2e-5)
        assert rollout.logprob[part][~mask].eq(0).all()


def test_ratios_are_one_and_the_environments_tokens_carry_no_loss(tokenizer):
    model = tiny()
    sampler = MultiTurnSampler(
        make_sampler("group", model, settings(max_new_tokens=6), seed=4), weather, tokenizer, max_turns=3, max_length=24
    )
    rollout = sampler(PROMPTS, 4)
    advantages = torch.linspace(-1, 1, 8)
    prompts = [p for p in PROMPTS for _ in range(4)]
    experience = build_experience(prompts, rollout, advantages, torch.ones(8, dtype=torch.bool))
    micro = collate(experience, list(torch.arange(8)[:, None]), PAD)
    assert (micro.target_ids != IGNORE).sum() == rollout.mask.sum()

    fuse_lm_head(model).eval()
    batch = dict(advantages=micro.advantages, normalizer=float(rollout.mask.sum()))  # on policy: no old ones
    loss = PolicyLoss("dapo")

    def step():
        model.zero_grad()
        out = model(micro.input_ids, target_ids=micro.target_ids, loss_fn=loss, batch=batch, segments=micro.cu_seqlens)
        out.loss.backward()
        return out, model.lm_head.weight.grad.clone()

    out, gradient = step()
    scored = micro.target_ids != IGNORE
    assert out.metrics["ratio_max"] == out.metrics["ratio_min"] == 1
    # against what the sampler recorded: one forward over the whole sequence for a cache that grew, in fp32
    torch.testing.assert_close(out.logprob[scored], micro.old_logprob[scored], rtol=1e-5, atol=2e-5)

    # the same by hand, over the sampled tokens alone
    model.zero_grad()
    total = 0.0
    for row, completion in enumerate(rollout.completions()):
        ids = torch.tensor([*prompts[row], *completion])
        rows = torch.log_softmax(model(ids[None]).logits[0], -1)[len(prompts[row]) - 1 : -1]
        picked = rows.gather(1, torch.tensor(completion)[:, None])[:, 0]
        mask = rollout.mask[rollout.cu_seqlens[row] : rollout.cu_seqlens[row + 1]]
        total = total - advantages[row] * picked[mask].sum()
    (total / rollout.mask.sum()).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


def test_state_is_the_turn_samplers(tokenizer):
    sampler = MultiTurnSampler(GroupSampler(tiny(), settings()), weather, tokenizer, max_turns=2, max_length=20)
    state = sampler.state_dict()
    first = sampler(PROMPTS, 2).completions()
    assert sampler(PROMPTS, 2).completions() != first
    sampler.load_state_dict(state)
    assert sampler(PROMPTS, 2).completions() == first
    assert sampler.settings is sampler.sampler.settings


TURN = "[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{{ '|' }}"
ASKED = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKED


def test_chat_turn_takes_the_template_apart(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert chat_turn(tokenizer, "tool")("42") == "|[tool]42|[assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<eos>", "</s>"))
    with pytest.raises(
        ValueError, match="stops \\('<eos>'\\) but with '</s>[|]': put the id of its end of turn into eos_token_id"
    ):
        chat_turn(tokenizer)
    forgets = "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}" + ASKED
    monkeypatch.setattr(tokenizer, "chat_template", forgets)  # earlier turns of the assistant
    with pytest.raises(ValueError, match="rewrites earlier turns when a message of role 'user' follows"):
        chat_turn(tokenizer)("a")


def test_a_turn_may_end_with_another_stop_than_eos(tokenizer, monkeypatch):
    """Gemma's templates: <end_of_turn>, at which its generation_config.json stops, while EOS is another token."""
    stop = tokenizer.convert_tokens_to_ids("u")
    options = dict(environment_role="tool", max_turns=2, max_completion_length=99)
    config = types.SimpleNamespace(environment=lambda *_: ["a"], **options)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<eos>", "u"))
    talks = conversations(Script([[5, stop]], [[6, EOS]], eos_token_ids=(EOS, stop)), config, tokenizer)
    assert talks.render("42") == "|[tool]42|[assistant]"
    [ids] = talks(PROMPTS[:1]).completions()
    assert ids[:2] == [5, stop]
    assert ids[-2:] == [6, EOS]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<eos>", "u<eos>"))
    talks = conversations(Script(eos_token_ids=(EOS, stop)), config, tokenizer)
    assert talks.render("42") == "<eos>|[tool]42|[assistant]"  # what the template puts behind the stop is not sampled


def test_bad_input_is_named(tokenizer):
    turn = [[5, EOS]]
    with pytest.raises(ValueError, match="max_turns must be at least 1, got 0"):
        MultiTurnSampler(Script(), weather, tokenizer, max_turns=0, max_length=3)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        MultiTurnSampler(Script(), weather, tokenizer, max_turns=1, max_length=0)

    def sampler(environment):
        return MultiTurnSampler(Script(turn), environment, tokenizer, max_turns=2, max_length=9)

    with pytest.raises(ValueError, match=r"columns\['a'\] must hold one value for each of 1 prompts"):
        sampler(weather)(PROMPTS[:1], columns={"a": [1, 2]})
    with pytest.raises(ValueError, match="environment <lambda> got 1 conversations and returned 2 messages"):
        sampler(lambda *_: ["a", "b"])(PROMPTS[:1])
    with pytest.raises(ValueError, match="must return strings or None, got int"):
        sampler(lambda *_: [3])(PROMPTS[:1])
    assert len(LETTERS) + 2 == VOCAB

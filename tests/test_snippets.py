"""What README.md and docs/ show runs as it stands, and does what they say of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from grpo_cases import PROMPTS, digits_sum, tiny
from snippets import DOCS, README, snippet

from rlhf_fast.cli.demos.task import make_tokenizer

SHAPE = (3, 9)


@pytest.fixture
def batch():
    """Tokens, a mask, advantages of both signs, old log-probabilities with ratios on both sides of 0.8 .. 1.28."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 15, SHAPE, generator=g)
    mask = torch.rand(SHAPE[0], SHAPE[1] - 1, generator=g) < 0.7
    model = tiny()
    with torch.no_grad():
        logprob = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    old = logprob + torch.linspace(-0.4, 0.4, mask.numel()).view_as(mask)[:, torch.randperm(8, generator=g)]
    adv = torch.randn(mask.shape, generator=g)
    return dict(torch=torch, model=model, ids=ids, mask=mask, adv=adv, old_logprob=old)


def test_before_and_after_are_one_loss(batch):
    model = batch["model"]
    exec(snippet(README, "# before"), batch)
    before = batch["loss"]
    before.backward()
    ratio, adv = batch["ratio"][batch["mask"]], batch["adv"][batch["mask"]]
    assert ((ratio > 1.2) & (ratio < 1.28) & (adv > 0)).any()  # where dapo's own upper clip would show
    assert ((ratio < 0.8) & (adv < 0)).any()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    exec(snippet(README, "fuse_lm_head(model)"), batch)
    torch.testing.assert_close(batch["out"].loss, before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_loss_of_ones_own_is_the_same_loss(batch):
    exec(snippet(README, "# before"), batch)
    mask, model = batch["mask"], batch["model"]
    hidden = model.model(batch["ids"][:, :-1]).last_hidden_state[mask]
    names = dict(torch=torch, hidden=hidden, lm_head=model.lm_head, target=batch["ids"][:, 1:][mask])
    names |= dict(old=batch["old_logprob"][mask], adv=batch["adv"][mask], w=torch.full((len(hidden),), 1 / mask.sum()))
    exec(snippet(README, "def my_loss"), names)
    torch.testing.assert_close(names["out"].loss, batch["loss"])
    assert 0 < names["out"].metrics["rows_backward"] < len(hidden)  # the clip leaves rows without a gradient


@pytest.mark.parametrize(
    ("file", "words"), [("training.md", "runs/ppo"), ("training.md", "runs/steps"), ("grpo.md", "out")]
)
def test_trainers_from_python(file, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    count = 8 if file == "training.md" else 8 * 4
    names = dict(model=tiny(), tokenizer=make_tokenizer(), queries=PROMPTS, scores=[float(i % 3) for i in range(count)])
    names |= dict(rows=[{"prompt": p} for p in PROMPTS], reward=digits_sum)
    code = snippet(DOCS / file, f'output_dir="{words}"')
    exec(code, names)
    assert (tmp_path / words / "model.safetensors").is_file()
    if "queries" in code:
        with pytest.raises(ValueError, match="the run is finished, by train.. or finish.., and takes no more steps"):
            names["trainer"].step(PROMPTS, names.get("responses", names.get("rollout")), names["scores"])

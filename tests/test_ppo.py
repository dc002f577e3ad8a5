"""PPO against a plain-torch step in fp64, and what holds before the first update."""

import copy
import math
from itertools import pairwise

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppo_cases import classifier, tiny, trainer  # noqa: E402

from rlhf_fast.trainers.ppo_experience import join  # noqa: E402
from rlhf_fast.trainers.rollout.samplers import Rollout  # noqa: E402


def rollout_of(it, *, tools=True, seed=0):
    """8 ragged completions, some of them cut, some with a tool's tokens inside; fp64."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 5, 1, 5, 4, 2, 5, 5])
    total = int(lengths.sum())
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    mask = torch.ones(total, dtype=torch.bool)
    mask[cu[1] + 1 : cu[1] + 3] = False  # in the middle
    mask[cu[3] + 3 : cu[3] + 5] = False  # at the end
    ids = torch.randint(3, 15, (total,), generator=g)
    logprob = -3 * torch.rand(total, generator=g).double()
    finish = ["length" if n == 5 else "stop" for n in lengths.tolist()]
    return Rollout(ids, logprob, cu.int(), finish, it.sampler.settings, mask if tools else None)


SCORES = torch.tensor([0.7, -1.3, 2.9, math.nan, 0.4, 1.1, -0.2, 3.3], dtype=torch.float64)


# ---- the formulas, sequence by sequence


def plain_tokens(model, value_of, ids, where, temperature):
    """(log-probabilities, entropies, values) of the tokens at `where`, and the value after the last token."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]  # once: the norm's own arithmetic is fp32
    logits = model.lm_head(hidden) / temperature
    logps = torch.log_softmax(logits, -1)
    chosen = torch.stack([logps[t - 1, ids[t]] for t in where])
    entropy = torch.stack([-(logps[t - 1].exp() * logps[t - 1]).sum() for t in where])
    values = value_of(ids, hidden)
    return chosen, entropy, torch.stack([values[t - 1] for t in where]), values[-1]


def plain_sequences(prompts, rollout, scores):
    """(ids, places of trained tokens, score, terminated) of every sequence with a score and a token."""
    out = []
    for i, (a, b) in enumerate(pairwise(rollout.cu_seqlens.tolist())):
        prompt, completion = list(prompts[i]), rollout.ids[a:b].tolist()
        mask = [True] * len(completion) if rollout.mask is None else rollout.mask[a:b].tolist()
        where = [len(prompt) + k for k, m in enumerate(mask) if m]
        if math.isfinite(scores[i]) and where:
            out.append((prompt + completion, where, scores[i], rollout.finish[i] == "stop"))
    return out


def plain_kl(log_ratio, estimator):
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]


def plain_advantages(cfg, said, refs, data):
    """Lists of advantages and returns, by the loops of the papers."""
    rewards = []
    for (logprob, _, _, _), ref, (_, _, score, terminated) in zip(said, refs, data, strict=True):
        if cfg.score_clip:
            score = max(min(score, cfg.score_clip), -cfg.score_clip)
        if cfg.missing_eos_penalty and not terminated:
            score = score - cfg.missing_eos_penalty
        r = torch.zeros_like(logprob)
        if cfg.kl_in == "reward" and cfg.kl_coef:
            kl = plain_kl(logprob - ref, cfg.kl_estimator or "k1")
            r -= cfg.kl_coef * (kl.clamp(-cfg.kl_clip, cfg.kl_clip) if cfg.kl_clip else kl)
        r[-1] += score
        rewards.append(r)
    if cfg.ppo_whiten_rewards:
        every = torch.cat(rewards)
        rewards = [(r - every.mean()) / (every.var() + 1e-8).sqrt() + every.mean() for r in rewards]
    advantages, returns = [], []
    for r, (_, _, v, after), (_, _, _, terminated) in zip(rewards, said, data, strict=True):
        following = after if cfg.bootstrap_truncated and not terminated else torch.zeros(())
        a, running = torch.zeros_like(r), 0.0
        for t in reversed(range(len(r))):
            running = r[t] + cfg.gamma * following - v[t] + cfg.gamma * cfg.lam * running
            a[t], following = running, v[t]
        advantages.append(a)
        returns.append(a + v)
    if cfg.whiten_advantages:
        every = torch.cat(advantages)
        advantages = [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in advantages]
    return advantages, returns


def plain_loss(cfg, now, said, refs, advantages, returns, on_policy):
    tokens = sum(len(a) for a in advantages)
    loss = 0.0
    for (logprob, entropy, v, _), (old, _, old_v, _), ref, a, r in zip(
        now, said, refs, advantages, returns, strict=True
    ):
        ratio = (logprob - (logprob.detach() if on_policy else old)).exp()
        high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
        per_token = -torch.minimum(ratio * a, ratio.clamp(1 - cfg.epsilon, 1 + high) * a)
        if cfg.dual_clip:
            per_token = torch.where(a < 0, torch.minimum(per_token, -cfg.dual_clip * a), per_token)
        if cfg.kl_in == "loss":
            per_token = per_token + cfg.kl_coef * plain_kl(logprob - ref, cfg.kl_estimator or "k3")
        per_value = (v - r) ** 2
        if cfg.cliprange_value:
            bounded = v.clamp(old_v - cfg.cliprange_value, old_v + cfg.cliprange_value)
            per_value = torch.maximum(per_value, (bounded - r) ** 2)
        loss = loss + (per_token - cfg.entropy_coef * entropy + cfg.vf_coef * per_value / 2).sum() / tokens
    return loss


CASES = {
    "own critic": dict(),
    "shared trunk": dict(critic="shared", bootstrap_truncated=True),
    "first update": dict(on_policy=True, critic="shared"),
    "kl in the loss": dict(kl_in="loss", kl_coef=0.3),
    "kl in the loss, shared": dict(kl_in="loss", kl_coef=0.3, kl_estimator="k2", critic="shared"),
    "no reference": dict(kl_coef=0.0, temperature=0.6),
    "cut goes on": dict(bootstrap_truncated=True, gamma=0.9, lam=0.7),
    "scores": dict(score_clip=1.0, missing_eos_penalty=0.5, kl_estimator="k3", kl_clip=0.1, kl_coef=0.5),
    "whitened rewards": dict(ppo_whiten_rewards=True, critic="shared"),
    "not whitened": dict(whiten_advantages=False, entropy_coef=0.1, cliprange_value=None),
    "clips": dict(epsilon=0.05, epsilon_high=0.1, dual_clip=1.2, cliprange_value=0.02, critic="shared"),
}
LAYOUTS = {
    "one": dict(per_device_train_batch_size=8),
    "four": dict(per_device_train_batch_size=2),
    "by tokens": dict(max_tokens_per_micro_batch=24),
    "packed": dict(per_device_train_batch_size=4, packing=True),
    "packed by tokens": dict(max_tokens_per_micro_batch=24, packing=True),
    "checkpointing": dict(gradient_checkpointing=True),
}


def moved(model, seed=5):
    """The same model a step later."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))


def own_value(critic):
    body = getattr(critic, critic.base_model_prefix)
    return lambda ids, _: body(torch.tensor([ids])).last_hidden_state[0] @ critic.score.weight[0]


def shared_value(head):
    return lambda _, hidden: hidden @ head.weight + head.bias


@pytest.mark.parametrize(
    ("case", "layout"),
    [(c, "four") for c in CASES] + [(c, x) for c in ("shared trunk", "kl in the loss") for x in LAYOUTS if x != "four"],
)
def test_loss_and_every_gradient_of_actor_and_critic_equal_plain_torch(tmp_path, case, layout):
    options = CASES[case] | LAYOUTS[layout] | dict(ppo_buffer_size=1)
    on_policy = options.pop("on_policy", False)
    critic = None
    if options.get("critic") != "shared":
        critic = classifier().double()
    reference = tiny(seed=9).double()
    given = reference if options.get("kl_coef", 1) else None
    options = dict(vf_coef=0.7, temperature=0.8, ppo_target=None) | options
    it = trainer(tmp_path, tiny(attention_dropout=0.3).double(), own=critic, ref_model=copy.deepcopy(given), **options)
    critic = it.loop.accelerator.unwrap_model(it.loop.models["critic"])
    if it.roles.shared:
        torch.nn.init.normal_(critic.weight, generator=torch.Generator().manual_seed(2))
    plain, plain_critic = tiny(attention_dropout=0.3).double().eval(), copy.deepcopy(critic).eval()
    value_of = shared_value(plain_critic) if it.roles.shared else own_value(plain_critic)
    rollout, prompts = rollout_of(it), [p.ids for p in it.prompts]
    data = plain_sequences(prompts, rollout, SCORES.tolist())
    it.start()

    sequences = join(prompts, rollout, SCORES.isfinite())
    experience, metrics = it.advantages(sequences, it.roles.ask(sequences), SCORES)
    with torch.no_grad():
        said = [plain_tokens(plain, value_of, ids, where, it.config.temperature) for ids, where, _, _ in data]
        refs = [plain_tokens(reference, value_of, ids, where, it.config.temperature)[0] for ids, where, _, _ in data]
        advantages, returns = plain_advantages(it.config, said, refs, data)
    close = dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(experience.logprob, torch.cat([s[0] for s in said]), **close)
    torch.testing.assert_close(experience.values, torch.cat([s[2] for s in said]), **close)
    torch.testing.assert_close(experience.advantages, torch.cat(advantages), **close)
    torch.testing.assert_close(experience.returns, torch.cat(returns), **close)
    if it.reference is not None:
        want = sum((s[0] - r).sum() for s, r in zip(said, refs, strict=True)) / len(data)
        assert metrics["kl_sequence"] == pytest.approx(want.item(), rel=1e-9)
        assert metrics["kl_k3"] == pytest.approx(
            torch.cat([plain_kl(s[0] - r, "k3") for s, r in zip(said, refs, strict=True)]).mean().item(), rel=1e-9
        )
    error = torch.cat(returns) - experience.values
    assert metrics["explained_variance"] == pytest.approx(
        1 - error.var().item() / torch.cat(returns).var().item(), rel=1e-9
    )

    for ours, theirs in ((it.loop.unwrapped, plain), (critic, plain_critic)):
        moved(ours)
        moved(theirs)
    it.loss = it.config.policy_loss(0.0, it.config.kl_coef)
    loss, grads = gradients_of_update(it, sequences, experience, torch.randperm(8), on_policy)
    now = [plain_tokens(plain, value_of, ids, where, it.config.temperature) for ids, where, _, _ in data]
    want = plain_loss(it.config, now, said, refs, advantages, returns, on_policy)
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-9)
    for name, parameter in [*plain.named_parameters(), *plain_critic.named_parameters("critic")]:
        torch.testing.assert_close(
            grads[name], parameter.grad, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert max(p.grad.abs().max() for p in plain.parameters()) > 1e-2
    assert max(p.grad.abs().max() for p in plain_critic.parameters()) > 1e-2


def gradients_of_update(it, sequences, experience, rows, on_policy):
    """(loss, {name: gradient}) of one `update`, which stops before the optimiser."""
    caught = {}
    models = (it.loop.unwrapped, it.loop.accelerator.unwrap_model(it.loop.models["critic"]))

    def instead():
        for prefix, model in zip(("", "critic."), models, strict=True):
            caught.update({prefix + n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return False  # as if a gradient were not finite

    it.loop._clip = instead
    it.update(sequences, experience, rows, on_policy=on_policy)
    return float(it.loop.meters.values["loss"][-1]), caught

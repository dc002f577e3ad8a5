"""PPO with a value head on the policy's trunk: one forward gives log-probabilities and values. Returns -reward."""

import copy

import torch
from tiny import EOS, IGNORE, PAD, aligned, padded, sorting, tiny_model

from rlhf_fast import PolicyLoss, ppo_advantages, value_loss
from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.rollout.samplers import GroupSampler, SamplerSettings


def main(steps: int = 30, epochs: int = 2) -> list[float]:
    policy, critic = fuse_lm_head(tiny_model()), torch.nn.Linear(32, 1)
    reference = copy.deepcopy(policy).requires_grad_(False)
    sampler = GroupSampler(policy, SamplerSettings(6, eos_token_ids=(EOS,), pad_token_id=PAD))
    loss_fn, losses = PolicyLoss("ppo", clip_low=0.2), []
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=5e-3)
    for step in range(steps):
        prompts, _, _ = sorting(128)
        rollout = sampler(prompts.tolist())
        rewards = torch.tensor([sum(t % 2 == 0 for t in c) / 6 for c in rollout.completions()])  # even digits
        inputs, targets = aligned(prompts, padded(rollout, rollout.ids, IGNORE))
        inputs, mask = inputs.clamp(min=PAD), targets != IGNORE
        segments = torch.arange(len(inputs) + 1) * inputs.shape[1]
        with torch.no_grad():
            out, hidden = policy(inputs, target_ids=targets, return_hidden=True)
            old, values = out.logprob, critic(hidden)[..., 0]
            ref = reference(inputs, target_ids=targets).logprob
        experience = ppo_advantages(rewards, values, old, ref, kl_coef=0.01, mask=mask)
        for _ in range(epochs):
            batch = {"advantages": experience.advantages, "old_logprob": old}
            request = dict(loss_fn=loss_fn, batch=batch, segments=segments, return_hidden=True)
            out, hidden = policy(inputs, target_ids=targets, **request)
            value = value_loss(critic(hidden)[..., 0], values, experience.returns, mask=mask)
            (out.loss + 0.5 * value.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(-rewards.mean().item())
        if step % 5 == 0:
            print(f"step {step:3d}  reward {rewards.mean():.3f}  value loss {value.loss.item():.4f}")
    return losses


if __name__ == "__main__":
    main()

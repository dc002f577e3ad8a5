"""GRPO: groups of answers to a prompt, advantages within the group, a KL to the initial policy. Returns -reward."""

import copy

import torch
from tiny import EOS, IGNORE, PAD, aligned, padded, sorting, tiny_model

from rlhf_fast import PolicyLoss, group_advantages
from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.trainers.rollout.samplers import GroupSampler, SamplerSettings


def main(steps: int = 30, group: int = 8) -> list[float]:
    policy = fuse_lm_head(tiny_model())
    reference = copy.deepcopy(policy).requires_grad_(False)
    sampler = GroupSampler(policy, SamplerSettings(6, eos_token_ids=(EOS,), pad_token_id=PAD))
    loss_fn, losses = PolicyLoss("grpo", beta=0.01), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(steps):
        prompts, _, _ = sorting(16)
        rollout = sampler(prompts.tolist(), group)
        rewards = torch.tensor([sum(t % 2 == 0 for t in c) / 6 for c in rollout.completions()])  # even digits
        advantages = group_advantages(rewards, group_size=group).advantages
        inputs, targets = aligned(prompts.repeat_interleave(group, 0), padded(rollout, rollout.ids, IGNORE))
        inputs = inputs.clamp(min=PAD)  # padding on the right: no token sees it
        with torch.no_grad():
            ref_logprob = reference(inputs, target_ids=targets).logprob
        batch = {"advantages": advantages, "ref_logprob": ref_logprob}  # no old_logprob: one update, on policy
        segments = torch.arange(len(inputs) + 1) * inputs.shape[1]
        out = policy(inputs, target_ids=targets, loss_fn=loss_fn, batch=batch, segments=segments)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(-rewards.mean().item())
        if step % 5 == 0:
            print(f"step {step:3d}  reward {rewards.mean():.3f}  kl {out.metrics['kl'].item():.4f}")
    return losses


if __name__ == "__main__":
    main()

"""KTO: single answers that are good or bad. Its reference point is the KL on answers that belong to other prompts."""

import torch
from tiny import aligned, sorting, tiny_model

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.losses import KTO, kto_kl


def main(steps: int = 30) -> list[float]:
    model, loss_fn, losses = fuse_lm_head(tiny_model()), KTO(beta=0.5), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prompts, good, bad = sorting(64)
    desirable = torch.arange(64) % 2 == 0
    answers = torch.where(desirable[:, None], good, bad)
    inputs, targets = aligned(prompts, answers)
    others, other_targets = aligned(prompts, answers.roll(1, 0))  # answers to other prompts
    with torch.no_grad():
        reference = model(inputs, target_ids=targets).logprob.flatten()
        other_reference = model(others, target_ids=other_targets).logprob.sum(1)
    segments = torch.arange(len(inputs) + 1) * inputs.shape[1]
    for step in range(steps):
        with torch.no_grad():
            kl = kto_kl(model(others, target_ids=other_targets).logprob.sum(1), other_reference)
        batch = {"desirable": desirable, "ref_logprob": reference, "kl": kl}
        out = model(inputs, target_ids=targets, loss_fn=loss_fn, batch=batch, segments=segments)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 5 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  kl {kl.item():.3f}")
    return losses


if __name__ == "__main__":
    main()

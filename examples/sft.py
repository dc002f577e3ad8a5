"""Supervised fine-tuning: log-likelihood of the answers, three products with the head, no logits."""

import torch
from tiny import aligned, sorting, tiny_model

from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.losses.nll import NLL


def main(steps: int = 60) -> list[float]:
    model, loss_fn, losses = fuse_lm_head(tiny_model()), NLL(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        prompts, answers, _ = sorting(64)
        inputs, targets = aligned(prompts, answers)
        out = model(inputs, target_ids=targets, loss_fn=loss_fn)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

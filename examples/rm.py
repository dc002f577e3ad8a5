"""A reward model from pairs: Bradley-Terry on the scores of the last token."""

import torch
from tiny import sorting, tiny_reward_model

from rlhf_fast import reward_loss


def main(steps: int = 40) -> list[float]:
    model, losses = tiny_reward_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        prompts, good, bad = sorting(64)
        ids = torch.cat([torch.cat([prompts, answers], 1) for answers in (good, bad)])
        chosen, rejected = model(ids).logits[:, 0].chunk(2)
        loss, metrics = reward_loss(chosen, rejected, center=0.01)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  accuracy {metrics['rewards/accuracies'].item():.2f}")
    return losses


if __name__ == "__main__":
    main()

"""Direct preference optimisation: pairs side by side in one batch, the reference's log-probabilities computed once."""

import torch
from tiny import aligned, sorting, tiny_model

from rlhf_fast import PreferenceLoss
from rlhf_fast.integrations.lm_head import fuse_lm_head
from rlhf_fast.losses import pair_segments


def main(steps: int = 30) -> list[float]:
    model, loss_fn, losses = fuse_lm_head(tiny_model()), PreferenceLoss("sigmoid", beta=0.5), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prompts, chosen, rejected = sorting(64)
    answers = torch.stack([chosen, rejected], 1).flatten(0, 1)  # chosen, rejected, chosen, ...
    inputs, targets = aligned(prompts.repeat_interleave(2, 0), answers)
    segments, is_chosen = pair_segments(torch.arange(len(inputs) + 1) * inputs.shape[1], inputs.numel())
    with torch.no_grad():
        reference = model(inputs, target_ids=targets).logprob
    batch = {"is_chosen": is_chosen, "ref_logprob": reference.flatten()}
    for step in range(steps):
        out = model(inputs, target_ids=targets, loss_fn=loss_fn, batch=batch, segments=segments)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 5 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  accuracy {out.metrics['rewards/accuracies'].item():.2f}")
    return losses


if __name__ == "__main__":
    main()

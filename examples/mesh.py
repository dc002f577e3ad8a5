"""Sequences over "dp", rows of the head over "tp": `torchrun --nproc-per-node 4 examples/mesh.py` on CPUs.

Nobody holds the whole head, and no logits are formed. The trunk is the same on all, its gradients meet over "dp".
"""

import torch
import torch.distributed as dist
from tiny import IGNORE, aligned, sorting, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from rlhf_fast import fused_linear_loss
from rlhf_fast.losses.nll import NLL


class Sharded(nn.Module):
    """A transformer, and this rank's rows of its head."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        model, self.tp = tiny_model(), mesh["tp"]
        rows = model.lm_head.weight.detach().tensor_split(self.tp.size())[self.tp.get_local_rank()]
        self.trunk, self.rows = model.model, nn.Parameter(rows.clone())

    def forward(self, inputs: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.trunk(inputs).last_hidden_state
        return fused_linear_loss(hidden, self.rows, targets, NLL(tokens), group=self.tp).loss


def main(steps: int = 60) -> list[float]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    dp, losses = mesh["dp"], []
    model = DistributedDataParallel(Sharded(mesh), process_group=dp.get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(dp.get_local_rank())  # ranks that share a head's sequences draw the same ones
    for step in range(steps):
        prompts, answers, _ = sorting(32)
        inputs, targets = aligned(prompts, answers)
        tokens = (targets != IGNORE).sum()
        dist.all_reduce(tokens, group=dp.get_group())
        loss = model(inputs, targets, tokens)  # this rank's share of the mean
        (dp.size() * loss).backward()  # DDP averages
        optimizer.step()
        optimizer.zero_grad()
        share = loss.detach().clone()
        dist.all_reduce(share, group=dp.get_group())
        losses.append(share.item())
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()

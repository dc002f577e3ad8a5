"""What PPO asks of its models: the actor's log-probabilities, the critic's values, the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.trainers.experience import cut_rows
from rlhf_fast.trainers.models.policy import Reference
from rlhf_fast.trainers.ppo_config import PPOConfig
from rlhf_fast.trainers.ppo_experience import Grid, RoleOutputs, Sequences, lay_out
from rlhf_fast.trainers.rollout.samplers import evaluating
from rlhf_fast.trainers.sharding import autocast


class Roles:
    """Actor, critic and reference over grids of sequences.

    Args:
        model: the actor, prepared, its head fused.
        critic: a `ValueHead` on the actor's trunk (`critic: shared`), or a model with `pool_by_length`, prepared.
        reference: None: no KL.
        accelerator: whose autocast the reference runs under, as the others do by being prepared.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: nn.Module,
        critic: nn.Module,
        reference: Reference | None,
        accelerator: Any,
        pad_token_id: int,
    ):
        self.config, self.model, self.critic, self.reference = config, model, critic, reference
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self.shared = config.critic == "shared"

    def grids(self, sequences: Sequences, rows: Tensor, count: int) -> list[tuple[Grid, Tensor]]:
        """The sequences `rows` in micro-batches of at most `count`, each with its part of the rows."""
        if len(rows) == 0:
            return []
        packed, lengths = self.config.packing, sequences.lengths[rows].tolist()
        cuts = cut_rows(rows.split(1), lengths, count, self.config.max_tokens_per_micro_batch, packed=packed)
        parts = [torch.cat(part) for part in cuts]
        return [(lay_out(sequences, part, self.pad_token_id, packed=packed), part) for part in parts]

    def actor(self, grid: Grid, **options: Any) -> tuple[Any, Tensor | None]:
        """What the fused head gives for a grid, and the hidden states of that forward where the critic shares them."""
        out = self.model(
            **grid.inputs,
            target_ids=grid.target_ids,
            temperature=self.config.temperature,
            return_hidden=self.shared,
            **options,
        )
        return out if self.shared else (out, None)

    def values(self, grid: Grid, hidden: Tensor | None, positions: Tensor) -> Tensor:
        """(n,) fp32: the critic's values at `positions` of the flattened grid."""
        if self.shared:
            return self.critic(hidden.flatten(0, 1)[positions])
        return self.critic(**grid.inputs, last=positions)

    def reference_logprob(self, grid: Grid) -> Tensor:
        """(b, T): log-probabilities under the reference."""
        with self.reference.active() as model, autocast(self.accelerator, model):
            return model(**grid.inputs, target_ids=grid.target_ids, temperature=self.config.temperature).logprob

    @torch.no_grad()
    def ask(self, sequences: Sequences) -> RoleOutputs:
        """What every role says about every trained token, before the updates; none of them drops anything out."""
        tokens, device = int(sequences.cu_trained[-1]), sequences.ids.device
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        logprob, ref_logprob, values = torch.zeros((3, tokens), dtype=dtype, device=device)
        bootstrap = torch.zeros(len(sequences.lengths), dtype=dtype, device=device)
        with evaluating(self.model), evaluating(self.critic):
            order = sequences.lengths.argsort(descending=True)
            for grid, rows in self.grids(sequences, order, self.config.per_device_eval_batch_size):
                out, hidden = self.actor(grid)
                where = grid.positions
                logprob[grid.slots] = out.logprob.flatten()[where]
                if self.reference is not None:
                    ref_logprob[grid.slots] = self.reference_logprob(grid).flatten()[where]
                found = self.values(grid, hidden, torch.cat([where, grid.last])).to(dtype)
                values[grid.slots], bootstrap[rows] = found.split([len(where), len(rows)])
        return RoleOutputs(logprob, ref_logprob if self.reference is not None else None, values, bootstrap)

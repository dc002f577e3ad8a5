"""Rollouts to train on: sampled, scored and, where asked for, refilled until their groups have something to say.

Dynamic sampling: a group whose advantages are all zero, such as one that its rewards do not rank where the baseline
is the group's own, has no gradient. Such groups are replaced by
groups of the next prompts, a bounded number of times, so that every minibatch holds about as much to learn from.

Source: Yu et al. 2025, "DAPO", section 3.2, which samples on until the batch is full; here `attempts` bounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.trainers.credit import informative
from rlhf_fast.trainers.data.tokenize import Prompt
from rlhf_fast.trainers.rewards import Scores, Steps
from rlhf_fast.trainers.rollout.samplers import Rollout, SamplerSettings
from rlhf_fast.trainers.stepwise import as_queries, as_rollout

if TYPE_CHECKING:
    from rlhf_fast.trainers.grpo import GRPOTrainer
    from rlhf_fast.trainers.rl import RLTrainer


class Batch(NamedTuple):
    """`group_size` scored completions of each prompt, B in all."""

    prompts: list[Prompt]
    rollout: Rollout
    scores: Scores

    @property
    def group_size(self) -> int:
        return len(self.rollout.finish) // len(self.prompts)


def as_batch(
    queries: Sequence[Any], responses: Any, scores: Any, tokenizer: Any, settings: SamplerSettings, group_size: int
) -> Batch:
    """A batch of the caller's own, as `GRPOTrainer.step` takes it.

    One query a response: `group_size` neighbours are a group. Fewer: one a group, of whatever size.
    """
    rollout = responses if isinstance(responses, Rollout) else as_rollout(responses, tokenizer, settings)
    rows, prompts = len(rollout.finish), as_queries(queries, tokenizer)
    total = torch.as_tensor(scores, dtype=torch.float32).cpu()
    if total.shape != (rows,):
        raise ValueError(f"scores must be ({rows},), one for each response, got {tuple(total.shape)}")
    if not prompts or rows % len(prompts):
        raise ValueError(f"queries must hold one for each of {rows} responses or groups, got {len(prompts)}")
    if len(prompts) == rows:
        if rows % group_size:
            raise ValueError(f"queries must come in groups of num_generations={group_size}, got {rows} rows")
        for i, prompt in enumerate(prompts):
            if prompt.ids != prompts[i - i % group_size].ids:
                raise ValueError(
                    f"queries must come in groups of num_generations={group_size} with one prompt, but row {i} has "
                    f"another prompt than row {i - i % group_size}"
                )
        prompts = prompts[::group_size]
    return Batch(prompts, rollout, Scores(total, total[:, None], total))


def collect(trainer: RLTrainer, group_size: int) -> Batch:
    """The next prompts' completions and their scores."""
    return _scored(trainer, trainer.next_prompts(), group_size)


def refilled(trainer: GRPOTrainer, batch: Batch, attempts: int) -> tuple[Batch, dict[str, float]]:
    """The batch with its degenerate groups replaced where other prompts had better ones, and counts of both."""
    size, drawn = batch.group_size, 0
    config, weights = trainer.config, trainer.reward_weights(batch.scores)
    judge = dict(weights=weights, options=config.advantage_options(), greedy=config.greedy_baseline)
    for _ in range(attempts):
        wanted = (~informative(batch.scores, size, **judge)).nonzero()[:, 0]
        most = trainer.accelerator.gather(torch.tensor([len(wanted)], device=trainer.accelerator.device)).max()
        if most == 0:
            break
        more = _scored(trainer, trainer.next_prompts(int(most)), size)  # as many everywhere: one stream of prompts
        drawn += len(more.prompts)
        found = informative(more.scores, size, **judge).nonzero()[:, 0][: len(wanted)]
        source = torch.arange(len(batch.prompts))
        source[wanted[: len(found)]] = len(batch.prompts) + found
        batch = select_groups(join(batch, more), source)
    left = (~informative(batch.scores, size, **judge)).sum()
    return batch, {"resampled_groups": float(drawn), "degenerate_groups": float(left)}


def _scored(trainer: RLTrainer, prompts: list[Prompt], group_size: int) -> Batch:
    with trainer.loop.timed("rollout"):
        rollout = trainer.sample(prompts, group_size)
    with trainer.loop.timed("scoring"):
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        return Batch(prompts, rollout, trainer.score_rollout(rows, rollout))


def join(first: Batch, second: Batch) -> Batch:
    """Both, one after the other."""
    a, b = first.rollout, second.rollout
    mask = None
    if a.mask is not None or b.mask is not None:
        masks = (torch.ones_like(r.ids, dtype=torch.bool) if r.mask is None else r.mask for r in (a, b))
        mask = torch.cat(tuple(masks))
    rollout = Rollout(
        torch.cat([a.ids, b.ids]),
        torch.cat([a.logprob, b.logprob]),
        torch.cat([a.cu_seqlens, a.cu_seqlens[-1] + b.cu_seqlens[1:]]),
        [*a.finish, *b.finish],
        a.settings,
        mask,
    )
    x, y = first.scores, second.scores
    scores = {name: torch.cat([getattr(x, name), getattr(y, name)]) for name in ("total", "each", "outcome")}
    rows = [(x.steps, 0), (y.steps, len(a.finish))]
    parts = [steps._replace(row=steps.row + shift) for steps, shift in rows if steps is not None]
    steps = Steps(*map(torch.cat, zip(*parts, strict=True))) if parts else None
    return Batch([*first.prompts, *second.prompts], rollout, x._replace(**scores, steps=steps))


def select_groups(batch: Batch, groups: Tensor) -> Batch:
    """The groups of these numbers, in this order."""
    size, rollout, scores = batch.group_size, batch.rollout, batch.scores
    rows = (groups[:, None] * size + torch.arange(size)).flatten()
    lengths, starts = rollout.lengths.cpu(), rollout.cu_seqlens[:-1].long().cpu()
    kept = lengths[rows]
    ends = kept.cumsum(0)
    tokens = torch.arange(int(ends[-1])) + (starts[rows] - ends + kept).repeat_interleave(kept)
    tokens = tokens.to(rollout.ids.device)
    place = torch.full((len(lengths),), -1)
    place[rows] = torch.arange(len(rows))
    return Batch(
        [batch.prompts[g] for g in groups.tolist()],
        Rollout(
            rollout.ids[tokens],
            rollout.logprob[tokens],
            torch.nn.functional.pad(ends, (1, 0)).to(rollout.cu_seqlens),
            [rollout.finish[r] for r in rows.tolist()],
            rollout.settings,
            None if rollout.mask is None else rollout.mask[tokens],
        ),
        scores._replace(
            total=scores.total[rows],
            each=scores.each[rows],
            outcome=scores.outcome[rows],
            steps=_moved(scores.steps, place),
        ),
    )


def _moved(steps: Steps | None, place: Tensor) -> Steps | None:
    """The steps of rows that went somewhere, there."""
    if steps is None:
        return None
    kept = place[steps.row] >= 0
    return Steps(*(column[kept] for column in steps._replace(row=place[steps.row])))

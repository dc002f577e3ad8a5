"""Which sequences share a row: how many completions of a prompt go through the model together.

In a shared row the prompt is computed once for k completions, but attention under its mask is dense: (P + k L)^2
pairs where k causal rows have k (P + L)^2 / 2. Per completion, with W weights that every token meets and A = layers x
heads x head size,

    cost(k) = 2 W (P / k + L) + 4 A (P + k L)^2 / k,      cost(1) = 2 W (P + L) + 2 A (P + L)^2

so short completions of long prompts share most and long ones not at all. Where k does not divide the group its last row
is padded to the width of the others, and counts as they do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf_fast.trainers.data.packing import check_packing
from rlhf_fast.trainers.experience import Experience, MicroBatch, collate, cut_rows, shared_mask
from rlhf_fast.trainers.rollout.samplers import evaluating

TOLERANCE = 0.1  # of the effect that a wrong mask has


class Layout:
    """Rows and micro-batches of an experience.

    Args:
        model: the policy; what it can do is tried out once.
        share: share prompts: "auto" by the cost above; True: whole groups; False: never.
        packed: everything in one row without padding; prompts are not shared then.
    Raises: ValueError when the model's attention cannot do what is asked for.
    """

    def __init__(self, model: nn.Module, *, share: bool | str = "auto", packed: bool = False):
        if packed and share is True:
            raise ValueError("share_prompts and packing are both true; choose one")
        reason = None if share is False or packed else why_not_shared(model)
        if share is True and reason:
            raise ValueError(f"share_prompts is true, but {reason}")
        if packed:
            check_packing(model)
        self.shares = share is not False and not packed and reason is None
        self.always, self.packed = share is True, packed
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        ends = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
        outside = {id(p) for m in ends for p in m.parameters()}  # looked up, or met by scored tokens only
        self.weights = sum(p.numel() for p in base.parameters() if id(p) not in outside)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = config.num_hidden_layers * config.num_attention_heads * head_size

    def per_row(self, prompt: float, completion: float, group: int) -> int:
        """How many of a group's completions share a row, given the mean lengths: the cheapest number."""
        if not self.shares or group == 1:
            return 1
        if self.always:
            return group

        def cost(k: int) -> float:  # of a group's rows, the last one padded to the width of the others
            width = prompt + k * completion
            pairs = width**2 * (0.5 if k == 1 else 1)
            return math.ceil(group / k) * (2 * self.weights * width + 4 * self.attention * pairs)

        return min(range(1, group + 1), key=cost)

    def rows(self, experience: Experience, sequences: Tensor, most: int) -> tuple[list[Tensor], list[int]]:
        """`sequences` in rows of at most `most`, and the tokens of each row. Neighbours of one group share a row."""
        lengths, prompts = experience.completion_lengths[sequences], experience.prompt_lengths[sequences]
        groups = experience.groups[sequences]
        sizes = torch.unique_consecutive(groups, return_counts=True)[1].tolist()
        means = prompts.float().mean().item(), lengths.float().mean().item()
        limit = min(self.per_row(*means, max(sizes)), most)
        counts = [min(limit, size - at) for size in sizes for at in range(0, size, limit)]
        rows = list(sequences.split(counts))
        starts = torch.tensor([0, *counts]).cumsum(0)
        tokens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).cpu()[starts].diff()
        return rows, (tokens + prompts.cpu()[starts[:-1]] - 1).tolist()

    def micro_batches(
        self, experience: Experience, sequences: Tensor, pad_id: int, *, count: int, tokens: int | None
    ) -> list[MicroBatch]:
        """`sequences` as micro-batches of at most `count` sequences, or of at most `tokens` tokens."""
        if len(sequences) == 0:
            return []
        rows, widths = self.rows(experience, sequences, count if tokens is None else len(sequences))
        parts = cut_rows(rows, widths, count, tokens, packed=self.packed)
        return [collate(experience, part, pad_id, packed=self.packed) for part in parts]


def why_not_shared(model: nn.Module) -> str | None:
    """Why completions cannot share a row of this model, in words; None when they can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        return f"attention {attention!r} takes no mask of its own (sdpa does)"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return f"{type(base).__name__} has layers other than full attention"
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    if not _mask_is_honoured(model, config.vocab_size):
        return f"{type(base).__name__} does not give the same numbers under a mask of shared prompts"
    return None


@torch.no_grad()
def _mask_is_honoured(model: nn.Module, vocabulary: int) -> bool:
    """Two completions of a prompt in one row, against a row for each; a causal mask shows how far off wrong is."""
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(0)
        prompt, first, second = torch.randint(vocabulary, (3, 1, 4), device=device)
        positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]], device=device)
        mask = shared_mask(torch.tensor([[0] * 4 + [1] * 4 + [2] * 4], device=device))

        def logits(ids: Sequence[Tensor], **kwargs: Tensor) -> Tensor:
            return model(input_ids=torch.cat(list(ids), 1), use_cache=False, **kwargs).logits[:, -4:].float()

        row = (prompt, first, second)
        alone, shared = logits((prompt, second)), logits(row, position_ids=positions, attention_mask=mask)
        wrong = logits(row, position_ids=positions, attention_mask=shared_mask(torch.zeros_like(positions)))
    return bool((shared - alone).norm() < TOLERANCE * (wrong - alone).norm())
